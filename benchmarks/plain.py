"""The hand-written loop: PyTorch, NumPy and a thread; nothing of raykd but the two architectures.

Its author has taken care: images decoded once into a memory map with the padding already around them, so that a batch of crops
is one gather; batches made ahead by a thread; one normalised batch for both models; no logging, no `.item()`.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.scene import MEAN, STD, STUDENT, TEACHER, Scene
from raykd.models import build


def decode(files: Sequence[Path], folder: Path, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[n 3 h+2p w+2p]` uint8 as a memory map, zeros around them, and labels `[n]`."""
    tables = [pq.read_table(path, columns=["image", "label"]) for path in files]
    labels = np.concatenate([t["label"].to_numpy() for t in tables]).astype(np.int64)
    side = 32 + 2 * padding
    path = folder / f"padded-{padding}.npy"
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(labels), 3, side, side))
    inner = slice(padding, padding + 32)
    row = 0
    for table in tables:
        for cell in table["image"].to_pylist():
            pixels = np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
            out[row, :, inner, inner] = pixels.transpose(2, 0, 1)
            row += 1
    out.flush()
    return np.load(path, mmap_mode="r"), labels


def batches(images: np.ndarray, labels: np.ndarray, batch_size: int, padding: int, seed: int = 0) -> Iterator[tuple]:
    """(images uint8, labels) without end: random order, random crop, random flip."""
    rng = np.random.default_rng(seed)
    windows = np.lib.stride_tricks.sliding_window_view(images, (32, 32), axis=(2, 3))
    while True:
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            top, left = rng.integers(0, 2 * padding + 1, (2, batch_size))
            views = windows[rows, :, top, left]
            mirrored = rng.random(batch_size) < 0.5
            views[mirrored] = views[mirrored][..., ::-1]
            yield torch.from_numpy(views), torch.from_numpy(labels[rows])


def ahead(source: Iterator[tuple], depth: int = 4) -> Iterator[tuple]:
    """The same, made ahead by a thread."""
    ready: queue.Queue = queue.Queue(depth)

    def work() -> None:
        for item in source:
            ready.put(item)

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()


def normaliser() -> Callable[[Tensor], Tensor]:
    """uint8 images to the models' input."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (MEAN, STD))
    return lambda images: images.float().sub_(mean).div_(std)


def load_teacher(scene: Scene) -> nn.Module:
    """The frozen ResNet-32."""
    model = build(TEACHER, 10)
    state = torch.load(scene.weights, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval().requires_grad_(False)


def optimizer(scene: Scene, student: nn.Module) -> torch.optim.Optimizer:
    """SGD as all rows use it."""
    return torch.optim.SGD(student.parameters(), lr=scene.lr, momentum=scene.momentum, weight_decay=scene.weight_decay)


def kd_step(
    scene: Scene, student: nn.Module, teacher: nn.Module, sgd: torch.optim.Optimizer, inputs: Tensor, labels: Tensor
) -> Tensor:
    """One step; returns the loss, detached."""
    with torch.inference_mode():
        target = teacher(inputs)
    logits = student(inputs)
    t = scene.temperature
    soft = F.kl_div(F.log_softmax(logits / t, 1), F.softmax(target / t, 1), reduction="batchmean") * t * t
    loss = scene.weight * soft + (1 - scene.weight) * F.cross_entropy(logits, labels)
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    return loss.detach()


def train(scene: Scene, gate: Callable[[], bool]) -> list[float]:
    """Trains until the gate says stop; returns every step's loss."""
    torch.manual_seed(0)
    student, teacher = build(STUDENT, 10).train(), load_teacher(scene)
    sgd, normalise = optimizer(scene, student), normaliser()
    images, labels = decode(scene.files, scene.scratch, scene.padding)
    losses = []
    for views, target in ahead(batches(images, labels, scene.batch_size, scene.padding)):
        if gate():
            break
        losses.append(kd_step(scene, student, teacher, sgd, normalise(views), target))
    return [float(value) for value in losses]
