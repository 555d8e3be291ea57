"""The image bank: batches of made images, in memory and on disk, from which a student learns.

    put(batch)     by whoever makes images; past `capacity` the least worth keeping goes
    draw(count)    images of any of them, as likely as their priority says

What does not fit in memory is on disk, one Arrow file a batch, written beside and renamed: a file is whole or not there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raykd.errors import ConfigError, DataError, near

PRIORITIES = ("uniform", "recent", "hard")
KEPT = 3  # checkpoints after which the files of a dropped batch go: an older one may be what a run resumes from
HALF_LIFE = 64  # batches after which an image is half as likely to be drawn, with priority "recent"


@dataclass(frozen=True)
class MadeBatch:
    """Images that somebody made, and how.

    Attributes:
        number: of the batch: what its randomness is keyed by.
        images: [b c h w] uint8.
        labels: [b] int64, the classes wanted.
        version: the student's steps behind the snapshot it was made with; -1: made without a student.
        maker: of the synthesizer.
        loss: of the images, at the end.
        score: what makes it worth drawing, with priority "hard"; the disagreement of teacher and student, in nats.
        seconds: it took.
    """

    number: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    version: int = -1
    maker: int = 0
    loss: float = 0.0
    score: float = 0.0
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return self.images.nbytes


class Bank:
    """Batches of made images, bounded in number and in memory.

    Args:
        folder: for what does not fit in memory, and for checkpoints.
        capacity: batches kept.
        memory_bytes: of images kept in memory; the others are read back from disk when they are drawn.
        priority: uniform | recent (later batches are likelier) | hard (by score).
    """

    def __init__(self, folder: Path, capacity: int, memory_bytes: int, priority: str = "uniform") -> None:
        if priority not in PRIORITIES:
            raise ConfigError(f"synthesis.priority: no priority {priority!r}. {near(priority, PRIORITIES)}")
        self.folder, self.capacity, self.memory_bytes, self.priority = folder, capacity, memory_bytes, priority
        self._batches: dict[int, MadeBatch] = {}  # in the order in which they came; images of those on disk are empty
        self._written: set[int] = set()  # numbers whose files are of these batches, not of a start that was cut off
        self._held = 0
        self._old: list[list[Path]] = [[]]  # files of dropped batches, by the checkpoint since which nobody needs them
        self.spilled = self.dropped = 0

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def numbers(self) -> list[int]:
        """Of the batches that are there, in the order in which they came."""
        return list(self._batches)

    def put(self, batch: MadeBatch) -> None:
        """Takes a batch in; a batch that is there already changes nothing."""
        if batch.number in self._batches:
            return
        self._batches[batch.number] = batch
        self._held += batch.nbytes
        while len(self._batches) > self.capacity:
            self._drop(self._least())
        self._fit(batch.number)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """`count` images, drawn with replacement: batches by priority, images within them alike.

        Args:
            count: b.
            generator: of the draw.

        Returns:
            images [b c h w] uint8, labels [b] int64, sample_index [b] int64 (batch number and place in it).

        Raises:
            DataError: the bank is empty, or a file has gone or is damaged.
        """
        if not self._batches:
            raise DataError("bank: expected images to draw from, got none yet.")
        order = list(self._batches)
        weights = self._weights(order)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        inside = torch.rand(count, generator=generator, dtype=torch.float64)
        images: list[Any] = [None] * count
        labels, index = np.empty(count, np.int64), np.empty(count, np.int64)
        for place in chosen.unique().tolist():
            batch, where = self._batches[order[place]], (chosen == place).nonzero().flatten()
            rows = (inside[where] * len(batch.labels)).long().tolist()
            found = batch.images[rows] if batch.nbytes else _read(self._path(batch.number), rows)[0]
            for i, row, image in zip(where.tolist(), rows, found):
                images[i], labels[i], index[i] = image, batch.labels[row], batch.number * len(batch.labels) + row
        drawn = torch.from_numpy(np.stack(images))
        return {"images": drawn, "labels": torch.from_numpy(labels), "sample_index": torch.from_numpy(index)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which batches there are, all of them on disk from here on."""
        for number in list(self._batches):
            self._write(number)
        self._old.append([])
        while len(self._old) > KEPT:
            for path in self._old.pop(0):
                path.unlink(missing_ok=True)
        keep = [(b.number, b.version, b.maker, b.loss, b.score, b.seconds) for b in self._batches.values()]
        return {"batches": [list(entry) for entry in keep], "dropped": self.dropped, "spilled": self.spilled}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`.

        Raises:
            DataError: a file has gone or is damaged.
        """
        self._batches, self._held, self._old = {}, 0, [[]]
        self._written = {int(entry[0]) for entry in state["batches"]}
        for number, version, maker, loss, score, seconds in state["batches"]:
            images, labels = _read(self._path(int(number)))
            made = MadeBatch(int(number), images, labels, int(version), int(maker), loss, score, seconds)
            self._batches[made.number] = made
            self._held += made.nbytes
            self._fit(made.number)
        self.dropped, self.spilled = int(state["dropped"]), int(state["spilled"])
        known = {self._path(number).name for number in self._batches}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in known:
                path.unlink()

    def summary(self, num_classes: int, version: int) -> dict[str, Any]:
        """Size, classes wanted, age of the snapshots in the student's steps, and how many were dropped or are on disk."""
        counts = np.zeros(num_classes, np.int64)
        for batch in self._batches.values():
            counts += np.bincount(batch.labels, minlength=num_classes)
        ages = [version - b.version for b in self._batches.values() if b.version >= 0]
        return {
            "batches": len(self._batches),
            "classes": counts.tolist(),
            "age_mean": float(np.mean(ages)) if ages else None,
            "age_max": max(ages, default=None),
            "dropped": self.dropped,
            "spilled": self.spilled,
            "held_bytes": self._held,
        }

    def newest(self, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images and labels of the batches that came last, at most `count` images."""
        images, labels = [], []
        for number in reversed(self._batches):
            batch = self._whole(number)
            images.append(batch.images)
            labels.append(batch.labels)
            if sum(map(len, labels)) >= count:
                break
        return np.concatenate(images)[:count], np.concatenate(labels)[:count]

    def _weights(self, order: list[int]) -> torch.Tensor:
        if self.priority == "recent":
            return torch.tensor([0.5 ** ((len(order) - 1 - i) / HALF_LIFE) for i in range(len(order))], dtype=torch.float64)
        if self.priority == "hard":
            scores = torch.tensor([self._batches[n].score for n in order], dtype=torch.float64).clamp_min(0)
            return scores + scores.mean().clamp_min(1e-6)
        return torch.ones(len(order), dtype=torch.float64)

    def _least(self) -> int:
        """The batch least worth keeping: the oldest, or with priority "hard" the easiest of the older half."""
        order = list(self._batches)
        if self.priority != "hard":
            return order[0]
        return min(order[: max(1, len(order) // 2)], key=lambda n: self._batches[n].score)

    def _drop(self, number: int) -> None:
        self._held -= self._batches.pop(number).nbytes
        self._old[-1].append(self._path(number))
        self.dropped += 1

    def _fit(self, last: int) -> None:
        """Leaves in memory what fits there, and the last one."""
        for number in list(self._batches):
            if self._held <= self.memory_bytes or number == last:
                break
            self._spill(number)

    def _spill(self, number: int) -> None:
        batch = self._batches[number]
        if not batch.nbytes:
            return
        self._write(number)
        self._held -= batch.nbytes
        self._batches[number] = _with(batch, np.empty((0, *batch.images.shape[1:]), np.uint8))
        self.spilled += 1

    def _whole(self, number: int) -> MadeBatch:
        batch = self._batches[number]
        if batch.nbytes:
            return batch
        return _with(batch, _read(self._path(number))[0])

    def _write(self, number: int) -> None:
        path, batch = self._path(number), self._batches[number]
        if number in self._written:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        table = pa.table(
            {"image": pa.array([image.tobytes() for image in batch.images], pa.binary()), "label": pa.array(batch.labels)}
        ).replace_schema_metadata({"shape": ",".join(map(str, batch.images.shape[1:]))})
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(part, path)
        self._written.add(number)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.arrow"


def _with(batch: MadeBatch, images: NDArray[np.uint8]) -> MadeBatch:
    labels = batch.labels.copy()  # where images and labels came in one buffer, it is given back with the images
    return MadeBatch(batch.number, images, labels, batch.version, batch.maker, batch.loss, batch.score, batch.seconds)


def _read(path: Path, rows: list[int] | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A batch, or these rows of it; of the others nothing is read."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
            table = table if rows is None else table.take(rows)
            shape = tuple(int(n) for n in table.schema.metadata[b"shape"].decode().split(","))
            images = np.stack([np.frombuffer(v.as_py(), np.uint8).reshape(shape) for v in table["image"]])
            return images, table["label"].to_numpy().astype(np.int64)
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
        raise DataError(f"bank file {path}: expected a batch of images, got {error}. Start the run anew.") from None
