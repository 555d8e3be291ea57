"""Small jobs whose images are made for a bank; `python -m tests.spine.making DATA FOLDER SETTINGS_JSON` runs one."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import torch

from raykd import Data, Job, Launch, Loss, Student, Teacher, Training
from raykd.config import Synthesis
from raykd.launch import cluster
from raykd.roles import checkpoints
from tests.spine.small import go

STEPS, BATCH = 18, 16


def making(root: Path, method: str = "dafl", **settings) -> Job:
    """A real ResNet-20 teaches a ResNet-8 on images made of what it knows: three updates of a small generator a batch.

    What `dafl`'s images minimise reads the teacher alone, that of `dfad`'s the student too.
    """
    job = Job(
        name="making",
        seed=3,
        data=Data(
            kind="parquet",
            root=str(root / "cifar10"),
            eval="test_first1000.parquet",
            num_classes=10,
            in_channels=3,
            size=(32, 32),
            normalise="cifar10",
            eval_limit=64,
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
        losses={method: Loss(method)},
        synthesis=Synthesis(
            mode="bank",
            options={"width": 8, "last": "sigmoid"},
            latent=16,
            steps=3,
            capacity=6,
            start=2,
            pace=2,
            snapshot_every=4,
            steps_per_epoch=9,
            show=8,
            cpus=0.5,
        ),
        training=Training(epochs=2, batch_size=BATCH, lr=0.05, milestones=(1.5,), checkpoint_every=4),
        launch=Launch(backend="local", cpus=0.5),
    )
    return job.replace(**settings)


def banked(folder: Path, rank: int = 0) -> dict:
    """The feed's part of the last checkpoint that counts: `bank`, `next`, `made`, `stale`."""
    _, newest = checkpoints.committed(folder / "checkpoints")[-1]
    return torch.load(newest / f"rank-{rank}.pt", weights_only=True)["feed"]


def provenance(folder: Path, rank: int = 0) -> dict[int, tuple[int, int]]:
    """Batch of the bank at the end -> (steps behind the student it was made with, who made it)."""
    return {int(number): (int(version), int(maker)) for number, version, maker, *_ in banked(folder, rank)["bank"]["batches"]}


def contents(folder: Path, *below: str) -> dict[int, tuple]:
    """Batches of the bank on disk at the end, as they are in their files."""
    found = {}
    for path in sorted(folder.joinpath("bank", *below).glob("*.arrow")):
        with pa.memory_map(str(path)) as source:
            found[int(path.stem)] = pa.ipc.open_file(source).read_all().to_pydict()
    return found


def records(folder: Path, kind: str) -> list[dict]:
    """Records of a kind, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in lines if record["kind"] == kind]


if __name__ == "__main__":
    data, folder, settings = sys.argv[1:4]
    job = making(Path(data), **json.loads(settings))
    if job.launch.backend == "ray":
        cluster.start_here(num_cpus=4)
    go(job, Path(folder))
