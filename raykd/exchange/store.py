"""The store: signals that teachers gave once, in files that later runs train from.

    header.json                                   what it was made of: seed, augmentation, data, teachers, codecs
    job.json                                      the job it was made for; `verify` needs nothing else
    <teacher>/<signal>/epoch-000/shard-00000.arrow
    <teacher>/done/epoch-000/shard-00000.json     the shard is whole: rows, size and SHA-256 of each signal's file

This file holds the header; store_files.py writes and reads shards, stored.py is the source that trains from them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raykd.errors import ConfigError
from raykd.signals import Signal

FORMAT, VERSION = "raykd store", 1
HEADER, JOB = "header.json", "job.json"
PART = ".part"


class Place(NamedTuple):
    """One shard."""

    teacher: str
    epoch: int
    shard: int


@dataclass(frozen=True)
class Part:
    """One array of an encoded signal: a column of its files. `shape` is one row's."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Values a row."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Kept:
    """A signal in the store: its folder, its columns, and what the codec says of all rows alike."""

    signal: Signal
    folder: str
    parts: tuple[Part, ...]
    constants: Mapping[str, Any]

    @property
    def row_bytes(self) -> int:
        """Bytes a sample."""
        return sum(part.width * np.dtype(part.dtype).itemsize for part in self.parts)

    @property
    def schema(self) -> pa.Schema:
        """Of its files."""
        columns = [(p.name, pa.list_(pa.from_numpy_dtype(np.dtype(p.dtype)), p.width)) for p in self.parts]
        shapes = {p.name: p.shape for p in self.parts}
        about = {"signal": self.signal.key, "shapes": json.dumps(shapes), "constants": json.dumps(dict(self.constants))}
        return pa.schema(columns, metadata=about)


@dataclass(frozen=True)
class KeptTeacher:
    """One teacher's part of the header.

    Attributes:
        fingerprint: what its answers depend on, `weights` (the hash of its state) among it.
        codec: as the job writes it.
        temperature: at which a topk codec's tail was cut.
        signals: what is kept.
        errors: the codec's largest, over all that was built.
    """

    fingerprint: Mapping[str, Any]
    codec: str
    temperature: float
    signals: tuple[Kept, ...]
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        """Bytes a sample, all signals."""
        return sum(kept.row_bytes for kept in self.signals)


@dataclass(frozen=True)
class Header:
    """What a store was made of.

    Attributes:
        seed: of the job; with `augmentation` it keys the views.
        augmentation: its settings.
        varies: whether two epochs show different views.
        epochs: kept; the views of epoch e are those of epoch e modulo this.
        data: fingerprint of the training set.
        num_samples: of it.
        rows: samples a shard.
        batch_size: of the builder's requests.
        teachers: by name.
    """

    seed: int
    augmentation: Mapping[str, Any]
    varies: bool
    epochs: int
    data: str
    num_samples: int
    rows: int
    batch_size: int
    teachers: Mapping[str, KeptTeacher]

    @property
    def shards(self) -> int:
        """Of one teacher and epoch."""
        return -(-self.num_samples // self.rows)

    def places(self) -> list[Place]:
        """All shards, in the order they are built."""
        return [Place(t, e, s) for t in self.teachers for e in range(self.epochs) for s in range(self.shards)]

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        return shard * self.rows, min((shard + 1) * self.rows, self.num_samples)


def layout(signals: Iterable[Signal], reply: Mapping[str, Mapping[str, Any]]) -> tuple[Kept, ...]:
    """How the signals of a teacher are kept, from one encoded batch of them."""
    found: list[Kept] = []
    for signal in signals:
        folder, taken = re.sub(r"[^A-Za-z0-9._-]+", "-", signal.key).strip("-"), {k.folder for k in found}
        while folder in taken:
            folder += "_"
        parts = reply[signal.key]
        arrays = {name: value for name, value in parts.items() if isinstance(value, np.ndarray)}
        columns = tuple(Part(name, str(a.dtype), a.shape[1:]) for name, a in arrays.items())
        found.append(Kept(signal, folder, columns, {n: v for n, v in parts.items() if n not in arrays}))
    return tuple(found)


def write_header(folder: Path, header: Header) -> None:
    """Writes header.json, whole or not at all."""
    write_json(folder / HEADER, {"format": FORMAT, "version": VERSION, **to_dict(header)})


def to_dict(header: Header) -> dict[str, Any]:
    """A header as plain data."""
    return {**vars(header), "teachers": {name: _teacher_dict(t) for name, t in header.teachers.items()}}


def read_header(folder: Path) -> Header:
    """Reads header.json.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of another version.
    """
    try:
        data = json.loads((folder / HEADER).read_text())
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ConfigError(
                f"Store {folder}: expected a {FORMAT} of version {VERSION}, got {data['format']} {data['version']}. "
                "Build it again with this raykd."
            )
        teachers = {name: _teacher(t) for name, t in data["teachers"].items()}
        names = ("seed", "augmentation", "varies", "epochs", "data", "num_samples", "rows", "batch_size")
        return Header(**{name: data[name] for name in names}, teachers=teachers)
    except OSError as error:
        why = "no such folder" if not folder.is_dir() else f"no {HEADER} in it" if not (folder / HEADER).exists() else error
        raise ConfigError(f"Store {folder}: expected a store, got {why}. Make it with `raykd store build`.") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"Store {folder}: its {HEADER} cannot be read ({type(error).__name__}: {error}).") from None


def _teacher_dict(teacher: KeptTeacher) -> dict[str, Any]:
    return {**vars(teacher), "signals": {kept.signal.key: _kept_dict(kept) for kept in teacher.signals}}


def _kept_dict(kept: Kept) -> dict[str, Any]:
    s = kept.signal
    about = {"kind": s.kind, "layer": s.layer, "options": [list(o) for o in s.options], "view": s.view}
    parts = {p.name: {"dtype": p.dtype, "shape": list(p.shape)} for p in kept.parts}
    return {"signal": about, "folder": kept.folder, "parts": parts, "constants": dict(kept.constants)}


def _teacher(data: Mapping[str, Any]) -> KeptTeacher:
    signals = tuple(_kept(kept) for kept in data["signals"].values())
    return KeptTeacher(data["fingerprint"], data["codec"], data["temperature"], signals, data["errors"])


def _kept(data: Mapping[str, Any]) -> Kept:
    s = data["signal"]
    signal = Signal(s["kind"], s["layer"], tuple((name, value) for name, value in s["options"]), s["view"])
    parts = tuple(Part(name, p["dtype"], tuple(p["shape"])) for name, p in data["parts"].items())
    return Kept(signal, data["folder"], parts, data["constants"])


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{os.getpid()}{PART}"
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n")


def again(folder: Path) -> str:
    """The command that builds what is not whole."""
    return f"`raykd store build {folder} --out {folder}`"
