"""Images in one directory a class: root/split/class/name.png; classes are numbered in sorted order."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from raykd.data.decoding import Payload
from raykd.data.shards import filesystem
from raykd.errors import DataError, near

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_SCAN_FILES = 256


class FolderSource:
    """Undecoded images below `root`/`split`, a local path or a URI.

    Raises:
        DataError: the directory is missing or holds no image in a class directory.
    """

    def __init__(self, root: str, split: str) -> None:
        self.base = f"{root.rstrip('/')}/{split}" if split not in (".", "") else root
        self._files = self._list(root, split)
        self.classes = sorted({name.split("/")[0] for name, _ in self._files})
        if not self._files:
            raise DataError(
                f"image folder: expected class directories with images, got none ({self.base}). See the suffixes: {_SUFFIXES}."
            )

    def _list(self, root: str, split: str) -> list[tuple[str, int]]:
        system, path = filesystem(self.base)
        try:
            infos = system.get_file_info(pafs.FileSelector(path, recursive=True))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"image folder: expected a directory, got '{self.base}'. {_directories(root, split)}") from error
        names = [(posixpath.relpath(info.path, path), info) for info in infos if info.type == pafs.FileType.File]
        return sorted((name, info.size or 0) for name, info in names if "/" in name and name.lower().endswith(_SUFFIXES))

    def __len__(self) -> int:
        return len(self._files)

    @property
    def fingerprint(self) -> str:
        """Hash over names and sizes of the files."""
        return hashlib.blake2b(json.dumps(self._files).encode(), digest_size=16).hexdigest()

    def labels(self) -> NDArray[np.int64]:
        """[n] rank of each file's class directory."""
        rank = {name: label for label, name in enumerate(self.classes)}
        return np.array([rank[name.split("/")[0]] for name, _ in self._files], np.int64)

    def where(self, row: int) -> str:
        """The file's name."""
        return self._files[row][0]

    def payloads(self, rows: NDArray[np.int64]) -> list[Payload]:
        """Content of the files. Raises DataError at one that cannot be read."""
        return [self._read(row) for row in rows.tolist()]

    def scan(self) -> Iterator[tuple[int, list[Payload]]]:
        """(first row, contents), some hundred files at a time."""
        for start in range(0, len(self), _SCAN_FILES):
            yield start, self.payloads(np.arange(start, min(start + _SCAN_FILES, len(self))))

    def _read(self, row: int) -> bytes:
        system, path = filesystem(self.base)
        try:
            with system.open_input_file(f"{path}/{self._files[row][0]}") as file:
                return bytes(file.read())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"image: expected a readable file, got none ({self.where(row)}): {error}") from error


def _directories(root: str, split: str) -> str:
    system, path = filesystem(root)
    try:
        infos = system.get_file_info(pafs.FileSelector(path))
    except (OSError, pa.ArrowException):
        return "Check data.root."
    return near(split, sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory))
