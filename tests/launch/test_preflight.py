"""Does a job fit? Needs against nodes, without a cluster."""

import pytest

from raykd.config import Job, Launch, Teacher
from raykd.errors import ResourceError
from raykd.launch.preflight import Need, fit, needs, require


def job(workers=1, cpus=1.0, gpus=0.0, teachers=None, **launch):
    return Job(launch=Launch(workers=workers, cpus=cpus, gpus=gpus, **launch), teachers=teachers or {})


def pool(replicas=1, **settings):
    return {"big": Teacher(replicas=replicas, **settings)}


def test_what_a_job_needs():
    found = needs(
        job(2, 1.5, 1.0, {"a": Teacher(replicas=3, cpus=0.5), "b": Teacher(placement="inline")}, resources={"x": 1.0})
    )
    assert [(n.what, n.count, dict(n.resources)) for n in found] == [
        ("student workers", 2, {"CPU": 1.5, "GPU": 1.0, "x": 1.0}),
        ("teacher a", 3, {"CPU": 0.5}),
    ]


@pytest.mark.parametrize(
    "given, nodes",
    [
        (job(), {"n": {"CPU": 1}}),
        (job(2, 2.0, teachers=pool(4, cpus=0.5)), {"n": {"CPU": 6}}),
        (job(2, 2.0, teachers=pool(4, cpus=0.5)), {"n": {"CPU": 3}, "m": {"CPU": 3}}),
        (job(3, 0.1), {"n": {"CPU": 0.3}}),
        (job(1, 1, 1.0, pool(1, gpus=0.5)), {"cpu": {"CPU": 8}, "gpu": {"CPU": 2, "GPU": 2}}),
        (job(1, 1, teachers=pool(1, resources={"tpu": 1})), {"n": {"CPU": 4}, "m": {"CPU": 1, "tpu": 1}}),
    ],
)
def test_it_fits(given, nodes):
    verdict = require(given, nodes)
    assert verdict.fits
    for node, has in nodes.items():
        for resource, amount in has.items():
            used = sum(
                need.resources.get(resource, 0.0) * verdict.placed.get(need.what, []).count(node) for need in needs(given)
            )
            assert used <= amount + 1e-6, "no node holds more than it has"
    assert {what: len(places) for what, places in verdict.placed.items()} == {n.what: n.count for n in needs(given)}


def test_the_sum_is_told():
    assert require(job(2, 2.0, teachers=pool(2, cpus=0.5)), {"n": {"CPU": 4}, "m": {"CPU": 2.5}}).text == (
        "CPU 5 of 6.5 free on 2 nodes"
    )
    assert require(job(), {"n": {"CPU": 1}}).text == "CPU 1 of 1 free on 1 node"


@pytest.mark.parametrize(
    "given, nodes, message",
    [
        (
            job(3),
            {"n": {"CPU": 2}},
            "CPU 3 of 2 free on 1 node.*student workers.*Change launch.workers, launch.cpus or launch.gpus",
        ),
        (
            job(1, teachers=pool(4, cpus=0.5)),
            {"n": {"CPU": 2}},
            "teacher big: 4 x .CPU 0.5.*Change teachers.big.replicas, .cpus",
        ),
        (job(1, 3.0), {"n": {"CPU": 2}, "m": {"CPU": 2}}, "CPU 3 of 4 free on 2 nodes.; no node has room for student workers"),
        (job(1, 1, 1.0), {"n": {"CPU": 8}}, "CPU 1 of 8 free, GPU 1 of 0 free"),
        (job(1, teachers=pool(1, resources={"tpu": 2})), {"n": {"CPU": 8, "tpu": 1}}, "tpu 2 of 1 free"),
        (job(resources={"disk": 1}), {"n": {"CPU": 8}}, "disk 1 of 0 free.*student workers"),
        (job(), {}, "CPU 1 of 0 free on 0 nodes"),
    ],
)
def test_it_does_not_fit(given, nodes, message):
    with pytest.raises(ResourceError, match=f"(?s){message}"):
        require(given, nodes)


def test_the_largest_are_placed_first():
    """Small processes first would leave no node with room for the large one."""
    wanted = [Need("small", 2, {"CPU": 1}, "s"), Need("large", 1, {"CPU": 3}, "l")]
    verdict = fit(wanted, {"n": {"CPU": 3}, "m": {"CPU": 2}})
    assert verdict.fits
    assert verdict.placed == {"large": ["n"], "small": ["m", "m"]}


def test_the_nodes_stay_as_they_are():
    nodes = {"n": {"CPU": 2.0}}
    fit([Need("a", 2, {"CPU": 1}, "s")], nodes)
    assert nodes == {"n": {"CPU": 2.0}}


def test_what_needs_a_rare_resource_is_placed_before_what_fits_anywhere():
    given = job(1, 4.0, teachers=pool(1, cpus=1, resources={"tpu": 1}))
    assert fit(needs(given), {"tpu": {"CPU": 4, "tpu": 1}, "cpu": {"CPU": 4}}).fits


def test_a_strict_strategy_counts_nodes():
    two = {"a": {"CPU": 4.0}, "b": {"CPU": 1.0}}
    assert fit([Need("workers", 2, {"CPU": 1}, "s", "STRICT_SPREAD")], two).placed["workers"] == ["a", "b"]
    assert not fit([Need("workers", 3, {"CPU": 1}, "s", "STRICT_SPREAD")], two).fits
    assert fit([Need("workers", 3, {"CPU": 1}, "s", "STRICT_PACK")], two).placed["workers"] == ["a", "a", "a"]
    assert not fit([Need("workers", 5, {"CPU": 1}, "s", "STRICT_PACK")], two).fits
    assert fit([Need("workers", 5, {"CPU": 1}, "s", "PACK")], two).fits
