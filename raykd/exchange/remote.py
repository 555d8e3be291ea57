"""Neighbours on Ray: peers whose mailboxes are in other processes, found by the name of their actor.

A message is asked for before it is there; the call waits at its sender, on an event loop beside the training, and returns the
message itself: its bytes belong to the one who asked, and outlive the sender.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raykd.errors import LostError, SourceError
from raykd.exchange.mailbox import Message
from raykd.exchange.pool import original

LOOK_S = 0.25  # between two looks for a peer that is started again
SLICE_S = 5.0  # of a wait, after which it is seen whether the whole has taken too long


@dataclass
class Far:
    """A neighbour in another process.

    Attributes:
        name: of the peer.
        actor: name of the actor it runs in.
        namespace: of Ray.
        listener: the peer that asks.
        timeout_s: longest wait for one message.
        restart_s: how long a peer that died is waited for; 0: it is not started again.
    """

    name: str
    actor: str
    namespace: str
    listener: str
    timeout_s: float
    restart_s: float = 0.0

    def __post_init__(self) -> None:
        self._handle: Any = None

    def ask(self, step: int, after: int | None = None) -> _Far:
        """Asks its actor; what is wrong with it is told by the answer."""
        return _Far(self, step, after, self._send(step, after))

    def leave(self) -> None:
        """Tells its actor, if it is there."""
        with contextlib.suppress(RayError, ValueError):
            self._found().leave.remote(self.name, self.listener)

    def _send(self, step: int, after: int | None) -> Any:
        try:
            return self._found().message.remote(self.name, step, self.listener, after)
        except (RayError, ValueError):
            return None

    def _found(self) -> Any:
        if self._handle is None:
            self._handle = ray.get_actor(self.actor, namespace=self.namespace)
        return self._handle

    def lost(self, why: str) -> None:
        """Forgets an actor that has died.

        Raises:
            LostError: it is not started again.
        """
        self._handle = None
        if not self.restart_s:
            raise LostError(
                f"Peer {self.name!r} is lost ({why}). The last checkpoint is intact: resume the run, or set "
                "exchange.on_loss='drop' or 'respawn'."
            )


@dataclass
class _Far:
    of: Far
    step: int
    after: int | None
    ref: Any

    def done(self) -> bool:
        return self.ref is None or bool(ray.wait([self.ref], timeout=0)[0])

    def result(self) -> Message:
        of, started = self.of, time.monotonic()
        down_since: float | None = None
        while True:
            now = time.monotonic()
            if now - started > of.timeout_s + of.restart_s:
                raise SourceError(
                    f"Peer {of.name!r}: expected its message of step {self.step} within {now - started:.0f} s, got none. "
                    "The last checkpoint is intact; look at its log, raise exchange.timeout_s and resume."
                )
            if down_since is not None and now - down_since > of.restart_s:
                raise LostError(f"Peer {of.name!r} died and did not come back within {of.restart_s:.0f} s. Resume the run.")
            if self.ref is None:
                self.ref = of._send(self.step, self.after)
            if self.ref is None:
                of.lost("its actor has gone")
                down_since = down_since or now
                time.sleep(LOOK_S)
                continue
            try:
                found: Message = ray.get(self.ref, timeout=SLICE_S)
                return found
            except GetTimeoutError:
                continue
            except RayTaskError as error:
                raise original(error, f"Peer {of.name!r}") from None
            except RayError as error:
                of.lost(type(error).__name__)
                self.ref = None
                down_since = down_since or now
                time.sleep(LOOK_S)
