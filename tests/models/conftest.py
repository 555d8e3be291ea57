"""Real weights and images for the tests of models; skipped where the data folder is absent."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def cifar_weights() -> dict[int, Path]:
    """Depth to file of the published CIFAR-10 ResNets."""
    folder = SHARED / "weights" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no real weights: {folder} is absent")
    return {int(path.name.split("-")[0].removeprefix("resnet")): path for path in folder.glob("resnet*.th")}


@pytest.fixture(scope="session")
def cifar_test() -> tuple[Tensor, Tensor]:
    """The first 1000 CIFAR-10 test images, normalised `[1000 3 32 32]`, and labels `[1000]`."""
    path = SHARED / "cifar10" / "test_first1000.parquet"
    if not path.is_file():
        pytest.skip(f"no real images: {path} is absent")
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(path, columns=["image", "label"]).to_pydict()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in rows["image"]])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None], torch.tensor(rows["label"])
