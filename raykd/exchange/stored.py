"""Training from a store: the source that answers out of its files, and its export.

Signals that couple the batch (`gram`) are kept as what they derive from, and derived when they are read.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raykd import catalogue
from raykd.errors import SourceError
from raykd.exchange import codec as codecs
from raykd.exchange.sources import Done, Fields, Pending, Source, Stats
from raykd.exchange.store import Place, again, read_header, replacing
from raykd.exchange.store_files import fault, open_shard
from raykd.parts.derived import derived_signals
from raykd.signals import Signal, Signals

Views = dict[str, dict[str, NDArray[Any]]]


def ancestry(signal: Signal) -> list[Signal]:
    """A signal, what it derives from, and so on to what the model itself yields."""
    known, found = catalogue.derived(), [signal]
    while found[-1].kind in known:
        parent = known[found[-1].kind].parent
        options = known[parent].options if parent in known else ()
        bound = tuple((name, value) for name, value in signal.options if name in options)
        found.append(Signal(parent, signal.layer, bound, signal.view))
    return found


def keepable(signal: Signal) -> Signal:
    """The signal itself, or the one nearest to it that does not depend on the rest of the batch."""
    known, line = catalogue.derived(), ancestry(signal)
    coupled = [place for place, s in enumerate(line) if s.kind in known and known[s.kind].per_batch]
    return line[max(coupled) + 1] if coupled else signal


def kept_for(signal: Signal, kept: Iterable[Signal]) -> Signal | None:
    """The kept signal that this one can be had from; None if there is none."""
    line, there = ancestry(signal), set(kept)
    start = line.index(keepable(signal))
    return next((s for s in line[start:] if s in there), None)


def derive(signal: Signal, parent: Signal, value: Any) -> Any:
    """The value of `signal` out of that of one of its ancestors."""
    known, functions, line = catalogue.derived(), derived_signals(), ancestry(signal)
    for step in reversed(line[: line.index(parent)]):
        own = {name: option for name, option in step.options if name in known[step.kind].options}
        value = functions[step.kind](value, **own)
    return value


class StoreSource:
    """Source over one teacher's part of a store.

    A shard's checksum is compared when its first row is asked for. Rows that are not there are answered by `fill`, the whole
    batch of them, or else are an error that names them.

    Args:
        folder: of the store.
        teacher: its name there.
        signals: what is asked for; all can be had from the store.
        fill: the live teacher.
    """

    def __init__(self, folder: Path, teacher: str, signals: Iterable[Signal], fill: Source | None = None) -> None:
        self.folder, self.teacher = folder, teacher
        self.window, self.drop = 1, False
        self.fill: Source | None = None
        self.header = read_header(folder)
        own = self.header.teachers[teacher]
        self.stats = Stats(errors=dict(own.errors))
        self._signals = tuple(dict.fromkeys(signals))
        by_signal = {kept.signal: kept for kept in own.signals}
        self._from = {s: kept_for(s, by_signal) for s in self._signals}
        missing = [s.key for s, parent in self._from.items() if parent is None]
        if missing:
            raise SourceError(f"Store {folder}, teacher {teacher!r}: expected {', '.join(missing)}, got none of it.")
        self._kept = tuple(by_signal[p] for p in dict.fromkeys(self._from.values()) if p is not None)
        self._open: dict[Place, Views | None] = {}  # None: not whole
        self._faults: dict[Place, str] = {}
        self._whole: set[Place] = set()
        if fill is not None:
            self.fill_from(fill)

    def fill_from(self, source: Source) -> None:
        """From now on the live teacher answers for batches with rows that are not there, a window of them at a time."""
        self.fill, self.window, self.drop = source, source.window, source.drop
        source.stats = self.stats

    def request(self, fields: Fields) -> Pending:
        """Reads the signals of one batch, keyed by `sample_index` and `augmentation_seed` (the epoch of its views)."""
        started = time.process_time()
        rows, epochs = (fields[name].numpy().astype(np.int64) for name in ("sample_index", "augmentation_seed"))
        if not self.header.varies:
            epochs[:] = 0
        groups = self._groups(rows, epochs)
        self._close_but(np.unique(epochs))
        missing = [places for place, places in groups.items() if self._views(place) is None]
        if missing:
            return self._missing(fields, rows, epochs, np.concatenate(missing), [p for p in groups if p in self._faults])
        found = self._decoded(self._gather(groups, rows))
        self.stats.requests += 1
        self.stats.client_s += time.process_time() - started
        return Done({self.teacher: found})

    def close(self) -> None:
        """Closes the maps and the live teacher."""
        self._open.clear()
        if self.fill is not None:
            self.fill.close()

    def _groups(self, rows: NDArray[np.int64], epochs: NDArray[np.int64]) -> dict[Place, NDArray[np.int64]]:
        """Shard -> which rows of the batch are in it."""
        keys = epochs * self.header.shards + rows // self.header.rows
        order = np.argsort(keys, kind="stable")
        found, starts = np.unique(keys[order], return_index=True)
        split = np.split(order, starts[1:])
        return {Place(self.teacher, *divmod(int(k), self.header.shards)): chosen for k, chosen in zip(found, split)}

    def _views(self, place: Place) -> Views | None:
        if place not in self._open:
            self._open[place] = self._mapped(place)
        return self._open[place]

    def _mapped(self, place: Place) -> Views | None:
        if place.epoch >= self.header.epochs:
            self._faults[place] = (
                f"it keeps the views of {self.header.epochs} epochs, and those of epoch {place.epoch} are asked for"
            )
            return None
        wrong = None if place in self._whole else fault(self.folder, self.header, place)
        if wrong is not None:
            self._faults[place] = wrong
            return None
        self._whole.add(place)
        return {kept.signal.key: open_shard(self.folder, self.header, place, kept) for kept in self._kept}

    def _close_but(self, epochs: NDArray[np.int64]) -> None:
        """Closes the maps of other epochs: a process may hold some tens of thousands only."""
        for place in [p for p in self._open if p.epoch not in epochs]:
            del self._open[place]

    def _gather(self, groups: Mapping[Place, NDArray[np.int64]], rows: NDArray[np.int64]) -> Signals:
        """Encoded signals of the batch, copied out of the maps."""
        found: Signals = {}
        for kept in self._kept:
            columns = {p.name: np.empty((len(rows), *p.shape), p.dtype) for p in kept.parts}
            for place, chosen in groups.items():
                views = self._views(place)
                assert views is not None, "shards that are not whole were sorted out before"
                within = rows[chosen] - place.shard * self.header.rows
                for name, column in columns.items():
                    column[chosen] = views[kept.signal.key][name][within]
            self.stats.bytes_in += sum(column.nbytes for column in columns.values())
            found[kept.signal.key] = columns | dict(kept.constants)
        return found

    def _decoded(self, encoded: Signals) -> Signals:
        values = codecs.decode(encoded)
        found: Signals = {}
        for signal, parent in self._from.items():
            assert parent is not None, "signals that cannot be had were refused at the start"
            found[signal.key] = derive(signal, parent, values[parent.key])
        return found

    def _missing(
        self, fields: Fields, rows: NDArray[np.int64], epochs: NDArray[np.int64], lost: NDArray[np.int64], places: list[Place]
    ) -> Pending:
        """The live teacher's answer; without one, an error that names the rows."""
        shown = ", ".join(f"{rows[i]} (epoch {epochs[i]})" for i in np.sort(lost)[:4]) + (", ..." if len(lost) > 4 else "")
        why = "; ".join(dict.fromkeys(self._faults[p] for p in places[:3])) + ("; ..." if len(places) > 3 else "")
        text = f"Store {self.folder}, teacher {self.teacher!r}: {len(lost)} of the {len(rows)} rows of a batch are not there"
        if self.fill is None:
            raise SourceError(
                f"{text}: sample_index {shown}. {why}. Build what is missing with {again(self.folder)}, or set "
                f"teachers.{self.teacher}.fill='pool' or 'inline' to ask the live teacher."
            )
        if not self.stats.filled:
            warnings.warn(f"{text}; the live teacher answers for it ({why}).", stacklevel=3)
        self.stats.filled += 1
        return self.fill.request(fields)


def export(folder: Path, out: Path) -> Iterator[Path]:
    """Writes the store as Parquet, decoded: a file a teacher, epoch and shard, with `sample_index` and a column a signal.

    Yields:
        Each file when it is written.

    Raises:
        SourceError: a shard is not whole.
    """
    import pyarrow.parquet as pq

    header = read_header(folder)
    for place in header.places():
        wrong = fault(folder, header, place)
        if wrong is not None:
            raise SourceError(f"Store {folder}: {wrong}. Build it with {again(folder)}, then export.")
        first, stop = header.span(place.shard)
        columns: dict[str, Any] = {"sample_index": pa.array(np.arange(first, stop, dtype=np.int64))}
        shapes = {}
        for kept in header.teachers[place.teacher].signals:
            parts = open_shard(folder, header, place, kept) | dict(kept.constants)
            values = codecs.decode({kept.signal.key: parts})[kept.signal.key].numpy()
            shapes[kept.signal.key] = values.shape[1:]
            width = math.prod(values.shape[1:])
            columns[kept.signal.key] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
        about = {"teacher": place.teacher, "epoch": str(place.epoch), "shapes": json.dumps(shapes)}
        path = out / place.teacher / f"epoch-{place.epoch:03d}" / f"shard-{place.shard:05d}.parquet"
        with replacing(path) as part:
            pq.write_table(pa.table(columns).replace_schema_metadata(about), part)
        yield path
