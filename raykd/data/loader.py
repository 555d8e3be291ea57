"""Prefetching: the batches of a plan, in order, made ahead by threads or processes.

With threads, a batch is made in this process. With processes, each worker re-creates batches from their keys and writes the
images into a slot of shared memory; the consumer copies them out and frees the slot. Either way the bits are `make_batch`'s.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raykd.config import Augmentation
from raykd.data.batches import Batch, Plan, batch_of
from raykd.data.sets import DataSet
from raykd.errors import ConfigError, DataError

Position: TypeAlias = tuple[int, int]


class _Ahead(NamedTuple):
    """A batch that is being made."""

    position: Position
    slot: int  # of shared memory; -1 with threads
    future: Future[Batch]


class Loader:
    """Iterates the batches of a plan from any (epoch, step) on, a window of them prefetched.

    Args:
        dataset: picklable if `processes` > 0.
        plan: of this worker; its seed keys the augmentation too.
        augmentation: None for none.
        start: (epoch, step) of the first batch.
        prefetch: batches made ahead, at least 1; with processes also the slots of shared memory.
        processes: 0 makes batches in threads of this process.
        threads: number of them.
        timeout_s: longest wait for one batch, in seconds.

    Errors of a worker surface at the consumer in their own type, at the batch they belong to. Use it as a context manager, or
    `close` it. Processes are spawned, so a script that uses them needs the `if __name__ == "__main__"` guard.
    """

    def __init__(
        self,
        dataset: DataSet,
        plan: Plan,
        augmentation: Augmentation | None,
        *,
        start: Position = (0, 0),
        prefetch: int = 4,
        processes: int = 0,
        threads: int = 1,
        timeout_s: float = 600.0,
    ) -> None:
        if prefetch < 1 or processes < 0 or threads < 1:
            raise ConfigError(
                f"loader: expected prefetch, threads >= 1 and processes >= 0, got {prefetch}, {threads}, {processes}."
            )
        self.plan, self.prefetch, self.timeout_s = plan, prefetch, timeout_s
        self._position = self._checked(start)
        self._ahead: deque[_Ahead] = deque()
        self._stuck = False
        self._maker: _Threads | _Processes
        if processes:
            self._maker = _Processes(dataset, plan, augmentation, processes, prefetch)
        else:
            self._maker = _Threads(dataset, plan, augmentation, threads)

    @property
    def position(self) -> Position:
        """(epoch, step) of the batch that comes next: what a checkpoint keeps."""
        return self._position

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, epoch after epoch, from `position` on."""
        while True:
            yield self._next()

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch: what is left of it if `position` is within it, else all."""
        if self._position[0] != epoch:
            self.seek((epoch, 0))
        while self._position[0] == epoch:
            yield self._next()

    def seek(self, position: Position) -> None:
        """Goes on from (epoch, step)."""
        self._position = self._checked(position)
        if self._ahead and self._ahead[0].position != position:
            self._drop()

    def close(self) -> None:
        """Stops the workers; batches made ahead are dropped."""
        for ahead in self._ahead:
            ahead.future.cancel()
        self._ahead.clear()
        self._maker.close(wait=not self._stuck)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _next(self) -> Batch:
        self._fill()
        ahead = self._ahead[0]
        try:
            batch = self._maker.finish(ahead.future.result(self.timeout_s), ahead.slot)
        except FutureTimeout as error:
            self._stuck = True
            raise DataError(
                f"loader: expected batch {ahead.position} within {self.timeout_s:g} s, got none. See the storage."
            ) from error
        except BrokenProcessPool as error:
            raise DataError(
                f"loader: expected batch {ahead.position}, got none: a worker process died. See its memory."
            ) from error
        except BaseException:
            self._drop()
            raise
        self._ahead.popleft()
        self._maker.free(ahead.slot)
        self._position = self._after(ahead.position)
        self._fill()
        return batch

    def _fill(self) -> None:
        while len(self._ahead) < self.prefetch:
            position = self._after(self._ahead[-1].position) if self._ahead else self._position
            slot = self._maker.take()
            self._ahead.append(_Ahead(position, slot, self._maker.submit(position, slot)))

    def _drop(self) -> None:
        """Forgets what is being made; waits for what has begun, since it writes into its slot."""
        wait([ahead.future for ahead in self._ahead if not ahead.future.cancel()], self.timeout_s)
        for ahead in self._ahead:
            self._maker.free(ahead.slot)
        self._ahead.clear()

    def _after(self, position: Position) -> Position:
        epoch, step = position
        return (epoch, step + 1) if step + 1 < self.plan.steps_per_epoch else (epoch + 1, 0)

    def _checked(self, position: Position) -> Position:
        epoch, step = position
        if epoch < 0 or not 0 <= step < self.plan.steps_per_epoch:
            raise ConfigError(f"position: expected epoch >= 0 and step 0..{self.plan.steps_per_epoch - 1}, got {position}.")
        return epoch, step


class _Work(NamedTuple):
    """What every worker knows."""

    dataset: DataSet
    plan: Plan
    augmentation: Augmentation | None

    def make(self, position: Position) -> Batch:
        """The batch at (epoch, step)."""
        return batch_of(self.dataset, self.plan, self.augmentation, *position)


class _Threads:
    """Makes batches in threads of this process."""

    def __init__(self, dataset: DataSet, plan: Plan, augmentation: Augmentation | None, threads: int) -> None:
        self._work = _Work(dataset, plan, augmentation)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="raykd-loader")

    def take(self) -> int:
        return -1

    def free(self, slot: int) -> None:
        pass

    def submit(self, position: Position, _: int) -> Future[Batch]:
        return self._pool.submit(self._work.make, position)

    def finish(self, batch: Batch, _: int) -> Batch:
        return batch

    def close(self, wait: bool) -> None:
        self._pool.shutdown(wait=wait, cancel_futures=True)


class _Processes:
    """Makes batches in spawned processes that write images into slots of shared memory."""

    def __init__(self, dataset: DataSet, plan: Plan, augmentation: Augmentation | None, processes: int, slots: int) -> None:
        dataset.read(np.zeros(1, np.int64))  # builds the decoded cache once, here
        shape = augmentation.out_shape(dataset.shape) if augmentation else dataset.shape
        self._slots = torch.empty((slots, plan.batch_size // plan.world, *shape), dtype=torch.uint8).share_memory_()
        self._free = list(range(slots))
        self._pool = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            _start_worker,
            (_Work(dataset, plan, augmentation), self._slots),
        )

    def take(self) -> int:
        return self._free.pop()

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def submit(self, position: Position, slot: int) -> Future[Batch]:
        return self._pool.submit(_work_in_process, position, slot)

    def finish(self, batch: Any, slot: int) -> Batch:
        fields = {name: torch.from_numpy(values) for name, values in batch.items()}
        return Batch(images=self._slots[slot, : len(fields["sample_index"])].clone(), **fields)

    def close(self, wait: bool) -> None:
        self._pool.shutdown(wait=wait, cancel_futures=True)


_worker: tuple[_Work, Tensor] | None = None


def _start_worker(work: _Work, slots: Tensor) -> None:
    """Prepares a spawned process: one thread, and an end when the parent ends."""
    global _worker
    torch.set_num_threads(1)
    _worker = work, slots
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, which writes a checkpoint first
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_in_process(position: Position, slot: int) -> Any:
    """Makes a batch into a slot; returns the small fields as arrays."""
    assert _worker is not None, "the process was started without _start_worker"
    work, slots = _worker
    batch = work.make(position)
    images = batch.pop("images")
    slots[slot, : len(images)] = images
    return {name: field.numpy() for name, field in batch.items()}
