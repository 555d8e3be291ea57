"""metrics.jsonl: each step once, however often a run was cut off."""

import json

import pytest

from raykd.roles.recorder import Recorder, read


def filled(path, steps=4):
    recorder = Recorder(path)
    for step in range(1, steps + 1):
        recorder.write("step", step, loss=step / 2)
        if step % 2 == 0:
            recorder.write("eval", step, top1=0.5)
    recorder.close()


def seen(path, kind=None):
    return [(r["kind"], r["step"]) for r in read(path, kind)]


def test_records_in_order_and_by_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path)
    assert seen(path) == [("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("eval", 4)]
    assert seen(path, "eval") == [("eval", 2), ("eval", 4)]
    assert read(path)[0] == {"kind": "step", "step": 1, "loss": 0.5}
    assert read(tmp_path / "nothing.jsonl") == []


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    recorder = Recorder(tmp_path / "m.jsonl")
    recorder.write("step", 1)
    assert seen(tmp_path / "m.jsonl") == [("step", 1)]
    recorder.close()


@pytest.mark.parametrize("step, left", [(0, []), (2, [("step", 1), ("step", 2), ("eval", 2)]), (9, None)])
def test_a_resumed_run_cuts_the_file_back(tmp_path, step, left):
    path = tmp_path / "metrics.jsonl"
    filled(path)
    whole = seen(path)
    recorder = Recorder(path, step)
    assert seen(path) == (whole if left is None else left)
    recorder.write("step", step + 1)
    recorder.close()
    assert seen(path)[-1] == ("step", step + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"kind": "step", "st', '{"kind": "step", "step": 5, "loss": 2.5}', "{"])
def test_a_last_line_cut_short_spoils_no_other(tmp_path, torn):
    """Also where only the line's end is missing."""
    path = tmp_path / "metrics.jsonl"
    filled(path)
    path.write_text(path.read_text() + torn)
    assert seen(path)[:6] == [("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("eval", 4)]
    recorder = Recorder(path, 5)
    recorder.write("step", 6, loss=3.0)
    recorder.close()
    assert seen(path)[-1] == ("step", 6)
    assert all(json.loads(line) for line in path.read_text().splitlines())
