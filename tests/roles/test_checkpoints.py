"""Checkpoints: what is committed counts, what was cut off does not."""

import json

import pytest
import torch

from raykd.errors import DataError
from raykd.roles.checkpoints import committed, load, newest, save


def write(folder, step, *, world=1, keep=9, barrier=lambda: None):
    """All ranks of one checkpoint, rank 0 last, as behind a barrier."""
    for rank in reversed(range(world)):
        save(folder, step, rank, world, {"step": step, "rank": rank, "x": torch.full((2,), float(step))}, barrier, keep)


def steps(folder):
    return [step for step, _ in committed(folder)]


def test_no_checkpoint_at_all(tmp_path):
    assert newest(tmp_path / "nothing") is None
    assert committed(tmp_path / "nothing") == []


def test_each_rank_reads_what_it_wrote(tmp_path):
    write(tmp_path, 7, world=3)
    for rank in range(3):
        state = load(tmp_path, newest(tmp_path), rank, 3)
        assert (state["step"], state["rank"], state["x"].tolist()) == (7, rank, [7.0, 7.0])
    assert sorted(p.name for p in (tmp_path / "step-00000007").iterdir()) == ["COMMIT", "rank-0.pt", "rank-1.pt", "rank-2.pt"]
    assert json.loads((tmp_path / "step-00000007" / "COMMIT").read_text()) == {"step": 7, "world": 3}


def test_the_newest_counts(tmp_path):
    for step in (5, 100_000_000, 30):
        write(tmp_path, step)
    assert steps(tmp_path) == [5, 30, 100_000_000]
    assert load(tmp_path, newest(tmp_path), 0, 1)["step"] == 100_000_000


def test_a_torn_folder_does_not_count(tmp_path):
    write(tmp_path, 5)

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    with pytest.raises(Killed):  # before the other ranks have written
        write(tmp_path, 10, barrier=die)
    assert (tmp_path / "step-00000010" / "rank-0.pt").exists()
    assert steps(tmp_path) == [5]
    assert load(tmp_path, newest(tmp_path), 0, 1)["step"] == 5
    write(tmp_path, 10)
    assert steps(tmp_path) == [5, 10]


def test_rank_0_commits_only_after_the_barrier(tmp_path):
    seen = []
    save(tmp_path, 3, 0, 2, {}, lambda: seen.append((tmp_path / "step-00000003" / "COMMIT").exists()), keep=1)
    assert seen == [False, True]
    save(tmp_path, 4, 1, 2, {}, lambda: None, keep=1)
    assert steps(tmp_path) == [3], "no other rank commits"


@pytest.mark.parametrize("rank", [0, 1])
def test_step_0_is_not_committed_while_it_is_written_again(rank, tmp_path):
    """Before the first step there may be several, each of another time; with one worker the file is replaced as a whole."""
    write(tmp_path, 0, world=2)
    assert steps(tmp_path) == [0]
    seen = []
    save(tmp_path, 0, rank, 2, {}, lambda: seen.append(steps(tmp_path)), keep=1)
    assert seen == ([[], [], [0]] if rank == 0 else [[0]] * 3), "rank 0 takes the mark away and sets it"
    write(tmp_path / "alone", 0)
    save(tmp_path / "alone", 0, 0, 1, {}, lambda: seen.append(steps(tmp_path / "alone")), keep=1)
    assert seen[3:] == [[0]] * 3


@pytest.mark.parametrize("keep", [1, 2])
def test_old_ones_go_and_torn_ones_do_not_count_as_kept(tmp_path, keep):
    (tmp_path / "step-00000008").mkdir()
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=keep)
    assert steps(tmp_path) == [5, 10, 15, 20][-keep:]
    assert not (tmp_path / "step-00000005").exists()


def test_another_number_of_workers_is_refused(tmp_path):
    write(tmp_path, 5, world=2)
    with pytest.raises(DataError, match=r"expected 1 workers, got one written by 2\. Resume with launch\.workers=2"):
        load(tmp_path, newest(tmp_path), 0, 1)


@pytest.mark.parametrize("damage", ["cut", "garbage", "gone", "code"])
def test_a_damaged_file_is_named(tmp_path, damage):
    write(tmp_path, 5)
    path = tmp_path / "step-00000005" / "rank-0.pt"
    if damage == "gone":
        path.unlink()
    elif damage == "code":  # weights_only: nothing is run
        torch.save({"x": print}, path)
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"nonsense")
    with pytest.raises(DataError, match=r"step-00000005/rank-0\.pt is damaged \(\w+\)\. Delete that folder"):
        load(tmp_path, newest(tmp_path), 0, 1)


def test_stray_files_are_no_checkpoints(tmp_path):
    for name in ("step-5", "step-00000005.tmp", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "COMMIT").write_text("{}")
    assert committed(tmp_path) == []
