"""A process keeps the memory of a step for the next: hardly a page fault in a step, on any thread."""

import os
import subprocess
import sys

import pytest

from raykd.roles.process import ALLOCATOR, environment

WORK = """
import resource, sys, threading, torch
from torch import nn
from raykd.roles.process import settle
settle(1) if sys.argv[1] == "settled" else torch.set_num_threads(1)
layers = [nn.Conv2d(3, 16, 3, padding=1)] + [m for _ in range(6) for m in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))]
net, images = nn.Sequential(*layers).eval(), torch.rand(128, 3, 32, 32)
@torch.no_grad()
def faults(steps=6):
    for _ in range(3):
        net(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        net(images)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps)
faults()
if sys.argv[2] == "thread":
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
"""


def faults(settled, where, **env):
    given = {name: value for name, value in os.environ.items() if name not in ALLOCATOR} | env
    done = subprocess.run([sys.executable, "-c", WORK, settled, where], env=given, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_step_takes_no_new_pages():
    (alone,) = faults("alone", "here")
    assert alone > 2000, "glibc keeps pages by itself now: is this still needed?"
    assert max(faults("settled", "here")) < alone / 10
    assert max(faults("alone", "thread", **ALLOCATOR)) < alone / 10


@pytest.mark.parametrize("own", [{"MALLOC_TRIM_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}])
def test_what_the_user_has_set_stays(own, monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    assert environment() == ALLOCATOR
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert environment() == {}
