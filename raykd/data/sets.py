"""Data sets: decoded images in one size, labels, and a name for every row.

`open_split(spec, split)` opens one split of a job's data; `probe(spec, split)` lists its faults from footers, names and
hashes alone. Kinds: parquet (Arrow too), folder, digits, torchvision:NAME, or a user's package.module:factory.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import PIL
from numpy.typing import NDArray

from raykd.data.decoding import DecodeOne, Images, Payload, Size, build_cache, cached, decode_all
from raykd.errors import DataError, near

Labels: TypeAlias = NDArray[np.int64]
KINDS = ("parquet", "folder", "digits", "torchvision:NAME", "package.module:factory")
SPLITS = ("train", "eval", "test")
CACHES = ("disk", "memory", "none")


@runtime_checkable
class DataSet(Protocol):
    """What raykd asks of a data set; a user's own needs these members and to be picklable.

    A data set never changes while it is open: `read` of the same index gives the same bits in every process.
    """

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every image."""

    @property
    def labels(self) -> Labels:
        """[n] in 0..num_classes-1; cheap."""

    @property
    def fingerprint(self) -> str:
        """Stable hash of the content, equal on every machine."""

    def __len__(self) -> int: ...

    def read(self, sample_index: NDArray[np.int64]) -> Images:
        """[k c h w] images at `sample_index` [k]."""

    def where(self, row: int) -> str:
        """Names the shard, row group and row, or the file, of a sample."""


class Source(Protocol):
    """Undecoded images and labels; what a kind implements."""

    @property
    def fingerprint(self) -> str:
        """Stable hash of the content."""

    def __len__(self) -> int: ...

    def labels(self) -> Labels:
        """[n] labels as stored."""

    def payloads(self, rows: NDArray[np.int64]) -> list[Payload]:
        """Stored images of `rows`."""

    def scan(self) -> Iterator[tuple[int, list[Payload]]]:
        """(first row, stored images) over the whole set, in order."""

    def where(self, row: int) -> str:
        """Names a row."""


_BUILD = threading.RLock()


class StoredSet:
    """The DataSet of a Source: decodes each image once and keeps the pixels.

    Args:
        source: undecoded images.
        num_classes: None takes the greatest label + 1.
        size: see `raykd.data.decoding.decode`.
        channels: 1, 3 or None.
        cache: "disk" keeps [n c h w] in a memory map below $RAYKD_CACHE, shared by the processes of a machine; "memory" in
            this process (pickling copies it); "none" decodes at every read.

    Raises:
        DataError: labels out of range, images that do not decode or differ in size, at the first use that meets them.
    """

    def __init__(
        self,
        source: Source,
        *,
        num_classes: int | None = None,
        size: Size = None,
        channels: int | None = None,
        cache: str = "disk",
    ) -> None:
        if cache not in CACHES:
            raise DataError(f"cache: expected one of {', '.join(CACHES)}, got '{cache}'. {near(cache, CACHES)}")
        self.source, self.cache = source, cache
        self._num_classes = num_classes
        self._decode = DecodeOne(source.where, size, channels)
        self._labels: Labels | None = None
        self._images: Images | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.cache == "disk":
            state["_images"] = None
        return state

    @property
    def num_classes(self) -> int:
        """As given, else the greatest label + 1."""
        return self._num_classes or int(self.labels.max()) + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w), from the first image."""
        if self._decode.shape is None:
            first = self._decode(next(self.source.scan())[1][0], 0)
            self._decode.shape = (first.shape[0], first.shape[1], first.shape[2])
        return self._decode.shape

    @property
    def labels(self) -> Labels:
        """[n], checked against num_classes."""
        if self._labels is None:
            self._labels = checked_labels(self.source.labels(), self._num_classes, self.source.where)
        return self._labels

    @property
    def fingerprint(self) -> str:
        """Hash of the source and of how it is decoded."""
        text = f"{self.source.fingerprint} {self._decode.size} {self._decode.channels}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def where(self, row: int) -> str:
        """Names the shard, row group and row, or the file."""
        return self.source.where(row)

    def read(self, sample_index: NDArray[np.int64]) -> Images:
        """[k c h w] images, a fresh writable array. The first call decodes the whole set unless cache="none"."""
        rows = np.asarray(sample_index, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise DataError(f"sample_index: expected 0..{len(self) - 1}, got {rows.min()}..{rows.max()}.")
        if self.cache == "none":
            return self._read_now(rows)
        return self._kept()[rows]

    def _read_now(self, rows: NDArray[np.int64]) -> Images:
        out = np.empty((len(rows), *self.shape), np.uint8)
        for i, (row, payload) in enumerate(zip(rows.tolist(), self.source.payloads(rows))):
            out[i] = self._decode(payload, row)
        return out

    def _kept(self) -> Images:
        if self._images is None:
            with _BUILD:
                if self._images is None:
                    self._images = self._from_disk() if self.cache == "disk" else self._to_memory()
        return self._images

    def _from_disk(self) -> Images:
        shape = (len(self), *self.shape)
        key = hashlib.blake2b(f"{self.fingerprint} pillow {PIL.__version__}".encode(), digest_size=12).hexdigest()
        found = cached(key, shape)
        return build_cache(key, shape, self._fill) if found is None else found

    def _to_memory(self) -> Images:
        out = np.empty((len(self), *self.shape), np.uint8)
        self._fill(out)
        return out

    def _fill(self, out: Images) -> None:
        decode_all(self.source.scan(), out, self._decode)


def checked_labels(labels: Labels, num_classes: int | None, where: Any) -> Labels:
    """`labels` made read-only. Raises DataError naming the first row outside 0..num_classes-1."""
    wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        top = "" if num_classes is None else f"{num_classes - 1}"
        raise DataError(
            f"labels: expected 0..{top}, got {labels[row]} ({where(row)}; {int(wrong.sum())} in all). "
            "Set num_classes or mend the labels."
        )
    labels = np.ascontiguousarray(labels, np.int64)
    labels.flags.writeable = False
    return labels


def open_split(spec: Any, split: str) -> DataSet:
    """Opens one split of a job's data.

    Args:
        spec: has `kind` and, as the kind needs them, `root`, `train`, `eval`, `test` (patterns of files, names of folders or of
            torchvision's splits), `num_classes`, `image_column` ("image"), `label_column` ("label"), `size`, `in_channels`,
            `cache` ("disk"), `download` (False). Absent attributes take the default.
        split: "train", "eval" or "test".

    Raises:
        DataError: all faults that footers, names and hashes show, one a line.
    """
    if split not in SPLITS:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, got '{split}'.")
    kind = str(spec.kind)
    if kind == "parquet":
        return _open_parquet(spec, split)
    if kind == "folder":
        from raykd.data.folders import FolderSource

        directory = _option(spec, split, split)
        if not isinstance(directory, str):
            raise DataError(f"data.{split}: expected the name of one directory below root, got {directory}.")
        return _stored(FolderSource(_need(spec, "root"), directory), spec)
    if kind == "digits":
        from raykd.data.packaged import digits

        return _stored(digits(split), spec, num_classes=10, cache="memory")
    if kind.startswith("torchvision:"):
        from raykd.data.packaged import torchvision_source

        default = "train" if split == "train" else "test"
        name, download = kind.partition(":")[2], bool(_option(spec, "download", False))
        return _stored(torchvision_source(name, _need(spec, "root"), _option(spec, split, default), download), spec)
    if ":" in kind:
        return _open_factory(kind, spec, split)
    raise DataError(f"data.kind: expected one of {', '.join(KINDS)}, got '{kind}'. {near(kind, KINDS)}")


def probe(spec: Any, split: str) -> list[str]:
    """Faults of a split: files, footers, columns, labels, hashes, the first image. Empty when there are none.

    Labels are read where footers do not tell their range, and no image but the first.
    """
    try:
        dataset = open_split(spec, split)
        if len(dataset) == 0:
            return [f"{split}: expected samples, got none."]
        shards = getattr(getattr(dataset, "source", None), "shards", None)
        if shards is None or any(shard.label_range is None for shard in shards):
            checked_labels(np.asarray(dataset.labels), _option(spec, "num_classes", None), dataset.where)
        if len(dataset.shape) != 3:
            return [f"images: expected a shape (c, h, w), got {dataset.shape}."]
    except DataError as error:
        return str(error).split("\n")
    return []


def _open_parquet(spec: Any, split: str) -> DataSet:
    from raykd.data.rows import ShardSource
    from raykd.data.shards import find_shards, inspect_shards

    columns = _option(spec, "image_column", "image"), _option(spec, "label_column", "label")
    num_classes = _option(spec, "num_classes", None)
    files, faults = find_shards(_option(spec, "root", None), _need(spec, split))
    shards, more = inspect_shards(files, *columns, num_classes)
    if faults or more:
        raise DataError("\n".join(faults + more))
    if num_classes is None and split != "train" and _option(spec, "train", None):
        num_classes = _open_parquet(spec, "train").num_classes
    return _stored(ShardSource(shards, *columns), spec, num_classes=num_classes)


def _stored(source: Source, spec: Any, *, num_classes: int | None = None, cache: str | None = None) -> StoredSet:
    channels = _option(spec, "in_channels", None)
    if channels not in (None, 1, 3):
        raise DataError(f"in_channels: expected 1 or 3, got {channels}.")
    size = _option(spec, "size", None)
    return StoredSet(
        source,
        num_classes=_option(spec, "num_classes", num_classes),
        size=size if size is None or isinstance(size, int) else (int(size[0]), int(size[1])),
        channels=channels,
        cache=cache or _option(spec, "cache", "disk"),
    )


def _open_factory(kind: str, spec: Any, split: str) -> DataSet:
    module_name, _, name = kind.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise DataError(
            f"data.kind: expected an importable module, got '{module_name}': {type(error).__name__}: {error}. "
            "Ship it with the job, and what it imports."
        ) from error
    if not hasattr(module, name):
        raise DataError(f"data.kind: expected a factory in {module_name}, got '{name}'. {near(name, vars(module))}")
    try:
        dataset = getattr(module, name)(spec, split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"data.kind: expected '{kind}' to return a DataSet, got {type(error).__name__}: {error} (split {split})."
        ) from error
    if not isinstance(dataset, DataSet):
        missing = [
            m for m in ("num_classes", "shape", "labels", "fingerprint", "__len__", "read", "where") if not hasattr(dataset, m)
        ]
        raise DataError(f"data.kind: expected '{kind}' to return a DataSet, got one without {', '.join(missing)}.")
    return dataset


def _option(spec: Any, name: str, default: Any) -> Any:
    value = getattr(spec, name, None)
    return default if value is None else value


def _need(spec: Any, name: str) -> Any:
    value = getattr(spec, name, None)
    if value is None:
        raise DataError(f"data.{name}: expected a value for kind '{spec.kind}', got none. Set data.{name}.")
    return value
