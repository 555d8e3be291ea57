"""Peers teach each other in one process: what they learn is what a plain loop written from the papers learns, bit for bit.

Real CIFAR-10 images with crop and flip; peers of different architectures, each with an optimizer, a schedule and a
normalisation of its own; CPU, float32, dense.
"""

import os
import signal

import pytest
import torch

from raykd import Loss, Teacher
from raykd.config import Edge
from raykd.errors import DivergenceError, Interrupted
from raykd.launch import online
from tests.spine import online_loop
from tests.spine.online_jobs import (
    SHARED,
    STEPS,
    assert_equal_ends,
    exported,
    fragile,
    of,
    peers,
    plain_peers,
    traces,
    versions,
    whole,
)
from tests.spine.small import At, go, steps_seen

PAIR = {"a": {"b": 1.0}, "b": {"a": 1.0}}
THREE = {"a": {"b": 0.5, "c": 0.5}, "b": {"a": 0.5, "c": 0.5}, "c": {"a": 0.5, "b": 0.5}}
GRAPHS = {
    "ring": ({"exchange.graph": "ring"}, {"a": {"c": 1.0}, "b": {"a": 1.0}, "c": {"b": 1.0}}),
    "leader": ({"exchange.graph": "leader:b"}, {"a": {"b": 1.0}, "c": {"b": 1.0}}),
    "star": ({"exchange.graph": "star:b"}, {"a": {"b": 1.0}, "b": {"a": 0.5, "c": 0.5}, "c": {"b": 1.0}}),
    "edges": (
        {"exchange.edges": {"a>b": Edge(weight=3.0), "c>b": Edge(), "b>a": Edge()}},
        {"a": {"b": 1.0}, "b": {"a": 0.75, "c": 0.25}},
    ),
    "every second step": ({"exchange.every": 2}, THREE),
    "own views": ({"exchange.views": "own"}, THREE),
}


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_peers_learn_what_a_plain_loop_learns(names, real_data, tmp_path):
    job = peers(real_data, names)
    expected, nets = online_loop.run(job, STEPS, PAIR if names == "ab" else THREE)
    go(job, tmp_path / "run")
    assert traces(tmp_path / "run", names) == expected
    for name in names:
        end = exported(tmp_path / "run", name)
        assert end.keys() == nets[name].state_dict().keys()
        assert all(torch.equal(end[key], value) for key, value in nets[name].state_dict().items())


@pytest.mark.parametrize("name", GRAPHS)
def test_who_teaches_whom_and_when(name, real_data, tmp_path):
    settings, graph = GRAPHS[name]
    job = plain_peers(real_data, "abc", **settings)
    expected, _ = online_loop.run(job, STEPS, graph, every=2 if "second" in name else 1)
    go(job, tmp_path / "run")
    found = traces(tmp_path / "run", "abc")
    assert found == expected
    heard = {n: {t for _, terms in found[n] for t in terms if t != "ce"} for n in "abc"}
    assert all(len(heard[n]) == len(graph.get(n, {})) for n in "abc")
    if "second" in name:
        assert all(set(terms) == {"ce"} for n in "abc" for step, terms in found[n] if step % 2 == 0)


@pytest.mark.parametrize("staleness", [0, 3, 7])
def test_copies_that_are_as_old_as_the_job_says(staleness, real_data, tmp_path):
    """Codistillation: frozen copies of the neighbours' weights answer for them; disjoint shards of the data."""
    settings = {"exchange.what": "weights", "exchange.staleness": staleness, "exchange.every": 2}
    job = peers(real_data, **settings, **{"exchange.shards": "disjoint", "training.epochs": 4})
    expected, _ = online_loop.run(job, STEPS, PAIR, every=2, staleness=staleness)
    result = go(job, tmp_path / "run")
    assert traces(tmp_path / "run") == expected
    due = [max(0, step - staleness) // 2 * 2 for step in range(STEPS)]
    for name, other in ("ab", "ba"):
        assert [found[other] for found in versions(tmp_path / "run", name)] == due
        assert result["edges"][f"{other}>{name}"]["stalest"] == max(step - old for step, old in enumerate(due))


def test_the_newest_copy_that_is_there(real_data, tmp_path):
    job = plain_peers(real_data, **{"exchange.what": "weights", "exchange.staleness": "newest"})
    result = go(job, tmp_path / "run")
    for name, other in ("ab", "ba"):
        seen = [found[other] for found in versions(tmp_path / "run", name)]
        assert seen == sorted(seen)
        assert all(old <= step for step, old in enumerate(seen))
        assert seen[-1] > 0
        assert result["edges"][f"{other}>{name}"]["stalest"] <= STEPS


def test_losses_of_an_edge(real_data, tmp_path):
    """b learns from a by dml, from c by kd; a from b by both; c from nobody."""
    edges = {"a>b": Edge(losses=("dml",)), "c>b": Edge(losses=("kd",)), "b>a": Edge()}
    losses = {"losses": {"dml": Loss("dml"), "kd": Loss("kd", ce_weight=1.0)}, "training.max_steps": 2}
    go(plain_peers(real_data, "abc", **{"exchange.edges": edges}, **losses), tmp_path / "run")
    terms = {n: set(found[0][1]) for n, found in traces(tmp_path / "run", "abc").items()}
    assert terms == {"a": {"ce", "dml", "kd"}, "b": {"ce", "dml", "kd"}, "c": {"ce"}}


def test_a_loss_of_a_teacher_is_heard_of_peers_where_there_is_none(real_data, tmp_path):
    """kd at temperature 2 is dml at temperature 2."""
    job = peers(real_data, losses={"kd": Loss("kd", temperature=2.0, weight=1.0, ce_weight=1.0)})
    go(job, tmp_path / "run")
    assert traces(tmp_path / "run") == online_loop.run(job, STEPS, PAIR, label="kd")[0]


def test_peers_and_a_frozen_teacher(real_data, tmp_path):
    big = Teacher(
        model="cifar_resnet20", weights=str(real_data / "weights" / "cifar10" / "resnet20-12fca82f.th"), normalise="imagenet"
    )
    losses = {"dml": Loss("dml", temperature=2.0), "kd": Loss("kd", weight=0.0, ce_weight=1.0)}
    job = peers(real_data, teachers={"big": big}, losses=losses)
    result = go(job, tmp_path / "run")
    found = traces(tmp_path / "run")
    assert all(set(terms) == {"ce", "dml", "kd"} for own in found.values() for _, terms in own)
    without = {n: [(s, {t: v for t, v in terms.items() if t != "kd"}) for s, terms in own] for n, own in found.items()}
    assert without == online_loop.run(job, STEPS, PAIR)[0], "a teacher of weight 0 changes nothing"
    assert result["teachers"]["big"]["top1"] > 0.8


def test_a_codec_of_signals(real_data, tmp_path):
    dense = go(plain_peers(real_data), tmp_path / "a")
    half = go(plain_peers(real_data, **{"exchange.codec": "fp16"}), tmp_path / "b")
    for one, other in zip(traces(tmp_path / "a")["a"], traces(tmp_path / "b")["a"]):
        assert one[1] == pytest.approx(other[1], rel=1e-2)
    assert traces(tmp_path / "a") != traces(tmp_path / "b")
    for edge in ("a>b", "b>a"):
        assert dense["edges"][edge]["messages"] == half["edges"][edge]["messages"] == STEPS + 1
        assert dense["edges"][edge]["bytes_in"] == 2 * half["edges"][edge]["bytes_in"] == 4 * 10 * 16 * (STEPS + 1)


def test_the_result(real_data, tmp_path):
    result = go(peers(real_data, baseline=True), tmp_path / "run")
    assert set(result["peers"]) == set(result["baseline"]) == {"a", "b"}
    for name in "ab":
        assert result["peers"][name]["steps"] == result["baseline"][name]["steps"] == STEPS
        assert result["peers"][name]["last"]["count"] == 32
    assert result["together"]["peers"] == ["a", "b"]
    assert 0 <= result["together"]["disagree"] <= 1
    assert (tmp_path / "run" / "baseline" / "peers" / "a" / "student.safetensors").exists()


def test_peers_that_share_a_process_or_not_are_the_same_job(real_data, tmp_path):
    """On the local backend all share one anyway."""
    go(plain_peers(real_data, **SHARED), tmp_path / "one")
    go(plain_peers(real_data), tmp_path / "two")
    assert traces(tmp_path / "one") == traces(tmp_path / "two")


MODES = {
    "signals": {},
    "stale weights": {"exchange.what": "weights", "exchange.staleness": 2},
    "a leader": {"exchange.graph": "leader:a", "training.checkpoint_every": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_stop_and_resume(mode, real_data, tmp_path):
    job = peers(real_data, **MODES[mode], **{"training.epochs": 5})
    go(job, tmp_path / "whole")

    def stop(_):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="a checkpoint was written"):
        go(job, tmp_path / "cut", PeerAt("b", 4, stop))
    steps = {n: steps_seen(of(tmp_path / "cut", n)) for n in "ab"}
    assert 4 <= steps["b"] <= steps["a"] <= steps["b"] + (mode == "a leader") < 30, "a leader hears nobody stop"
    assert all((of(tmp_path / "cut", n) / "checkpoints" / f"step-{steps[n]:08d}" / "COMMIT").exists() for n in "ab")
    go(job, tmp_path / "cut", resume=True)
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole")


class PeerAt(At):
    """As `At`, of a peer's steps."""

    def __init__(self, name, step, action) -> None:
        super().__init__(step, action)
        self.name = name

    def poll(self) -> None:
        if self.folder is not None and self.fired_at is None and (now := steps_seen(of(self.folder, self.name))) >= self.step:
            self.fired_at = now
            self.action(self)


def test_a_peer_that_diverges_ends_the_run(real_data, tmp_path):
    job = plain_peers(real_data, **fragile("b", tmp_path / "marker", "nan", 5))
    with pytest.raises(DivergenceError, match=r"Peer 'b'.*[Ss]tep 5.*checkpoint is intact"):
        go(job, tmp_path / "run")
    assert max(step for step, _ in traces(tmp_path / "run")["a"]) <= 6
    result = go(job, tmp_path / "run", resume=True)  # the marker is there: this time all is well
    assert result["peers"]["a"]["steps"] == STEPS
    for found in traces(tmp_path / "run").values():
        whole(found)


@pytest.mark.parametrize("method", ["dml", "kdcl"])
def test_a_run_that_has_dropped_a_peer_goes_on_without_it(method, real_data, tmp_path):
    """What was trained, or is remembered, with it is in the checkpoint and fits."""
    job = plain_peers(real_data, "abc", losses={method: Loss(method)}, **{"training.epochs": 5, "exchange.on_loss": "drop"})
    with pytest.raises(Interrupted):
        go(job, tmp_path / "run", PeerAt("a", 4, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    online.drop(tmp_path / "run", "b")
    at = steps_seen(of(tmp_path / "run", "b"))
    result = go(job, tmp_path / "run", resume=True)
    assert result["peers"]["b"]["dropped_at"] == at
    assert result["together"]["peers"] == ["a", "c"]
    for name in "ac":
        assert result["peers"][name]["dropped"] == {"b": at}
        assert [step for step, _ in traces(tmp_path / "run", name)[name]] == list(range(1, 31))
        assert not any(t.endswith(".b") for t in traces(tmp_path / "run", name)[name][-1][1])
