"""Philox against the published answers; draws as functions of their keys."""

from __future__ import annotations

import numpy as np
import pytest

from raykd.data.keys import derive, permutation, philox, torch_generator, uniform, words

# Known-answer vectors of Philox4x32-10 published with Salmon et al., SC 2011.
ONES = 0xFFFFFFFF
FIXED = [0, 2, 3, 4, 6, 9, 7, 1, 8, 5]  # permutation(0, 0, 10): a resumed run must find its order again
ANSWERS = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, answer", ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(counter, key, answer):
    several = np.array([counter, [1, 2, 3, 4]], np.uint64).T
    assert philox(several, key)[:, 0].tolist() == answer


def test_words_pack_index_epoch_and_block_into_the_counter():
    index, epoch = 2**33 + 5, 7
    key = derive(3, "crop")
    drawn = words(3, epoch, np.array([index]), 6, "crop")[0]
    expected = [philox(np.array([[5], [2], [7], [block]], np.uint64), (key & ONES, key >> 32))[:, 0] for block in (0, 1)]
    assert drawn.tolist() == np.concatenate(expected)[:6].tolist()


def test_uniform_rows_depend_on_their_own_key_only():
    rows = np.arange(1000)
    whole = uniform(1, 2, rows, 5, "crop")
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(uniform(1, 2, rows[order], 5, "crop"), whole[order])
    assert np.array_equal(uniform(1, 2, rows[17:18], 3, "crop"), whole[17:18, :3])
    epochs = np.where(rows < 500, 2, 3)
    assert np.array_equal(uniform(1, epochs, rows, 5, "crop")[:500], whole[:500])
    for other in (uniform(0, 2, rows, 5, "crop"), uniform(1, 3, rows, 5, "crop"), uniform(1, 2, rows, 5, "flip")):
        assert not (other == whole).any()


def test_uniform_is_uniform_and_uncorrelated():
    drawn = uniform(0, 0, np.arange(20000), 4, "x")
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 50  # chi square with 19 degrees of freedom: 43.8 at 0.1 %
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.03


def test_permutation_is_one_keyed_and_read_only():
    order = permutation(0, 1, 1000)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, permutation.__wrapped__(0, 1, 1000))
    for other in (permutation(0, 2, 1000), permutation(1, 1, 1000), permutation(0, 1, 1000, "mix")):
        assert (other == order).mean() < 0.02
    with pytest.raises(ValueError):
        order[0] = 1


def test_permutation_never_changes():
    assert permutation(0, 0, 10).tolist() == FIXED


def test_derive_separates_its_parts():
    seeds = {
        derive(0),
        derive(0, "a"),
        derive(0, "ab", "c"),
        derive(0, "a", "bc"),
        derive(0, 1),
        derive(0, "1"),
        derive(1),
        derive(-1),
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, np.int64(5)) == derive(0, 5)  # type: ignore[arg-type]


def test_torch_generator_is_keyed():
    import torch

    first, again, other = torch_generator(0, "kd", 3), torch_generator(0, "kd", 3), torch_generator(0, "kd", 4)
    drawn = torch.rand(8, generator=first)
    assert torch.equal(drawn, torch.rand(8, generator=again))
    assert not torch.equal(drawn, torch.rand(8, generator=other))
