"""The image bank: what it keeps, what it draws, and what is on disk of it when."""

import errno
import multiprocessing
import os
import signal
import time
import warnings
import weakref
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from raykd.errors import ConfigError, DataError
from raykd.exchange.bank import HALF_LIFE, KEPT, UNSEEN, Bank, MadeBatch

SHAPE, COUNT, CLASSES = (3, 4, 4), 5, 10
BYTES = COUNT * 3 * 4 * 4  # of a batch's images
MANY = 10**9


def made(number: int, score: float = 0.0, version: int = -1, content: int | None = None) -> MadeBatch:
    """A batch whose images and labels follow from its number, or from `content`."""
    rng = np.random.default_rng(number if content is None else content)
    images = rng.integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)
    labels, seen = rng.integers(0, CLASSES, (2, COUNT))
    confidence = rng.random(COUNT, np.float32)
    return MadeBatch(number, images, labels, version, number % 2, 1.5, score, 0.25, seen, confidence)


def filled(folder, numbers, capacity=100, memory_bytes=MANY, priority="uniform", scores=None) -> Bank:
    bank = Bank(folder, capacity, memory_bytes, priority)
    for number in numbers:
        bank.put(made(number, (scores or {}).get(number, 0.0)))
    return bank


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def named(*numbers: int) -> set[str]:
    return {f"{number:08d}.arrow" for number in numbers}


def whole(drawn) -> None:
    """Each image and label drawn is the one that its index names."""
    for image, label, index in zip(drawn["images"], drawn["labels"].tolist(), drawn["sample_index"].tolist()):
        batch = made(index // COUNT)
        assert torch.equal(image, torch.from_numpy(batch.images[index % COUNT]))
        assert label == batch.labels[index % COUNT]


def equal(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in ("images", "labels", "sample_index"))


def test_batches_stay_in_the_order_in_which_they_came_and_the_oldest_goes(tmp_path):
    bank = filled(tmp_path, [3, 1, 7, 2], capacity=3)
    assert bank.numbers == [1, 7, 2]
    assert (len(bank), bank.dropped) == (3, 1)
    assert bank.summary(CLASSES, 0)["held_bytes"] == 3 * BYTES
    found = bank.newest(COUNT + 2)
    for name, own in {"images": "images", "label": "labels", "seen": "seen", "confidence": "confidence"}.items():
        expected = np.concatenate([getattr(made(2), own), getattr(made(7), own)])[: COUNT + 2]
        assert np.array_equal(found[name], expected), name
    assert len(bank.newest(100)["label"]) == 3 * COUNT


def test_a_batch_that_comes_twice_counts_once(tmp_path):
    bank = filled(tmp_path, [1, 2])
    bank.put(made(1, content=99))
    assert bank.numbers == [1, 2]
    whole(bank.draw(50, seeded()))


def test_with_priority_hard_the_easiest_of_the_older_half_goes(tmp_path):
    scores = {0: 3.0, 1: 0.5, 2: 2.0, 3: 0.1, 4: 0.0}
    bank = filled(tmp_path, range(5), capacity=4, priority="hard", scores=scores)
    assert bank.numbers == [0, 2, 3, 4]


def shares(bank, count=40_000) -> dict[int, float]:
    seen = Counter((bank.draw(count, seeded())["sample_index"] // COUNT).tolist())
    return {number: seen[number] / count for number in bank.numbers}


def test_priorities_are_how_likely_batches_are_drawn(tmp_path):
    assert shares(filled(tmp_path, range(4))) == pytest.approx(dict.fromkeys(range(4), 0.25), abs=0.01)
    scores = {0: 0.0, 1: 1.0, 2: 3.0}
    mean = 4 / 3
    expected = {n: (s + mean) / (4 + 3 * mean) for n, s in scores.items()}
    assert shares(filled(tmp_path, range(3), priority="hard", scores=scores)) == pytest.approx(expected, abs=0.01)
    recent = shares(filled(tmp_path, range(2 * HALF_LIFE), capacity=MANY, priority="recent"), 200_000)
    assert recent[2 * HALF_LIFE - 1] / recent[HALF_LIFE - 1] == pytest.approx(2.0, rel=0.2)
    assert sum(list(recent.values())[:HALF_LIFE]) == pytest.approx(1 / 3, abs=0.01)


def test_images_within_a_batch_are_alike(tmp_path):
    drawn = filled(tmp_path, [4]).draw(20_000, seeded())
    counts = torch.bincount(drawn["sample_index"] - 4 * COUNT, minlength=COUNT) / 20_000
    assert counts.tolist() == pytest.approx([1 / COUNT] * COUNT, abs=0.015)


def test_a_draw_is_a_function_of_its_generator_wherever_the_batches_are(tmp_path):
    memory, disk = (filled(tmp_path / str(most), range(6), memory_bytes=most) for most in (MANY, 1))
    assert disk.spilled == 5
    for seed in range(3):
        drawn = memory.draw(64, seeded(seed))
        whole(drawn)
        assert drawn["images"].dtype == torch.uint8
        assert equal(drawn, memory.draw(64, seeded(seed)))
        assert equal(drawn, disk.draw(64, seeded(seed)))
    assert not equal(memory.draw(64, seeded(0)), memory.draw(64, seeded(1)))


def test_an_empty_bank_says_so(tmp_path):
    with pytest.raises(DataError, match="bank: expected images to draw from, got none"):
        Bank(tmp_path, 3, 1).draw(1, seeded())


def test_an_unknown_priority(tmp_path):
    with pytest.raises(ConfigError, match=r"synthesis\.priority: no priority 'recnt'.*'recent'"):
        Bank(tmp_path, 3, 1, "recnt")


def test_what_does_not_fit_in_memory_is_on_disk(tmp_path):
    bank = filled(tmp_path, range(5), memory_bytes=2 * BYTES + 1)
    assert files(tmp_path) == named(0, 1, 2)
    assert bank.spilled == 3
    assert bank.summary(CLASSES, 0)["held_bytes"] == 2 * BYTES
    whole(bank.draw(100, seeded()))
    assert bank.summary(CLASSES, 0)["held_bytes"] == 2 * BYTES, "reading back keeps nothing"
    bank = filled(tmp_path / "least", range(3), memory_bytes=1)
    assert files(tmp_path / "least") == named(0, 1), "the newest stays"


def test_memory_is_given_back_when_a_batch_goes_to_disk(tmp_path):
    """Also where images and labels came in one buffer, as from Ray's object store."""
    pixels = COUNT * int(np.prod(SHAPE))
    buffer = np.zeros(pixels + 8 * COUNT, np.uint8)
    images, labels = buffer[:pixels].reshape(COUNT, *SHAPE), buffer[pixels:].view(np.int64)
    there = weakref.ref(buffer)
    bank = Bank(tmp_path, 10, 1)
    bank.put(MadeBatch(0, images, labels))
    del buffer, images, labels
    assert there() is not None
    bank.put(made(1))
    assert there() is None


def test_a_summary_counts_classes_and_ages(tmp_path):
    bank = Bank(tmp_path, 10, 1)
    for number, version in enumerate((0, 10, -1)):
        bank.put(made(number, version=version))
    found = bank.summary(CLASSES, 30)
    expected = sum(np.bincount(made(n).seen, minlength=CLASSES) for n in range(3))
    assert found["bank_classes"] == expected.tolist(), "as teachers see them, of those on disk too"
    assert (found["age_mean"], found["age_max"], found["batches"], found["spilled"]) == (25.0, 30, 3, 2)


def same(bank: Bank, other: Bank) -> None:
    assert bank.state() == other.state()
    assert equal(bank.draw(64, seeded()), other.draw(64, seeded()))


def test_a_checkpoint_holds_what_a_bank_was(tmp_path):
    bank = filled(tmp_path, [2, 5, 3, 4], capacity=3, memory_bytes=2 * BYTES, priority="hard", scores={5: 1.25, 3: 0.5})
    state = bank.state()
    assert files(tmp_path) == named(5, 3, 4), "that of 2 was written before it was dropped, and is in no checkpoint"
    other = Bank(tmp_path, 3, 2 * BYTES, "hard")
    other.load_state(state)
    assert files(tmp_path) == named(5, 3, 4)
    assert other.numbers == [5, 3, 4]
    same(bank, other)


def test_a_bank_is_loaded_within_its_memory(tmp_path, monkeypatch):
    state = filled(tmp_path, range(8)).state()
    bank, most = Bank(tmp_path, 100, 2 * BYTES), []
    fit = Bank._fit

    def watched(self, last):
        fit(self, last)
        most.append(self._held)

    monkeypatch.setattr(Bank, "_fit", watched)
    bank.load_state(state)
    assert max(most) == 2 * BYTES
    whole(bank.draw(50, seeded()))


def test_files_that_a_checkpoint_needs_stay(tmp_path):
    bank = filled(tmp_path, [0, 1], capacity=2)
    states = [bank.state()]
    for number in range(2, 9):
        bank.put(made(number))
        states.append(bank.state())
        for state in states[-2:]:  # what a job keeps by default
            again = {f"{int(entry[0]):08d}.arrow" for entry in state["batches"]}
            assert again <= files(tmp_path)
    assert len(files(tmp_path)) <= 2 + KEPT, "and no others for ever"


def test_files_that_no_checkpoint_names_go_at_once(tmp_path):
    bank = Bank(tmp_path, 3, memory_bytes=1)
    for number in range(3):
        bank.put(made(number))
    bank.state()
    for number in range(3, 40):
        bank.put(made(number))
        assert len(files(tmp_path)) <= 3 + 3
    assert files(tmp_path) == named(0, 1, 2) | named(*bank.numbers) - named(39), "the last one is in memory"
    for _ in range(KEPT):
        bank.state()
    assert files(tmp_path) == named(*bank.numbers)
    whole(bank.draw(50, seeded()))


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path):
    bank = filled(tmp_path, [0, 1, 2], memory_bytes=1)
    state = bank.state()
    for number in (3, 4):
        bank.put(made(number))
    (tmp_path / "00000009.4711").write_bytes(b"cut off")
    other = Bank(tmp_path, 100, 1)
    other.load_state(state)
    assert files(tmp_path) == named(0, 1, 2)
    other.put(made(3, content=33))
    other.put(made(4))
    found = other.newest(2 * COUNT)["images"][COUNT:]
    assert np.array_equal(found, made(3, content=33).images), "made with another student"


def test_a_file_of_a_start_without_a_checkpoint_is_not_taken_for_the_new_batch(tmp_path):
    filled(tmp_path, [0, 1], memory_bytes=1)
    bank = Bank(tmp_path, 100, 1)
    bank.put(made(0, content=50))
    bank.put(made(1))
    assert np.array_equal(bank.newest(2 * COUNT)["images"][COUNT:], made(0, content=50).images)


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "another file": lambda path: path.write_bytes(b"x" * 2000),
}


def flipped(path, where: int) -> None:
    """One bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_its_batch_dropped(damage, tmp_path):
    bank = filled(tmp_path, range(4), memory_bytes=1)
    state = bank.state()
    DAMAGES[damage](tmp_path / "00000001.arrow")
    wanted = r"bank file .*00000001\.arrow: expected a batch of images, got .*\. Batch 1 is dropped\."
    with pytest.warns(UserWarning, match=wanted):
        whole(bank.draw(100, seeded()))
    assert (bank.numbers, bank.damaged, bank.dropped) == ([0, 2, 3], 1, 0)
    DAMAGES["empty"](tmp_path / "00000001.arrow")
    other = Bank(tmp_path, 100, 1)
    with pytest.warns(UserWarning, match=r"00000001\.arrow"):
        other.load_state(state)
    assert (other.numbers, other.damaged) == ([0, 2, 3], 1)
    assert files(tmp_path) == named(0, 2, 3)
    assert equal(bank.draw(64, seeded()), other.draw(64, seeded()))
    other.put(made(1, content=50))
    other.state()
    assert "00000001.arrow" in files(tmp_path), "another one of that number is written"


@pytest.mark.parametrize("part", ["images", "labels"])
def test_no_image_is_drawn_of_which_a_bit_has_changed(part, tmp_path):
    bank, own = filled(tmp_path, range(3), memory_bytes=1), made(1)
    path = tmp_path / "00000001.arrow"
    flipped(path, path.read_bytes().index(own.images[2].tobytes() if part == "images" else own.labels.tobytes()) + 16)
    with pytest.warns(UserWarning, match=r"00000001\.arrow: expected image 2 as it was written.*Batch 1 is dropped"):
        whole(bank.draw(200, seeded()))
    assert (bank.numbers, bank.summary(CLASSES, 0)["damaged"]) == ([0, 2], 1)


def test_nothing_that_has_changed_is_drawn_wherever_the_bit_is(tmp_path):
    size = len((filled(tmp_path / "one", range(2), memory_bytes=1).folder / "00000000.arrow").read_bytes())
    rng = np.random.default_rng(0)
    for where in rng.choice(size, 60, replace=False).tolist():
        bank = filled(tmp_path / str(where), range(2), memory_bytes=1)
        flipped(bank.folder / "00000000.arrow", where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole(bank.draw(50, seeded()))


def test_a_bank_of_damaged_files_alone_is_no_bank(tmp_path):
    state = filled(tmp_path, range(2)).state()
    for path in tmp_path.iterdir():
        path.unlink()
    with (
        pytest.warns(UserWarning, match="is dropped"),
        pytest.raises(DataError, match=r"expected batches of images, got damaged files alone\. Start the run anew"),
    ):
        Bank(tmp_path, 100, 1).load_state(state)


def test_a_file_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    bank = filled(tmp_path, range(2), memory_bytes=1)

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(pa, "memory_map", refused)
    with pytest.raises(DataError, match=r"00000000\.arrow: expected a batch of images, got .*Permission.*Resume the run"):
        bank.draw(50, seeded())
    assert files(tmp_path) == named(0)


def test_files_of_earlier_releases_are_read(tmp_path):
    """Without checksums and without what teachers see."""
    state = filled(tmp_path, range(3)).state()
    state.pop("damaged")
    for path in tmp_path.iterdir():
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all().drop_columns(["crc32", "seen", "confidence"])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    bank = Bank(tmp_path, 100, BYTES)
    bank.load_state(state)
    whole(bank.draw(100, seeded()))
    found = bank.newest(COUNT)
    assert np.array_equal(found["label"], made(2).labels)
    assert (found["seen"] == UNSEEN).all()
    assert np.isnan(found["confidence"]).all()
    assert bank.summary(CLASSES, 0)["bank_classes"] == [0] * CLASSES


LARGE = (64, 3, 128, 128)  # 3 MB a file, so that a kill is likely to fall into a write


def write_for_ever(folder) -> None:
    bank, images = Bank(folder, 6, 1), np.ones(LARGE, np.uint8)
    for number in range(10**6):
        bank.put(MadeBatch(number, images * np.uint8(number % 251), np.full(len(images), number)))
        if number % 7 == 0:
            bank.state()


@pytest.mark.parametrize("wait_s", [0.0, 0.013, 0.031])
def test_a_writer_that_is_killed_leaves_files_whole_or_none(wait_s, tmp_path):
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,), daemon=True)
    writer.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.arrow"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(wait_s)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    left = sorted(int(path.stem) for path in tmp_path.glob("*.arrow"))
    bank = Bank(tmp_path, 100, MANY)
    bank.load_state({"batches": [[n, -1, 0, 0.0, 0.0, 0.0] for n in left], "dropped": 0, "spilled": 0})
    assert files(tmp_path) == named(*left), "what was half written is gone"
    drawn = bank.draw(500, seeded())
    number = drawn["sample_index"] // LARGE[0]
    assert torch.equal(drawn["labels"], number)
    assert torch.equal(drawn["images"].flatten(1), (number % 251).to(torch.uint8)[:, None].expand(-1, int(np.prod(LARGE[1:]))))
