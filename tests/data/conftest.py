"""Fixtures: a cache of their own, small Parquet sets, and the real CIFAR-10 where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_samples import SHARED, pixels, png, table


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("raykd-cache")


@pytest.fixture(autouse=True)
def cache_folder(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYKD_CACHE", str(_cache))
    return _cache


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Writes `n` PNG images into shards of 10 rows, row groups of 4, and returns the spec."""

    def write(n: int = 20, change: Callable[[list[bytes]], Any] | None = None, **options: Any) -> SimpleNamespace:
        contents = [png(image) for image in pixels(n)]
        if change:
            change(contents)
        for k in range(0, n, 10):
            part = table(contents[k : k + 10], [i % 5 for i in range(k, min(k + 10, n))])
            pq.write_table(part, tmp_path / f"train-{k // 10}.parquet", row_group_size=4)
        default = {"root": str(tmp_path), "train": "train-*.parquet", "num_classes": 5, "cache": "memory"}
        return SimpleNamespace(kind="parquet", **{**default, **options})

    return write


@pytest.fixture
def cifar10() -> SimpleNamespace:
    root = SHARED / "cifar10"
    if not root.is_dir():
        pytest.skip("needs the real CIFAR-10 at ../shared/data/cifar10")
    return SimpleNamespace(
        kind="parquet", root=str(root), train="train-*.parquet", eval="test_first1000.parquet", num_classes=10
    )
