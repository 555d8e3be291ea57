"""Arrow and Parquet shards: which files a pattern names, and what their footers say. No image is read here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raykd.errors import DataError, near

ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
_TAIL_BYTES = 1 << 16
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Shard:
    """One file of a data set, as its footer describes it.

    Attributes:
        name: path below the root, or the file's own name; it is what messages and the fingerprint say.
        uri: opens the file from any process.
        size: bytes.
        footer: hash of the footer.
        groups: rows of each row group (Parquet) or record batch (Arrow).
        schema: of the columns.
        label_range: least and greatest label by the statistics, None where the file keeps none.
    """

    name: str
    uri: str
    size: int
    footer: str
    groups: tuple[int, ...]
    schema: pa.Schema
    label_range: tuple[int, int] | None = None

    @property
    def is_arrow(self) -> bool:
        """Arrow IPC (file or stream) and not Parquet."""
        return self.name.endswith(ARROW_SUFFIXES)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or a pyarrow or fsspec URI, and the path within it.

    Raises:
        DataError: no file system answers to the URI's scheme.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    directory, _, name = uri.rpartition("/")
    if directory.endswith("/") or not name:
        return _remote(uri)
    system, path = _remote(directory)  # one client a directory, not one a file
    return system, f"{path.rstrip('/')}/{name}"


@lru_cache(maxsize=64)
def _remote(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return _fsspec(uri)


def _fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        import fsspec

        found, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise DataError(f"data.root: expected a path or a URI of pyarrow or fsspec, got '{uri}': {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path


def open_file(uri: str) -> pa.NativeFile:
    """A random-access file: a memory map where the file is local."""
    system, path = filesystem(uri)
    return pa.memory_map(path) if isinstance(system, pafs.LocalFileSystem) else system.open_input_file(path)


def find_shards(root: str | None, patterns: str | Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The files that `patterns` name, each once, sorted within a pattern.

    Args:
        root: local path or URI that relative patterns start from; None is the working directory.
        patterns: names or globs (`*` stays within a directory, `**` does not); absolute paths and URIs stand for themselves.

    Returns:
        (name, uri) of each file, and a fault for each pattern that names none.
    """
    found: dict[str, str] = {}
    faults = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        base, rest = _split(root, pattern)
        try:
            names = _list(base, recursive="/" in rest)
        except (OSError, pa.ArrowException) as error:
            faults.append(f"data.root: expected a directory, got '{base}'{_cause(error)}. {_near_directory(base)}")
            continue
        wanted = _regex(rest)
        matches = [name for name in names if wanted.fullmatch(name)]
        found.update({_join(base, name): name for name in matches})
        if not matches:
            hint = near(rest, sorted(names)) if names else "The directory is empty."
            faults.append(f"data files: expected '{rest}' to name at least one file, got none ({base}). {hint}")
    return [(name, uri) for uri, name in found.items()], faults


def _split(root: str | None, pattern: str) -> tuple[str, str]:
    """(directory to list, pattern below it)."""
    if "://" not in pattern and not os.path.isabs(os.path.expanduser(pattern)):
        return root or ".", pattern
    wild = _WILD.search(pattern)
    cut = pattern.rfind("/", 0, wild.start() if wild else len(pattern))
    return pattern[:cut] or "/", pattern[cut + 1 :]


def _join(base: str, name: str) -> str:
    return f"{base.rstrip('/')}/{name}"


def _list(base: str, recursive: bool) -> list[str]:
    system, path = filesystem(base)
    infos = system.get_file_info(pafs.FileSelector(path, recursive=recursive))
    return sorted(os.path.relpath(info.path, path) if path else info.path for info in infos if info.type == pafs.FileType.File)


def _near_directory(base: str) -> str:
    parent, _, name = base.rstrip("/").rpartition("/")
    try:
        system, path = filesystem(parent or ".")
        infos = system.get_file_info(pafs.FileSelector(path))
    except (OSError, pa.ArrowException, DataError):
        return "Check the path."
    return near(name, sorted(info.base_name for info in infos))


def _regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression: `*` and `?` stop at '/', `**/` is any directories."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return re.compile("".join(parts.get(t, t if re.fullmatch(r"\[[^\]]+\]", t) else re.escape(t)) for t in tokens))


def inspect_shards(
    files: Iterable[tuple[str, str]], image_column: str, label_column: str, num_classes: int | None
) -> tuple[list[Shard], list[str]]:
    """Reads the footers of `files`, many at once, and checks the columns against them.

    Returns:
        the shards, and all faults: a corrupt or truncated file, a missing column, a label that is no integer or, by the
        file's statistics, outside 0..num_classes-1.
    """

    def read(file: tuple[str, str]) -> tuple[Shard | None, list[str]]:
        try:
            shard = _read_shard(*file, label_column)
        except DataError as error:
            return None, [str(error)]
        return shard, _column_faults(shard, image_column, label_column) + _label_faults(shard, label_column, num_classes)

    with ThreadPoolExecutor(16, thread_name_prefix="raykd-footers") as pool:
        results = list(pool.map(read, files))
    shards = [shard for shard, _ in results if shard is not None]
    faults = [fault for _, some in results for fault in some]
    if shards and not faults and not any(sum(shard.groups) for shard in shards):
        faults.append(f"data files: expected rows, got none ({len(shards)} files, first {shards[0].name}).")
    return shards, faults


def _read_shard(name: str, uri: str, label_column: str) -> Shard:
    kind = "Arrow IPC" if name.endswith(ARROW_SUFFIXES) else "Parquet"
    try:
        with open_file(uri) as file:
            size = file.size()
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
        if kind == "Arrow IPC":
            return _read_arrow(name, uri, size, tail)
        return _read_parquet(name, uri, size, tail, label_column)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"data file: expected a whole {kind} file, got one that is corrupt or truncated ({name}): {_first_line(error)}. "
            "Copy it again."
        ) from error


def _read_parquet(name: str, uri: str, size: int, tail: bytes, label_column: str) -> Shard:
    with open_file(uri) as file, pq.ParquetFile(file) as reader:
        metadata, schema = reader.metadata, reader.schema_arrow
    groups = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
    footer = tail[-8 - int.from_bytes(tail[-8:-4], "little") :]
    return Shard(name, uri, size, _hash(footer), groups, schema, _label_range(metadata, label_column))


def _read_arrow(name: str, uri: str, size: int, tail: bytes) -> Shard:
    schema, batches = arrow_batches(uri)
    return Shard(name, uri, size, _hash(tail), tuple(batch.num_rows for batch in batches), schema)


def arrow_batches(uri: str) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Schema and record batches of an Arrow IPC file or stream; a local file is mapped, not read."""
    with open_file(uri) as file:
        magic = file.read(6)
        file.seek(0)
        reader: Any
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(file)
            return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
        reader = pa.ipc.open_stream(file)
        return reader.schema, list(reader)


def _label_range(metadata: pq.FileMetaData, label_column: str) -> tuple[int, int] | None:
    bounds: list[int] = []
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        columns = [group.column(c) for c in range(group.num_columns)]
        for statistics in (c.statistics for c in columns if c.path_in_schema == label_column):
            if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
                return None
            bounds += [statistics.min, statistics.max]
    return (min(bounds), max(bounds)) if bounds else None


def _column_faults(shard: Shard, image_column: str, label_column: str) -> list[str]:
    faults = []
    for role, column in (("image", image_column), ("label", label_column)):
        if column not in shard.schema.names:
            faults.append(
                f"{role}_column: expected a column of the file, got '{column}' ({shard.name}). "
                f"{near(column, shard.schema.names)}"
            )
    if label_column in shard.schema.names and not pa.types.is_integer(shard.schema.field(label_column).type):
        kind = shard.schema.field(label_column).type
        faults.append(f"label_column: expected integers, got {kind} in '{label_column}' ({shard.name}). Store class numbers.")
    return faults


def _label_faults(shard: Shard, label_column: str, num_classes: int | None) -> list[str]:
    if shard.label_range is None:
        return []
    low, high = shard.label_range
    top = f"{num_classes - 1}" if num_classes else "..."
    if low >= 0 and (num_classes is None or high < num_classes):
        return []
    return [f"labels: expected 0..{top}, got {low}..{high} in '{label_column}' ({shard.name}). Set num_classes."]


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _cause(error: BaseException) -> str:
    return ", which does not exist" if isinstance(error, FileNotFoundError) else f": {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
