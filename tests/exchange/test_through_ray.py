"""Gradients through teachers on Ray actors: as in this process, also when a replica dies in between."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import ray
import torch

from raykd.exchange.asking import GRAD, SUM, Ask, Asks
from raykd.exchange.codec import parse
from raykd.exchange.pool import PoolSource
from raykd.exchange.sources import InlineSource
from raykd.exchange.through import through
from raykd.launch import replicas
from raykd.roles.teacher import Committee, Teacher
from raykd.signals import Signal
from tests.exchange import makers
from tests.exchange.makers import WANTED, asks, gradient
from tests.spine.small import cifar


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:Teacher")
def test_two_remote_teachers_and_replicas_that_die(real_data, tmp_path, ray_cluster):
    specs = makers.specs(tmp_path, real_data)
    specs = {name: dataclasses.replace(spec, max_restarts=0) for name, spec in specs.items()}
    job = cifar(real_data).replace(teachers=specs, losses={})
    handles = replicas.start(job, makers.FACTS)
    try:
        here = {
            n: InlineSource(Committee({n: Teacher(s, makers.FACTS, torch.device("cpu"), n)}, 5), asks(n))
            for n, s in specs.items()
        }
        there = {n: PoolSource(n, handles[n], asks(n), timeout_s=20.0) for n in specs}
        expected = gradient(lambda images: through(here, images, WANTED))

        def agrees(between=lambda: None):
            found = gradient(lambda images: through(there, images, WANTED), between)
            return all(torch.equal(a, b) for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]]))

        assert agrees()
        logits = Asks((Ask("small", (Signal("logits"),), parse("dense")),))
        images, weights = np.random.default_rng(0).random((6, 3, 32, 32), np.float32), np.ones((6, 10), np.float32)
        request = there["small"].ask(images, logits, {"small": {"logits": weights}})  # a gradient, on its way
        request.sent.result()
        ray.kill(handles["small"][request.replica], no_restart=True)
        wanted = here["small"].ask(images, logits, {"small": {"logits": weights}}).result()[SUM][GRAD]
        assert torch.equal(request.result()[SUM][GRAD], wanted)
        assert agrees(lambda: ray.kill(handles["big"][there["big"]._next], no_restart=True))  # whom the backward would ask
        assert there["big"].backward.retries == 1
        assert there["big"].stats.retries == 0
    finally:
        replicas.stop(handles)
