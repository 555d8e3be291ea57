"""Data sets that come as packages: scikit-learn's digits, and torchvision's sets as far as they do not unpickle."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raykd.data.decoding import Images, Payload
from raykd.data.keys import permutation
from raykd.errors import DataError, near

_SCAN_ROWS = 1024
_DIGITS_TRAIN = 1437
_DIGITS_KEY = 20
# torchvision's classes that keep pixels of plain files in memory; of the others many unpickle.
_BY_FLAG = ("MNIST", "FashionMNIST", "KMNIST", "USPS")
_BY_SPLIT = ("SVHN", "STL10")


class ArraySource:
    """Images that are pixels already: images [n c h w] uint8 and labels [n] int64, both in memory."""

    def __init__(self, images: Images, labels: NDArray[np.int64], name: str, fingerprint: str | None = None) -> None:
        self._images, self._labels, self.name = images, labels, name
        self.fingerprint = fingerprint or hashlib.blake2b(images.tobytes() + labels.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def labels(self) -> NDArray[np.int64]:
        """[n] labels."""
        return self._labels

    def where(self, row: int) -> str:
        """Name of the set and the row."""
        return f"{self.name}, row {row}"

    def payloads(self, rows: NDArray[np.int64]) -> list[Payload]:
        """Pixels of `rows`."""
        return list(self._images[rows])

    def scan(self) -> Iterator[tuple[int, list[Payload]]]:
        """(first row, pixels) in pieces."""
        for start in range(0, len(self), _SCAN_ROWS):
            yield start, list(self._images[start : start + _SCAN_ROWS])


def digits(split: str) -> ArraySource:
    """scikit-learn's digits: 1797 grey images of 8x8 from 0..16 scaled to 0..255; 1437 train, the other 360 eval and test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = permutation(_DIGITS_KEY, 0, len(bunch.target), "digits split")
    rows = order[:_DIGITS_TRAIN] if split == "train" else order[_DIGITS_TRAIN:]
    images = np.round(bunch.images[rows] * (255.0 / 16.0)).astype(np.uint8)[:, None]
    return ArraySource(images, bunch.target[rows].astype(np.int64), f"digits {'train' if split == 'train' else 'eval'}")


class _Binary(NamedTuple):
    """A CIFAR archive in its binary form: records of label bytes (the last counts) and 3072 pixel bytes, planes R, G, B."""

    archive: str
    md5: str
    folder: str
    label_bytes: int
    files: dict[str, dict[str, str]]  # split -> file -> MD5; "" where only the archive's is published


_CIFAR = {
    "CIFAR10": _Binary(
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        label_bytes=1,
        files={
            "train": {
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            },
            "test": {"test_batch.bin": ""},
        },
    ),
    "CIFAR100": _Binary(
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        label_bytes=2,
        files={"train": {"train.bin": ""}, "test": {"test.bin": ""}},
    ),
}
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32


class CifarSource:
    """CIFAR-10 or CIFAR-100 from the binary archive or its extracted files below `root`; nothing is unpickled.

    The archive is checked against its MD5. Extracted files are checked by size, and by MD5 where it is known (CIFAR-10
    train); the test split and CIFAR-100 have a published hash of the archive only.

    Raises:
        DataError: neither is there, or the content differs.
    """

    def __init__(self, name: str, root: str, split: str, download: bool = False) -> None:
        self.name, self.split, self.form = name, split, _CIFAR[name]
        if split not in self.form.files:
            raise DataError(f"split: expected train or test of {name}, got '{split}'. {near(split, self.form.files)}")
        self.folder, self.archive = Path(root) / self.form.folder, Path(root) / self.form.archive
        self._extracted = all((self.folder / file).is_file() for file in self.form.files[split])
        if not self._extracted and not self.archive.is_file():
            if not download:
                raise DataError(
                    f"{name}: expected {self.form.archive} or {self.form.folder}/ with {', '.join(self.form.files[split])}, "
                    f"got neither ({root}). Set download=True or copy the binary archive there."
                )
            _download(self.form, root)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    def __len__(self) -> int:
        return {"train": 50000, "test": 10000}[self.split]

    @property
    def fingerprint(self) -> str:
        """The archive's hash and the split; the content is checked against it."""
        return f"{self.name} {self.form.md5} {self.split}"

    @cached_property
    def _records(self) -> Images:
        """[n, label bytes + 3072]"""
        contents = self._from_files() if self._extracted else self._from_archive()
        width = self.form.label_bytes + _PIXELS
        for file, content in contents.items():
            expected = len(self) // len(contents) * width
            if len(content) != expected:
                raise DataError(f"{self.name}: expected {expected} bytes, got {len(content)} ({file}). Copy it again.")
        return np.frombuffer(b"".join(contents.values()), np.uint8).reshape(-1, width)

    def _from_files(self) -> dict[str, bytes]:
        contents = {file: (self.folder / file).read_bytes() for file in self.form.files[self.split]}
        for file, expected in self.form.files[self.split].items():
            if expected and _md5(contents[file]) != expected:
                raise DataError(f"{self.name}: expected MD5 {expected}, got {_md5(contents[file])} ({file}). Copy it again.")
        return contents

    def _from_archive(self) -> dict[str, bytes]:
        found = _md5(self.archive.read_bytes())
        if found != self.form.md5:
            raise DataError(f"{self.name}: expected MD5 {self.form.md5}, got {found} ({self.archive.name}). Copy it again.")
        contents = {}
        with tarfile.open(self.archive, "r:gz") as tar:
            for file in self.form.files[self.split]:
                member = tar.extractfile(f"{self.form.folder}/{file}")
                contents[file] = member.read() if member else b""
        return contents

    def labels(self) -> NDArray[np.int64]:
        """[n] labels (CIFAR-100: the fine ones)."""
        return self._records[:, self.form.label_bytes - 1].astype(np.int64)

    def where(self, row: int) -> str:
        """File and record."""
        files = list(self.form.files[self.split])
        per_file = len(self) // len(files)
        return f"{files[row // per_file]}, record {row % per_file}"

    def payloads(self, rows: NDArray[np.int64]) -> list[Payload]:
        """Pixels of `rows`."""
        return list(self._pixels()[rows])

    def scan(self) -> Iterator[tuple[int, list[Payload]]]:
        """(first row, pixels) in pieces."""
        for start in range(0, len(self), _SCAN_ROWS):
            yield start, list(self._pixels()[start : start + _SCAN_ROWS])

    def _pixels(self) -> Images:
        return self._records[:, self.form.label_bytes :].reshape(-1, 3, 32, 32)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(form: _Binary, root: str) -> None:
    from torchvision.datasets.utils import download_url

    try:
        download_url(_CIFAR_URL + form.archive, root, form.archive, form.md5)
    except (OSError, RuntimeError) as error:
        raise DataError(f"download: expected {form.archive}, got {error}. Copy it to {root}.") from error


def torchvision_source(name: str, root: str, split: str, download: bool = False) -> ArraySource | CifarSource:
    """A torchvision data set by class name, read without unpickling.

    Args:
        name: CIFAR10, CIFAR100, MNIST, FashionMNIST, KMNIST, USPS, SVHN or STL10.
        root: where its files are.
        split: torchvision's name of the split ("train", "test").
        download: fetch what is missing.

    Raises:
        DataError: files are missing or damaged, or the class unpickles or is none raykd reads.
    """
    known = [*_CIFAR, *_BY_FLAG, *_BY_SPLIT]
    if name not in known:
        raise DataError(
            f"torchvision set: expected one that raykd reads without unpickling, got '{name}'. {near(name, known)} "
            "Other sets: kind='folder', 'parquet' or a factory of your own."
        )
    if split not in ("train", "test"):
        raise DataError(f"split: expected train or test of {name}, got '{split}'. {near(split, ('train', 'test'))}")
    if name in _CIFAR:
        return CifarSource(name, root, split, download)
    from torchvision import datasets

    which: dict[str, Any] = {"train": split == "train"} if name in _BY_FLAG else {"split": split}
    try:
        dataset: Any = getattr(datasets, name)(root, **which, download=download)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"torchvision {name}: expected its files, got {error} ({root}). Set download=True or copy them."
        ) from error
    images = np.asarray(dataset.data)
    labels = np.asarray(dataset.targets if name in _BY_FLAG else dataset.labels).astype(np.int64)
    return ArraySource(images[:, None] if images.ndim == 3 else images, labels, f"{name} {split}")
