"""Teachers together: what sharing an actor, dropping one, and waiting for one ask of the settings."""

import pytest

from raykd.config import Data, Job, Launch, Loss, Teacher
from raykd.launch import settings
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
