"""Rows of Arrow and Parquet shards: labels, and images as they are stored."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raykd.data.decoding import Images, Payload
from raykd.data.shards import Shard, arrow_batches, filesystem, open_file
from raykd.errors import DataError

_SCAN_ROWS = 256
_GROUP_BYTES = 512 << 20


class ShardSource:
    """Undecoded images and labels of a list of shards, in their order.

    Args:
        shards: from `inspect_shards`, without faults.
        image_column: struct<bytes, path>, binary, or fixed-size lists or tensors of uint8 whose shape the file tells.
        label_column: integers.
    """

    def __init__(self, shards: Sequence[Shard], image_column: str, label_column: str) -> None:
        self.shards, self.image_column, self.label_column = list(shards), image_column, label_column
        self._places = [(s, g) for s, shard in enumerate(self.shards) for g in range(len(shard.groups))]
        rows = [count for shard in self.shards for count in shard.groups]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._readers = [_Reader(shard, image_column) for shard in self.shards]
        self._groups = _Groups()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Hash over names, sizes and footers of the shards and the columns read; equal on every machine."""
        facts = [[shard.name, shard.size, shard.footer] for shard in self.shards]
        text = json.dumps([facts, self.image_column, self.label_column])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def where(self, row: int) -> str:
        """Shard, row group and row within it."""
        place = self._place(row)
        shard, group = self._places[place]
        name = self.shards[shard].name
        return f"{name}, row group {group}, row {row - int(self._starts[place])}"

    def labels(self) -> NDArray[np.int64]:
        """[n] labels as stored; reads one column. Raises DataError at a null or an unreadable shard."""
        return np.concatenate([self._shard_labels(shard) for shard in self.shards])

    def _shard_labels(self, shard: Shard) -> NDArray[np.int64]:
        try:
            if shard.is_arrow:
                batches = [batch.select([self.label_column]) for batch in arrow_batches(shard.uri)[1]]
                table = pa.Table.from_batches(batches, pa.schema([shard.schema.field(self.label_column)]))
            else:
                with open_file(shard.uri) as file, pq.ParquetFile(file) as reader:
                    table = reader.read(columns=[self.label_column])
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"labels: expected column '{self.label_column}', got an unreadable one ({shard.name}): {error}"
            ) from error
        column = table[self.label_column]
        if column.null_count:
            raise DataError(
                f"labels: expected integers, got {column.null_count} nulls ({shard.name}). Fill or drop these rows."
            )
        return column.cast(pa.int64()).to_numpy()

    def payloads(self, rows: NDArray[np.int64]) -> list[Payload]:
        """The stored images of `rows` in any order; row groups in use stay in memory, up to 512 MiB."""
        found: dict[int, Payload] = {}
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for place in np.unique(places).tolist():
            shard, group = self._places[place]
            column = self._groups.get(place, self._readers[shard], group)
            wanted = np.unique(rows[places == place])
            taken = column.take(pa.array(wanted - self._starts[place]))
            found.update(zip(wanted.tolist(), self._readers[shard].payloads(taken)))
        return [found[row] for row in rows.tolist()]

    def scan(self) -> Iterator[tuple[int, list[Payload]]]:
        """(first row, stored images) of consecutive rows over the whole set, some hundred rows at a time."""
        for place, (shard, group) in enumerate(self._places):
            row = int(self._starts[place])
            for column in self._readers[shard].scan(group):
                yield row, self._readers[shard].payloads(column)
                row += len(column)

    def _place(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1


class _Reader:
    """Reads the image column of one shard."""

    def __init__(self, shard: Shard, column: str) -> None:
        self.shard, self.column = shard, column
        self.shape = _tensor_shape(shard, column)
        self._batches: list[pa.RecordBatch] | None = None

    def __reduce__(self) -> tuple[type[_Reader], tuple[Shard, str]]:
        return _Reader, (self.shard, self.column)

    def group(self, group: int) -> pa.Array:
        """The whole column of a row group."""
        return pa.concat_arrays(list(self.scan(group)))

    def scan(self, group: int) -> Iterator[pa.Array]:
        """The column of a row group in pieces. Raises DataError when a page is unreadable."""
        try:
            if self.shard.is_arrow:
                if self._batches is None:
                    self._batches = arrow_batches(self.shard.uri)[1]
                column = self._batches[group].column(self.column)
                yield from (column[start : start + _SCAN_ROWS] for start in range(0, len(column), _SCAN_ROWS))
                return
            with open_file(self.shard.uri) as file, pq.ParquetFile(file) as reader:
                for batch in reader.iter_batches(_SCAN_ROWS, row_groups=[group], columns=[self.column], use_threads=False):
                    yield batch.column(0)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"data file: expected readable rows, got a damaged row group ({self.shard.name}, row group {group}): {error}"
            ) from error

    def payloads(self, column: pa.Array) -> list[Payload]:
        """Stored images of a piece of the column."""
        if self.shape is not None:
            storage = column.storage if isinstance(column, pa.ExtensionArray) else column
            pixels = storage.flatten().to_numpy(zero_copy_only=False)
            return list(_channels_first(pixels.reshape(-1, *self.shape)))
        if not pa.types.is_struct(column.type):
            return [b"" if value is None else value for value in column.to_pylist()]
        return [self._encoded(value or {}) for value in column.to_pylist()]

    def _encoded(self, value: dict[str, Any]) -> bytes:
        content, path = value.get("bytes"), value.get("path")
        if content is not None or not path:
            return content or b""
        try:
            uri = path if "://" in path or path.startswith("/") else f"{self.shard.uri.rpartition('/')[0]}/{path}"
            system, within = filesystem(uri)
            with system.open_input_file(within) as file:
                return bytes(file.read())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"image: expected a file at '{path}', got none ({self.shard.name}): {error}") from error


def _tensor_shape(shard: Shard, column: str) -> tuple[int, ...] | None:
    """Shape of raw uint8 pixels, None for encoded files. Raises DataError when the type holds no image."""
    field = shard.schema.field(column)
    kind = field.type
    if isinstance(kind, pa.FixedShapeTensorType):
        shape: tuple[int, ...] | None = tuple(kind.shape)
        inner = kind.value_type
    elif pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        text = (field.metadata or {}).get(b"shape")
        shape, inner = (tuple(json.loads(text)) if text else None), kind.value_type
    else:
        struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return None
        shape = inner = None
    if shape is None or len(shape) not in (2, 3) or inner != pa.uint8():
        raise DataError(
            f"image_column: expected struct<bytes, path>, binary, or uint8 with a shape of 2 or 3 axes, got {kind} "
            f"in '{column}' ({shard.name}). A list of pixels needs field metadata shape='[c, h, w]'."
        )
    return shape


def _channels_first(pixels: Images) -> Images:
    """[n h w], [n h w c] or [n c h w] as [n c h w]; c is 1 or 3."""
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return pixels


class _Groups:
    """Row groups read last, bounded in bytes; safe between threads, left behind when pickled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, pa.Array] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Groups], tuple[()]]:
        return _Groups, ()

    def get(self, place: int, reader: _Reader, group: int) -> pa.Array:
        """The image column of a row group."""
        with self._lock:
            if place not in self._kept:
                self._kept[place] = reader.group(group)
            self._kept.move_to_end(place)
            while len(self._kept) > 1 and sum(a.nbytes for a in self._kept.values()) > _GROUP_BYTES:
                self._kept.popitem(last=False)
            return self._kept[place]
