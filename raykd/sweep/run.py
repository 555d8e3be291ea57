"""`sweep(job, space)`: from faults to the winner's seeds. The driver watches; it never touches a tensor.

    faults of job and space -> folder -> stages, once -> teachers, once -> trials (Tune) -> winner x seeds, on all images

Everything is in the sweep's folder, so that each step is taken up again where it was left.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

from raykd.config import Job
from raykd.errors import Interrupted, JobFaults, ResourceError, SourceError
from raykd.launch import assembly, cluster, preflight
from raykd.launch.locking import locked
from raykd.launch.run import JOB, RESULT, commit, hardware
from raykd.launch.run import run as run_job
from raykd.resolve import read, resolve, to_dict, validate, write
from raykd.sweep import faults, folders, ledger, sharing, tuning
from raykd.sweep import plan as plans
from raykd.sweep import space as spaces
from raykd.sweep.ledger import Row
from raykd.sweep.observer import SweepObserver
from raykd.sweep.plan import Plan, Trial
from raykd.sweep.space import Space
from raykd.sweep.trial import Given, job_of

SPACE = "space.pkl"
POLL_S = 0.3
RELEASE_S = 10.0  # until what stages gave back shows as free


def sweep(
    job: Job,
    space: Space,
    *,
    folder: Path | str | None = None,
    observer: SweepObserver | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Runs a sweep to its end.

    Args:
        job: what every trial does but for its settings.
        space: job path -> distribution of Ray Tune, `tune.grid_search([...])` or a value.
        folder: of the sweep; None: a new one, `<runs>/<name>-sweep-<number>`.
        observer: hears of the progress; None: nobody.
        settings: of `Plan`: search, scheduler, samples, seeds, share, holdout, grace, reduction, perturb_every, max_concurrent.

    Returns:
        The content of sweep.json: trials, forward passes of the teachers, the winner and its seeds.

    Raises:
        JobFaults: everything that is wrong with job, space and settings, before anything started.
        ResourceError: the cluster cannot hold one trial. Interrupted: stopped, and resumable. SourceError: every trial failed.
    """
    plan = plans.make(**settings)
    space = spaces.as_space(space, "space")
    told = _early(job, space, plan)
    if told:
        raise JobFaults.of(told)
    job = validate(job)
    planned = plans.trials(plan, space, job.seed)
    place = folders.new(job, Path(folder) if folder else None)
    write(job, place / JOB)
    (place / SPACE).write_bytes(cloudpickle.dumps(space))
    plans.write(place, plan, space, planned)
    return _go(place, job, space, plan, planned, observer or SweepObserver())


def resume(folder: Path | str, *, observer: SweepObserver | None = None) -> dict[str, Any]:
    """Goes on with a sweep that was stopped or killed: the same trials, finished ones and finished seeds not run again.

    Raises:
        ConfigError: the folder holds no sweep. Others: as `sweep`.
    """
    place = Path(folder).absolute()
    plan, _, planned = plans.read(place)
    space = cloudpickle.loads((place / SPACE).read_bytes())
    return _go(place, read(place / JOB), space, plan, planned, observer or SweepObserver())


def _early(job: Job, space: Space, plan: Plan) -> list[str]:
    planned = plans.trials(plan, space, job.seed) if not _endless(space, plan) else []
    nodes = cluster.nodes(free=False) if ray.is_initialized() else {}
    return faults.found(job, space, plan, planned, nodes)


def _endless(space: Space, plan: Plan) -> bool:
    return plan.search == "grid" and any(spaces.finite(d) is None for d in space.values())


def _go(place: Path, job: Job, space: Space, plan: Plan, planned: list[Trial], observer: SweepObserver) -> dict[str, Any]:
    if (place / ledger.SWEEP).is_file():
        done = ledger.read_json(place / ledger.SWEEP)
        if done["complete"]:
            observer.note(f"Finished earlier, nothing is run again ({place}).")
            observer.end(done)
            return done
    taken = f"Sweep {place}: another raykd is running it"
    with locked(place, taken), tuning.quiet(), cluster.connected(job):
        cluster.require_shared(place)
        return _Sweep(place, job, space, plan, planned, observer).all()


class _Sweep:
    """One sweep on a cluster that is there."""

    def __init__(self, place: Path, job: Job, space: Space, plan: Plan, planned: list[Trial], observer: SweepObserver) -> None:
        self.place, self.job, self.space, self.plan = place, job, space, plan
        self.planned, self.observer = planned, observer
        self.epochs = max(sharing.longest(job, space))
        self.started, self._next, self._stopping = time.time(), 0.0, False
        self._loop: tuning.Loop | None = None
        self.rows: list[Row] = []
        self._kept: dict[str, tuple[Any, Row]] = {}

    def all(self) -> dict[str, Any]:
        """Stages, teachers, trials, winner."""
        with tuning.stoppable(self._stop):
            base = self._after_stages()
            at_once = self._room(base)
            self.observer.begin(self.place, self._about(at_once))
            forwards = self._trials(base, at_once)
            winner = self._winner()
            best = self.job.replace(**winner["settings"])
            write(best, self.place / ledger.BEST)
            seeds = self._seeds(base.replace(**winner["settings"]))
        result = self._result(forwards, winner, seeds, complete=True)
        ledger.write_json(self.place / ledger.SWEEP, result)
        self.observer.end(result)
        return result

    def _stop(self) -> None:
        self._stopping = True
        if self._loop is None:
            self._check()
        else:
            self.observer.note("Stopping: trials end, the sweep can be resumed. Ctrl-C again to stop at once.")
            self._loop.stop()

    def _check(self) -> None:
        if self._stopping:
            raise Interrupted(f"Stopped. Go on with: raykd sweep --resume {self.place}")

    def _after_stages(self) -> Job:
        """The job with the weights of its stages, which are run now if they have not been."""
        places: dict[str, Path] = {}
        for name, stage in resolve(self.job).stages.items():
            self._check()
            places[name] = self.place / "stages" / name
            here = dataclasses.replace(stage.launch, backend="ray", address=self.job.launch.address)
            ready = dataclasses.replace(assembly.with_stage_weights(stage, places), launch=here)
            self._run(ready, places[name], f"stage {name}")
        return dataclasses.replace(assembly.with_stage_weights(self.job, places), stages={})

    def _run(self, job: Job, folder: Path, what: str) -> dict[str, Any]:
        """A run of its own in a folder of the sweep, taken up again where there is one."""
        if (folder / RESULT).is_file():
            return ledger.read_json(folder / RESULT)
        return run_job(job, folder=folder, resume=(folder / JOB).is_file(), observer=self.observer.run(what))

    def _room(self, base: Job) -> int:
        """Trials at a time; raises ResourceError where not even one fits."""
        most = min(self.plan.max_concurrent or 10**6, len(self.planned) or self.plan.samples)
        deadline = time.monotonic() + RELEASE_S
        while True:
            count = sharing.concurrent(base, self.plan.share, cluster.nodes(), most)
            if count == most or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)  # what stages have just given back may take a moment to show as free
        if not count:
            verdict = preflight.fit(sharing.needs(base, self.plan.share, 1), cluster.nodes())
            raise ResourceError(f"launch.cpus: one trial does not fit. {verdict.text}")
        return count

    def _trials(self, base: Job, at_once: int) -> dict[str, Any]:
        """All trials; returns the teachers' forward passes."""
        with sharing.teachers(base, self.space, self.plan, self.place, self.observer.run("store")) as shared:
            self._check()
            given = Given(base, self.plan, shared, str(self.place), tuple(t.name for t in self.planned))
            limit = None if self.plan.needs_checkpoints else at_once
            self._loop = tuning.Loop(self.place, self.plan, self.space, self.planned, given, limit, self.epochs, self._poll)
            whole = self._loop.run()
            self._loop = None
            self._poll(self._states, now=True)
            forwards = self._forwards(given)
        ledger.write_csv(self.place / ledger.CSV, self.rows, list(self.space))
        if not whole:
            ledger.write_json(self.place / ledger.SWEEP, self._result(forwards, None, [], complete=False))
            self._check()
        return forwards

    def _poll(self, states: list[tuple[str, Mapping[str, Any], str]], now: bool = False) -> None:
        """Reads the trials' folders and passes the table on, a few times a second."""
        self._states = states
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + POLL_S
        self.rows = [self._row(*state) for state in sorted(states, key=lambda s: s[0])]
        self.observer.update(self.rows)

    def _row(self, name: str, settings: Mapping[str, Any], state: str) -> Row:
        """As `ledger.row`; a folder in which nothing has changed is not read again."""
        mark = (state, dict(settings), ledger.mark(self.place, name))
        if name not in self._kept or self._kept[name][0] != mark:
            epochs = plans.epochs_of(self.job, settings)
            self._kept[name] = (mark, ledger.row(self.place, name, settings, epochs, state))
        return self._kept[name][1]

    def _forwards(self, given: Given) -> dict[str, Any]:
        """How many images the teachers computed for all trials, and how many they would have for one, or for each alone."""
        base = job_of(dataclasses.replace(given, shared=sharing.Shared("none")), {})
        known = assembly.facts(base)
        one = sharing.one_trial(base, known)
        share = sum(r["epoch"] / self.epochs for r in self.rows)
        live = sum(r["forwards"] for r in self.rows)
        return {
            "share": given.shared.share,
            "sweep": given.shared.computed if given.shared.share == "store" else live,
            "one_trial": one,
            "unshared": round(one * share),
            "unit": "images through a teacher",
        }

    def _winner(self) -> Row:
        winner = ledger.best_of(self.rows)
        if winner is None:
            told = next((r["error"] for r in self.rows if r["error"]), None)
            why = f"{told['type']}: {told['message']}" if told else self._tune_error()
            raise SourceError(f"All {len(self.rows)} trials failed. {why} Look into {self.place / 'trials'}, then resume.")
        return winner

    def _tune_error(self) -> str:
        texts = sorted((self.place / tuning.NAME).glob("*/error.txt"))
        lines = [line for line in texts[0].read_text().splitlines() if line.strip()] if texts else []
        return lines[-1].rstrip(".") + "." if lines else "They left no word."

    def _seeds(self, best: Job) -> list[dict[str, Any]]:
        """The winner on the whole training set, evaluated once, at the end."""
        epochs = resolve(best).training.epochs or 1
        whole = dataclasses.replace(best, training=dataclasses.replace(best.training, eval_every=epochs))
        found = []
        for seed in range(self.job.seed, self.job.seed + self.plan.seeds):
            self._check()
            place = self.place / "winner" / f"seed-{seed}"
            found.append(self._run(dataclasses.replace(whole, seed=seed), place, f"winner, seed {seed}"))
        return found

    def _about(self, at_once: int) -> dict[str, Any]:
        return {
            "name": self.job.name,
            "folder": str(self.place),
            **dataclasses.asdict(self.plan),
            "samples": len(self.planned) or self.plan.samples,
            "epochs": self.epochs,
            "at_once": at_once,
            "space": {path: spaces.describe(domain) for path, domain in self.space.items()},
        }

    def _result(
        self, forwards: Mapping[str, Any], winner: Row | None, seeds: Sequence[Mapping[str, Any]], complete: bool
    ) -> dict[str, Any]:
        held = dataclasses.replace(self.job.data, holdout=self.plan.holdout)
        return {
            **self._about(0),
            "complete": complete,
            "judged_on": sharing.described(held),
            "trials": list(self.rows),
            "forwards": dict(forwards),
            "winner": winner and {k: winner[k] for k in ("trial", "settings", "epoch", "last", "best")},
            "seeds": [_seed(s) for s in seeds],
            "spread": {split: _spread([s["student"].get(split) for s in seeds]) for split in ("last", "test")},
            "teachers": seeds[0]["teachers"] if seeds else {},
            "commit": commit(),
            "hardware": hardware(),
            "nodes": len(cluster.nodes(free=False)),
            "seconds": round(time.time() - self.started, 3),
            "job": to_dict(self.job),
        }


def _seed(result: Mapping[str, Any]) -> dict[str, Any]:
    student = result["student"]
    kept = {"seed": result["seed"], "folder": result["folder"], "seconds": result["seconds"]}
    return kept | {"last": student.get("last"), "test": student.get("test")}


def _spread(found: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Mean, standard deviation (n - 1) and n of top-1; None where nothing was measured."""
    values = [f["top1"] for f in found if f]
    if not values:
        return None
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return {"mean": mean, "std": deviation, "n": len(values), "values": values}
