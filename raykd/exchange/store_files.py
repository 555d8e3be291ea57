"""The files of a store.

A shard holds the views of samples [s * rows, (s + 1) * rows) in one epoch, as one Arrow record batch: a fixed-size list a row
for each part of the signal's codec, so that a row is found by its number and read from a memory map. Files are written under
another name and renamed, the marker last; what has no marker is not there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd.errors import SourceError
from raykd.exchange.codec import Encoded
from raykd.exchange.store import Header, Kept, Place, replacing, write_json

MARKERS = "done"
ROWS, SHARDS = 4096, 8  # at most so many samples a shard, and about so many shards of a small data set
MOST_SHARD_BYTES = 256 * 1024**2  # of all signals of a teacher: what the builder holds in memory


def rows_a_shard(num_samples: int, batch_size: int, row_bytes: int) -> int:
    """Samples a shard, in whole batches: 4096, fewer where they take too much memory or replicas could not share the work."""
    wanted = min(ROWS, num_samples // SHARDS, MOST_SHARD_BYTES // max(row_bytes, 1))
    return max(wanted // batch_size, 1) * batch_size


def write_shard(folder: Path, header: Header, place: Place, replies: Iterable[Encoded]) -> dict[str, Any]:
    """Writes one shard: a file a signal, then its marker.

    Args:
        folder: of the store.
        header: of it.
        place: which shard.
        replies: encoded signals of its batches, in order; rows beyond the shard's are padding and are left out.

    Returns:
        The marker's content.

    Raises:
        SourceError: an answer is not finite.
    """
    started = time.perf_counter()
    kept = header.teachers[place.teacher].signals
    first, stop = header.span(place.shard)
    count = stop - first
    columns = {k.signal.key: {p.name: np.empty((count, *p.shape), p.dtype) for p in k.parts} for k in kept}
    errors: dict[str, float] = {}
    at = 0
    for reply in replies:
        size = min(header.batch_size, count - at)
        for key, own in columns.items():
            for name, column in own.items():
                column[at : at + size] = reply.signals[key][name][:size]
        for name, error in reply.errors.items():
            errors[name] = max(errors.get(name, 0.0), error)
        at += size
    if at != count:
        raise SourceError(f"Store {folder}: expected {count} rows of shard {place.shard}, got {at}.")
    files = {}
    for k in kept:
        _require_finite(place, k, columns[k.signal.key], first)
        files[k.signal.key] = _write_file(shard_file(folder, place, k), k, columns[k.signal.key])
    marker = {"rows": count, "files": files, "errors": errors, "seconds": round(time.perf_counter() - started, 4)}
    write_json(marker_file(folder, place), marker)
    return marker


def shard_bytes(kept: Kept, rows: int) -> int:
    """Bytes of a signal's file of so many rows, to the byte."""
    sink = pa.MockOutputStream()
    _write_columns(sink, kept, {p.name: np.zeros((rows, *p.shape), p.dtype) for p in kept.parts})
    return sink.size()


def total_bytes(header: Header) -> int:
    """Bytes of all Arrow files of the store once it is whole."""
    spans = [header.span(s) for s in range(header.shards)]
    counts: dict[int, int] = {}
    for first, stop in spans:
        counts[stop - first] = counts.get(stop - first, 0) + 1
    kept = [k for t in header.teachers.values() for k in t.signals]
    return header.epochs * sum(times * shard_bytes(k, rows) for k in kept for rows, times in counts.items())


def shard_file(folder: Path, place: Place, kept: Kept) -> Path:
    """Where a signal of a shard is."""
    return folder / place.teacher / kept.folder / f"epoch-{place.epoch:03d}" / f"shard-{place.shard:05d}.arrow"


def marker_file(folder: Path, place: Place) -> Path:
    """Where it says that a shard is whole."""
    return folder / place.teacher / MARKERS / f"epoch-{place.epoch:03d}" / f"shard-{place.shard:05d}.json"


def _require_finite(place: Place, kept: Kept, columns: Mapping[str, NDArray[Any]], first: int) -> None:
    for column in columns.values():
        if column.dtype.kind == "f" and not np.isfinite(column).all():
            bad = np.flatnonzero(~np.isfinite(column).reshape(len(column), -1).all(axis=1))
            raise SourceError(
                f"Teacher {place.teacher!r}, signal {kept.signal.key}: expected finite values, got NaN or infinite ones for "
                f"{len(bad)} samples, sample_index {first + int(bad[0])} of epoch {place.epoch} among them. "
                "Check its weights, its normalisation and its dtype."
            )


def _write_file(path: Path, kept: Kept, columns: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Size and SHA-256 of the file, taken from what was meant to be written."""
    with replacing(path) as part, part.open("wb") as file:
        sink = _Hashing(file)
        _write_columns(sink, kept, columns)
    return {"bytes": sink.count, "sha256": sink.digest.hexdigest()}


def _write_columns(sink: Any, kept: Kept, columns: Mapping[str, NDArray[Any]]) -> None:
    schema = kept.schema
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(columns[p.name].reshape(-1)), p.width) for p in kept.parts]
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


class _Hashing:
    """A file that hashes what it is given."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file, self.digest, self.count = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.count += len(data)
        self.file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.count

    def flush(self) -> None:
        self.file.flush()


def read_marker(folder: Path, place: Place) -> dict[str, Any] | None:
    """A shard's marker; None where there is none."""
    try:
        return json.loads(marker_file(folder, place).read_text())
    except (OSError, ValueError):
        return None


def fault(folder: Path, header: Header, place: Place, deep: bool = True) -> str | None:
    """What is wrong with a shard; None if it is whole.

    Args:
        folder: of the store.
        header: of it.
        place: which shard.
        deep: read the files and compare their SHA-256; else only their sizes.
    """
    marker = read_marker(folder, place)
    if marker is None:
        return f"{marker_file(folder, place).relative_to(folder)}: expected a marker, got none: the shard was never finished"
    for kept in header.teachers[place.teacher].signals:
        path = shard_file(folder, place, kept)
        name, wanted = path.relative_to(folder), marker["files"].get(kept.signal.key)
        if wanted is None:
            return f"{name}: the marker does not name it"
        size = path.stat().st_size if path.is_file() else None
        if size != wanted["bytes"]:
            return f"{name}: expected {wanted['bytes']} bytes, got {'none' if size is None else size}"
        if deep and (digest := _sha256(path)) != wanted["sha256"]:
            return f"{name}: expected sha256 {wanted['sha256'][:12]}, got {digest[:12]}: the file is damaged"
    return None


def open_shard(folder: Path, header: Header, place: Place, kept: Kept) -> dict[str, NDArray[Any]]:
    """The columns of one signal's shard as arrays [rows, *shape] over the memory-mapped file; nothing is copied."""
    batch = pa.ipc.open_file(pa.memory_map(str(shard_file(folder, place, kept)))).get_batch(0)
    first, stop = header.span(place.shard)
    flat = {p.name: batch.column(p.name).flatten().to_numpy(zero_copy_only=True) for p in kept.parts}
    return {p.name: flat[p.name].reshape(stop - first, *p.shape) for p in kept.parts}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
