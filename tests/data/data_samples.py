"""Small images and tables for the data tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def pixels(n: int, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, kind)
    return file.getvalue()


def table(contents: list[bytes], labels: list[int]) -> pa.Table:
    images = pa.array(
        [{"bytes": content, "path": None} for content in contents], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    return pa.table({"image": images, "label": pa.array(labels, pa.int64())})
