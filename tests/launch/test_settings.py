"""What sharing an actor, dropping a teacher, and waiting for one or for images ask of the settings and the hosts."""

from contextlib import nullcontext

import pytest

from raykd.config import Data, Job, Launch, Loss, Teacher
from raykd.errors import ConfigError, DivergenceError
from raykd.launch import hosts, settings
from raykd.launch.run import _keep_job as keep_job
from raykd.resolve import resolve

LOSS = {"kd": Loss("kd", aggregate="mean_probs")}


def job(launch=None, losses=None, **teachers):
    return resolve(Job(data=Data(), teachers=teachers, losses=losses or LOSS, launch=Launch(**launch or {})))


def told(found):
    return [fault for check in (settings.settings, settings.losses, settings.actors) for fault in check(found)]


def test_an_actor_is_not_called_like_another_teacher():
    (fault,) = told(job(a=Teacher(placement="inline"), b=Teacher(actor="a")))
    assert fault.startswith("teachers.b.actor: 'a' is the name of a teacher with actors of its own")
    assert told(job(a=Teacher(actor="a"), b=Teacher(actor="a"))) == []


@pytest.mark.parametrize("setting", [{"replicas": 2}, {"inputs": "recipe"}, {"codec": "fp16"}])
def test_what_belongs_to_the_actor_is_the_same_for_all_who_share_it(setting):
    (fault,) = told(job(a=Teacher(actor="x"), b=Teacher(actor="x", **setting)))
    assert fault.startswith(f"teachers.b.{next(iter(setting))}: expected that of 'a', with which it shares the actor 'x'")


@pytest.mark.parametrize(
    "teachers",
    [
        {"a": Teacher(actor="x", on_loss="drop"), "b": Teacher(actor="x", on_loss="drop")},
        {"a": Teacher(on_loss="drop"), "b": Teacher(weight=0.0)},
    ],
)
def test_dropping_leaves_somebody_to_listen_to(teachers):
    (fault,) = told(job(**teachers))
    assert fault.startswith("teachers.a.on_loss: losses.kd listens to nobody else with a weight above 0")


def test_a_teacher_may_go_where_others_stay():
    assert told(job(a=Teacher(on_loss="drop"), b=Teacher())) == []
    (fault,) = told(job(a=Teacher(on_loss="drop"), b=Teacher(), losses={"feed": Loss("feed")}))
    assert "feed trains parts for each of its teachers" in fault


def test_workers_wait_for_each_other_longer_than_one_waits_for_a_teacher():
    teachers = {"a": Teacher(on_loss="drop", replicas=2), "b": Teacher()}
    (fault,) = told(job({"workers": 2}, **teachers))
    assert fault.startswith("launch.collective_timeout_s: expected above 660 s")
    assert told(job({"workers": 2, "collective_timeout_s": 700.0}, **teachers)) == []


def test_workers_wait_for_each_other_longer_than_one_waits_for_a_batch_of_images():
    banked = {"losses.dafl": Loss("dafl"), "synthesis.mode": "bank", "synthesis.synthesizers": 2}
    waiting = Job(teachers={"a": Teacher()}, launch=Launch(workers=2, request_timeout_s=300.0)).replace(**banked)
    (fault,) = [f for f in told(resolve(waiting)) if "collective" in f]
    assert fault.startswith("launch.collective_timeout_s: expected above 600 s")
    assert not [f for f in told(resolve(waiting.replace(**{"launch.collective_timeout_s": 601.0}))) if "collective" in f]


@pytest.mark.parametrize("setting, may", [("synthesizers", 2), ("max_restarts", 5), ("memory_bytes", 10**6), ("steps", 9)])
def test_where_images_are_made_may_change_between_two_starts(setting, may, tmp_path):
    before = resolve(Job(teachers={"a": Teacher()}).replace(**{"losses.dafl": Loss("dafl"), "synthesis.mode": "bank"}))
    keep_job(before, tmp_path, resume=False)
    now = resolve(before.replace(**{f"synthesis.{setting}": may}))
    if setting != "steps":
        keep_job(now, tmp_path, resume=True)
        return
    with pytest.raises(ConfigError, match=r"the job has changed \(synthesis.steps"):
        keep_job(now, tmp_path, resume=True)


@pytest.mark.parametrize("mode, raised", [("bank", True), ("lockstep", False)])
def test_a_rank_whose_synthesizer_diverges_does_not_leave_the_others_waiting(mode, raised, tmp_path, monkeypatch):
    """In a bank each rank has synthesizers of its own; in turn all ranks meet it at the same step."""

    def diverges(*_):
        raise DivergenceError("Synthesis, batch 3: the images' loss is not finite.")

    own = resolve(
        Job(teachers={"a": Teacher(placement="inline")}).replace(**{"losses.dafl": Loss("dafl"), "synthesis.mode": mode})
    )
    monkeypatch.setattr(hosts, "learn", diverges)
    monkeypatch.setattr(hosts, "sources", lambda *_: {})
    config = {"folder": str(tmp_path), "job": own, "plans": [], "facts": None, "handles": {}}
    with pytest.raises(DivergenceError) if raised else nullcontext():
        hosts.work(0, 2, config)
    assert "batch 3" in (tmp_path / hosts.FATAL).read_text()
    hosts.work(1, 2, config)  # a retry finds that it is over
