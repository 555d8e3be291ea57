"""The pool client: asks replicas of one teacher (or of several that share actors) on Ray, wherever they live.

    request(batch)   to the replica with the least in flight, written into the object store on a thread of the client's own,
                     beside the student's work; the fields are kept until the answer is here
    ask(images)      the same of float images, or their gradient (see through.py)
    result()         waits, in order; when a replica dies, hangs or loses an object, everything in flight there is sent again
                     to another replica

A teacher has no state, so a request may be answered twice; it is used once, by the step that asked for it.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError

from raykd.errors import LostError, RaykdError, SourceError
from raykd.exchange.asking import Asks
from raykd.exchange.codec import Reply
from raykd.exchange.sources import Answers, Cotangents, Fields, Stats, num_bytes, to_send

PATIENCE_S = 0.25  # pause before a request is sent again when no other replica is there


@dataclass
class _Replica:
    handle: Any
    in_flight: int = 0
    queue: int = 0  # other workers' requests, as it last reported
    down_since: float | None = None
    gone: bool = False  # Ray does not start it again
    probe: Any = None  # asks a replica that is down whether it is up again


@dataclass(eq=False)
class _Request:
    """One request; `sent` is its newest sending: Ray's reference to the answer, and the CPU seconds it took.

    With cotangents it asks for the gradient at the images.
    """

    source: PoolSource
    fields: dict[str, np.ndarray]
    number: int
    asks: Asks
    stats: Stats
    cotangents: Cotangents | None = None
    replica: int = -1
    sent: Future[tuple[Any, float]] = field(default_factory=Future)
    tries: int = 0

    def result(self) -> Answers:
        """The signals of this batch. Raises LostError when the teacher is lost for good."""
        return self.source.wait_for(self)


@dataclass
class PoolSource:
    """Source over the replicas of one teacher, or of the teachers that share an actor.

    Attributes:
        name: of the teacher or actor, for messages.
        handles: its replicas' actor handles.
        asks: what they are asked for.
        inputs: "pixels" or "recipe".
        window: requests kept in flight.
        timeout_s: longest wait for one answer before it is asked of another replica.
        retries: of one request.
        restart_s: how long a pool with no live replica is waited for.
        in_flight_bytes: bound on replies that are on their way, all requests together.
        drop: whether the training goes on without this source when it is lost.
        first: the replica that is asked first, so that several workers do not all begin with the same one.
        stats: of requests for signals.
        backward: of requests for gradients.
    """

    name: str
    handles: list[Any]
    asks: Asks
    inputs: str = "pixels"
    window: int = 4
    timeout_s: float = 120.0
    retries: int = 5
    restart_s: float = 300.0
    in_flight_bytes: int = 512 * 1024**2
    drop: bool = False
    first: int = 0
    stats: Stats = field(default_factory=Stats)
    backward: Stats = field(default_factory=Stats)

    def __post_init__(self) -> None:
        self._replicas = [_Replica(h) for h in self.handles]
        self._pending: deque[_Request] = deque()
        self._next = self.first % len(self.handles)
        self._all_down_since: float | None = None
        self._sender: ThreadPoolExecutor | None = None  # not before it is needed: a source may travel to its process
        self._setting = f"teachers.{self.asks.of[0].teacher}.replicas"

    def request(self, fields: Fields) -> _Request:
        """Sends one whole batch."""
        started = time.thread_time()
        sent = to_send(fields, self.inputs, self.asks.fields)
        return self._begin(_Request(self, sent, self.stats.requests, self.asks, self.stats), started)

    def ask(self, images: np.ndarray, asks: Asks, cotangents: Cotangents | None = None) -> _Request:
        """Sends float images for signals, or with cotangents for the gradient; see sources.Live."""
        stats = self.stats if cotangents is None else self.backward
        request = _Request(self, {"images": images}, stats.requests, asks, stats, cotangents)
        return self._begin(request, time.thread_time())

    def _begin(self, request: _Request, started: float) -> _Request:
        request.stats.requests += 1
        self._send(request)
        self._pending.append(request)
        request.stats.client_s += time.thread_time() - started
        return request

    def wait_for(self, request: _Request) -> Answers:
        """Waits for one request's answer, resending as often as `retries` allows."""
        while True:
            ref = self._reference(request)
            try:
                reply = ray.get(ref, timeout=self.timeout_s)
            except GetTimeoutError:
                self._lose(request.replica, f"no answer within {self.timeout_s:g} s")
                continue
            except RayTaskError as error:
                raise original(error, f"Teacher {self.name!r}") from None
            except RayError as error:  # its process, node or object is gone
                self._replicas[request.replica].gone |= isinstance(error, ActorDiedError)
                self._lose(request.replica, type(error).__name__)
                continue
            return self._take(request, reply)

    def close(self) -> None:
        """Forgets what is in flight; the replicas belong to the run's driver."""
        self._pending.clear()
        if self._sender is not None:
            self._sender.shutdown(wait=False, cancel_futures=True)
            self._sender = None

    def _take(self, request: _Request, reply: Reply) -> Answers:
        started = time.thread_time()
        replica = self._replicas[request.replica]
        replica.in_flight -= 1
        self._all_down_since = None
        replica.queue, replica.down_since = max(0, reply.queue - replica.in_flight), None
        self._pending.remove(request)
        request.stats.count(reply)
        answers = reply.decoded()
        self.window = max(1, min(self.window, self.in_flight_bytes // max(reply.num_bytes, 1)))
        request.stats.client_s += time.thread_time() - started
        return answers

    def _send(self, request: _Request) -> None:
        index = self._pick()
        replica = self._replicas[index]
        replica.in_flight += 1
        request.replica, request.tries = index, request.tries + 1
        self._sender = self._sender or ThreadPoolExecutor(1, f"to {self.name}")
        request.sent = self._sender.submit(_call, replica.handle, request)
        request.stats.bytes_out += sum(a.nbytes for a in request.fields.values()) + num_bytes(request.cotangents)

    def _reference(self, request: _Request) -> Any:
        """Ray's reference to a request's answer, as soon as it is sent.

        Raises:
            SourceError: it could not be sent.
        """
        try:
            ref, seconds = request.sent.result(self.timeout_s)
        except NotInTime:
            why = f"not within {self.timeout_s:g} s"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        else:
            request.stats.client_s += seconds
            return ref
        raise SourceError(f"Teacher {self.name!r}: a request could not be sent ({why}). The last checkpoint is intact: resume.")

    def _pick(self) -> int:
        """The live replica with the least to do; replicas that are down come after all others, the longest down first."""
        for replica in self._replicas:
            _knock(replica)
        count = len(self._replicas)
        order = [(self._next + i) % count for i in range(count)]
        self._next = (self._next + 1) % count
        load = {i: self._replicas[i].in_flight + self._replicas[i].queue for i in order}
        return min(order, key=lambda i: (self._replicas[i].gone, self._replicas[i].down_since or 0.0, load[i]))

    def _lose(self, index: int, why: str) -> None:
        """Marks a replica down and sends everything in flight there to another one."""
        replica = self._replicas[index]
        now = time.monotonic()
        if replica.down_since is None:
            warnings.warn(f"Teacher {self.name!r}, replica {index}: {why}; its requests go to another replica.", stacklevel=2)
        replica.in_flight = replica.queue = 0
        replica.down_since = now
        lost = [r for r in self._pending if r.replica == index]
        all_down = all(r.down_since is not None for r in self._replicas)
        self._all_down_since = (self._all_down_since or now) if all_down else None
        if all(r.gone for r in self._replicas):
            raise LostError(
                f"Teacher {self.name!r}: all of its {len(self._replicas)} replicas are gone and none is started again ({why}). "
                f"The last checkpoint is intact; raise {self._setting} or .max_restarts and resume."
            )
        if self._all_down_since is not None and now - self._all_down_since > self.restart_s:
            raise LostError(
                f"Teacher {self.name!r}: none of {len(self._replicas)} replicas answered for {self.restart_s:.0f} s ({why}). "
                f"The last checkpoint is intact; raise {self._setting} or .max_restarts and resume."
            )
        if not all_down and any(r.tries > self.retries for r in lost):
            raise SourceError(
                f"Teacher {self.name!r}: a request failed {self.retries + 1} times ({why}). The last checkpoint is intact; "
                "look at the replicas' logs, raise launch.request_timeout_s or launch.retries, and resume."
            )
        if all_down:
            time.sleep(PATIENCE_S)
            for request in lost:
                request.tries = 0  # waiting for a restart is not a failure of the request
        for request in lost:
            request.stats.retries += 1
            self._send(request)


def _call(handle: Any, request: _Request) -> tuple[Any, float]:
    """On the sender's thread: the reference to the answer, and the CPU seconds that it took."""
    started = time.thread_time()
    if request.cotangents is None:
        ref = handle.answer.remote(request.fields, request.asks)
    else:
        ref = handle.input_grad.remote(request.fields["images"], request.asks, request.cotangents)
    return ref, time.thread_time() - started


def _knock(replica: _Replica) -> None:
    """A replica that was down and answers again is up; asked without waiting."""
    if replica.down_since is None or replica.gone:
        return
    if replica.probe is None:
        replica.probe = replica.handle.ready.remote()
        return
    if not ray.wait([replica.probe], timeout=0)[0]:
        return
    try:
        ray.get(replica.probe)
        replica.down_since = None
    except RayError:
        pass
    replica.probe = None


def original(error: BaseException, who: str) -> Exception:
    """The raykd error inside a Ray error, as itself; else a SourceError that says who failed."""
    seen: set[int] = set()
    inner: Any = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, RaykdError):
            base = next(c for c in type(inner).__mro__ if c.__module__ == RaykdError.__module__)
            return base(str(inner.args[0]) if inner.args else str(inner))
        inner = getattr(inner, "cause", None) or inner.__cause__
    text = str(error).strip().splitlines()
    return SourceError(f"{who} failed: {type(error).__name__}: {text[-1] if text else ''}")
