"""The pool client's book-keeping against replicas that are plain objects: who is asked, who is resent, who comes back."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from raykd.errors import LostError, SourceError
from raykd.exchange import pool as pools
from raykd.exchange.asking import Ask, Asks
from raykd.exchange.codec import Encoded, Reply, parse
from raykd.exchange.pool import PoolSource
from raykd.signals import Signal

ASKS = Asks((Ask("t", (Signal("logits"),), parse("dense")),))


class Ref:
    """A call's future: answers once, or raises."""

    def __init__(self, replica, value):
        self.replica, self.value, self.lost = replica, value, not replica.alive


class Call:
    def __init__(self, replica, answer):
        self.replica, self.answer = replica, answer

    def remote(self, *arguments):
        ref = Ref(self.replica, self.answer(*arguments))
        self.replica.calls += 1
        self.replica.refs.append(ref)
        return ref


class Fake:
    """A replica that echoes the batch's first pixel; `die()` loses what is in flight there."""

    def __init__(self):
        self.alive, self.calls, self.refs, self.answered = True, 0, [], 0
        self.gone = False  # not started again
        self.answer = Call(self, self._echo)
        self.ready = Call(self, lambda: True)

    def _echo(self, fields, _):
        self.answered += 1
        pixels = fields["images"].reshape(len(fields["images"]), -1)[:, :1].astype(np.float32)
        return Reply({"t": Encoded({"logits": {"dense": pixels}})})

    def die(self):
        self.alive = False
        for ref in self.refs:
            ref.lost = True


@pytest.fixture
def replicas(monkeypatch):
    """Three fakes, and a Ray that knows no other objects than theirs."""

    def get(ref, timeout=None):
        if ref.lost:
            raise ActorDiedError() if ref.replica.gone else ActorUnavailableError("restarting", b"0" * 16)
        return ref.value

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout=None: (refs, []))
    monkeypatch.setattr(pools, "PATIENCE_S", 0.0)
    return [Fake() for _ in range(3)]


def batch(value: int):
    return {"images": torch.full((2, 1, 1, 1), value, dtype=torch.uint8)}


def value_of(request) -> int:
    return int(request.result()["t"]["logits"][0, 0])


def test_answers_come_in_order_and_the_load_is_shared(replicas):
    source = PoolSource("t", replicas, ASKS)
    requests = [source.request(batch(i)) for i in range(6)]
    assert [value_of(r) for r in requests] == list(range(6))
    assert [r.answered for r in replicas] == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:Teacher")
def test_what_a_dead_replica_had_is_answered_by_another_once(replicas):
    source = PoolSource("t", replicas, ASKS)
    requests = [source.request(batch(i)) for i in range(6)]
    replicas[1].die()
    assert [value_of(r) for r in requests] == list(range(6))
    assert source.stats.requests == 6
    assert source.stats.retries == 2


@pytest.mark.filterwarnings("ignore:Teacher")
def test_a_replica_that_is_back_is_used_again(replicas):
    source = PoolSource("t", replicas, ASKS)
    requests = [source.request(batch(i)) for i in range(3)]
    replicas[0].die()
    for request in requests:
        request.result()
    replicas[0].alive = True
    before = replicas[0].answered
    for i in range(30):
        assert value_of(source.request(batch(i))) == i
    assert replicas[0].answered - before >= 8


@pytest.mark.filterwarnings("ignore:Teacher")
def test_all_die_and_one_returns(replicas):
    source = PoolSource("t", replicas, ASKS, retries=2)
    requests = [source.request(batch(i)) for i in range(6)]
    for replica in replicas:
        replica.die()
    tries = 0

    def revive(_):
        nonlocal tries
        tries += 1
        if tries == 20:
            replicas[2].alive = True

    pools.time.sleep, slept = revive, pools.time.sleep
    try:
        assert [value_of(r) for r in requests] == list(range(6))
    finally:
        pools.time.sleep = slept


@pytest.mark.filterwarnings("ignore:Teacher")
def test_all_dead_for_good_is_an_error_that_names_the_setting(replicas):
    asks = Asks((Ask("big", (Signal("logits"),), parse("dense")),))
    source = PoolSource("shared", replicas, asks, restart_s=0.05)
    request = source.request(batch(1))
    for replica in replicas:
        replica.die()
    with pytest.raises(SourceError, match=r"none of 3 replicas answered.*teachers\.big\.replicas"):
        request.result()


@pytest.mark.filterwarnings("ignore:Teacher")
def test_replicas_that_are_gone_are_not_waited_for(replicas):
    source = PoolSource("big", replicas, ASKS, restart_s=1e9)
    request = source.request(batch(1))
    for replica in replicas:
        replica.die()
        replica.gone = True
    with pytest.raises(LostError, match=r"all of its 3 replicas are gone and none is started again"):
        request.result()


def test_workers_begin_with_different_replicas(replicas):
    for first in range(3):
        PoolSource("t", replicas, ASKS, first=first).request(batch(1)).result()
    assert [r.calls for r in replicas] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:Teacher")
def test_a_hung_replica_is_left_after_the_timeout(replicas, monkeypatch):
    hung = replicas[0]
    real = ray.get

    def get(ref, timeout=None):
        if ref.replica is hung:
            raise GetTimeoutError()
        return real(ref, timeout)

    monkeypatch.setattr(ray, "get", get)
    source = PoolSource("t", replicas, ASKS)
    assert [value_of(source.request(batch(i))) for i in range(9)] == list(range(9))
    assert source.stats.retries == 1


def test_in_flight_bytes_bound_the_window(replicas):
    source = PoolSource("t", replicas, ASKS, window=8, in_flight_bytes=24)
    source.request(batch(1)).result()
    assert source.window == 3  # replies of eight bytes


def test_sending_holds_nobody_up_and_keeps_the_order(replicas):
    held, sent = threading.Event(), []

    class Slow(Fake):
        def _echo(self, fields, asks):
            held.wait(10)
            sent.append(int(fields["images"][0, 0, 0, 0]))
            return super()._echo(fields, asks)

    source = PoolSource("t", [Slow(), Slow()], ASKS)
    requests = [source.request(batch(i)) for i in range(4)]
    assert sent == []
    held.set()
    assert [value_of(r) for r in requests] == sent == list(range(4))
    assert source.stats.bytes_out == 8


def test_what_cannot_be_sent_is_an_error_at_its_result(replicas):
    source = PoolSource("t", replicas[:1], ASKS)
    good = source.request(batch(1))
    assert value_of(good) == 1
    replicas[0].answer = Call(replicas[0], lambda *_: pickle.dumps(lambda: None))
    request = source.request(batch(2))
    with pytest.raises(SourceError, match=r"'t': a request could not be sent .*[Pp]ickl"):
        request.result()


def test_what_is_not_sent_in_time_is_an_error(replicas):
    held = threading.Event()
    replicas[0].answer = Call(replicas[0], lambda *_: held.wait(10))
    source = PoolSource("t", replicas[:1], ASKS, timeout_s=0.05)
    request = source.request(batch(1))
    with pytest.raises(SourceError, match=r"not within 0\.05 s"):
        request.result()
    held.set()


def test_a_closed_source_sends_again(replicas):
    source = PoolSource("t", replicas, ASKS)
    assert value_of(source.request(batch(1))) == 1
    source.close()
    assert value_of(source.request(batch(2))) == 2
