import os

import pytest

from raykd.report.follow import Follower, Progress, wait_share
from tests.report.folders import lines, step


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def steps(follower):
    return [r["step"] for r in follower.read()[0]]


def test_only_new_and_whole_lines_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.read() == ([], False)
    text = lines([step(1), step(2), step(3)])
    cut = len(lines([step(1), step(2)])) + 10
    path.write_text(text[:cut])
    assert steps(follower) == [1, 2]
    assert steps(follower) == []
    path.write_text(text)
    assert steps(follower) == [3]


def test_lines_that_are_no_records_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([step(1)]) + "{broken\n3\n\xff\n" + lines([step(2)]))
    assert steps(Follower(path)) == [1, 2]


def test_a_file_cut_back_by_a_resumed_run_is_read_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    path.write_text(lines([step(1), step(2), step(3)]))
    follower.read()
    part = tmp_path / "part"
    part.write_text(lines([step(1), step(2)]))
    os.replace(part, path)
    records, over = follower.read()
    assert ([r["step"] for r in records], over) == ([1, 2], True)
    with path.open("a") as file:
        file.write(lines([step(3)]))
    assert [r["step"] for r in follower.read()[0]] == [3]
    path.write_text(lines([step(1)]))
    assert follower.read()[1]


def test_speed_loss_and_waiting_share():
    progress = Progress(100)
    for number in range(1, 61):
        progress.add(step(number, wait=0.4))
    assert progress.images_per_s == pytest.approx(800)
    assert progress.wait_share == pytest.approx(0.4)
    assert progress.settled_wait_share == pytest.approx(0.4)
    newest = range(41, 61)
    assert progress.loss == pytest.approx(sum(3 / n for n in newest) / 20)
    assert progress.terms["kd"] == pytest.approx(sum(2 / n for n in newest) / 20)


def test_waiting_share_is_settled_after_fifty_steps():
    progress = Progress(100)
    for number in range(1, 50):
        progress.add(step(number, wait=1.0 if number <= 10 else 0.2))
    assert progress.settled_wait_share is None
    progress.add(step(50, wait=0.2))
    assert progress.settled_wait_share == pytest.approx(0.2)


def test_time_left_counts_evaluations_but_not_an_earlier_run():
    clock = Clock()
    progress = Progress(110, clock)
    for number in range(1, 51):
        progress.add(step(number), live=False)
    assert progress.seconds_left is None
    for number in range(51, 61):
        progress.add(step(number))
        clock.now += 2.0
    assert progress.seconds_left == pytest.approx(20 / 9 * 50)
    progress.restart()
    assert (progress.step, progress.seconds_left) == (0, None)


def test_a_single_step_and_none_at_all():
    progress = Progress(1)
    assert (progress.images_per_s, progress.wait_share, progress.loss, progress.terms) == (None, None, None, {})
    progress.add({"kind": "step", "step": 1})
    assert progress.seconds_left is None
    assert wait_share([]) is None
