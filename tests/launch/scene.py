"""One small job that is right, and the files that make it wrong: images, weights and modules, each spoiled in one way."""

from __future__ import annotations

import dataclasses
import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from raykd import Data, Job, Launch, Loss, Student, Teacher, Training, models

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
MODULE = '''
"""A user's own models and losses, right and wrong."""
import torch
from torch import nn


def twice(num_classes):
    """A model that yields twice as many classes as were asked for."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(192, num_classes)

        def forward(self, images):
            logits = self.linear(images.flatten(1))
            return torch.cat([logits, logits], 1)

    return Twice()


def not_a_model(num_classes):
    return "resnet"


def failing_model(num_classes):
    raise KeyError("no such block")


def good_loss(student_logits, teacher_logits, *, weight: float = 1.0, ce_weight: float = 0.1):
    return (student_logits - teacher_logits).square().mean(1)


def raising_loss(student_logits, teacher_logits, *, weight: float = 1.0, ce_weight: float = 0.1):
    raise KeyError("margin")


def late_loss(student_logits, teacher_logits, *, weight: float = 1.0, ce_weight: float = 0.1):
    if student_logits.device.type != "meta":
        raise KeyError("margin")
    return student_logits.mean(1)


def shape_loss(student_logits, teacher_logits, *, weight: float = 1.0, ce_weight: float = 0.1):
    return (student_logits - teacher_logits).square()


def none_loss(student_logits, teacher_logits, *, weight: float = 1.0, ce_weight: float = 0.1):
    pass


def constant_loss(student_logits, teacher_logits, *, weight: float = 1.0, ce_weight: float = 0.1):
    return teacher_logits.mean(1)


def misnamed_loss(student_logit, teacher_logits, *, weight: float = 1.0):
    return student_logit


def unknown_loss(pupil_logits, teacher_logits, *, weight: float = 1.0):
    return pupil_logits


def data(spec, split):
    return [1, 2, 3]
'''


class Evil:
    """What a pickle of weights must never be able to do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def png(size: tuple[int, int] = (8, 8), seed: int = 0) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_rows(path: Path, images: list[bytes], labels: Any, **options: Any) -> None:
    """A Parquet shard."""
    column = pa.array([{"bytes": image, "path": None} for image in images], STRUCT)
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels, pa.int64())
    pq.write_table(pa.table({"image": column, "label": labels}), path, **options)


def write_data(root: Path) -> None:
    """64 good rows, and shards that are wrong."""
    root.mkdir()
    images, labels = [png(seed=i) for i in range(64)], [i % 4 for i in range(64)]
    write_rows(root / "train.parquet", images, labels, row_group_size=16)
    write_rows(root / "eval.parquet", images[:16], labels[:16])
    whole = (root / "train.parquet").read_bytes()
    (root / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (root / "corrupt.parquet").write_bytes(b"PAR1 this is no Parquet file PAR1")
    write_rows(root / "floats.parquet", images, pa.array([0.5] * 64))
    write_rows(root / "range.parquet", images, [7, *labels[1:]])
    write_rows(root / "hidden.parquet", images, [*labels[:40], 9, *labels[41:]], row_group_size=16, write_statistics=False)
    write_rows(root / "sizes.parquet", [*images[:33], png((8, 9)), *images[34:]], labels, row_group_size=16)
    write_rows(root / "undecodable.parquet", [*images[:37], b"no image", *images[38:]], labels, row_group_size=16)
    write_rows(root / "first.parquet", [b"no image", *images[1:]], labels)
    write_rows(root / "few.parquet", images[:3], labels[:3])
    (root / "emptydir").mkdir()


def write_weights(root: Path) -> None:
    """A teacher's weights, and files that are none."""
    root.mkdir()

    def state(name: str, classes: int = 4) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return models.build(name, classes).state_dict()

    good = state("cifar_resnet8")
    save_file(good, root / "good.safetensors")
    save_file(state("cifar_resnet14"), root / "other.safetensors")
    save_file(state("cifar_resnet8", 10), root / "ten.safetensors")
    save_file({k: v * torch.nan if v.is_floating_point() else v for k, v in good.items()}, root / "nan.safetensors")
    save_file({k: v * 1e6 if k.startswith("linear") else v for k, v in good.items()}, root / "large.safetensors")
    save_file({"linear.weight": torch.zeros(4, 192), "linear.bias": torch.zeros(4)}, root / "twice.safetensors")
    torch.save(good, root / "good.pt")
    for name in ("good.pt", "good.safetensors"):
        content = (root / name).read_bytes()
        (root / name.replace("good", "truncated")).write_bytes(content[: len(content) // 2])
    with (root / "evil.pt").open("wb") as file:
        pickle.dump({"state_dict": Evil()}, file, protocol=2)
    torch.save({"epoch": 3}, root / "empty.pt")


def write_modules(root: Path) -> None:
    """Modules of the user's own, on sys.path."""
    (root / "bad_user_code.py").write_text(MODULE)
    (root / "bad_syntax.py").write_text("def my_loss(student_logits, *, weight: float = 1.0)\n    return student_logits\n")
    (root / "bad_import.py").write_text("import a_package_that_is_not_there\n\n\ndef net(num_classes):\n    pass\n")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))


def job(root: Path, **settings: Any) -> Job:
    """A job that is right: one teacher, 64 images, a step of 16."""
    return put(
        Job(
            name="bad",
            data=Data(
                kind="parquet",
                root=str(root / "data"),
                train="train.parquet",
                eval="eval.parquet",
                num_classes=4,
                normalise="cifar10",
                cache="memory",
            ),
            student=Student(model="cifar_resnet8"),
            teachers={"big": Teacher(model="cifar_resnet8", weights=str(root / "weights" / "good.safetensors"))},
            losses={"kd": Loss("kd")},
            training=Training(epochs=1, batch_size=16, lr=0.05, scheduler="constant"),
            launch=Launch(backend="local"),
            runs=str(root / "runs"),
        ),
        {path: value.replace("{root}", str(root)) if isinstance(value, str) else value for path, value in settings.items()},
    )


def put(place: Any, settings: Mapping[str, Any]) -> Any:
    """A copy with settings changed by path and nothing checked: a job as a user's own Python makes it."""
    for path, value in settings.items():
        place = _put(place, path.split("."), value)
    return place


def _put(place: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if isinstance(place, Loss):
        return Loss(place.method, **{"layers": place.layers, "teachers": place.teachers, **place.options, name: value})
    if isinstance(place, Mapping):
        inner = _put(place[name], rest, value) if rest else value
        return {**place, name: inner}
    return dataclasses.replace(place, **{name: _put(getattr(place, name), rest, value) if rest else value})
