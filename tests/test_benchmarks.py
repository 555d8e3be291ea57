"""The benchmarks run and say what they should; no figure is judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measure, peers, rows, synthesis, tables
from benchmarks.gate import Segment
from benchmarks.scene import Scene
from raykd.config import Exchange

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_rows_take_turns(real_data, tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--rows", "student,inline", "--rounds", "2", "--steps", "1"]
    done = subprocess.run(
        [*command, "--data", str(real_data), "--json", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    timed = {row["row"]: row for row in found["rows"]}
    assert timed.keys() == {"student", "inline"}
    assert all(row["step_ms"]["least"] <= row["step_ms"]["median"] <= row["step_ms"]["greatest"] for row in timed.values())
    assert all(row["images_s"] > 0 and row["cpu_s_per_step"] > 0 and row["steps"] == 6 for row in timed.values())
    assert "raykd inline" in done.stdout


def test_the_hand_written_loop_does_the_same_maths(real_data, tmp_path):
    assert rows.agreement(Scene(real_data, tmp_path, shards=1), steps=1) < 1e-6


def test_absent_data_is_said(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--rows", "hand", "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "name the folder with --data" in done.stdout


def test_rare_steps_are_spread():
    usual, rare = 1.0, 6.0
    segments = [Segment(first, [rare if k % 5 == 0 else usual for k in range(first, first + 10)], {}) for first in (0, 10)]
    assert measure.step_seconds(segments, rare_every=5, spread=5) == pytest.approx([2.0, 2.0])


def test_ratios_are_paired_by_round():
    def turns(*values):
        return [Segment(0, [v] * 4, {"cpu_s": 4 * v}) for v in values]

    found = measure.ratios({"inline": turns(2.0, 4.0), "hand": turns(1.0, 2.0)}, rare_every=0)
    assert found[0]["ratio"] == {"median": 2.0, "least": 2.0, "greatest": 2.0}
    assert found[0]["met"] is False
    found = measure.ratios({"pool": turns(1.0), "ceiling": turns(0.98)}, rare_every=0)
    assert found[0]["met"] is True


def test_a_disturbed_run_judges_nothing():
    segments = {name: [Segment(0, [1.0] * 4, {"cpu_s": 3.0})] for name in ("inline", "hand")}
    assert measure.stolen(segments) == pytest.approx(0.25)
    assert measure.ratios(segments, rare_every=0)[0]["met"] is None


def company(*step_s, cpu_s=0.0, **counters):
    """One round: a segment of four steps for each peer, of which two count."""
    counted = {name: 4 * value for name, value in {"cpu_s": cpu_s, "wait_s": 0.0, **counters}.items()}
    return [Segment(0, [9.0, 9.0, s, s], counted) for s in step_s]


def test_peers_are_compared_with_the_slowest_or_with_the_work_of_all():
    found = {"alone": [company(1.0, 2.0, cpu_s=1.0)], "together": [company(2.1, 2.1, wait_s=0.21, cpu_s=1.02)]}
    row = peers._real_row("a, b", 2, 2, found)
    assert row["cpu_ratio"] == pytest.approx(1.02)
    assert row["ratio"]["median"] == pytest.approx(2.1 / 2.0)
    assert row["wait_share"] == pytest.approx(0.1)
    row = peers._real_row("a, b", 2, 1, found)
    assert row["ratio"]["median"] == pytest.approx(2.1 / 2.0)  # two seconds of work on one core
    row = peers._real_row("a, b", 2, 1, found | {"alone": [company(1.0, 2.0, cpu_s=0.75)]})
    assert row["ratio"]["median"] == pytest.approx(2.1 / 1.5)
    shared = {"alone": [company(1.0, 1.0, 1.0, 1.0, cpu_s=1.0)], "together": [company(2.2, 2.1)]}  # two an actor
    assert peers._real_row("a + b, a + b", 4, 2, shared)["ratio"]["median"] == pytest.approx(1.1)


def test_an_exchange_is_compared_with_the_same_peers_alone(tmp_path):
    sent = {"messages": 1.0, "bytes_out": 128.0}
    found = {"alone": [company(1.0, 1.0, cpu_s=0.1)], "ring": [company(1.1, 1.1, cpu_s=0.14, **sent)]}
    row = peers._simulated_row(2, "ring", found)
    assert (row["messages"], row["bytes_out"]) == (2.0, 128.0)
    assert row["longer_ms"]["median"] == pytest.approx(100.0)
    assert row["longer"] == pytest.approx(0.1)
    assert row["cpu_ms"]["median"] == pytest.approx(40.0)
    more = {"graph": "all", "peers": 4, "longer_ms": {"median": 300.0}, "cpu_ms": {"median": 80.0}}
    peers.plot([row, row | more], tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 1000
    (table,) = tables.peer_tables({"exchange": [row]})
    assert table.body[0][-1] == "40.0"
    assert "(peers.png)" in tables.markdown({"about": {}, "exchange": [row]})["peers"]


@pytest.mark.ray
def test_companies_take_turns_and_exchange():
    naps = [0.01, 0.01]
    jobs = {
        peers.ALONE: peers.napping(peers.ALONE, naps, Exchange()),
        "all": peers.napping("all", naps, Exchange()),
        "newest": peers.napping("newest", naps, Exchange(what="weights", staleness="newest"), weights=1000),
    }
    with peers.homes(2) as homes:
        found = peers.turns(homes, jobs, 2, dict.fromkeys(jobs, (2, 2)))
    assert all(len(own) == 2 and [len(s.seconds) for s in own] == [4, 4] for rounds in found.values() for own in rounds)
    assert peers.a_step(found["all"][1], "bytes_out") == 32 * 1000 * 4
    assert all(peers.a_step(own, "messages") == 0 for own in found[peers.ALONE])
    assert peers.a_step(found["newest"][1], "bytes_out") == 4 * (1000 + 1000)


@pytest.mark.ray
def test_synthesizers_fill_a_bank_beside_a_student():
    lines = list(synthesis.simulated((1, 2), 2, update_s=0.1, step_s=0.05))
    assert [row["makers"] for row in lines] == [1, 2]
    assert all(0 < row["efficiency"] < 1.2 and row["batch_s"] == pytest.approx(0.3) and row["steps"] > 0 for row in lines)
    assert lines[1]["batches_s"] > lines[0]["batches_s"]
    assert all(0 <= row["wait_share"] < 1 and row["wait_ms_most"] >= 0 for row in lines)
    (table,) = tables.making_tables({"bank": lines})
    assert table.body[0][0] == "1"
    assert len(table.body[0]) == len(table.head)


@pytest.mark.ray
def test_a_gradient_from_a_replica_is_that_of_this_process(real_data, tmp_path):
    here, there = synthesis.gradient(Scene(real_data, tmp_path), batch=8, rounds=1, calls=1)
    assert (here["place"], there["place"], there["error"]) == ("here", "replica", 0.0)
    assert (here["forward_out"], here["ratio"]["median"]) == (0, 1.0)
    pixels, logits = 4 * 3 * 32 * 32, 4 * 10
    assert (there["forward_out"], there["forward_in"]) == (pixels, logits)
    assert (there["backward_out"], there["backward_in"]) == (pixels + logits, pixels)
    (table,) = tables.making_tables({"gradient": [here, there]})
    assert all(len(line) == len(table.head) for line in table.body)


@pytest.mark.ray
@pytest.mark.slow
def test_one_synthesizer_and_two_take_turns(real_data, tmp_path):
    one, two = synthesis.makers(Scene(real_data, tmp_path), batch=4, rounds=1, batches=1)
    assert (one["makers"], two["makers"], one["ratio"]["median"]) == (1, 2, 1.0)
    assert two["images_s"]["median"] / one["images_s"]["median"] == pytest.approx(two["ratio"]["median"])
    (table,) = tables.making_tables({"makers": [one, two]})
    assert table.body[1][0] == "2"
