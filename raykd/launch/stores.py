"""Whether a store can stand for a teacher: what `check` says of it before anything starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raykd import models
from raykd.config import Augmentation, Job, Teacher
from raykd.data.splits import open_data
from raykd.errors import ConfigError, JobFaults, near
from raykd.exchange import store
from raykd.exchange.asking import Ask
from raykd.exchange.store import Header
from raykd.exchange.store_files import fault
from raykd.exchange.stored import kept_for
from raykd.launch import assembly
from raykd.resolve import to_dict
from raykd.roles.losses import Plan
from raykd.roles.network import Facts
from raykd.roles.network import build as build_model
from raykd.roles.teacher import own_facts

SHOWN = 3
_STATES: dict[str, str] = {}


def settled(job: Job) -> Job:
    """The job with the folders of its stores absolute, since workers start in folders of their own, and with
    `data.augmentation_epochs` filled: the views that all of its stores keep. Stages too."""
    stages = {name: settled(stage) for name, stage in job.stages.items()}
    kept = {n: t for n, t in job.teachers.items() if t.placement == "store" and t.store is not None}
    found = {n: dataclasses.replace(t, store=str(Path(str(t.store)).absolute())) for n, t in kept.items()}
    job = dataclasses.replace(job, stages=stages, teachers={**job.teachers, **found})
    if job.data.augmentation_epochs is not None or not found:
        return job
    try:
        epochs = min(store.read_header(Path(str(t.store))).epochs for t in found.values())
    except ConfigError:  # `faults` tells it
        return job
    return dataclasses.replace(job, data=dataclasses.replace(job.data, augmentation_epochs=epochs))


def faults(job: Job, found: list[Plan], known: Facts, name: str) -> list[str]:
    """Why a teacher's store cannot stand for it; empty if it can, or if it has none.

    Args:
        job: resolved.
        found: its connected losses.
        known: of the training data.
        name: of the teacher.
    """
    spec, where = job.teachers[name], f"teachers.{name}.store"
    if spec.placement != "store":
        return [f"{where}: only placement='store' reads a store, got {spec.placement!r}."] if spec.store else []
    if spec.store is None:
        return [f"{where}: placement='store' needs the folder that `raykd store build` wrote. Set it."]
    folder = Path(spec.store)
    header = store.read_header(folder)
    told = mismatches(job, folder, header, assembly.asks(job, found, (name,)).of, known)
    if not told and spec.fill == "none":
        told = _holes(job, folder, header, name)
    return [f"{where}: {text}" for text in told]


def require(job: Job, found: list[Plan], known: Facts) -> None:
    """As `faults`, for what is known only when the job's stages have run.

    Raises:
        JobFaults: a store cannot stand for its teacher.
    """
    told = [fault for name in job.teachers for fault in faults(job, found, known, name)]
    if told:
        raise JobFaults.of(told)


def mismatches(job: Job, folder: Path, header: Header, asks: Iterable[Ask], known: Facts) -> list[str]:
    """In what a store differs from what a job's teachers would answer when they are asked."""
    train = open_data(job.data, "train", job.data_seed)
    told = []
    if header.data != train.fingerprint:
        told.append(
            f"expected the outputs for this training set ({len(train)} images, {train.fingerprint[:12]}), got those of another "
            f"({header.num_samples}, {header.data[:12]})"
        )
    asked = to_dict(job.data.augmentation)
    changed = {n: (v, header.augmentation.get(n)) for n, v in asked.items() if plain(v) != header.augmentation.get(n)}
    if changed:
        shown = ", ".join(f"{n} {mine!r} where it has {its!r}" for n, (mine, its) in changed.items())
        told.append(f"expected views of the job's augmentation, got those of another ({shown})")
    elif header.varies and header.seed != job.data_seed:
        told.append(f"expected views of seed {job.data_seed}, got those of seed {header.seed}")
    for ask in asks:
        told += _teacher_mismatches(job, header, ask, known)
    return [f"{text} (store {folder}). Build one for this job with `raykd store build`, or change the job." for text in told]


def _teacher_mismatches(job: Job, header: Header, ask: Ask, known: Facts) -> list[str]:
    name = ask.teacher
    kept = header.teachers.get(name)
    if kept is None:
        return [f"expected outputs of a teacher {name!r}, got none. {near(name, header.teachers)}"]
    told, spec = [], job.teachers[name]
    if not (spec.weights or "").startswith(assembly.STAGE):  # known when the stage has run
        mine = fingerprint(spec, known)
        changed = [n for n, v in mine.items() if v != kept.fingerprint.get(n)]
        if changed:
            shown = ", ".join(f"{n} {short(mine[n])} where it has {short(kept.fingerprint.get(n))}" for n in changed)
            told.append(f"expected outputs of this teacher, got those of another ({shown})")
    if spec.codec != kept.codec:
        told.append(f"expected codec {spec.codec!r}, got {kept.codec!r}")
    elif ask.codec.kind == "topk" and ask.codec.temperature != kept.temperature:
        told.append(f"expected {kept.codec} with its tail at temperature {ask.codec.temperature:g}, got {kept.temperature:g}")
    missing = [s.key for s in ask.signals if kept_for(s, (k.signal for k in kept.signals)) is None]
    if missing:
        there = ", ".join(k.signal.key for k in kept.signals)
        told.append(f"expected {', '.join(missing)}, got {there} only")
    return told


def _holes(job: Job, folder: Path, header: Header, name: str) -> list[str]:
    """What is missing of a teacher's part, by markers and sizes."""
    told = []
    views = job.data.augmentation_epochs or job.training.epochs or 1
    if header.varies and views > header.epochs:
        told.append(
            f"expected the views of {views} epochs (data.augmentation_epochs), got {header.epochs} (store {folder}). Lower it, "
            f"build more with --epochs, or set teachers.{name}.fill."
        )
    broken = [f for p in header.places() if p.teacher == name and (f := fault(folder, header, p, deep=False))]
    if broken:
        shown = "; ".join(broken[:SHOWN]) + ("; ..." if len(broken) > SHOWN else "")
        told.append(
            f"{len(broken)} of {header.epochs * header.shards} shards are not whole (store {folder}): {shown}. Build them with "
            f"{store.again(folder)}, or set teachers.{name}.fill."
        )
    return told


def fingerprint(spec: Teacher, known: Facts) -> dict[str, Any]:
    """What a teacher's answers depend on beside the images; `weights` is the hash of its state dict."""
    facts = own_facts(spec, known)
    normalise = spec.normalise or facts.normalise
    shown = {
        "model": spec.model,
        "options": dict(spec.options),
        "label_map": spec.label_map,
        "normalise": normalise,
        "input_size": spec.input_size,
        "dtype": spec.dtype,
    }
    return plain(shown) | {"weights": _state(spec, facts)}


def _state(spec: Teacher, facts: Facts) -> str:
    """Hash of a teacher's state dict; worked out again only where the file or a setting has changed."""
    path = Path(spec.weights or "")
    stat = path.stat() if path.is_file() else None
    about = [spec.model, spec.weights, spec.dtype, to_dict(spec.options), facts.num_classes, facts.shape]
    key = json.dumps([*about, stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino)], default=str)
    if key not in _STATES:
        _STATES[key] = models.fingerprint(build_model(spec, facts))
    return _STATES[key]


def varies(augmentation: Augmentation) -> bool:
    """Whether two epochs show different views."""
    a = augmentation
    return bool(a.crop or a.flip or a.randaugment or a.resized_crop or a.erase or a.mixes)


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
