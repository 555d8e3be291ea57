"""The image bank: batches of made images, in memory and on disk, from which a student learns.

    put(batch)     by whoever makes images; past `capacity` the least worth keeping goes
    draw(count)    images of any of them, as likely as their priority says

What does not fit in memory is on disk, one Arrow file a batch, written beside and renamed: a file is whole or not there. Each
image in it has a checksum; a batch of which something is damaged, or gone, is dropped with a warning when it is read.
"""

from __future__ import annotations

import errno
import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
NOTES = {"label": np.int64, "seen": np.int64, "confidence": np.float32}  # what a file says of each image
UNSEEN = -1  # class of an image of which nobody noted what teachers see in it


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
        seen: [b] int64, the classes that teachers see in the images; empty where nobody noted it.
        confidence: [b] float32, how sure they are, 0 to 1; empty where nobody noted it.
    """

    number: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    version: int = -1
    maker: int = 0
    loss: float = 0.0
    score: float = 0.0
    seconds: float = 0.0
    seen: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    confidence: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return self.images.nbytes

    @property
    def notes(self) -> dict[str, NDArray[Any]]:
        """What its file says of each image, by column."""
        found: dict[str, NDArray[Any]] = {"label": self.labels, "seen": self.seen, "confidence": self.confidence}
        return {name: value.astype(NOTES[name], copy=False) for name, value in found.items() if len(value)}


class _Damaged(Exception):
    """What is wrong with a file, without a full stop."""


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
        self._saved: set[int] = set()  # numbers that one of the last checkpoints names
        self._old: list[list[int]] = [[]]  # those of them that were dropped, by the checkpoint since which nobody needs them
        self.spilled = self.dropped = self.damaged = 0

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
            DataError: the bank is empty, or a file cannot be read.
        """
        while True:
            if not self._batches:
                raise DataError("bank: expected images to draw from, got none yet.")
            try:
                return self._draw(count, generator)
            except _Damaged as error:
                self._lose(*error.args)

    def _draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        order = list(self._batches)
        weights = self._weights(order)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        inside = torch.rand(count, generator=generator, dtype=torch.float64)
        images: list[Any] = [None] * count
        labels, index = np.empty(count, np.int64), np.empty(count, np.int64)
        for place in chosen.unique().tolist():
            batch, where = self._batches[order[place]], (chosen == place).nonzero().flatten()
            rows = (inside[where] * len(batch.labels)).long().tolist()
            found = batch.images[rows] if batch.nbytes else self._read(batch.number, rows)[0]
            for i, row, image in zip(where.tolist(), rows, found):
                images[i], labels[i], index[i] = image, batch.labels[row], batch.number * len(batch.labels) + row
        drawn = torch.from_numpy(np.stack(images))
        return {"images": drawn, "labels": torch.from_numpy(labels), "sample_index": torch.from_numpy(index)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which batches there are, all of them on disk from here on."""
        for number in list(self._batches):
            self._write(number)
        self._saved |= set(self._batches)
        self._old.append([])
        while len(self._old) > KEPT:
            for number in self._old.pop(0):
                self._forget(number)
        keep = [(b.number, b.version, b.maker, b.loss, b.score, b.seconds) for b in self._batches.values()]
        counts = {"dropped": self.dropped, "spilled": self.spilled, "damaged": self.damaged}
        return {"batches": [list(entry) for entry in keep]} | counts

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`.

        Raises:
            DataError: all files have gone or are damaged, or one cannot be read.
        """
        self._batches, self._held, self._old = {}, 0, [[]]
        self._written = {int(entry[0]) for entry in state["batches"]}
        self._saved = set(self._written)
        self.damaged = int(state.get("damaged", 0))
        for number, version, maker, loss, score, seconds in state["batches"]:
            try:
                images, notes = self._read(int(number))
            except _Damaged as error:
                self._lose(*error.args)
                continue
            made = MadeBatch(int(number), images, notes.pop("label"), int(version), int(maker), loss, score, seconds, **notes)
            self._batches[made.number] = made
            self._held += made.nbytes
            self._fit(made.number)
        self.dropped, self.spilled = int(state["dropped"]), int(state["spilled"])
        if state["batches"] and not self._batches:
            raise DataError(f"bank {self.folder}: expected batches of images, got damaged files alone. Start the run anew.")
        known = {self._path(number).name for number in self._batches}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in known:
                path.unlink()

    def summary(self, num_classes: int, version: int) -> dict[str, Any]:
        """Size, what teachers see in all images by class, age of the snapshots in the student's steps, what went where."""
        counts = np.zeros(num_classes, np.int64)
        for batch in self._batches.values():
            counts += np.bincount(batch.seen, minlength=num_classes)
        ages = [version - b.version for b in self._batches.values() if b.version >= 0]
        return {
            "batches": len(self._batches),
            "bank_classes": counts.tolist(),
            "age_mean": float(np.mean(ages)) if ages else None,
            "age_max": max(ages, default=None),
            "dropped": self.dropped,
            "damaged": self.damaged,
            "spilled": self.spilled,
            "held_bytes": self._held,
        }

    def newest(self, count: int) -> dict[str, NDArray[Any]]:
        """Of the batches that came last, at most `count` images: `images` and NOTES, UNSEEN and nan where nobody noted them."""
        found: list[dict[str, NDArray[Any]]] = []
        for number in reversed(list(self._batches)):
            try:
                batch = self._whole(number)
            except _Damaged as error:
                self._lose(*error.args)
                continue
            unknown = {"seen": np.full(len(batch.labels), UNSEEN), "confidence": np.full(len(batch.labels), np.nan, np.float32)}
            found.append({"images": batch.images} | unknown | batch.notes)
            if sum(len(own["label"]) for own in found) >= count:
                break
        return {name: np.concatenate([own[name] for own in found])[:count] for name in ("images", *NOTES)}

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
        if number in self._saved:
            self._old[-1].append(number)
        else:
            self._forget(number)
        self.dropped += 1

    def _forget(self, number: int) -> None:
        """Nobody comes back to this batch: its file goes."""
        self._written.discard(number)
        self._saved.discard(number)
        self._path(number).unlink(missing_ok=True)

    def _lose(self, number: int, why: str) -> None:
        """Drops a batch whose file is damaged."""
        warnings.warn(f"{why}. Batch {number} is dropped.", stacklevel=3)
        self._batches.pop(number, None)
        self._forget(number)
        self.damaged += 1

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
        return _with(batch, self._read(number)[0])

    def _write(self, number: int) -> None:
        path, batch = self._path(number), self._batches[number]
        if number in self._written:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        images, notes = [image.tobytes() for image in batch.images], batch.notes
        sums = [_checksum(image, notes, row) for row, image in enumerate(images)]
        columns = {"image": pa.array(images, pa.binary()), "crc32": pa.array(sums, pa.uint32())}
        table = pa.table(columns | {name: pa.array(value) for name, value in notes.items()})
        table = table.replace_schema_metadata({"shape": ",".join(map(str, batch.images.shape[1:]))})
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(part, path)
        self._written.add(number)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.arrow"

    def _read(self, number: int, rows: list[int] | None = None) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
        """Images and notes of a batch on disk, or of these rows of it; of the others nothing is read.

        Raises:
            _Damaged: its number, and what is wrong. DataError: the file cannot be read now.
        """
        path = self._path(number)
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
                table.validate(full=True)
                table = table if rows is None else table.take(rows)
                shape = tuple(int(n) for n in table.schema.metadata[b"shape"].decode().split(","))
                raw = [value.as_py() for value in table["image"]]
                images = np.stack([np.frombuffer(image, np.uint8).reshape(shape) for image in raw])
                there = ["label", *(name for name in ("seen", "confidence") if name in table.column_names)]
                notes = {name: table[name].to_numpy().astype(NOTES[name]) for name in there}
                sums = table["crc32"].to_pylist() if "crc32" in table.column_names else []  # older files have none
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):  # of the machine, not of the file
                raise DataError(f"bank file {path}: expected a batch of images, got {error}. Resume the run.") from None
            raise _Damaged(number, f"bank file {path}: expected a batch of images, got {error}") from None
        for i, wanted in enumerate(sums):
            if _checksum(raw[i], notes, i) != wanted:
                row = i if rows is None else rows[i]
                raise _Damaged(number, f"bank file {path}: expected image {row} as it was written, got another checksum")
        return images, notes


def _with(batch: MadeBatch, images: NDArray[np.uint8]) -> MadeBatch:
    """The batch with these images; notes that came in one buffer with the others are copied, so that it is given back."""
    return replace(batch, images=images, labels=batch.labels.copy(), seen=batch.seen.copy(), confidence=batch.confidence.copy())


def _checksum(image: bytes, notes: Mapping[str, NDArray[Any]], row: int) -> int:
    """Of an image and what its file says of it."""
    found = zlib.crc32(image)
    for name in NOTES:
        if name in notes:
            found = zlib.crc32(notes[name][row].tobytes(), found)
    return found
