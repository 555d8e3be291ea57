"""Chains run from one job: every stage learns from the ones before it, no weights are copied by hand, nothing runs twice."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raykd import Job, Loss, Teacher
from raykd.errors import Interrupted, JobFaults
from raykd.launch.checks import inspect
from raykd.launch.observer import Observer
from raykd.resolve import from_dict, resolve, to_dict
from raykd.roles.recorder import read
from tests.spine.links import ASSISTANTS, DIGITS, LOCAL, TRAINING, chain, digits
from tests.spine.small import assert_equal_states, final_state, go, kill_tree, steps_seen, trace

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120
HEARD = {  # link -> whom it listens to
    "takd": {"takd-1": ["big"], "takd-2": ["takd-1"], "": ["takd-2"]},
    "dgkd": {"dgkd-1": ["big"], "dgkd-2": ["big", "dgkd-1"], "": ["big", "dgkd-1", "dgkd-2"]},
}
kinds = pytest.mark.parametrize("kind", HEARD)


def links(job: Job) -> dict[str, Job]:
    """The links of a chain, first to last; the student's is called ""."""
    return {name: stage for name, stage in job.stages.items() if name != "big"} | {"": job}


@kinds
def test_a_job_becomes_its_stages(kind):
    job = resolve(chain(kind))
    assert list(job.stages) == ["big", f"{kind}-1", f"{kind}-2"]
    assert {name: list(link.teachers) for name, link in links(job).items()} == HEARD[kind]
    models = [link.student.model for link in links(job).values()]
    assert models == [*ASSISTANTS, "digits_cnn"]
    for link in links(job).values():
        assert {name: spec.weights for name, spec in link.teachers.items()} == {name: f"stage:{name}" for name in link.teachers}
        (loss,) = link.losses.values()
        assert (loss.options["temperature"], loss.options["weight"], link.ce_weight) == (2.0, 0.9, 0.1)
        assert (link.training, link.data, link.seed) == (job.training, job.data, job.seed)
    names = [link.name for link in links(job).values()]
    assert names == [f"{kind}-{kind}-1", f"{kind}-{kind}-2", kind]
    assert resolve(job) == job, "it is not expanded again"
    assert resolve(from_dict(to_dict(job))) == job


@kinds
def test_other_losses_stay_with_the_student(kind):
    beside = {kind: Loss(kind, assistants=ASSISTANTS), "at": Loss("at", weight=10.0)}
    job = resolve(dataclasses.replace(chain(kind), losses=beside, ce_weight=0.5))
    assert [list(link.losses) for link in links(job).values()] == [[kind], [kind], [kind, "at"]]
    assert job.losses["at"].teachers == ("big",)
    assert list(job.teachers) == list(dict.fromkeys(["big", *HEARD[kind][""]]))
    assert [link.ce_weight for link in links(job).values()] == [0.5] * 3
    assert inspect(job).faults == []


def faults(job: Job) -> str:
    with pytest.raises(JobFaults) as caught:
        resolve(job)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["takd", "dgkd"])
@pytest.mark.parametrize("change", [{"seed": 5}, {"losses.{}.temperature": 9.0}, {"losses.{}.assistants": ["digits_cnn"]}])
def test_a_chain_that_has_its_stages_is_not_changed_behind_them(kind, change):
    """A resolved job says its stages in full; other options of the loss would not reach them."""
    made = resolve(chain(kind))
    assert resolve(made) == made
    with pytest.raises(
        JobFaults, match=rf"losses\.{kind}\.assistants: expected the settings that stage '{kind}-1' was made of"
    ):
        resolve(made.replace(**{path.format(kind): value for path, value in change.items()}))


def test_what_cannot_be_a_chain_says_so():
    bare = chain("takd")
    losses = {"takd": Loss("takd")}
    assert "losses.takd.assistants: expected architectures between" in faults(dataclasses.replace(bare, losses=losses))
    assert "expected names of architectures, got [3]" in faults(bare.replace(**{"losses.takd.assistants": [3]}))
    taken = dataclasses.replace(bare, stages={**bare.stages, "takd-2": bare.stages["big"]})
    assert "expected no stage or teacher called takd-1 or takd-2, got takd-2" in faults(taken)
    assert "takd.teachers: expected at least one teacher" in faults(dataclasses.replace(bare, teachers={}))
    alone = resolve(dataclasses.replace(chain("dgkd"), losses={"dgkd": Loss("dgkd")}))
    assert list(alone.stages) == ["big"], "without assistants the job's teachers are the guides"
    one = resolve(bare.replace(**{"losses.takd.assistants": ASSISTANTS[0]}))
    assert list(one.stages) == ["big", "takd-1"]
    assert inspect(bare.replace(**{"losses.takd.assistants": ["no_such_net"]})).faults


class Told(Observer):
    """What was begun and what was skipped."""

    def __init__(self):
        self.begun, self.skipped = [], []

    def begin(self, path, job, folder, total_steps):  # noqa: ARG002
        self.begun.append(path)

    def skip(self, path, folder, result):  # noqa: ARG002
        self.skipped.append(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each chain, run through once."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in HEARD}
    return {kind: (folders[kind], go(chain(kind), folders[kind])) for kind in HEARD}


@kinds
def test_a_chain_runs_from_one_job(kind, whole):
    folder, result = whole[kind]
    measured = {name: found["student"]["last"]["top1"] for name, found in result["stages"].items()}
    for name, heard in HEARD[kind].items():
        found = result["stages"][name] if name else result
        assert list(found["teachers"]) == heard
        for teacher, seen in found["teachers"].items():
            assert seen["top1"] == pytest.approx(measured[teacher]), "the teacher is what the stage before trained"
        own = Path(found["folder"])
        steps = read(own / "metrics.jsonl", "step")
        assert len(steps) == STEPS
        assert all(norm > 0 for norm in steps[0]["grad_norms"].values())
        assert sum(s["loss"] for s in steps[-9:]) < sum(s["loss"] for s in steps[:9])
    sizes = [sum(v.numel() for v in load_file(Path(f["folder"]) / "student.safetensors").values()) for f in stages(result)]
    assert sizes == sorted(sizes, reverse=True)
    assert result["student"]["last"]["top1"] > 0.5


def stages(result):
    return [*result["stages"].values(), result]


@kinds
def test_finished_stages_are_not_run_again(kind, whole):
    folder, _ = whole[kind]
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    for result in (folder / "result.json", folder / "stages" / f"{kind}-2" / "result.json"):
        result.rename(result.with_suffix(".kept"))
    try:
        told = Told()
        go(chain(kind), folder, told, resume=True)
    finally:
        for result in folder.rglob("result.kept"):
            result.rename(result.with_suffix(".json"))
    assert told.skipped == ["stages.big", f"stages.{kind}-1"]
    assert told.begun == [f"stages.{kind}-2", ""]
    unchanged = {path for path, time_ns in kept.items() if path.stat().st_mtime_ns == time_ns}
    assert {p for p in kept if p.parent.name in ("big", f"{kind}-1")} <= unchanged


@kinds
def test_killed_in_a_stage_and_resumed(kind, whole, tmp_path):
    before, _ = whole[kind]
    cut = tmp_path / "cut"
    place = cut / "stages" / f"{kind}-2"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.spine.links", kind, str(cut)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 240
    while steps_seen(place) < STEPS // 2 + 2:
        assert process.poll() is None, f"the run ended before it was killed: {process.stderr.read().decode()[-2000:]}"
        assert time.monotonic() < deadline, "the run is too slow to be killed"
        time.sleep(0.005)
    kill_tree(process)
    assert not (place / "result.json").exists()
    told = Told()
    go(chain(kind), cut, told, resume=True)
    assert told.skipped == ["stages.big", f"stages.{kind}-1"]
    for link in HEARD[kind]:
        one, other = (folder / "stages" / link if link else folder for folder in (before, cut))
        assert_equal_states(final_state(one), final_state(other))
        assert trace(one) == trace(other)


def test_stopped_between_stages(tmp_path):
    """A stop that is asked for while one stage trains ends the chain there; it goes on where it was."""

    class Stop(Told):
        def poll(self):
            if self.begun and self.begun[-1] == "stages.takd-1" and not self.skipped:
                self.skipped.append("")
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        go(chain("takd"), tmp_path / "run", Stop())
    told = Told()
    result = go(chain("takd"), tmp_path / "run", told, resume=True)
    assert told.skipped == ["stages.big"]
    assert told.begun == ["stages.takd-1", "stages.takd-2", ""]
    assert result["student"]["steps"] == STEPS


MAPS = {"low": (0, 1, 2, 3, 4), "lower": (0, 1, 2, 3, 4), "high": (5, 6, 7, 8, 9)}


def amalgamation(**settings) -> Job:
    """Two teachers that know the same five digits and one that knows the others; components for each, then a student of all."""
    stages = {}
    for number, (name, classes) in enumerate(MAPS.items()):
        data = dataclasses.replace(DIGITS, kind=f"tests.spine.halves:{'low' if classes[0] == 0 else 'high'}", num_classes=5)
        data = dataclasses.replace(data, in_channels=1, normalise="digits")
        stages[name] = Job(name=name, seed=number, data=data, student=digits(10), training=TRAINING, launch=LOCAL)
    teacher = Teacher(model="digits_cnn", options={"width": 10})
    teachers = {n: dataclasses.replace(teacher, weights=f"stage:{n}", label_map=classes) for n, classes in MAPS.items()}
    loss = Loss("ka-customize", components=(ASSISTANTS[0],), common_channels=8, lam=0.1)
    job = Job(
        name="amalgamation",
        data=DIGITS,
        stages=stages,
        teachers=teachers,
        student=digits(8),
        losses={"ka": loss},
        training=TRAINING,
        launch=LOCAL,
    )
    return job.replace(**settings)


def test_components_are_a_first_step():
    job = resolve(amalgamation())
    assert list(job.stages) == [*MAPS, "ka-1", "ka-2"]
    assert [list(job.stages[f"ka-{k}"].teachers) for k in (1, 2)] == [["low", "lower"], ["high"]]
    assert list(job.teachers) == ["ka-1", "ka-2"]
    assert [spec.label_map for spec in job.teachers.values()] == [None, None]
    assert [list(classes) for classes in job.losses["ka"].options["known"]] == [list(MAPS["low"]), list(MAPS["high"])]
    assert [link.ce_weight for link in (*job.stages.values(), job)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert resolve(job) == job
    assert "components: expected one architecture, or one for each of 2 groups" in faults(
        amalgamation(**{"losses.ka.components": [*ASSISTANTS, ASSISTANTS[0]]})
    )
    assert resolve(amalgamation(**{"losses.ka.components": []})).teachers.keys() == MAPS.keys()


@pytest.mark.parametrize("components", [(ASSISTANTS[0],), ()])
def test_a_student_of_all_classes_from_teachers_of_some_without_labels(components, tmp_path):
    """Labels are noise and are not used; evaluation sees the true ones. Neither teacher can reach more than half."""
    settings = {"losses.ka.components": list(components), "data.noisy_labels": True}
    result = go(amalgamation(**settings), tmp_path / "run")
    assert result["student"]["last"]["top1"] > 0.6
    steps = read(tmp_path / "run" / "metrics.jsonl", "step")
    assert set(steps[0]["terms"]) == {"ka.output", "ka.feature"}
    assert all(norm > 0 for norm in steps[0]["grad_norms"].values())
    student = load_file(tmp_path / "run" / "student.safetensors")
    torch.testing.assert_close(student["linear.weight"].shape, torch.Size([10, 32]))
