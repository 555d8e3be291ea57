"""Who teaches whom, and what each peer's own job is."""

import pytest

from raykd import Data, Job, Launch, Loss, Training
from raykd.config import Edge, Exchange, Peer
from raykd.errors import ConfigError
from raykd.launch import assembly, online, peering
from raykd.launch.checks import inspect

GRAPHS = {
    "all": {"a": "bcd", "b": "acd", "c": "abd", "d": "abc"},
    "ring": {"a": "d", "b": "a", "c": "b", "d": "c"},
    "leader:b": {"a": "b", "b": "", "c": "b", "d": "b"},
    "star:b": {"a": "b", "b": "acd", "c": "b", "d": "b"},
}


def job(names="abcd", **settings) -> Job:
    return Job(
        name="peers",
        seed=3,
        data=Data(limit=64),
        peers={name: Peer(model="digits_cnn") for name in names},
        losses={"dml": Loss("dml")},
        training=Training(recipe="online", epochs=1, batch_size=16),
        launch=Launch(backend="local"),
    ).replace(**settings)


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs(graph):
    found = peering.edges(job(**{"exchange.graph": graph}))
    assert {name: "".join(own) for name, own in found.items()} == GRAPHS[graph]
    assert all(edge == Edge() for own in found.values() for edge in own.values())


def test_edges_count_alone_and_are_in_the_jobs_order():
    named = {"c > a": Edge(weight=3.0), "b>a": Edge(losses=("dml",)), "a>d": Edge()}
    found = peering.edges(job(**{"exchange.edges": named, "exchange.graph": "all"}))
    assert {name: list(own) for name, own in found.items()} == {"a": ["b", "c"], "b": [], "c": [], "d": ["a"]}
    assert found["a"]["c"].weight == 3.0
    assert found["a"]["b"].losses == ("dml",)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"exchange.graph": "rnig"}, "exchange.graph: expected one of all, ring, leader:<peer>, star:<peer>, got 'rnig'"),
        ({"exchange.graph": "leader"}, "exchange.graph: expected one of"),
        ({"exchange.graph": "ring:a"}, "exchange.graph: expected one of"),
        ({"exchange.graph": "leader:e"}, "exchange.graph: no peer 'e'"),
        ({"exchange.edges": {"a>e": Edge()}}, "exchange.edges.a>e: expected 'a>b' of two peers"),
        ({"exchange.edges": {"a-b": Edge()}}, "exchange.edges.a-b: expected 'a>b'"),
        ({"exchange.edges": {"a>a": Edge()}}, "exchange.edges.a>a: expected two different peers"),
    ],
)
def test_wrong_graphs(settings, says):
    with pytest.raises(ConfigError) as caught:
        peering.edges(job(**settings))
    assert str(caught.value).startswith(says)


def test_the_job_of_one_peer():
    whole = job(
        "ab",
        **{
            "peers.b.training": {"lr": 0.02},
            "peers.b.gpus": 1.0,
            "exchange.shards": "disjoint",
            "exchange.what": "weights",
            "exchange.views": "own",
        },
    )
    a, b = (peering.peer_job(whole, name) for name in "ab")
    assert (b.training.lr, b.launch.gpus, a.launch.gpus) == (0.02, 1.0, 0.0)
    assert a.data.seed == b.data.seed == 3, "the order of the images is that of the run"
    assert a.seed != b.seed, "all other randomness is the peer's own"
    assert (a.data.shard, b.data.shard, a.data.view, b.data.view) == ((0, 2), (1, 2), 0, 1)
    assert peering.peer_job(whole.replace(**{"exchange.every": 2}), "a").seed == a.seed
    alone = peering.peer_job(job("ab"), "a").data
    assert (alone.shard, alone.view) == (None, 0)


def test_what_each_publishes_and_to_whom():
    seen = inspect(job("abc", **{"exchange.graph": "leader:a"}))
    assert not seen.faults
    parts = peering.parts(seen.job, assembly.facts(seen.job))
    assert [s.key for s in parts["a"].published] == ["logits"]
    assert (parts["a"].listens, parts["a"].listeners) == ((), ("b", "c"))
    assert (parts["b"].published, parts["b"].listens, parts["b"].listeners) == ((), ("a",), ())


def test_shares_of_edges():
    seen = inspect(job("abc", **{"exchange.edges": {"a>c": Edge(weight=3.0), "b>c": Edge()}}))
    parts = peering.parts(seen.job, assembly.facts(seen.job))
    assert {p.label: p.share for p in parts["c"].plans} == {"dml.a": 0.75, "dml.b": 0.25}
    assert parts["a"].plans == []


def test_peers_of_one_actor():
    assert peering.together(job(**{"peers.b.actor": "x", "peers.d.actor": "x"})) == {"a": ("a",), "x": ("b", "d"), "c": ("c",)}


def test_circles_of_peers_that_exchange_with_each_other():
    listens = {"a": ["b"], "b": [], "c": [], "d": ["e"], "e": ["f"], "f": ["a"], "g": ["c"]}
    found = online.circles(listens)
    assert sorted("".join(sorted(circle)) for circle in found) == ["abdef", "cg"]


@pytest.mark.parametrize("staleness, every, most", [(0, 1, 5), (3, 1, 11), (3, 2, 9), ("newest", 1, 5)])
def test_how_far_ahead_a_peer_may_be(staleness, every, most):
    assert online.ahead(Exchange(what="weights", staleness=staleness, every=every)) == most
