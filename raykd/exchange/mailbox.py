"""Mailboxes: what a peer has published, until those that listen have taken it.

    publish(step s)   waits while a listener has not taken the message of `ahead` exchanges before
    find(step s)      that message, and no other; or the newest there is

A peer publishes once an exchange; every listener takes each message when its own step comes to it. The last messages are kept a
little longer, for a listener that has to begin again.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from raykd.errors import SourceError
from raykd.exchange.codec import Encoded

PROBE = -1  # step of the message before the training, which is kept for good
KEPT = 2  # messages kept although all have taken them


@dataclass(frozen=True)
class Message:
    """What a peer says at one exchange.

    Attributes:
        sender: name of the peer.
        step: of the run, at which it was published.
        version: optimizer steps behind the sender's weights.
        content: its signals, or its weights, encoded.
        stop_at: the sender ends before this step; None: it goes on.
    """

    sender: str
    step: int
    version: int
    content: Encoded
    stop_at: int | None = None


@dataclass
class Status:
    """Where a peer is: for the driver, which watches."""

    step: int = PROBE
    version: int = 0
    waiting_for: str | None = None
    idle_s: float = 0.0
    owed: Mapping[str, int] = field(default_factory=dict)  # listener -> the oldest message it has not taken
    ended: bool = False


class Mailbox:
    """One peer's messages; any thread may use it.

    Args:
        owner: the peer.
        listeners: peers that take every message.
        ahead: messages that may be published before the first of them is taken.
        newest: keep the newest message only, and wait for nobody.
        timeout_s: longest wait for a listener.
    """

    def __init__(
        self, owner: str, listeners: Iterable[str], ahead: int, newest: bool = False, timeout_s: float = 3600.0
    ) -> None:
        self.owner, self.ahead, self.newest, self.timeout_s = owner, ahead, newest, timeout_s
        self.status = Status()
        self._untaken: dict[str, list[int]] = {name: [] for name in listeners}
        self._again: dict[str, list[int]] = {name: [] for name in self._untaken}  # restored, which it may still ask for
        self._messages: dict[int, Message] = {}
        self._changed = threading.Condition()
        self._waiting: list[Callable[[], None]] = []
        self._since = time.monotonic()

    def publish(self, message: Message) -> float:
        """Puts a message out; the seconds it had to wait for listeners.

        Raises:
            SourceError: a listener has taken nothing for `timeout_s`.
        """
        started = time.monotonic()
        with self._changed:
            while not self.newest and (slow := self._slow()):
                self.status.waiting_for = slow
                if not self._changed.wait(self.timeout_s):
                    raise SourceError(
                        f"Peer {slow!r}: expected it to take what {self.owner!r} published within {self.timeout_s:g} s. "
                        "Look at its log; the last checkpoint is intact, resume the run."
                    )
            self.status.waiting_for = None
            self._since = time.monotonic()
            self._messages[message.step] = message
            if message.step != PROBE:
                for steps in self._untaken.values():
                    steps.append(message.step)
            self._tidy()
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for wake in waiting:
            wake()
        return time.monotonic() - started

    def find(self, step: int, listener: str, after: int | None = None) -> Message | None:
        """The message of a step; with `after`, the newest later than that one; None while it is not there.

        Who asks for a step has taken all before it.
        """
        with self._changed:
            if listener in self._untaken and step != PROBE and after is None:
                for steps in (self._untaken, self._again):
                    steps[listener] = [s for s in steps[listener] if s >= step]
                self._tidy()
                self._changed.notify_all()
            if after is None or step == PROBE:
                return self._messages.get(step)
            there = max((s for s in self._messages if s != PROBE), default=None)
            return self._messages[there] if there is not None and there > after else None

    def wait(self, step: int, listener: str, after: int | None, timeout_s: float) -> Message:
        """As `find`, waiting for it.

        Raises:
            SourceError: it did not come in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            woken = threading.Event()
            with self._changed:
                found = self.find(step, listener, after)
                if found is not None:
                    return found
                self._waiting.append(woken.set)
            if not woken.wait(max(0.0, deadline - time.monotonic())):
                raise SourceError(f"Peer {self.owner!r}: expected its message of step {step} within {timeout_s:g} s, got none.")

    async def when_there(self, step: int, listener: str, after: int | None = None) -> Message:
        """As `find`, waiting for it, on an event loop."""
        loop = asyncio.get_running_loop()
        while True:
            woken = loop.create_future()
            with self._changed:
                found = self.find(step, listener, after)
                if found is not None:
                    return found
                self._waiting.append(functools.partial(_tell, loop, woken))
            await woken

    def leave(self, listener: str) -> None:
        """A listener takes nothing any more."""
        with self._changed:
            self._untaken.pop(listener, None)
            self._again.pop(listener, None)
            self._tidy()
            self._changed.notify_all()

    def tick(self, step: int | None = None, version: int | None = None, waiting_for: str | None = None) -> None:
        """The owner gets on: it is at this step, or waits for somebody."""
        with self._changed:
            self._since = time.monotonic()
            self.status.waiting_for = waiting_for
            if step is not None:
                self.status.step = step
            if version is not None:
                self.status.version = version

    def end(self) -> None:
        """The owner has ended; what it published stays."""
        with self._changed:
            self.status.ended = True

    def report(self) -> Status:
        """Where the owner is, now."""
        with self._changed:
            owed = {name: steps[0] for name, steps in self._untaken.items() if steps}
            idle = time.monotonic() - self._since
            now = self.status
            return Status(now.step, now.version, now.waiting_for, idle, owed, now.ended)

    def kept(self) -> list[Message]:
        """The messages that are still there, but for the probe."""
        with self._changed:
            return [self._messages[step] for step in sorted(self._messages) if step != PROBE]

    def restore(self, messages: Iterable[Message]) -> None:
        """Puts messages back that an earlier life had published."""
        with self._changed:
            for message in messages:
                self._messages[message.step] = message
                for steps in self._again.values():
                    steps.append(message.step)
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for wake in waiting:
            wake()

    def _slow(self) -> str | None:
        return next((name for name, steps in self._untaken.items() if len(steps) >= self.ahead), None)

    def _tidy(self) -> None:
        """Drops what everybody has taken, but for the last few."""
        steps = sorted(step for step in self._messages if step != PROBE)
        last = steps[-1:] if self.newest else steps[-max(KEPT, self.ahead) :]
        every = [*self._untaken.values(), *self._again.values()]
        owed = set() if self.newest else {step for own in every for step in own}
        for step in steps:
            if step not in last and step not in owed:
                del self._messages[step]


def _tell(loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
    loop.call_soon_threadsafe(_wake, woken)


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
