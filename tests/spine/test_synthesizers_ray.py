"""Synthesizers on actors: the batches that one process would make, and what happens when one dies, or a teacher, or everything.

What a batch is depends on its number, on the teachers and on the student it was made with, not on who makes it. So where the
images' loss reads no student (dafl), batches are the same bit for bit, whoever died. What is not the same is when they come:
which ones are there to be drawn from at a step, and which student they were made with, follow from the machine's speed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from raykd.errors import LostError
from raykd.launch.observer import Observer
from tests.spine.making import STEPS, banked, contents, making, provenance, records
from tests.spine.small import go, kill_tree, steps_seen, trace
from tests.spine.test_resume import born, own_workers

pytestmark = pytest.mark.ray
slow = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MAKER, REPLICA = b"ray::Maker.make", b"ray::Replica"  # a synthesizer at work; a teacher's
NUMBER = 6  # batches of a bank that is made once
TWO = {"launch.backend": "ray", "synthesis.synthesizers": 2, "synthesis.steps": 12}
ONCE = {"synthesis.steps": 12, "synthesis.grow": "once", "synthesis.capacity": NUMBER, "synthesis.start": NUMBER}
ALWAYS = {"synthesis.capacity": 1000, "synthesis.pace": 0}  # nothing is dropped, and there is always one in work
FINAL = {"synthesis.max_restarts": 0}
ENOUGH = 14  # batches that no run here comes to


@pytest.fixture(autouse=True)
def quiet():
    """A synthesizer that is lost warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def alone(real_data, tmp_path_factory):
    """Batches as one process makes them, which is what they have to be."""
    folder = tmp_path_factory.mktemp("alone")
    many = {"synthesis.capacity": ENOUGH, "synthesis.start": ENOUGH, "training.max_steps": 1}
    go(making(real_data, **ONCE | many), folder)
    found = contents(folder)
    assert sorted(found) == list(range(ENOUGH))
    return found


class Killer(Observer):
    """SIGKILLs `count` processes of a kind, once, as soon as `of` of them are there and so many steps are done."""

    def __init__(self, kind: bytes, of: int, count: int = 1, step: int = 0) -> None:
        self.kind, self.of, self.count, self.step, self.folder, self.killed = kind, of, count, step, None, 0

    def begin(self, path, job, folder, total_steps) -> None:  # noqa: ARG002
        self.folder = folder

    def poll(self) -> None:
        if self.killed or self.folder is None or steps_seen(self.folder) < self.step:
            return
        there = sorted(own_workers(self.kind), key=born)[-self.of :]
        if len(there) == self.of:
            self.killed = steps_seen(self.folder) or 1
            for pid in random.sample(there, self.count):
                os.kill(pid, signal.SIGKILL)


def whole(folder: Path) -> None:
    """Every step once, in order."""
    assert [step for step, _ in trace(folder)] == list(range(1, STEPS + 1))


def nothing_lost(folder: Path, alone) -> None:
    """Every number once up to the last that came, but for those in work at the end; each as one process would make it."""
    state, found = banked(folder), contents(folder)
    there = sorted(int(batch[0]) for batch in state["bank"]["batches"])
    assert there == sorted(found)
    missing = set(range(max(there) + 1)) - set(there)
    assert missing <= {*state["again"]}, "in work when the checkpoint was written"
    assert {n: found[n] for n in there if n < ENOUGH} == {n: alone[n] for n in there if n < ENOUGH}


@slow
@pytest.mark.parametrize("restarts", [0, 3])
def test_a_killed_synthesizer(restarts, real_data, tmp_path, ray_cluster, alone):
    """Not started again, its batches are taken over by the other; started again or not, nothing of the bank is missing."""
    killer = Killer(MAKER, 2)
    go(making(real_data, **TWO | ONCE | {"synthesis.max_restarts": restarts}), tmp_path, killer)
    assert killer.killed
    whole(tmp_path)
    assert contents(tmp_path) == {n: alone[n] for n in range(NUMBER)}
    by = [maker for _, maker in provenance(tmp_path).values()]
    assert restarts or by.count(by[-1]) >= NUMBER - 1, "all but what the other had handed in"


@slow
def test_all_are_killed_and_the_run_is_resumed(real_data, tmp_path, ray_cluster, alone):
    job = making(real_data, **TWO | ALWAYS | FINAL)
    with pytest.raises(LostError, match=r"All synthesizers are gone .*checkpoint is intact: resume"):
        go(job, tmp_path, Killer(MAKER, 2, count=2, step=5))
    before = banked(tmp_path)["bank"]["batches"]
    assert before
    go(job, tmp_path, resume=True)
    whole(tmp_path)
    nothing_lost(tmp_path, alone)
    assert banked(tmp_path)["bank"]["batches"][: len(before)] == before, "in the same order"


@slow
def test_nobody_misses_a_synthesizer_when_the_bank_is_full(real_data, tmp_path, ray_cluster, alone):
    killer = Killer(b"ray::Maker", 2, count=2, step=3)
    go(making(real_data, **TWO | ONCE | FINAL), tmp_path, killer)
    assert killer.killed
    whole(tmp_path)
    assert contents(tmp_path) == {n: alone[n] for n in range(NUMBER)}


@slow
def test_a_killed_replica_of_the_teacher(real_data, tmp_path, ray_cluster, alone):
    """The student's own; synthesizers have theirs in their processes."""
    killer = Killer(REPLICA, 2, step=5)
    result = go(making(real_data, **TWO | ALWAYS | {"teachers.big.replicas": 2}), tmp_path, killer)
    assert killer.killed
    whole(tmp_path)
    nothing_lost(tmp_path, alone)
    assert result["exchange"]["big"]["requests"] == 1 + STEPS, "the probe, and none twice but what was lost"


@slow
@pytest.mark.parametrize("method", ["dafl", "dfad"])
def test_everything_is_killed_and_resumed(method, real_data, tmp_path, ray_cluster, alone):
    settings = TWO | ALWAYS
    step = random.randrange(5, STEPS - 4)
    words = [str(real_data), str(tmp_path), json.dumps({"method": method, **settings})]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.spine.making", *words],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 240
    while steps_seen(tmp_path) < step:
        assert process.poll() is None, f"the run ended before it was killed: {process.stderr.read().decode()[-2000:]}"
        assert time.monotonic() < deadline, "the run is too slow to be killed"
        time.sleep(0.01)
    kill_tree(process)
    before = banked(tmp_path)["bank"]["batches"]
    go(making(real_data, method, **settings), tmp_path, resume=True)
    whole(tmp_path)
    assert banked(tmp_path)["bank"]["batches"][: len(before)] == before
    if method == "dafl":
        nothing_lost(tmp_path, alone)
    else:
        assert all(0 <= version < STEPS for version, _ in provenance(tmp_path).values()), (
            "each says which student it was made with"
        )


@slow
def test_two_workers_with_a_synthesizer_each(real_data, tmp_path, ray_cluster, alone):
    go(making(real_data, **TWO | ONCE | {"launch.workers": 2}), tmp_path)
    whole(tmp_path)
    for rank in range(2):
        mine = list(range(rank, 2 * NUMBER, 2))
        assert sorted(provenance(tmp_path, rank)) == mine
        assert contents(tmp_path, f"rank-{rank}") == {n: alone[n] for n in mine}
        assert {maker for _, maker in provenance(tmp_path, rank).values()} == {rank}
    assert all(record["images"] == 16 for record in records(tmp_path, "step"))
