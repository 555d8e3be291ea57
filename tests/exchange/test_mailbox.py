"""A mailbox gives each listener the message of its step and no other, and makes the sender wait for the slowest of them."""

import asyncio
import threading
import time

import numpy as np
import pytest

from raykd.errors import SourceError
from raykd.exchange.codec import Encoded
from raykd.exchange.mailbox import KEPT, PROBE, Mailbox, Message


def message(step: int, sender: str = "a") -> Message:
    return Message(sender, step, step, Encoded({"logits": {"dense": np.full((1, 1), step, np.float32)}}))


def box(*listeners: str, ahead: int = 2, newest: bool = False, timeout_s: float = 5.0) -> Mailbox:
    return Mailbox("a", listeners, ahead, newest, timeout_s)


def published(where: Mailbox, *steps: int) -> Mailbox:
    for step in steps:
        where.publish(message(step))
    return where


def later(action) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def steps_of(where: Mailbox) -> list[int]:
    return [m.step for m in where.kept()]


def test_the_message_of_a_step_and_no_other():
    where = published(box("b", ahead=9), 0, 1, 2)
    for step in (0, 1, 2):
        assert where.find(step, "b").step == step
    assert where.find(3, "b") is None
    assert where.find(2, "b").step == 2, "asked again: it is still there"


def test_the_probe_is_for_everybody_and_for_good():
    where = published(box("b", "c"), PROBE, 0, 1)
    for step in range(2, 9):
        for name in "bc":
            where.find(step, name)
        where.publish(message(step))
    assert where.find(PROBE, "b").step == PROBE
    assert where.find(8, "b").step == 8


def test_a_sender_waits_for_the_slowest_listener():
    where = published(box("b", "c"), 0, 1)
    where.find(2, "b")
    assert where.report().owed == {"c": 0}
    done = threading.Event()
    thread = later(lambda: (where.publish(message(2)), done.set()))
    assert not done.wait(0.1), "c has taken nothing"
    assert where.report().waiting_for == "c"
    where.find(1, "c")  # who asks for 1 has taken 0
    assert done.wait(2)
    thread.join()
    assert where.report().waiting_for is None
    assert where.report().owed == {"b": 2, "c": 1}


def test_a_listener_that_takes_nothing_is_named():
    where = published(box("b", timeout_s=0.05), 0, 1)
    with pytest.raises(SourceError, match=r"Peer 'b': expected it to take what 'a' published within 0.05 s.*resume"):
        where.publish(message(2))


def test_who_leaves_is_waited_for_no_more():
    where = published(box("b"), 0, 1)
    thread = later(lambda: published(where, 2, 3, 4, 5))
    time.sleep(0.05)
    where.leave("b")
    thread.join(2)
    assert not thread.is_alive()
    assert where.report().owed == {}


def test_nothing_is_kept_that_all_have_taken_but_the_last_few():
    where = box("b", "c", ahead=3)
    for step in range(10):
        where.publish(message(step))
        where.find(step, "b")
        where.find(max(step - 1, 0), "c")
    assert steps_of(where) == [7, 8, 9]
    assert len(steps_of(published(box(ahead=1), *range(10)))) == KEPT


def test_what_a_listener_is_owed_is_kept_however_old():
    where = published(box("b", "c", ahead=4), 0, 1, 2, 3)
    where.find(3, "c")
    assert steps_of(where) == [0, 1, 2, 3]
    assert where.find(0, "b").step == 0


def test_the_newest_waits_for_nobody():
    where = published(box("b", newest=True), PROBE, *range(6))
    assert steps_of(where) == [5]
    assert where.find(0, "b", after=PROBE).step == 5
    assert where.find(0, "b", after=5) is None
    thread = later(lambda: (time.sleep(0.05), where.publish(message(6))))
    assert where.wait(0, "b", 5, 2.0).step == 6
    thread.join()


def test_a_message_is_waited_for():
    where = box("b")
    thread = later(lambda: (time.sleep(0.05), where.publish(message(0))))
    assert where.wait(0, "b", None, 2.0).step == 0
    thread.join()
    with pytest.raises(SourceError, match=r"Peer 'a': expected its message of step 7 within 0\.05 s, got none"):
        where.wait(7, "b", None, 0.05)


def test_many_wait_on_one_event_loop():
    where = box(*"bcd", ahead=5)

    async def take(listener: str) -> list[int]:
        return [(await where.when_there(step, listener)).step for step in range(5)]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(take, "bcd"))

    thread = later(lambda: [(time.sleep(0.01), where.publish(message(step))) for step in range(5)])
    assert asyncio.run(all_of_them()) == [[0, 1, 2, 3, 4]] * 3
    thread.join()


def test_what_an_earlier_life_had_published_is_there_again():
    """It counts for nobody's waiting, yet stays until those who listen have asked for later ones."""
    where = box("b", ahead=2)
    where.restore([message(step) for step in (3, 4, 5, 6)])
    published(where, 7, 8)
    assert steps_of(where) == [3, 4, 5, 6, 7, 8]
    assert where.find(3, "b").step == 3
    assert where.report().owed == {"b": 7}
    where.find(8, "b")
    published(where, 9)
    assert steps_of(where) == [8, 9]


def test_who_waits_hears_of_what_is_restored():
    where = box("b")
    thread = later(lambda: (time.sleep(0.05), where.restore([message(4)])))
    assert where.wait(4, "b", None, 2.0).step == 4
    thread.join()


def test_where_the_owner_is():
    where = box("b")
    where.tick(step=4, version=3)
    found = where.report()
    assert (found.step, found.version, found.waiting_for, found.ended) == (4, 3, None, False)
    time.sleep(0.05)
    assert where.report().idle_s >= 0.05
    where.tick(waiting_for="c")
    assert where.report().idle_s < 0.05
    assert where.report().waiting_for == "c"
    where.end()
    assert where.report().ended


def test_idle_time_does_not_count_what_was_waited_for_a_listener():
    where = published(box("b", ahead=1), 0)
    thread = later(lambda: (time.sleep(0.1), where.find(1, "b")))
    where.publish(message(1))
    thread.join()
    assert where.report().idle_s < 0.1
