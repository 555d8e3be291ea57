"""Peers on actors: where they live changes nothing; and what happens when one dies, hangs, or all are killed.

Real CIFAR-10 images with crop and flip; CPU, float32, dense.
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

from raykd.errors import DivergenceError, Interrupted, SourceError
from raykd.launch import peers as driver
from tests.spine import online_loop
from tests.spine.online_jobs import (
    RAY,
    SHARED,
    STEPS,
    assert_equal_ends,
    fragile,
    of,
    peers,
    plain_peers,
    records,
    traces,
    versions,
    whole,
)
from tests.spine.small import go, kill_tree, steps_seen
from tests.spine.test_online import PAIR, THREE, PeerAt

pytestmark = pytest.mark.ray
slow = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
HOMES = {
    "apart": {},
    "two share an actor": SHARED,
    "all share an actor": SHARED | {"peers.c.actor": "home"},
}
WITHOUT_B = {"a": {"c": 1.0}, "c": {"a": 1.0}}
DEATH = 5  # step at which b dies, hangs or diverges


@pytest.fixture(autouse=True)
def quiet():
    """A peer that is lost warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that says that what happens once has happened."""
    return tmp_path / "marker"


@pytest.mark.parametrize(
    "home", ["apart", pytest.param("two share an actor", marks=slow), pytest.param("all share an actor", marks=slow)]
)
def test_peers_learn_what_a_plain_loop_learns(home, real_data, tmp_path, ray_cluster):
    job = peers(real_data, "abc", **RAY, **HOMES[home])
    result = go(job, tmp_path / "run")
    assert traces(tmp_path / "run", "abc") == online_loop.run(job, STEPS, THREE)[0]
    assert result["together"]["peers"] == ["a", "b", "c"]
    assert all(found == dict.fromkeys("bc", s) for s, found in enumerate(versions(tmp_path / "run", "a")))


@slow
def test_copies_are_as_old_on_actors(real_data, tmp_path, ray_cluster):
    settings = {"exchange.what": "weights", "exchange.staleness": 3}
    job = peers(real_data, **RAY, **settings)
    go(job, tmp_path / "run")
    assert traces(tmp_path / "run") == online_loop.run(job, STEPS, PAIR, staleness=3)[0]


@slow
@pytest.mark.parametrize("what", ["signals", "weights"])
def test_two_workers_a_peer_equal_one(what, real_data, tmp_path, ray_cluster):
    go(plain_peers(real_data, **{"exchange.what": what}), tmp_path / "one")
    go(plain_peers(real_data, **RAY, **{"launch.workers": 2, "exchange.what": what}), tmp_path / "two")
    for name in "ab":
        one, two = traces(tmp_path / "one")[name], traces(tmp_path / "two")[name]
        assert [s for s, _ in one] == [s for s, _ in two]
        for (_, terms), (_, others) in zip(one, two):
            assert terms == pytest.approx(others, rel=5e-5)


def test_a_peer_that_dies_is_dropped(real_data, tmp_path, marker, ray_cluster):
    """The others' trace is that of a plain loop in which nobody hears it from the step of its death on."""
    job = plain_peers(real_data, "abc", **RAY, **fragile("b", marker, "kill", DEATH), **{"exchange.on_loss": "drop"})
    result = go(job, tmp_path / "run")
    assert marker.exists()
    expected, _ = online_loop.run(job, STEPS, lambda step: THREE if step < DEATH else WITHOUT_B)
    found = traces(tmp_path / "run", "abc")
    assert found["a"] == expected["a"]
    assert found["c"] == expected["c"]
    assert found["b"] == expected["b"][:DEATH]
    for name in "ac":
        whole(found[name])
        assert [(r["step"], r["peers"]) for r in records(tmp_path / "run", name, "dropped")] == [(DEATH, ["b"])]
        assert result["peers"][name]["dropped"] == {"b": DEATH}
    assert result["peers"]["b"]["dropped_at"] == DEATH
    assert result["together"]["peers"] == ["a", "c"]


@slow
def test_a_follower_that_dies_is_dropped(real_data, tmp_path, marker, ray_cluster):
    """Nobody listens to it, so nobody has met its loss; the result says so all the same."""
    settings = {"exchange.on_loss": "drop", "exchange.graph": "leader:a"}
    result = go(plain_peers(real_data, "abc", **RAY, **fragile("b", marker, "kill", DEATH), **settings), tmp_path / "run")
    assert result["peers"]["b"]["dropped_at"] == DEATH
    for name in "ac":
        whole(traces(tmp_path / "run", "abc")[name])


@slow
def test_a_dropped_peer_stays_away_when_the_run_is_resumed(real_data, tmp_path, marker, ray_cluster):
    settings = {"exchange.on_loss": "drop", "training.epochs": 5}
    job = plain_peers(real_data, "abc", **RAY, **fragile("b", marker, "kill", DEATH), **settings)
    with pytest.raises(Interrupted):
        go(job, tmp_path / "run", PeerAt("a", 9, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    assert records(tmp_path / "run", "a", "dropped")
    result = go(job, tmp_path / "run", resume=True)
    expected, _ = online_loop.run(job, 30, lambda step: THREE if step < DEATH else WITHOUT_B)
    assert {n: traces(tmp_path / "run", "abc")[n] for n in "ac"} == {n: expected[n] for n in "ac"}
    assert result["peers"]["b"] == {"model": job.peers["b"].model, "dropped_at": DEATH} | {
        k: v for k, v in result["peers"]["b"].items() if k == "parameters"
    }


RESPAWNS = {
    "all": ({}, "kill", "ac"),
    "after its last word": ({}, "kill late", "ac"),
    "a follower": ({"exchange.graph": "leader:a"}, "kill", ""),
    "the leader": ({"exchange.graph": "leader:b"}, "kill late", "ac"),
    "stale weights": ({"exchange.what": "weights", "exchange.staleness": 2}, "kill", "ac"),
    "every second step": ({"exchange.every": 2}, "kill", "ac"),
}


@slow
@pytest.mark.parametrize("name", RESPAWNS)
def test_a_peer_that_dies_is_started_again_and_rejoins(name, real_data, tmp_path, marker, ray_cluster):
    settings, does, listeners = RESPAWNS[name]
    job = plain_peers(
        real_data, "abc", **RAY, **fragile("b", marker, does, DEATH), **{"exchange.on_loss": "respawn"}, **settings
    )
    result = go(job, tmp_path / "run")
    assert result["peers"]["b"]["respawned"] == 1
    found, every, late = traces(tmp_path / "run", "abc"), job.exchange.every, job.exchange.late
    for other in "ac":
        whole(found[other])
        assert not records(tmp_path / "run", other, "dropped")
    rejoined = records(tmp_path / "run", "b", "rejoined")
    steps = [step for step, _ in found["b"]]
    assert steps[-1] == STEPS
    if not rejoined:  # its checkpoint was of the very step at which the others waited
        whole(found["b"])
        lag, back = 0, DEATH
    else:
        back, version = rejoined[0]["step"], rejoined[0]["version"]
        assert len(rejoined) == 1
        # followers may be behind, and are still served; so may all by as much as copies are late, and ask for what is as late
        least = 0 if name == "the leader" else DEATH - 1 - every - 2 * late
        assert least <= back <= DEATH + 1
        assert version <= back
        assert version % 3 == 0, "a checkpoint's"
        lag = back - version
        assert steps == [*range(1, version + 1), *range(back + 1, STEPS + 1)]
    for other in listeners:
        said = [seen.get("b") for seen in versions(tmp_path / "run", other)]
        for step, version in enumerate(said):
            of_step = max(0, step - late) // every * every
            if late or step % every == 0:
                assert version in ({of_step} if of_step < back else {of_step, of_step - lag}), "of that step and of no other"
        last = (STEPS - 1) // every * every  # step of the last exchange
        assert lag == 0 or said[last] == max(0, last - late) // every * every - lag
        heard = [any(term.startswith("dml") for term in terms) for _, terms in found[other]]
        assert heard == [step % every == 0 for step in range(STEPS)]


@slow
def test_a_peer_that_dies_too_often(real_data, tmp_path, marker, ray_cluster):
    """Its marker is a file that cannot be made, so it dies each time."""
    settings = {"exchange.on_loss": "respawn", "exchange.respawns": 1} | fragile("b", tmp_path, "kill", 2)
    settings["peers.b.options"] = {"does": "kill always", "at": 2, "marker": str(marker)}
    with pytest.raises(SourceError, match=r"Peer b is lost after 1 restarts.*checkpoints are intact: resume"):
        go(plain_peers(real_data, **RAY, **settings), tmp_path / "run")


def test_a_peer_that_dies_stops_the_run_which_resumes_to_the_same_weights(real_data, tmp_path, marker, ray_cluster):
    job = plain_peers(real_data, **fragile("b", marker, "kill", DEATH))
    marker.write_text("")
    go(job, tmp_path / "whole")
    marker.unlink()
    with pytest.raises(SourceError, match=r"Peer '?b'? .*lost.*resume"):
        go(job.replace(**RAY), tmp_path / "cut")
    assert max(steps_seen(of(tmp_path / "cut", n)) for n in "ab") == DEATH
    go(job.replace(**RAY), tmp_path / "cut", resume=True)
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole")


@slow
@pytest.mark.parametrize("on_loss", ["drop", "respawn", "stop"])
def test_a_peer_that_hangs(on_loss, real_data, tmp_path, marker, ray_cluster, monkeypatch):
    monkeypatch.setattr(driver, "ASK_S", 3.0)
    settings = {"exchange.on_loss": on_loss, "exchange.timeout_s": 6.0, "launch.start_timeout_s": 60.0}
    job = plain_peers(real_data, **RAY, **fragile("b", marker, "hang", DEATH), **settings)
    if on_loss == "stop":
        with pytest.raises(SourceError, match=r"Peer b is lost .*no word for"):
            go(job, tmp_path / "run")
    else:
        result = go(job, tmp_path / "run")
        whole(traces(tmp_path / "run")["a"])
        if on_loss == "drop":
            assert result["peers"]["a"]["dropped"] == {"b": DEATH}
        else:
            assert result["peers"]["b"]["respawned"] == 1
    hung = int(marker.read_text())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{hung}/stat").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{hung}/stat").exists(), "its process is ended"


def kill_everything_at(step: int, folder: Path, names: str, arguments: list[str]) -> None:
    """Starts a run and SIGKILLs all of its processes once a peer has done so many steps."""
    words = [sys.executable, "-m", "tests.spine.online_driver", *arguments]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while max(steps_seen(of(folder, name)) for name in names) < step:
        assert process.poll() is None, f"the run ended before it was killed: {process.stderr.read().decode()[-2000:]}"
        assert time.monotonic() < deadline, "the run is too slow to be killed"
        time.sleep(0.01)
    kill_tree(process)


WAYS = {
    "signals": {},
    "stale weights": {"exchange.what": "weights", "exchange.staleness": 2},
    "a leader": {"exchange.graph": "leader:a", "training.keep_checkpoints": 1},
}


@slow
@pytest.mark.parametrize("way", WAYS)
def test_all_are_killed_and_resumed(way, real_data, tmp_path, ray_cluster):
    settings = {**WAYS[way], "training.epochs": 5, "training.milestones": [3.5]}
    go(peers(real_data, **settings), tmp_path / "whole")
    step = random.randrange(4, 20)
    kill_everything_at(step, tmp_path / "cut", "ab", [str(real_data), str(tmp_path / "cut"), "ab", json.dumps(settings | RAY)])
    assert not (tmp_path / "cut" / "result.json").exists()
    go(peers(real_data, **settings, **RAY), tmp_path / "cut", resume=True)
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole"), f"killed at step {step}"
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole")


@slow
def test_a_stop_ends_all_at_one_step(real_data, tmp_path, ray_cluster):
    job = peers(real_data, "abc", **{"training.epochs": 8, "exchange.graph": "ring"})
    go(job, tmp_path / "whole")
    with pytest.raises(Interrupted, match="a checkpoint was written"):
        go(job.replace(**RAY), tmp_path / "cut", PeerAt("c", 3, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    steps = {steps_seen(of(tmp_path / "cut", name)) for name in "abc"}
    assert len(steps) == 1
    assert steps < set(range(4, 48))
    for name in "abc":
        assert (of(tmp_path / "cut", name) / "checkpoints" / f"step-{max(steps):08d}" / "COMMIT").exists()
    go(job.replace(**RAY), tmp_path / "cut", resume=True)
    assert traces(tmp_path / "cut", "abc") == traces(tmp_path / "whole", "abc")
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole", "abc")


@slow
def test_a_peer_that_diverges_ends_the_run_with_one_error(real_data, tmp_path, marker, ray_cluster):
    job = plain_peers(real_data, "abc", **RAY, **fragile("b", marker, "nan", DEATH), **{"exchange.on_loss": "respawn"})
    with pytest.raises(DivergenceError, match=rf"Peer 'b': .* step {DEATH} .*not finite") as caught:
        go(job, tmp_path / "run")
    assert str(caught.value).count("Peer") == 1


@slow
def test_peers_that_exchange_nothing_do_not_hang(real_data, tmp_path, ray_cluster):
    """A peer that has nobody to wait for, and a training longer than `exchange.timeout_s`."""
    slowly = {"peers.b.model": "tests.spine.online_nets:fragile", "peers.b.options": {"does": "slow", "at": 1000}}
    job = plain_peers(real_data, "abc", **RAY, **slowly, **{"exchange.timeout_s": 6.0, "exchange.edges": {"a>c": {}}})
    result = go(job, tmp_path / "run")
    assert all(result["peers"][name]["steps"] == STEPS for name in "abc")
    assert result["peers"]["b"]["seconds"] > 8


@slow
def test_nobody_waits_for_a_slow_peer_whose_newest_copy_answers(real_data, tmp_path, ray_cluster):
    slowly = {"peers.b.model": "tests.spine.online_nets:fragile", "peers.b.options": {"does": "slow", "at": 300}}
    newest = {"exchange.what": "weights", "exchange.staleness": "newest"}
    go(plain_peers(real_data, **RAY, **slowly, **newest), tmp_path / "run")
    took = {n: [r["step_s"] for r in records(tmp_path / "run", n, "step")] for n in "ab"}
    assert min(took["b"]) > 0.3
    assert sorted(took["a"])[-2] < 0.3, "but for the first"
