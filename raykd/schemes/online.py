"""Online distillation: peers that learn together, each by its own loop, and teach each other.

    peer a    forward ──publish(step s)──▶ mailbox a ──▶ b, c          messages: sender, step, version
              ◀─────────────collect(step s)────────────  mailboxes of those it listens to
              losses, backward, optimizer step

A peer is an ordinary learner (raykd/schemes/offline.py, `learning`) which pauses at an exchange. What it hears is of its own
step, never of another; it waits for nobody it does not listen to. With `exchange.what = "weights"` it publishes its weights
instead, every so often, and those who listen keep a frozen copy that answers for it: `staleness` says how old the copy is.

`learn_together` runs the peers of one process, one after the other up to their exchange. One process for each, or one for
several: the result is the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from raykd.config import Exchange, Student
from raykd.errors import DivergenceError, Interrupted, LostError, RaykdError, SourceError
from raykd.exchange import codec as codecs
from raykd.exchange.mailbox import PROBE, Mailbox, Message
from raykd.roles.learner import without_ema
from raykd.roles.network import Facts, Tapped, build
from raykd.schemes.offline import Learning, Offer, Said
from raykd.signals import Signal, Signals

DENSE = codecs.Codec("dense")


class Answer(Protocol):
    """A message that was asked for."""

    def done(self) -> bool:
        """Whether it is there, or its sender is lost."""

    def result(self) -> Message:
        """Waits for it. Raises LostError when its sender has gone for good, SourceError when it does not come in time."""


class Neighbour(Protocol):
    """A peer that is listened to, wherever it runs."""

    def ask(self, step: int, after: int | None = None) -> Answer:
        """Asks for its message of a step; with `after`, for the newest later than that."""

    def leave(self) -> None:
        """Takes nothing from it any more."""


@dataclass
class Near:
    """A neighbour in this process."""

    mailbox: Mailbox
    listener: str
    timeout_s: float

    def ask(self, step: int, after: int | None = None) -> Answer:
        """Asks its mailbox."""
        return _Near(self, step, after)

    def leave(self) -> None:
        """Leaves its mailbox."""
        self.mailbox.leave(self.listener)


@dataclass
class _Near:
    of: Near
    step: int
    after: int | None
    found: Message | None = None

    def done(self) -> bool:
        self.found = self.found or self.of.mailbox.find(self.step, self.of.listener, self.after)
        return self.found is not None

    def result(self) -> Message:
        if self.done() and self.found is not None:
            return self.found
        return self.of.mailbox.wait(self.step, self.of.listener, self.after, self.of.timeout_s)


@dataclass
class EdgeStats:
    """What came over one edge since the last start."""

    messages: int = 0
    bytes_in: int = 0
    wait_s: float = 0.0  # time this peer waited for that one
    stale_steps: int = 0  # sum over the exchanges; weights only
    stalest: int = 0


@dataclass
class Copy:
    """A neighbour as it was: frozen, in evaluation mode.

    Args:
        spec: of the peer.
        signals: that are asked of it.
        facts: of the training data.
        device: of the learner.
    """

    spec: Student
    signals: tuple[Signal, ...]
    facts: Facts
    device: torch.device
    version: int | None = None

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            self.model = build(self.spec, self.facts, self.device).eval().requires_grad_(False)
        self.tapped = Tapped(self.spec, self.model, [without_ema(s) for s in self.signals], self.facts, self.device)

    def load(self, message: Message) -> None:
        """Becomes what the neighbour was at the message's step."""
        self.model.load_state_dict(codecs.decode(message.content.signals))
        self.version = message.step

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Signals:
        """Its signals for uint8 images `[b c h w]`."""
        found = self.tapped(images)
        return {signal.key: found[without_ema(signal).key] for signal in self.signals}


@dataclass
class PeerLink:
    """One peer's side of the exchange.

    Attributes:
        name: of the peer.
        exchange: the job's.
        mailbox: of this peer; those who listen take its messages.
        neighbours: peers it listens to.
        copies: of these, where weights are exchanged.
        absent: models of those that were dropped in an earlier start: they answer the probe, for the shapes of what was trained
            with them, and nothing after it.
    """

    name: str
    exchange: Exchange
    mailbox: Mailbox
    neighbours: dict[str, Neighbour]
    listeners: tuple[str, ...] = ()
    copies: dict[str, Copy] = field(default_factory=dict)
    absent: dict[str, Copy] = field(default_factory=dict)
    edges: dict[str, EdgeStats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.drop = self.exchange.on_loss == "drop"
        self.gone: set[str] = set(self.absent)
        self.sent = {"messages": 0, "bytes_out": 0}
        self._asked: dict[str, tuple[int, Answer]] = {}
        self._codec = codecs.parse(self.exchange.codec)
        self._versions: dict[str, int] = {}
        self._step = 0
        self.edges = {name: EdgeStats() for name in self.neighbours}

    @property
    def weights(self) -> bool:
        """Whether weights are exchanged."""
        return self.exchange.what == "weights"

    def meets(self, step: int) -> bool:
        """Whether there is an exchange at this step: with copies at each, as they answer for the neighbours."""
        if not (self.neighbours or self.listeners):
            return False
        return step % self.exchange.every == 0 or (self.weights and bool(self.neighbours))

    def publish(self, offer: Offer) -> float:
        """Puts out what is due; the seconds it waited for those who listen.

        Raises:
            DivergenceError: it is not finite; nobody hears it. SourceError: one that listens takes nothing any more.
        """
        self._step = max(offer.step, 0)
        self.mailbox.tick(self._step, offer.version)
        if not self.listeners or (offer.step != PROBE and offer.step % self.exchange.every):
            return 0.0
        self._check_finite(offer)
        content = _weights(offer) if self.weights else codecs.encode(offer.signals, self._codec)
        self.sent["messages"] += 1
        self.sent["bytes_out"] += content.num_bytes * len(self.listeners)
        return self.mailbox.publish(Message(self.name, offer.step, offer.version, content, offer.stop_at))

    def collect(self, offer: Offer) -> Said:
        """What the neighbours have said for this step.

        Raises:
            LostError: one has gone for good, and the run does not go on without. SourceError: a wait took too long.
        """
        started = time.perf_counter()
        answers: dict[str, Signals] = {}
        stops = []
        for name in [n for n in self.neighbours if n not in self.gone]:
            self.mailbox.tick(waiting_for=name)
            since = time.perf_counter()
            try:
                message = self._of_weights(name, offer.step) if self.weights else self._of_step(name, offer.step)
            except LostError:
                if not self.drop:
                    raise
                self.gone.add(name)
                continue
            finally:
                if offer.step != PROBE:  # before it, others may still be starting
                    self.edges[name].wait_s += time.perf_counter() - since
                self.mailbox.tick()
            if message is not None:
                self._versions[name] = message.version
                stops.append(message.stop_at)
            if self.weights:
                answers[name] = self.copies[name](offer.batch["images"])
                self._count_age(name, offer.step)
            elif message is not None:
                answers[name] = codecs.decode(message.content.signals)
        for name in list(self.absent):
            answers[name] = self.absent.pop(name)(offer.batch["images"])  # at the probe, which is the first of all
        stop = min((s for s in stops if s is not None), default=None)
        return Said(answers, dict(self._versions), frozenset(self.gone), stop, time.perf_counter() - started)

    def _check_finite(self, offer: Offer) -> None:
        for key, value in (offer.weights() if self.weights else offer.signals).items():
            if not bool(torch.isfinite(value).all()):
                raise DivergenceError(
                    f"Peer {self.name!r}: what it publishes at step {self._step} is not finite ({key}); nothing was updated "
                    "and the last checkpoint is intact. Lower its learning rate, or the weight of its losses."
                )

    def _of_step(self, name: str, step: int) -> Message:
        """The neighbour's message of exactly this step."""
        message = self._take(name, step)
        if step != PROBE:
            self._ask(name, step + self.exchange.every)
        return message

    def _of_weights(self, name: str, step: int) -> Message | None:
        """Brings the copy to the version that is due; None where it has it already."""
        copy = self.copies[name]
        if step == PROBE:
            message = self._take(name, PROBE)
            if copy.version is None:
                copy.load(message)
            return message
        if self.exchange.newest:
            have = copy.version if copy.version is not None and copy.version >= 0 else PROBE
            answer = self._asked[name][1] if name in self._asked else self._ask(name, step, after=have)
            if have != PROBE and not answer.done():
                return None
            message = answer.result()
            del self._asked[name]
        else:
            due = self._due(step)
            if copy.version == due:
                return None
            message = self._take(name, due)
            self._ask(name, due + self.exchange.every)
        self._check(name, message)
        copy.load(message)
        return message

    def _due(self, step: int) -> int:
        """The version of the copies that answer at a step."""
        return max(0, step - self.exchange.late) // self.exchange.every * self.exchange.every

    def _take(self, name: str, step: int) -> Message:
        asked = self._asked.pop(name, None)
        answer = asked[1] if asked is not None and asked[0] == step else self.neighbours[name].ask(step)
        message = answer.result()
        self._check(name, message)
        if message.step != step:
            raise SourceError(f"Peer {name!r}: expected its message of step {step}, got one of step {message.step}.")
        return message

    def _check(self, name: str, message: Message) -> None:
        if message.sender != name:
            raise SourceError(f"Peer {name!r}: expected a message of its own, got one of {message.sender!r}.")
        self.edges[name].messages += 1
        self.edges[name].bytes_in += message.content.num_bytes

    def _ask(self, name: str, step: int, after: int | None = None) -> Answer:
        """Asks now for what is needed later, so that nothing is waited for but the neighbour's own work."""
        answer = self.neighbours[name].ask(step, after)
        self._asked[name] = (step, answer)
        return answer

    def _count_age(self, name: str, step: int) -> None:
        version = self.copies[name].version
        if step != PROBE and version is not None:
            age = step - max(version, 0)
            self.edges[name].stale_steps += age
            self.edges[name].stalest = max(self.edges[name].stalest, age)

    def state(self) -> dict[str, Any]:
        """Copies with their versions, and the messages that others may still ask for; nothing where signals are exchanged."""
        if not self.weights:
            return {}
        copies = {n: {"version": c.version, "weights": c.model.state_dict()} for n, c in self.copies.items()}
        since = self._step if self.exchange.newest else self._due(self._step)
        messages = [
            {"step": m.step, "version": m.version, "weights": codecs.decode(m.content.signals)}
            for m in self.mailbox.kept()
            if m.step >= since
        ]
        return {"copies": copies, "messages": messages}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        for name, kept in state.get("copies", {}).items():
            if name in self.copies:
                self.copies[name].model.load_state_dict(kept["weights"])
                self.copies[name].version = kept["version"]
        self.mailbox.restore(
            Message(self.name, m["step"], m["version"], codecs.encode(m["weights"], DENSE)) for m in state.get("messages", ())
        )

    def stats(self) -> dict[str, dict[str, Any]]:
        """Neighbour -> what came from it; "" what was published."""
        return {name: vars(edge) for name, edge in self.edges.items()} | {"": dict(self.sent)}

    def close(self) -> None:
        """Takes nothing from the neighbours any more; what was published stays for them."""
        self._asked.clear()
        for neighbour in self.neighbours.values():
            neighbour.leave()
        self.mailbox.end()


def _weights(offer: Offer) -> codecs.Encoded:
    """The student's weights, as they are now."""
    found = codecs.encode(dict(offer.weights()), DENSE)
    for parts in found.signals.values():
        parts["dense"] = np.array(parts["dense"])
    return found


def margin(exchange: Exchange, peers: int) -> int:
    """Steps after which all peers have heard, one from the other, that one of them was asked to stop."""
    return 0 if exchange.newest else peers * exchange.every + exchange.late


def learn_together(
    members: Mapping[str, Learning], links: Mapping[str, PeerLink], ended: Callable[[str, Any], None] | None = None
) -> dict[str, Any]:
    """Runs the peers of one process to their end, each up to its exchange in turn.

    Args:
        members: peer -> its training (`learning`).
        links: peer -> its side of the exchange.
        ended: told each peer's result as it ends.

    Returns:
        Peer -> its result.

    Raises:
        Interrupted: they were stopped, all with a checkpoint. Any other error of a peer, at once.
    """
    running, said = dict(members), dict.fromkeys(members, None)
    results: dict[str, Any] = {}
    stopped: Interrupted | None = None
    try:
        while running:
            offers: dict[str, tuple[Offer, float]] = {}
            for name in list(running):
                try:
                    offer = running[name].send(said[name])  # type: ignore[arg-type]
                    offers[name] = offer, links[name].publish(offer)
                except StopIteration as done:
                    results[name] = done.value
                    del running[name]
                    if ended is not None:
                        ended(name, done.value)
                except Interrupted as error:
                    stopped = error
                    del running[name]
                except RaykdError as error:
                    if str(error).startswith("Peer "):
                        raise
                    raise type(error)(f"Peer {name!r}: {error}") from error
            for name, (offer, waited) in offers.items():
                found = links[name].collect(offer)
                said[name] = Said(found.answers, found.versions, found.gone, found.stop_at, found.waited + waited)  # type: ignore[assignment]
    finally:
        _close(running.values())
    if stopped is not None:
        raise stopped
    return results


def _close(running: Iterable[Learning]) -> None:
    for training in running:
        with contextlib.suppress(RaykdError):
            training.close()
