"""The rows: what is timed, each as a function (scene, gate) -> findings, run in a process of its own."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain
from benchmarks.gate import Gate
from benchmarks.scene import Scene, job
from raykd.config import Job
from raykd.data.batches import Plan as Order
from raykd.data.loader import Loader
from raykd.data.splits import open_data
from raykd.errors import Interrupted
from raykd.exchange.sources import Source
from raykd.launch import assembly
from raykd.roles.learner import Learner
from raykd.roles.recorder import read
from raykd.schemes.offline import Setting, learn

Found = Mapping[str, Any]
Sources = Callable[[Job, Any, Any], Mapping[str, Source]]


def student(scene: Scene, gate: Gate) -> Found:
    """raykd without teachers."""
    return _learn(scene, None, gate, lambda *_: {})


def ceiling(scene: Scene, gate: Gate) -> Found:
    """raykd without teachers, while another process does one inference of the teacher for each step, unconnected."""
    context = multiprocessing.get_context("spawn")
    turns = context.Semaphore(0)
    partner = context.Process(target=_infer, args=(scene, turns), daemon=True)
    partner.start()

    def paced() -> bool:
        stop = gate()
        turns.release()
        return stop

    try:
        return _learn(scene, None, paced, lambda *_: {})
    finally:
        partner.kill()


def hand(scene: Scene, gate: Gate) -> Found:
    """The hand-written loop."""
    return {"losses": plain.train(scene, gate)}


def inline(scene: Scene, gate: Gate) -> Found:
    """raykd, the teacher in the student's process."""
    return _learn(scene, "inline", gate, lambda j, plans, known: assembly.local_sources(j, plans, known, pickled=False))


def pool(scene: Scene, gate: Gate) -> Found:
    """raykd, the teacher one replica on a Ray actor; the student is the process that started Ray."""
    import ray

    from raykd.launch import cluster, hosts, replicas

    started: dict[str, list[Any]] = {}

    def sources(j: Job, plans: Any, known: Any) -> Mapping[str, Source]:
        started.update(replicas.start(j, known))
        found = hosts.sources(j, plans, known, started)
        gate.probe = lambda: {
            "teacher_cpu_s": sum(ray.get([h.__ray_call__.remote(cpu_s) for h in started["big"]], timeout=60)),
            **{k: v for k, v in vars(found["big"].stats).items() if isinstance(v, (int, float))},
        }
        return found

    with cluster.here(num_cpus=4):
        try:
            return _learn(scene, "pool", gate, sources)
        finally:
            replicas.stop(started)


def torchdistill(scene: Scene, gate: Gate) -> Found:
    """The torchdistill package."""
    from benchmarks import foreign

    return {"losses": foreign.train(scene, gate)}


ROWS: dict[str, Callable[[Scene, Gate], Found]] = {
    "student": student,
    "ceiling": ceiling,
    "hand": hand,
    "inline": inline,
    "pool": pool,
    "torchdistill": torchdistill,
}


def cpu_s(_: Any) -> float:
    """CPU seconds of this process; sent to replicas."""
    return time.process_time()


def _learn(scene: Scene, placement: str | None, gate: Callable[[], bool], sources: Sources) -> Found:
    return learn_gated(job(scene, placement), scene, gate, sources)


def learn_gated(chosen: Job, scene: Scene, gate: Callable[[], bool], sources: Sources) -> Found:
    """raykd's own `learn`, paused between segments by its question whether to stop, which it asks once a step."""
    known = assembly.facts(chosen)
    plans = assembly.connect(chosen, known)
    with tempfile.TemporaryDirectory(dir=scene.scratch) as place:
        folder = Path(place)
        try:
            learn(0, 1, chosen, sources(chosen, plans, known), Setting(plans, known, folder, gate))
        except Interrupted:
            steps = read(folder / "metrics.jsonl", "step")
            return {"losses": [r["loss"] for r in steps], "wait_s": [r["wait_s"] for r in steps]}
    raise RuntimeError("The training ended before the benchmark did.")


def _infer(scene: Scene, turns: Any) -> None:
    """The ceiling's other process: one batch for each turn."""
    torch.set_num_threads(1)
    teacher, normalise = plain.load_teacher(scene), plain.normaliser()
    images = torch.randint(0, 256, (scene.batch_size, 3, 32, 32), dtype=torch.uint8)
    while turns.acquire():
        with torch.inference_mode():
            teacher(normalise(images))


def agreement(scene: Scene, steps: int = 4) -> float:
    """Largest relative difference of the loss between raykd inline and the hand-written step, same start and batches."""
    chosen = job(scene, "inline")
    known = assembly.facts(chosen)
    plans = assembly.connect(chosen, known)
    train = open_data(chosen.data, "train", chosen.seed)
    order = Order(len(train), scene.batch_size, chosen.seed)
    source = assembly.local_sources(chosen, plans, known, pickled=False)["big"]
    learner = Learner(chosen, plans, known, torch.tensor(train.labels), torch.device("cpu"), order.steps_per_epoch)
    twin, teacher, normalise = copy.deepcopy(learner.student).train(), plain.load_teacher(scene), plain.normaliser()
    sgd = plain.optimizer(scene, twin)
    worst = 0.0
    with Loader(train, order, chosen.data.augmentation) as loader:
        for step, batch in zip(range(steps), loader):
            signals = source.request(batch).result()
            if step == 0:
                learner.bind(batch, signals)
            theirs = float(plain.kd_step(scene, twin, teacher, sgd, normalise(batch["images"]), batch["labels"]))
            ours = learner.step(batch, signals, scene.batch_size).loss
            worst = max(worst, abs(ours - theirs) / abs(theirs))
    return worst
