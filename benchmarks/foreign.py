"""torchdistill (arXiv:2011.12913), used as its examples do: a DistillationBox with KDLoss, torchvision's transforms an image,
a DataLoader with one worker process. It is installed into the run's scratch folder and seen by its row's process only.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from benchmarks.plain import decode, load_teacher
from benchmarks.scene import MEAN, STD, STUDENT, Scene
from raykd.models import build

PACKAGE = "torchdistill"
FOLDER = "torchdistill-packages"


def install(scratch: Path) -> str | None:
    """Installs the package (without torch, which is here) below the scratch folder; the reason if that is not to be had."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("uv") or "uv", "pip"]
    command = [*pip, "install", "-q", "--no-deps", "--target", str(scratch / FOLDER), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"pip: {error}"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]


class Pictures(Dataset):
    """CIFAR-10 as torchvision keeps it: decoded arrays, a PIL image a sample, then the transforms."""

    def __init__(self, scene: Scene, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.transform = transform
        images, labels = decode(scene.files, scene.scratch, padding=0)
        self.pixels, self.labels = np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def train(scene: Scene, gate: Callable[[], bool]) -> list[float]:
    """Trains until the gate says stop; returns every step's loss."""
    sys.path.append(str(scene.scratch / FOLDER))
    from torchdistill.core.distillation import get_distillation_box
    from torchvision import transforms

    torch.manual_seed(0)
    chain = [
        transforms.RandomCrop(32, padding=scene.padding),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    pictures = Pictures(scene, transforms.Compose(chain))
    box = get_distillation_box(
        load_teacher(scene),
        build(STUDENT, 10),
        {"train": pictures},
        _config(scene),
        torch.device("cpu"),
        None,
        False,
        1,
    )
    box.teacher_model.eval()
    losses: list[torch.Tensor] = []
    for epoch in range(10**4):
        box.pre_epoch_process(epoch=epoch)
        for images, targets, extra in box.train_data_loader:
            if gate():
                return [float(value) for value in losses]
            loss = box.forward_process(images, targets=targets, supp_dict=extra)
            box.post_forward_process(loss=loss)
            losses.append(loss.detach())
        box.post_epoch_process()
    return []


def _config(scene: Scene) -> dict[str, Any]:
    """What its YAML files say for KD."""
    from torch.utils.data import RandomSampler

    kd = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}
    kd |= {"temperature": scene.temperature, "alpha": 1 - scene.weight, "reduction": "batchmean"}
    loader = {"batch_size": scene.batch_size, "num_workers": 1, "drop_last": True, "persistent_workers": True}
    loader["multiprocessing_context"] = "fork"  # Linux's default; its classes cannot be unpickled in a spawned process
    sgd = {"lr": scene.lr, "momentum": scene.momentum, "weight_decay": scene.weight_decay}
    forward = {"forward_proc": "forward_batch_only"}
    return {
        "num_epochs": 10**4,
        "train_data_loader": {"dataset_id": "train", "sampler": {"class_or_func": RandomSampler}, "kwargs": loader},
        "teacher": {**forward, "requires_grad": False},
        "student": {**forward, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": sgd},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}},
        },
    }
