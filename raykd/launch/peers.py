"""Peers on Ray: each an actor group of its own, or several in one; started, watched and started again by the driver.

driver    places a group for each process of peers, asks where they are, ends those that hang, follows `exchange.on_loss`
actor     one thread trains (`learn_together`); an event loop beside it hands out messages
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raykd.errors import Interrupted, LostError, RaykdError, ResourceError, SourceError
from raykd.exchange.mailbox import Status
from raykd.launch import hosts
from raykd.launch.cluster import NAMESPACE
from raykd.launch.online import ROOM, Group, boxes_of, drop, members
from raykd.launch.peering import together
from raykd.schemes.online import learn_together

WATCH_S = 0.5
POLL_S = 0.2
ASK_S = 20.0  # for a peer's event loop to say where it is
SETTLE_S = 30.0  # for the others to come to where they wait for a peer that died


class PeerWorker:
    """One worker of one process of peers."""

    def __init__(self, group: Group, names: tuple[str, ...], rank: int) -> None:
        self._group, self._names, self._rank = group, names, rank
        self._boxes = boxes_of(group, names)

    async def address(self) -> tuple[str, int]:
        """A free port on this worker's node, for the meeting of the workers of one peer."""
        return hosts.free_port()

    async def message(self, owner: str, step: int, listener: str, after: int | None) -> Any:
        """A peer's message, when it is there."""
        return await self._boxes[owner].when_there(step, listener, after)

    async def leave(self, owner: str, listener: str) -> None:
        """A listener takes nothing from a peer any more."""
        self._boxes[owner].leave(listener)

    async def status(self) -> dict[str, Status]:
        """Where the peers of this process are."""
        return {name: box.report() for name, box in self._boxes.items()}

    async def work(self, world: int, address: tuple[str, int], rejoin: int | None) -> None:
        """Trains its peers."""
        import asyncio

        await asyncio.get_running_loop().run_in_executor(None, self._work, world, address, rejoin)

    def _work(self, world: int, address: tuple[str, int], rejoin: int | None) -> None:
        group, rank = self._group, self._rank
        if (group.folder / hosts.FATAL).exists():
            return
        with hosts.meeting(group.parts[self._names[0]].job.launch, rank, world, address):
            try:
                trainings, links = members(group, self._names, rank, world, self._boxes, rejoin)
                learn_together(trainings, links, self._ended)
            except LostError as error:
                self._fail(error)
                raise
            except RaykdError as error:
                self._fail(error)
                if world > 1 and not isinstance(error, hosts.AGREED):
                    raise

    def _fail(self, error: RaykdError) -> None:
        hosts.leave_error(self._group.folder, error, self._rank)

    def _ended(self, name: str, result: Any) -> None:
        if self._rank == 0:
            hosts.leave_result(self._group.folder / ROOM / name, result)


@dataclass
class _Process:
    """One process of peers, as the driver sees it."""

    names: tuple[str, ...]
    workers: list[Any] = field(default_factory=list)
    refs: list[Any] = field(default_factory=list)
    placement: Any = None
    lives: int = 0
    ended: bool = False
    asked: dict[Any, float] = field(default_factory=dict)  # a question after its status, and when it was asked
    seen: dict[str, Status] = field(default_factory=dict)


class Watch:
    """The driver's part: starts all peers and follows them to their end."""

    def __init__(self, group: Group, poll: Callable[[], None]) -> None:
        self.group, self.poll = group, poll
        self.processes = {
            process: _Process(group.there(names)) for process, names in together(group.job).items() if group.there(names)
        }
        self.dropped: list[str] = []
        self.respawned: dict[str, int] = {}

    def run(self) -> None:
        """All peers to their end.

        Raises:
            SourceError: a peer was lost and the run does not go on without it. ResourceError: they were not placed in time.
        """
        try:
            for process in self.processes:
                self._place(process)
            for process in self.processes:
                self._start(process, None)
            self._follow()
        finally:
            for name in self.processes:
                self._kill(name)

    def _place(self, process: str) -> None:
        job, this = self.group.job, self.processes[process]
        launch = self.group.parts[this.names[0]].job.launch
        bundle = {"CPU": launch.cpus, **launch.resources} | ({"GPU": launch.gpus} if launch.gpus else {})
        this.placement = ray.util.placement_group([bundle] * launch.workers, strategy=launch.placement_strategy)
        try:
            ray.get(this.placement.ready(), timeout=launch.start_timeout_s)
        except GetTimeoutError:
            raise ResourceError(
                f"Peers {', '.join(this.names)}: {launch.workers} x {bundle} were not placed within "
                f"{job.launch.start_timeout_s:g} s. Let peers share an actor (peers.*.actor), lower launch.cpus, or add nodes."
            ) from None
        make = ray.remote(PeerWorker)
        this.workers = [
            make.options(
                name=self.group.actor(process, rank),
                namespace=NAMESPACE,
                num_cpus=launch.cpus,
                num_gpus=launch.gpus,
                resources=dict(launch.resources) or None,
                max_concurrency=1000,
                enable_task_events=False,  # one a call: the control store would hold a row for each step
                scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(this.placement),
            ).remote(self.group, this.names, rank)
            for rank in range(launch.workers)
        ]

    def _start(self, process: str, rejoin: int | None) -> None:
        this = self.processes[process]
        try:
            address = ray.get(this.workers[0].address.remote(), timeout=self.group.job.launch.start_timeout_s)
        except RayError as error:
            raise SourceError(f"Peers {', '.join(this.names)} did not start: {hosts.last_line(error)}") from None
        this.refs = [w.work.remote(len(this.workers), address, rejoin) for w in this.workers]

    def _follow(self) -> None:
        while any(not p.ended for p in self.processes.values()):
            self.poll()
            if (self.group.folder / hosts.FATAL).exists():
                self._drain()
                return
            for name, process in list(self.processes.items()):
                if not process.ended:
                    why = self._look(process)
                    if why is not None:
                        self._lost(name, why)
            time.sleep(POLL_S)

    def _look(self, process: _Process) -> str | None:
        """What a process has died of, or that it hangs; None where all is well."""
        done, waiting = ray.wait(process.refs, num_returns=len(process.refs), timeout=0)
        try:
            ray.get(done)
        except RayError as error:
            return hosts.last_line(error)
        if not waiting:
            process.ended = True
            return None
        return self._hangs(process)

    def _hangs(self, process: _Process) -> str | None:
        """Asks every worker where its peers are; who does not answer, or waits for nobody and gets nowhere, hangs."""
        now, limit = time.monotonic(), self.group.job.exchange.timeout_s
        if not process.asked:
            process.asked = {w.status.remote(): now for w in process.workers}
            return None
        done, waiting = ray.wait(list(process.asked), num_returns=len(process.asked), timeout=0)
        if waiting:
            oldest = min(process.asked[ref] for ref in waiting)
            return f"no word for {now - oldest:.0f} s" if now - oldest > max(limit, ASK_S) else None
        if now - max(process.asked.values()) < WATCH_S:
            return None
        for ref in done:
            try:
                found: dict[str, Status] = ray.get(ref)
            except RayError:
                continue  # `_look` tells
            process.seen |= found
            stuck = [n for n, s in found.items() if not s.ended and s.waiting_for is None and s.idle_s > limit]
            if stuck and len(stuck) == len([n for n, s in found.items() if not s.ended]):
                return f"no step for {limit:g} s"
        process.asked = {}
        return None

    def _lost(self, name: str, why: str) -> None:
        """Follows `exchange.on_loss`."""
        process, exchange = self.processes[name], self.group.job.exchange
        self._kill(name)
        who = ", ".join(process.names)
        if (self.group.folder / hosts.FATAL).exists():
            return
        if exchange.on_loss == "drop":
            process.ended = True
            self.dropped += process.names
            for peer in process.names:
                drop(self.group.folder, peer)
            self._leave(process.names)
            if all(n in self.dropped for p in self.processes.values() for n in p.names):
                raise SourceError(f"All peers are lost; the last was {who} ({why}). Their last checkpoints are intact: resume.")
            return
        if exchange.on_loss == "respawn" and process.lives < exchange.respawns:
            process.lives += 1
            self.respawned |= dict.fromkeys(process.names, process.lives)
            rejoin = self._rejoin(process)
            self._place(name)
            self._start(name, rejoin)
            return
        times = f" after {process.lives} restarts" if process.lives else ""
        raise SourceError(f"Peer {who} is lost{times} ({why}). The last checkpoints are intact: resume the run.")

    def _leave(self, names: tuple[str, ...]) -> None:
        """Tells the others that these take nothing any more."""
        for process in self.processes.values():
            for owner in process.names if not process.ended else ():
                for worker in process.workers:
                    for listener in names:
                        worker.leave.remote(owner, listener)

    def _rejoin(self, lost: _Process) -> int | None:
        """The first step at which the others need what these peers publish, or of which these have not heard them; it is known
        once every one that listens to them waits for them."""
        if self.group.job.exchange.newest:  # nobody waits for another
            return None
        others = [p for p in self.processes.values() if p is not lost and p.workers]
        deadline = time.monotonic() + SETTLE_S
        while True:
            self.poll()
            seen: dict[str, Status] = {}
            refs = [w.status.remote() for p in others for w in p.workers]
            for ref in refs:
                try:
                    found = ray.get(ref, timeout=ASK_S)
                except RayError:
                    continue
                seen |= {n: s for n, s in found.items() if n not in seen or s.step < seen[n].step}
            listening = {n for name in lost.names for n in self.group.parts[name].listeners if n in seen and not seen[n].ended}
            waiting = {n for n in listening if seen[n].waiting_for in lost.names}
            if waiting == listening or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        exchange = self.group.job.exchange
        late = exchange.late
        needed = [max(0, seen[n].step - late) if n in waiting else seen[n].step + exchange.every for n in listening]
        needed += [s.owed[name] + late for s in seen.values() for name in lost.names if name in s.owed]
        if not needed:
            needed = [s.step for n, s in seen.items() if not s.ended and set(self.group.parts[n].listeners) & set(lost.names)]
        return min(needed) // exchange.every * exchange.every if needed else None

    def _drain(self) -> None:
        """After an error of one, or a stop: lets the others come to their own end, for a while."""
        stopped = isinstance(hosts.fatal(self.group.folder), Interrupted)
        deadline = time.monotonic() + (self.group.job.launch.start_timeout_s if stopped else 0.0)
        while time.monotonic() < deadline:
            refs = [ref for p in self.processes.values() for ref in p.refs]
            if not ray.wait(refs, num_returns=len(refs), timeout=POLL_S)[1]:
                return
            self.poll()

    def _kill(self, name: str) -> None:
        process = self.processes[name]
        for worker in process.workers:
            ray.kill(worker)
        if process.placement is not None:
            ray.util.remove_placement_group(process.placement)
        process.workers, process.placement, process.asked = [], None, {}
