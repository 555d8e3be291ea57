"""Building a store and looking into it. The driver moves no tensors: builders write the files (building.py).

driver    resolve, check, one real batch through each teacher (how its signals are laid out), header, what is missing
builder   shard after shard: files, then the marker that says it is whole
driver    the codecs' largest errors into the header
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raykd.config import Job
from raykd.data.batches import Batch, make_batch
from raykd.data.splits import open_data
from raykd.errors import ConfigError, Interrupted, JobFaults
from raykd.exchange import codec as codecs
from raykd.exchange import store
from raykd.exchange import store_files as files
from raykd.exchange.asking import Ask, Asks
from raykd.exchange.store import Header, Kept, KeptTeacher, Place
from raykd.exchange.stored import keepable
from raykd.launch import assembly
from raykd.launch.building import Builder, ahead, answered, batches_of, made, wrapped
from raykd.launch.locking import locked
from raykd.launch.observer import Observer
from raykd.launch.stores import fingerprint, mismatches, plain, short, varies
from raykd.resolve import read, to_dict, write
from raykd.roles.losses import Plan
from raykd.roles.network import Facts


class Building(Observer):
    """Hears of a build's progress too; this one says nothing."""

    def planned(self, folder: Path, rows: int, done: int, num_bytes: int) -> None:
        """A build begins: rows of all teachers and epochs together, and how many are there already."""

    def progressed(self, place: Place, done: int) -> None:
        """A shard was written; `done` rows this time, so far."""


def build(
    job: Job,
    out: Path | str,
    epochs: int | None = None,
    observer: Observer | None = None,
    resume: bool = True,
    rows: int | None = None,
) -> dict[str, Any]:
    """Runs a job's teachers once over the views of some epochs and keeps what its losses need.

    What is there and whole is kept; what is missing, truncated or damaged is built. More epochs than before add to a store.

    Args:
        job: whose teachers, losses, data and seed; where its teachers are placed does not matter.
        out: folder of the store, new or of the same job.
        epochs: whose views are kept; None: as many as the store has or `data.augmentation_epochs` says, one where all
            epochs look alike.
        observer: hears of the progress (a `Building`, to hear of each shard).
        resume: False builds every shard anew.
        rows: samples a shard, rounded up to whole batches; None: 4096, fewer of a small data set or where they are large.

    Returns:
        folder; epochs; rows (samples x epochs); bytes of the Arrow files; seconds; forwards (teacher -> views it computed
        this time, padding of last batches not counted); errors (teacher -> the codec's largest); built and kept (shards);
        damaged (what was found broken and built again).

    Raises:
        JobFaults: what is wrong with the job. ConfigError: the folder holds a store of something else. ResourceError: the
        cluster cannot hold a teacher. SourceError: a teacher's answer is not finite or does not fit its codec.
    """
    started, folder, heard = time.time(), Path(out).absolute(), observer or Observer()
    job, header = planned(job, folder, epochs, rows, heard)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"Store {folder}: another build is writing into it"):
        header = _begun(folder, job, header)
        faults = {p: files.fault(folder, header, p) if resume else "" for p in header.places()}
        missing = [p for p, wrong in faults.items() if wrong is not None]
        damaged = [str(w) for p, w in faults.items() if w and files.read_marker(folder, p) is not None]
        for wrong in damaged:
            heard.warn(f"{wrong}. This shard is built again.")
        forwards = dict.fromkeys(header.teachers, 0)
        if isinstance(heard, Building):
            every = sum(_count(header, p) for p in faults)
            left = sum(_count(header, p) for p in missing)
            heard.planned(folder, every, every - left, files.total_bytes(header))
        with _stoppable():
            for place, marker in made(job, folder, header, missing):
                forwards[place.teacher] += marker["rows"]
                if isinstance(heard, Building):
                    heard.progressed(place, sum(forwards.values()))
        header = _with_errors(folder, header)
        store.write_header(folder, header)
    return {
        "folder": str(folder),
        "epochs": header.epochs,
        "rows": header.num_samples * header.epochs,
        "bytes": files.total_bytes(header),
        "seconds": round(time.time() - started, 3),
        "forwards": forwards,
        "errors": {name: dict(t.errors) for name, t in header.teachers.items()},
        "built": len(missing),
        "kept": len(faults) - len(missing),
        "damaged": damaged,
    }


def plan(job: Job, out: Path | str, epochs: int | None = None, rows: int | None = None) -> dict[str, Any]:
    """What `build` would write, to the byte, without writing anything; one batch goes through each teacher.

    Raises:
        As `build`.
    """
    folder = Path(out).absolute()
    _, header = planned(job, folder, epochs, rows, Observer())
    return {"folder": str(folder)} | summary(header)


def summary(header: Header) -> dict[str, Any]:
    """Sizes of a whole store: bytes in all, and of each signal a sample and file by file."""
    teachers = {
        name: {
            "codec": t.codec,
            "bytes_per_sample": t.row_bytes,
            "signals": {k.signal.key: {"bytes_per_sample": k.row_bytes, "shape": _shape(k)} for k in t.signals},
            "errors": dict(t.errors),
        }
        for name, t in header.teachers.items()
    }
    return {
        "bytes": files.total_bytes(header),
        "epochs": header.epochs,
        "samples": header.num_samples,
        "rows": header.num_samples * header.epochs,
        "rows_a_shard": header.rows,
        "shards": len(header.places()),
        "teachers": teachers,
    }


def info(out: Path | str) -> dict[str, Any]:
    """What a store holds and what it was made of; sizes of files are compared with their markers, contents are not."""
    folder = Path(out).absolute()
    header = store.read_header(folder)
    faults = _faults(folder, header, deep=False)
    about = {
        "folder": str(folder),
        "complete": not faults,
        "whole_shards": len(header.places()) - len(faults),
        "seed": header.seed,
        "augmentation": dict(header.augmentation),
        "data": header.data,
        "batch_size": header.batch_size,
        "models": {name: dict(t.fingerprint) for name, t in header.teachers.items()},
    }
    return about | summary(header)


def verify(out: Path | str, recompute: bool = False) -> dict[str, Any]:
    """Reads every file and compares it with its checksum.

    Args:
        out: folder of the store.
        recompute: also run the first batch of each teacher and epoch again, live, and compare what it encodes bit for bit;
            needs the data and the weights that the store's job.json names.

    Returns:
        folder, shards, whole (how many), faults (each names its file), recomputed (batches that were compared).
    """
    folder = Path(out).absolute()
    header = store.read_header(folder)
    faults = _faults(folder, header, deep=True)
    shards, compared = len(header.places()), 0
    whole = shards - len(faults)
    if recompute:
        job = read(folder / store.JOB)
        known = assembly.facts(job)
        faults += mismatches(job, folder, header, [_ask(header, name) for name in header.teachers], known)
        for name in header.teachers:
            wrong, count = _recomputed(job, folder, header, name, known)
            faults, compared = faults + wrong, compared + count
    return {"folder": str(folder), "shards": shards, "whole": whole, "faults": faults, "recomputed": compared}


def planned(job: Job, folder: Path, epochs: int | None, rows: int | None, heard: Observer) -> tuple[Job, Header]:
    """The job as it is built from, and the header of what is built; nothing is written.

    Raises:
        As `build`.
    """
    from raykd.launch.checks import inspect

    seen = inspect(_live(job))
    staged = [
        f"teachers.{n}.weights: a store needs weights that are there, got {t.weights!r}. Run the job first, then name the "
        "student.safetensors of its stage."
        for n, t in seen.job.teachers.items()
        if (t.weights or "").startswith(assembly.STAGE)
    ]
    if job.peers:
        staged.append(
            "peers: a store keeps what frozen teachers say to one student, this job has peers. Use a job of one student."
        )
    if not job.teachers:
        staged.append("teachers: a store keeps what teachers say, and the job has none. Add one.")
    if staged or seen.faults:
        raise JobFaults.of(staged or seen.faults)
    job = seen.job
    before = store.read_header(folder) if (folder / store.HEADER).exists() else None
    epochs = _epochs(job, epochs, before, heard)
    known = assembly.facts(job)
    found = assembly.connect(job, known)
    train = open_data(job.data, "train", job.data_seed)
    size = min((job.training.batch_size or 1) // job.launch.workers, len(train))
    batch = make_batch(train, wrapped(0, size, len(train)), job.data.augmentation, job.data_seed, 0)
    teachers = {name: _laid_out(job, found, known, name, batch) for name in job.teachers}
    widest = max(t.row_bytes for t in teachers.values())
    if rows is None:
        a_shard = before.rows if before is not None else files.rows_a_shard(len(train), size, widest)
    else:
        a_shard = -(-rows // size) * size
    augmentation = plain(to_dict(job.data.augmentation))
    changing = varies(job.data.augmentation)
    header = Header(job.data_seed, augmentation, changing, epochs, train.fingerprint, len(train), a_shard, size, teachers)
    if before is not None:
        _require_same(folder, before, header)
    return job, header


def _live(job: Job) -> Job:
    """The job without its stores and stages: its teachers are asked, by pixels."""
    teachers = {
        n: dataclasses.replace(t, placement="pool", store=None, fill="none", inputs="pixels", actor=None)
        for n, t in job.teachers.items()
    }
    return dataclasses.replace(job, teachers=teachers, stages={}, baseline=False)


def _epochs(job: Job, wanted: int | None, before: Header | None, heard: Observer) -> int:
    if not varies(job.data.augmentation):
        if wanted is not None and wanted > 1:
            heard.note(f"All epochs look alike without augmentation: one is kept instead of {wanted}.")
        return 1
    found = wanted or job.data.augmentation_epochs or (before.epochs if before is not None else None)
    if found is None:
        raise ConfigError(
            "--epochs: expected the number of epochs whose views are kept, got none. A longer training sees them again: "
            "epoch e takes those of epoch e modulo this."
        )
    if found < 1:
        raise ConfigError(f"--epochs: expected at least 1, got {found}.")
    return max(found, before.epochs) if before is not None else found


def _laid_out(job: Job, found: list[Plan], known: Facts, name: str, batch: Batch) -> KeptTeacher:
    """A teacher's part of the header, from one batch of its answers."""
    spec = job.teachers[name]
    wanted = assembly.wanted(found, name)
    views = [s.key for s in wanted if s.view is not None]
    if views:
        raise JobFaults.of(
            [f"teachers.{name}: {', '.join(views)} is drawn anew for each batch, which a store cannot keep. Ask it live."]
        )
    signals = tuple(dict.fromkeys(keepable(s) for s in wanted))
    codec = assembly.codec(job, found, name)
    reply = answered(assembly.make_committee(job, (name,), known), Asks((Ask(name, signals, codec),)), batch)
    kept = store.layout(signals, reply.signals)
    return KeptTeacher(fingerprint(spec, known), spec.codec, codec.temperature, kept)


def _require_same(folder: Path, before: Header, now: Header) -> None:
    """Raises ConfigError where a folder holds a store of something else; it may have fewer epochs."""
    flat = [_flat(store.to_dict(h)) for h in (before, now)]
    free = {"epochs"} | ({"seed"} if not now.varies else set())
    names = [n for n in sorted({*flat[0], *flat[1]}) if n not in free and ".errors" not in n]
    changed = [n for n in names if flat[0].get(n) != flat[1].get(n)]
    if changed:
        shown = "; ".join(f"{n}: has {short(flat[0].get(n))}, needs {short(flat[1].get(n))}" for n in changed[:6])
        raise ConfigError(f"Store {folder}: expected one of this job, got another ({shown}). Name another folder.")


def _begun(folder: Path, job: Job, header: Header) -> Header:
    """Header and job in their place before the first shard; what a killed build left half-written is gone."""
    for part in folder.rglob(f".*{store.PART}"):
        part.unlink(missing_ok=True)
    if (folder / store.HEADER).exists():
        before = store.read_header(folder)
        teachers = {n: dataclasses.replace(t, errors=before.teachers[n].errors) for n, t in header.teachers.items()}
        header = dataclasses.replace(header, teachers=teachers)
    with store.replacing(folder / store.JOB) as part:
        write(job, part)
    store.write_header(folder, header)
    return header


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C ends a build that the same command goes on with."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("The shards that are finished are kept; the same command goes on.") from None


def _with_errors(folder: Path, header: Header) -> Header:
    """The header with the codecs' largest errors, from the markers."""
    errors: dict[str, dict[str, float]] = {name: {} for name in header.teachers}
    for place in header.places():
        for name, value in (files.read_marker(folder, place) or {"errors": {}})["errors"].items():
            errors[place.teacher][name] = max(errors[place.teacher].get(name, 0.0), value)
    return dataclasses.replace(
        header, teachers={n: dataclasses.replace(t, errors=errors[n]) for n, t in header.teachers.items()}
    )


def _recomputed(job: Job, folder: Path, header: Header, name: str, known: Facts) -> tuple[list[str], int]:
    """Compares the first batch of each epoch with the live teacher's; what does not agree, and how many were compared."""
    own, told, count = header.teachers[name], [], 0
    builder = Builder(job, name, str(folder), header, known)
    places = [p for p in header.places() if p.teacher == name and p.shard == 0 and files.fault(folder, header, p) is None]
    asked = [(p.epoch, next(iter(batches_of(header, 0)))) for p in places]
    with ahead(builder.train, job, asked) as batches:
        for place, batch in zip(places, batches):
            live = answered(builder.committee, builder.asks, batch).signals
            count += 1
            for kept in own.signals:
                views = files.open_shard(folder, header, place, kept)
                size = min(header.batch_size, header.span(0)[1])
                differ = [n for n, v in views.items() if not np.array_equal(v[:size], live[kept.signal.key][n][:size])]
                if differ:
                    path = files.shard_file(folder, place, kept).relative_to(folder)
                    told.append(f"{path}: the live teacher answers otherwise for the first batch ({', '.join(differ)})")
    return told, count


def _faults(folder: Path, header: Header, deep: bool) -> list[str]:
    return [wrong for p in header.places() if (wrong := files.fault(folder, header, p, deep)) is not None]


def _ask(header: Header, name: str) -> Ask:
    own = header.teachers[name]
    return Ask(name, tuple(k.signal for k in own.signals), codecs.parse(own.codec, own.temperature))


def _count(header: Header, place: Place) -> int:
    first, stop = header.span(place.shard)
    return stop - first


def _shape(kept: Kept) -> dict[str, list[int]]:
    return {p.name: list(p.shape) for p in kept.parts}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {p: v for k, inner in value.items() for p, v in _flat(inner, f"{path}.{k}" if path else k).items()}
    return {path: plain(value)}
