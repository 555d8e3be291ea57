"""Small jobs of peers on real CIFAR-10 images, and what tests read from their run folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from raykd import Augmentation, Data, Job, Launch, Loss, Training
from raykd.config import Exchange, Peer
from tests.spine.small import assert_equal_states, final_state, trace

STEPS = 12  # two epochs
MODELS = {"a": "cifar_resnet8", "b": "tests.spine.plain:plain", "c": "wrn_16_1"}
OWN = {
    "a": {},
    "b": {"lr": 0.02, "scheduler": "cosine", "weight_decay": 1e-3, "nesterov": False},
    "c": {"optimizer": "adamw", "lr": 1e-3},
}
NORMALISE = {"a": None, "b": "imagenet", "c": None}
RAY = {"launch.backend": "ray"}
SHARED = {f"peers.{name}.actor": "home" for name in "ab"}


def peers(root: Path, names: str = "ab", model: str | None = None, **settings) -> Job:
    """Peers of different architectures with optimizers, schedules and normalisation of their own, which learn by dml; with
    `model` all are of that one."""
    job = Job(
        name="peers",
        seed=5,
        data=Data(
            kind="parquet",
            root=str(root / "cifar10"),
            train="train-00000-of-00005.parquet",
            eval="test_first1000.parquet",
            normalise="cifar10",
            limit=96,
            eval_limit=32,
            augmentation=Augmentation(crop=4, flip=True),
        ),
        peers={n: Peer(model=model or MODELS[n], normalise=NORMALISE[n], training=OWN[n]) for n in names},
        losses={"dml": Loss("dml", temperature=2.0)},
        exchange=Exchange(),
        training=Training(recipe="online", epochs=2, batch_size=16, lr=0.05, milestones=(1.5,), checkpoint_every=3),
        launch=Launch(backend="local", cpus=0.5),
    )
    return job.replace(**settings)


def plain_peers(root: Path, names: str = "ab", **settings) -> Job:
    """Peers without batch norm: quick, and the same with any number of workers."""
    return peers(root, names, "tests.spine.plain:plain", **settings)


def fragile(name: str, marker: Path, does: str, at: int) -> dict[str, object]:
    """Settings by which something happens to a peer at a step, once."""
    return {
        f"peers.{name}.model": "tests.spine.online_nets:fragile",
        f"peers.{name}.options": {"does": does, "at": at, "marker": str(marker)},
    }


def of(folder: Path, name: str) -> Path:
    """A peer's folder."""
    return folder / "peers" / name


def traces(folder: Path, names: str = "ab") -> dict[str, list[tuple]]:
    """Peer -> (step, every term exactly as it was)."""
    return {name: trace(of(folder, name)) for name in names}


def records(folder: Path, name: str, kind: str) -> list[dict]:
    """What a peer has recorded of a kind."""
    lines = (of(folder, name) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def versions(folder: Path, name: str) -> list[dict[str, int]]:
    """Of each step: neighbour -> the version of what it had said."""
    return [r["versions"] for r in records(folder, name, "step")]


def exported(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """A peer's weights at the end."""
    return load_file(of(folder, name) / "student.safetensors")


def assert_equal_ends(one: Path, other: Path, names: str = "ab") -> None:
    """All peers of two runs ended alike, bit for bit: weights, momenta, connectors."""
    for name in names:
        assert_equal_states(final_state(of(one, name)), final_state(of(other, name)))


def whole(trace_of_one: list[tuple]) -> None:
    """No step is lost and none is doubled."""
    assert [step for step, _ in trace_of_one] == list(range(1, STEPS + 1))
