"""Who makes batches elsewhere, without Ray: what is asked again, and when."""

import itertools
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from raykd.errors import ConfigError, LostError, SourceError
from raykd.exchange import making
from raykd.exchange.bank import MadeBatch
from raykd.exchange.making import Far


class Scene:
    """Ray, as far as it is asked here: a call of a maker that is away fails at once, any other is done at once."""

    def __init__(self, makers: int) -> None:
        self.away, self.answers, self.count, self.waited = {}, {}, itertools.count(), 0.0
        self.knows = {i: {"of": i} for i in range(makers)}
        self.handles = [
            SimpleNamespace(
                make=self.call(i, lambda number, *_, i=i: MadeBatch(number, np.zeros((1, 1), np.uint8), np.zeros(1), maker=i)),
                state=self.call(i, lambda i=i: self.knows[i]),
                load_state=self.call(i, lambda state, i=i: self.knows.update({i: state})),
            )
            for i in range(makers)
        ]

    def call(self, maker, does):
        def remote(*given):
            ref = next(self.count)
            away = self.away.get(maker)
            if isinstance(away, list):  # away for so many calls
                away = away.pop() if away else None
            self.answers[ref] = away or does(*given)
            return ref

        return SimpleNamespace(remote=remote)

    def wait(self, refs, num_returns, timeout):  # noqa: ARG002
        self.waited += timeout
        return list(refs), []

    def get(self, ref, timeout=None):
        if isinstance(ref, list):
            return [self.get(each, timeout) for each in ref]
        found = self.answers.pop(ref)
        if isinstance(found, Exception):
            raise found
        return found


DOWN, DEAD = ActorUnavailableError("away", b"0" * 16), ActorDiedError()


@pytest.fixture(autouse=True)
def quiet():
    """A synthesizer that is lost warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def far(monkeypatch, makers=2, **settings) -> tuple[Far, Scene]:
    scene = Scene(makers)
    monkeypatch.setattr(making, "ray", scene)
    return Far(list(scene.handles), 2, **{"timeout_s": 60.0, "restart_s": 60.0} | settings), scene


def test_a_student_that_does_not_wait_is_not_held_up_by_a_maker_that_is_away(monkeypatch):
    found, scene = far(monkeypatch)
    monkeypatch.setattr(making, "PATIENCE_S", 30.0)
    scene.away = {0: DOWN}
    found.ask(0, None)
    found.ask(1, None)
    started = time.monotonic()
    assert [batch.number for batch in found.take(wait=False)] == [1]
    assert found.take(wait=False) == []
    assert time.monotonic() - started < 1
    assert found.asked == [0], "it is under way for whoever counts"
    assert found.retries == 1
    scene.away = {}
    found._later = [(0.0, number, student) for _, number, student in found._later]
    assert found.take(wait=False)[0].number == 0
    assert found.asked == []


@pytest.mark.parametrize("makers", [1, 2])
def test_a_student_that_waits_gets_it_when_the_maker_is_back(makers, monkeypatch):
    found, scene = far(monkeypatch, makers)
    monkeypatch.setattr(making, "PATIENCE_S", 0.05)
    scene.away = dict.fromkeys(range(makers), DOWN)
    found.ask(7, None)
    assert found.take(wait=False) == []
    scene.away = {}
    started = time.monotonic()
    assert [batch.number for batch in found.take(wait=True)] == [7]
    assert time.monotonic() - started >= 0.03, "not asked without a pause"


def test_a_maker_that_stays_away_is_told(monkeypatch):
    found, scene = far(monkeypatch, 1, timeout_s=0.1, restart_s=0.1)
    monkeypatch.setattr(making, "PATIENCE_S", 0.02)
    scene.away = {0: DOWN}
    found.ask(0, None)
    with pytest.raises(SourceError, match=r"expected a batch within 0\.2 s"):
        found.take(wait=True)


def test_what_a_maker_had_that_is_gone_is_asked_of_the_other_at_once(monkeypatch):
    found, scene = far(monkeypatch)
    scene.away = {0: DEAD}
    for number in range(4):
        found.ask(number, None)
    assert sorted(batch.number for batch in found.take(wait=False) + found.take(wait=False)) == [0, 1, 2, 3]
    scene.away = {1: DEAD}
    found.ask(4, None)
    with pytest.raises(LostError, match="All synthesizers are gone"):
        found.take(wait=False)


def test_what_makers_know_waits_for_one_that_is_being_started_again(monkeypatch):
    found, scene = far(monkeypatch)
    monkeypatch.setattr(making, "PATIENCE_S", 0.01)
    scene.away = {0: [DOWN, DOWN]}
    assert found.state() == [{"of": 0}, {"of": 1}]
    assert len(found.handles) == 2


def test_what_makers_know_is_without_one_that_is_gone(monkeypatch):
    found, scene = far(monkeypatch)
    scene.away = {0: DEAD}
    assert found.state() == [{"of": 1}]
    assert len(found.handles) == 1
    scene.away = {1: DEAD}
    with pytest.raises(LostError, match="All synthesizers are gone"):
        found.state()


def test_a_maker_that_stays_away_ends_a_checkpoint(monkeypatch):
    found, scene = far(monkeypatch, 1, timeout_s=0.05, restart_s=0.05)
    monkeypatch.setattr(making, "PATIENCE_S", 0.02)
    scene.away = {0: DOWN}
    with pytest.raises(LostError, match="The last checkpoint is intact"):
        found.state()


def test_makers_that_could_not_go_on_are_told(monkeypatch):
    found, scene = far(monkeypatch)
    found.load_state([{"of": 8}, {"of": 9}])
    assert scene.knows == {0: {"of": 8}, 1: {"of": 9}}
    scene.away = {1: RayTaskError("load_state", "", ConfigError("of another job"))}
    with pytest.raises(ConfigError, match="of another job"):
        found.load_state([{}, {}])
    scene.away = {1: DEAD}
    with pytest.raises(LostError, match="resume the run"):
        found.load_state([{}, {}])


def test_nothing_is_asked_for_once_it_is_closed(monkeypatch):
    found, scene = far(monkeypatch)
    scene.away = {0: DOWN, 1: DOWN}
    found.ask(0, None)
    assert found.take(wait=False) == []
    found.close()
    assert found.asked == []
    assert found.take(wait=True) == []
