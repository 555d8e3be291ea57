"""The store's rows: a training from it, the building of one, and the plain inference loop that building is compared with."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain
from benchmarks.gate import Gate
from benchmarks.rows import Found, Sources, learn_gated
from benchmarks.scene import Scene, job
from raykd import Loss
from raykd.config import Job
from raykd.exchange.stored import StoreSource
from raykd.launch import assembly, storing
from raykd.launch.building import Builder
from raykd.launch.observer import Observer

ROWS_A_SHARD = 1536  # twelve batches, so that each segment of a full run writes one shard; by default there are 2.7 times more
CODECS = ("dense", "fp16", "int8", "topk:5")
LOSSES = {  # what is kept for it
    "kd": Loss("kd"),
    "at": Loss("at"),
    "fitnet": Loss("fitnet"),
    "sp": Loss("sp"),
}


def store(scene: Scene, gate: Gate) -> Found:
    """raykd from a store of one epoch's views."""
    with tempfile.TemporaryDirectory(dir=scene.scratch) as place:
        chosen = _local(scene)
        storing.build(chosen, place, 1)
        data = dataclasses.replace(chosen.data, augmentation_epochs=1)
        teacher = dataclasses.replace(chosen.teachers["big"], placement="store", store=place)
        chosen = dataclasses.replace(chosen, data=data, teachers={"big": teacher})
        return learn_gated(chosen, scene, gate, _from(Path(place)))


def _from(folder: Path) -> Sources:
    return lambda _, plans, __: {"big": StoreSource(folder, "big", assembly.wanted(plans, "big"))}


def build(scene: Scene, gate: Gate) -> Found:
    """raykd building a store: views, teacher, files, checksums."""
    with tempfile.TemporaryDirectory(dir=scene.scratch) as place:
        chosen, header = storing.planned(_local(scene), Path(place), 10**3, ROWS_A_SHARD, Observer())
        builder = Builder(chosen, "big", place, header, assembly.facts(chosen))
        builder.committee = _Gated(builder.committee, gate)  # type: ignore[assignment]
        try:
            for _ in builder.shards(header.places()):
                pass
        except _Stop:
            return {}
    raise RuntimeError("The store was whole before the benchmark ended.")


def infer(scene: Scene, gate: Gate) -> Found:
    """The hand-written loop: batches ahead by a thread, the teacher under inference_mode, logits kept in memory."""
    with tempfile.TemporaryDirectory(dir=scene.scratch) as place:
        teacher, normalise = plain.load_teacher(scene), plain.normaliser()
        images, labels = plain.decode(scene.files, Path(place), scene.padding)
        kept = []
        for views, _ in plain.ahead(plain.batches(images, labels, scene.batch_size, scene.padding)):
            if gate():
                return {}
            with torch.inference_mode():
                kept.append(teacher(normalise(views)).numpy())
    return {}


ROWS: dict[str, Callable[[Scene, Gate], Found]] = {"store": store, "build": build, "infer": infer}


def sizes(scene: Scene) -> dict[str, dict[str, int]]:
    """Loss -> codec -> bytes that a sample of one epoch takes in the store; none where the codec does not fit the loss."""
    found: dict[str, dict[str, int]] = {}
    chosen = _local(scene)
    for name, loss in LOSSES.items():
        found[name] = {}
        for codec in CODECS if name == "kd" else CODECS[:3]:
            teacher = dataclasses.replace(chosen.teachers["big"], codec=codec)
            asked = dataclasses.replace(chosen, losses={name: loss}, teachers={"big": teacher})
            planned = storing.plan(asked, scene.scratch / "none", 1)
            found[name][codec] = planned["teachers"]["big"]["bytes_per_sample"]
    return found


class _Stop(Exception):
    """The gate said stop."""


class _Gated:
    """The builder's teacher, asked only when the gate opens."""

    def __init__(self, committee: Any, gate: Callable[[], bool]) -> None:
        self._committee, self._gate = committee, gate

    def answer(self, fields: Mapping[str, Any], asks: Any) -> Any:
        if self._gate():
            raise _Stop
        return self._committee.answer(fields, asks)


def _local(scene: Scene) -> Job:
    """The pool row's job in this process."""
    chosen = job(scene, "pool")
    data = dataclasses.replace(chosen.data, eval=chosen.data.train)  # never measured; `check` wants a split to measure teachers
    return dataclasses.replace(chosen, data=data, launch=dataclasses.replace(chosen.launch, backend="local"))
