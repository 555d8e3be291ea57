"""Randomness that is a function of its keys: no state, so any process re-creates any draw bit for bit.

`uniform` draws per sample (augmentation), `permutation` per epoch (order, mixing partners), `torch_generator` per anything
else (a loss, a role, a step). All rest on integer arithmetic, so they depend on no version of NumPy or torch.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
ROUNDS = 10


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10, a bijection of 128-bit counters for each 64-bit key, over an array of counters.

    Args:
        counter: [4, n] words below 2**32, held in uint64.
        key: two words below 2**32.

    Returns:
        [4, n] words below 2**32: four independent uniform words a counter.

    References:
        Salmon et al., Parallel random numbers: as easy as 1, 2, 3. SC 2011. https://doi.org/10.1145/2063384.2063405
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (p1 >> _HALF) ^ c1 ^ np.uint64(k0), (p0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def derive(seed: int, *parts: int | str) -> int:
    """A seed for one purpose: 63 bits of a stable hash (BLAKE2b) of `seed` and `parts`.

    Integers and strings of the same spelling differ, and so do ("ab", "c") and ("a", "bc").
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        text = part.encode() if isinstance(part, str) else str(int(part)).encode()
        digest.update(b"%c%d:" % (b"s" if isinstance(part, str) else b"i", len(text)) + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def torch_generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator keyed by its arguments (torch's CPU engine uses the low 32 bits of a seed)."""
    return torch.Generator().manual_seed(derive(seed, *parts))


def words(seed: int, epoch: int | NDArray[np.int64], index: NDArray[np.int64], count: int, stream: str) -> NDArray[np.uint64]:
    """Uniform 32-bit words keyed by (seed, stream, epoch, index); each row depends on its own index and epoch only.

    Args:
        seed: any integer.
        epoch: one for all rows, or [n]; 0 to 2**32 - 1.
        index: [n] non-negative.
        count: words a row.
        stream: name of the purpose, so that two purposes never share a draw.

    Returns:
        [n, count] words below 2**32, in uint64.
    """
    blocks = -(-count // 4)
    n = len(index)
    key = derive(seed, stream)
    counter = np.empty((4, n, blocks), np.uint64)
    rows = np.asarray(index, np.int64).astype(np.uint64)[:, None]
    counter[0], counter[1] = rows & _LOW, rows >> _HALF
    counter[2] = np.broadcast_to(np.asarray(epoch, np.int64).astype(np.uint64), (n,))[:, None]
    counter[3] = np.arange(blocks, dtype=np.uint64)
    drawn = philox(counter.reshape(4, -1), (key & 0xFFFFFFFF, key >> 32))
    return drawn.T.reshape(n, blocks * 4)[:, :count]


def uniform(
    seed: int, epoch: int | NDArray[np.int64], sample_index: NDArray[np.int64], draws: int, stream: str
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2**-32, keyed by (seed, stream, epoch, sample_index).

    Args:
        seed: of the run.
        epoch: one for all samples, or [n].
        sample_index: [n] positions in the data set.
        draws: numbers a sample.
        stream: name of the purpose ("crop", "flip", ...).

    Returns:
        [n, draws]; row i does not depend on the other rows.
    """
    return words(seed, epoch, sample_index, draws, stream).astype(np.float64) * 2.0**-32


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, n: int, stream: str = "order") -> NDArray[np.int64]:
    """A permutation of range(n) keyed by (seed, stream, epoch): read-only [n], the stable order of 64-bit keyed words.

    NumPy's own `Generator.permutation` may change between versions; this one may not, so a resumed run keeps its order.
    """
    drawn = words(seed, epoch, np.arange(n, dtype=np.int64), 2, stream)
    order = np.argsort(drawn[:, 0] << _HALF | drawn[:, 1], kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def batch_key(seed: int, purpose: str, sample_index: NDArray[np.int64], views: NDArray[np.int32]) -> int:
    """A seed for what is drawn once a batch, by whoever holds the batch's keys: a teacher, a store, the student.

    Args:
        seed: of the run.
        purpose: its name.
        sample_index: [b] int64.
        views: [b] int32, the batch's `augmentation_seed`.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(sample_index, np.int64).tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(views, np.int32).tobytes())
    return derive(seed, purpose, int.from_bytes(digest.digest(), "little"))
