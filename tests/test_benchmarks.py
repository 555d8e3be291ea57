"""The benchmarks run and say what they should; no figure is judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measure, rows
from benchmarks.gate import Segment
from benchmarks.scene import Scene

ROOT = Path(__file__).resolve().parents[1]


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
