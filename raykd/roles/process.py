"""What a process in which models run sets before they do: threads, and how the C library's allocator keeps memory.

Left alone, glibc gives the pages of a step's activations back to the system and takes them anew in the next: on a CPU up to
half of the time of an inference goes there (docs/benchmarks.md, "Pages"). Here freed memory stays, up to a bound.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

KEPT_BYTES = 2**30  # freed memory at the end of the heap that a process keeps
MAPPED_BYTES = 2**25  # allocations from which on each is mapped by itself; glibc takes no more than this
ALLOCATOR = {  # as glibc reads it when a process starts; one arena, as the others give their pages back whatever is said
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES),
    "MALLOC_MMAP_THRESHOLD_": str(MAPPED_BYTES),
}
_OPTIONS = ((-8, 1), (-1, KEPT_BYTES), (-3, MAPPED_BYTES))  # the same for mallopt(3), by its numbers


def environment() -> dict[str, str]:
    """Variables for processes that are yet to start; nothing where the user has set the allocator."""
    return {} if _set_by_user() else dict(ALLOCATOR)


def settle(threads: int) -> None:
    """Sets torch's threads, and the allocator of this process where its environment did not."""
    torch.set_num_threads(threads)
    if sys.platform == "linux" and not _set_by_user():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in _OPTIONS:
                libc.mallopt(option, value)


def _set_by_user() -> bool:
    given = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    return "GLIBC_TUNABLES" in os.environ or any(ALLOCATOR.get(name) != value for name, value in given.items())
