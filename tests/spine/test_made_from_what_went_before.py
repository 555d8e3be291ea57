"""Methods whose batches depend on those before: a meta-generator, a memory, a generator that learns first."""

import pytest
import torch

from raykd.errors import Interrupted, SignalError
from raykd.launch import hosts
from raykd.launch.observer import Observer
from raykd.resolve import resolve
from raykd.roles.losses import plans
from raykd.roles.synthesizer import Synthesizer
from raykd.schemes import offline
from tests.spine.making import STEPS, banked, contents, making, records
from tests.spine.small import At, assert_equal_states, final_state, go, trace

FIRST = {"synthesis.generator": "conditional", "synthesis.options": {"width": 8, "join": "onehot", "last": "tanh_each"}}
METHODS = {
    "fastdfkd": {"method": "fastdfkd", "losses.fastdfkd.warmup": 3},
    "reptile": {"method": "fastdfkd", "losses.fastdfkd.warmup": 3, "synthesis.meta": "reptile", "synthesis.keep": "last"},
    "cmi": {"method": "cmi", "losses.cmi.memory": 64, "losses.cmi.head": 8},
    "kegnet": {"method": "kegnet", "synthesis.mode": "lockstep", "synthesis.before": 4, "losses.kegnet.units": 8, **FIRST},
}


class Died(Exception):
    """What ends a run without a word."""


def die(_) -> None:
    raise Died


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(name, real_data, tmp_path):
    """On the local backend: the same bank, generator, memory and student, bit for bit; what the student minimises is there."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = making(real_data, **METHODS[name])
    go(job, whole)
    with pytest.raises(Died):
        go(job, cut, At(10, die))
    go(job, cut, resume=True)
    assert trace(cut) == trace(whole)
    assert_equal_states(final_state(whole), final_state(cut))
    feeds = [banked(folder) for folder in (whole, cut)]
    if name == "kegnet":
        assert_equal(*(feed["generator"] for feed in feeds))
        assert feeds[0]["rounds"] == STEPS
    else:
        assert contents(whole) == contents(cut)
        assert_equal(*(feed["makers"][0]["losses"] for feed in feeds))
        assert_equal(*(feed["makers"][0]["generator"] for feed in feeds))
    assert all(record["loss"] > 0 for record in records(whole, "step"))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert_equal(value, b[key])


@pytest.mark.slow
def test_the_generator_learns_before_the_first_round(real_data, tmp_path):
    """Three updates before it, or three in the first round: the same; later rounds of none leave it alone."""
    kegnet = METHODS["kegnet"] | {"training.max_steps": 3}
    before = making(real_data, **kegnet | {"synthesis.before": 3})
    within = making(
        real_data,
        **kegnet | {"synthesis.before": 0, "synthesis.generator_steps": 3, "synthesis.student_steps": 3},
    )
    states = []
    for name, job in (("before", before), ("within", within)):
        go(job, tmp_path / name)
        states.append(banked(tmp_path / name)["generator"])
    assert_equal(*states)
    assert trace(tmp_path / "before") == trace(tmp_path / "within")


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_run_is_stopped_before_its_first_step_and_goes_on(at, real_data, tmp_path, monkeypatch):
    """Twice: the generator learns each update once, and all of the run is as if it had not been stopped."""
    job = making(real_data, **METHODS["kegnet"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(job, whole)
    honest, seen = Synthesizer._update, []

    def counted(self, through, number, epoch):
        seen.append(number)
        if number + 1 in (at, at + 1):
            (cut / "STOP").touch()
        return honest(self, through, number, epoch)

    monkeypatch.setattr(hosts, "STOP_POLL_S", 0.0)
    monkeypatch.setattr(Synthesizer, "_update", counted)
    with pytest.raises(Interrupted, match=f"Stopped after {at} of 4 updates of the generator before the first step; a"):
        go(job, cut)
    assert not trace(cut)
    if at < 4:
        with pytest.raises(Interrupted, match=f"Stopped after {at + 1} of 4 updates"):
            go(job, cut, resume=True)
    go(job, cut, resume=True)
    assert seen == [0, 1, 2, 3]
    assert trace(cut) == trace(whole)
    assert_equal_states(final_state(whole), final_state(cut))
    assert [r["done"] for r in records(whole, "prepared")][-1] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastdfkd", "cmi", "dafl"])
def test_a_stop_is_heard_while_the_bank_is_filled(name, real_data, tmp_path, monkeypatch):
    """Each batch is made once, and all of the run is as if it had not been stopped."""
    job = making(real_data, **METHODS.get(name, {"method": name}) | {"synthesis.start": 4})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(job, whole)
    honest, seen = Synthesizer.make, []

    def counted(self, through, number, *rest):
        seen.append(number)
        if number == 1:
            (cut / "STOP").touch()
        return honest(self, through, number, *rest)

    monkeypatch.setattr(hosts, "STOP_POLL_S", 0.0)
    monkeypatch.setattr(Synthesizer, "make", counted)
    with pytest.raises(Interrupted, match="Stopped after 2 of 4 batches of images before the first step; a checkpoint"):
        go(job, cut)
    assert seen == [0, 1]
    assert not trace(cut)
    go(job, cut, resume=True)
    assert seen == sorted(set(seen))
    assert trace(cut) == trace(whole)
    assert_equal_states(final_state(whole), final_state(cut))
    told = [(r["done"], r["total"], r["parts"]) for r in records(whole, "prepared")]
    assert told[-1] == (4, 4, "batches of images")


@pytest.mark.slow
def test_what_was_learnt_before_the_first_step_is_kept_now_and_then(real_data, tmp_path, monkeypatch):
    job = making(real_data, **METHODS["kegnet"])
    honest, seen = Synthesizer._update, []

    def dying(self, through, number, epoch):
        seen.append(number)
        if len(seen) == 4:
            raise Died
        return honest(self, through, number, epoch)

    monkeypatch.setattr(offline, "KEPT_S", 0.0)
    monkeypatch.setattr(Synthesizer, "_update", dying)
    with pytest.raises(Died):
        go(job, tmp_path / "cut")
    go(job, tmp_path / "cut", resume=True)
    assert seen == [0, 1, 2, 3, 3]
    go(job, tmp_path / "whole")
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


class Stops(Observer):
    """Asks for a stop as soon as something before the first step is recorded."""

    folder = None

    def begin(self, path, job, folder, total_steps):  # noqa: ARG002
        self.folder = folder

    def poll(self):
        if self.folder is not None and (self.folder / "metrics.jsonl").is_file() and records(self.folder, "prepared"):
            (self.folder / "STOP").touch()


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_stop_after_the_same_update(real_data, tmp_path, ray_cluster):
    settings = {"synthesis.before": 120, "launch.backend": "ray", "launch.workers": 2, "training.max_steps": 3}
    job = making(real_data, **METHODS["kegnet"] | settings)
    with pytest.raises(Interrupted, match=r"Stopped after \d+ of 120 updates"):
        go(job, tmp_path / "cut", Stops())
    done = {banked(tmp_path / "cut", rank)["prepared"] for rank in range(2)}
    assert len(done) == 1
    assert 0 < done.pop() < 120
    go(job, tmp_path / "cut", resume=True)
    go(job, tmp_path / "whole")
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert_equal(*(banked(tmp_path / name)["generator"] for name in ("cut", "whole")))


def local_loss(student_logits, teacher_logits_local, *, weight: float = 1.0, ce_weight: float = 0.0):
    """A loss of a student that asks for a view which only images that are made have."""
    return (student_logits - teacher_logits_local).square().mean(1)


def test_a_student_has_no_parts_of_images(real_data):
    job = resolve(making(real_data, "dafl").replace(losses={"parts": {"method": f"{__name__}:local_loss"}}))
    with pytest.raises(SignalError, match="teacher_logits_local: expected a view of images"):
        plans(job, {"student": [], "big": []})
