"""Small jobs on real CIFAR-10 images, and what tests read from their run folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

from raykd import Augmentation, Data, Job, Launch, Loss, Student, Teacher, Training
from raykd.launch.observer import Observer
from raykd.launch.run import run


def cifar(root: Path, **settings) -> Job:
    """A real ResNet-20 teaches a ResNet-8 with five losses at once: augmentation, mixup, a memory bank, a trained connector."""
    job = Job(
        name="small",
        seed=3,
        data=Data(
            kind="parquet",
            root=str(root / "cifar10"),
            train="train-00000-of-00005.parquet",
            eval="test_first1000.parquet",
            normalise="cifar10",
            limit=512,
            eval_limit=128,
            augmentation=Augmentation(crop=4, flip=True, mixup=0.4),
        ),
        student=Student(model="cifar_resnet8"),
        teachers={
            "big": Teacher(
                model="cifar_resnet20",
                weights=str(root / "weights" / "cifar10" / "resnet20-12fca82f.th"),
                normalise="imagenet",
                cpus=0.5,
            )
        },
        losses={
            "kd": Loss("kd"),
            "fitnet": Loss("fitnet"),
            "at": Loss("at"),
            "sp": Loss("sp"),
            "crd": Loss("crd", num_negatives=64),
        },
        ce_weight=0.5,
        training=Training(epochs=2, batch_size=32, lr=0.05, milestones=(1.5,), checkpoint_every=5),
        launch=Launch(backend="local", cpus=0.5),
    )
    return job.replace(**settings)


def mlp(root: Path, **settings) -> Job:
    """Without batch norm, with per-sample losses and a connector: what data parallelism must leave unchanged."""
    return cifar(root).replace(
        **{
            "student.model": "tests.spine.plain:plain",
            "losses": {"kd": {"method": "kd"}, "fitnet": {"method": "fitnet", "regressor": "conv"}},
            "training.max_steps": 12,
            **settings,
        }
    )


def trace(folder: Path) -> list[tuple]:
    """(step, every term exactly as it was) of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["terms"]) for r in lines if r["kind"] == "step"]


def steps_seen(folder: Path) -> int:
    """Steps recorded so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def final_state(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """Everything trainable and remembered at the end: student, connectors, banks, momenta; flat, by name."""
    newest = max((folder / "checkpoints").glob("step-*"))
    state = torch.load(newest / f"rank-{rank}.pt", weights_only=True)
    flat: dict[str, torch.Tensor] = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        elif isinstance(value, torch.Tensor):
            flat[path] = value

    walk(state, "")
    exported = load_file(folder / "student.safetensors")
    return flat | {f"exported.{k}": v for k, v in exported.items()}


def assert_equal_states(one: dict, other: dict) -> None:
    """Bit for bit, every tensor."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, {different[:5]} among them"


class At(Observer):
    """Calls `action(observer)` once, as soon as `step` steps are recorded."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action, self.folder = step, action, None
        self.fired_at = None

    def begin(self, path, job, folder, total_steps) -> None:  # noqa: ARG002
        self.folder = folder

    def poll(self) -> None:
        if self.fired_at is None and self.folder is not None and steps_seen(self.folder) >= self.step:
            self.fired_at = steps_seen(self.folder)
            self.action(self)


def go(job: Job, folder: Path, observer: Observer | None = None, resume: bool = False) -> dict:
    """Runs a job in a folder."""
    return run(job, folder=folder, observer=observer, resume=resume)


def descendants(pid: int) -> list[int]:
    """All processes below one, from /proc."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
    found, front = [], [pid]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        found += front
    return found


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all below it."""
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
