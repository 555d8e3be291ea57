"""Gradients through teachers elsewhere are those of the same teachers here, whoever dies on the way."""

from __future__ import annotations

import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError

from raykd.config import Teacher as Spec
from raykd.errors import ConfigError, LostError, SignalError, SourceError
from raykd.exchange import pool as pools
from raykd.exchange.asking import Ask, Asks
from raykd.exchange.codec import parse
from raykd.exchange.pool import PoolSource
from raykd.exchange.sources import InlineSource, LocalSource
from raykd.exchange.through import through
from raykd.roles.network import Facts
from raykd.roles.teacher import Committee, Teacher
from raykd.signals import Signal
from tests.conftest import DATA
from tests.exchange import makers
from tests.exchange.makers import WANTED, asks, error, gradient

CPU = torch.device("cpu")
NAMES = ("big", "small")


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    real = DATA.resolve() if DATA.is_dir() else None
    return SimpleNamespace(of=makers.specs(folder, real), expected=makers.plain_gradient(folder, real))


def committee(specs, *names):
    return Committee({n: Teacher(specs.of[n], makers.FACTS, CPU, n) for n in names}, 5)


class Replica:
    """An actor that is a plain object: pickles what comes and goes, dies when told to."""

    def __init__(self, inner):
        self.inner, self.alive, self.calls, self.dies_in = inner, True, [], None
        self.answer = SimpleNamespace(remote=lambda *given: self._sent("answer", given))
        self.input_grad = SimpleNamespace(remote=lambda *given: self._sent("input_grad", given))
        self.ready = SimpleNamespace(remote=lambda: SimpleNamespace(replica=self, made=lambda: True))

    def _sent(self, method, given):
        self.calls.append(method)
        message = pickle.dumps(given)
        return SimpleNamespace(replica=self, made=lambda: getattr(self.inner, method)(*pickle.loads(message)), method=method)


@pytest.fixture
def fake_ray(monkeypatch):
    def get(ref, timeout=None):
        value = pickle.loads(pickle.dumps(ref.made())) if ref.replica.alive else None
        if getattr(ref, "method", None) is not None and ref.replica.dies_in == ref.method:
            ref.replica.alive = False  # it worked, and died before the answer was here
        if not ref.replica.alive:
            raise ActorDiedError()
        return value

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout=None: (refs, []))
    monkeypatch.setattr(pools, "PATIENCE_S", 0.0)


@pytest.fixture
def pooled(specs, fake_ray):
    """Two sources with two replicas each."""
    replicas = {n: [Replica(committee(specs, n)) for _ in range(2)] for n in NAMES}
    return {n: PoolSource(n, replicas[n], asks(n)) for n in NAMES}, replicas


def inline(specs):
    return {n: InlineSource(committee(specs, n), asks(n)) for n in NAMES}


def local(specs):
    return {n: LocalSource(committee(specs, n), asks(n)) for n in NAMES}


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]]))


def ask(sources):
    return lambda images: through(sources, images, WANTED)


def test_inline_is_the_gradient_without_raykd(specs):
    loss, grads = gradient(ask(inline(specs)))
    torch.testing.assert_close(loss, specs.expected[0], rtol=1e-6, atol=0)
    assert error(grads, specs.expected[1]) < 2e-5  # the pixels are normalised in another order of operations
    assert all(float(g.abs().max()) > 0 for g in grads)


def test_placement_does_not_change_a_bit(specs, pooled):
    expected = gradient(ask(inline(specs)))
    assert same(gradient(ask(local(specs))), expected)
    assert same(gradient(ask(pooled[0])), expected)
    mixed = {"big": inline(specs)["big"], "small": pooled[0]["small"]}
    assert same(gradient(ask(mixed)), expected)
    shared = {"both": LocalSource(committee(specs, *NAMES), Asks(tuple(asks(n).of[0] for n in NAMES)))}
    assert same(gradient(ask(shared)), expected)
    assert shared["both"].backward.requests == 1


@pytest.mark.filterwarnings("ignore:Teacher")
@pytest.mark.parametrize("method", ["answer", "input_grad"])
def test_a_replica_dies_in_the_middle_of_a_request(method, specs, pooled):
    sources, replicas = pooled
    expected = gradient(ask(inline(specs)))
    for own in replicas.values():  # asked in turn: the first for the signals, the second for the gradient
        own[0 if method == "answer" else 1].dies_in = method
    assert same(gradient(ask(sources)), expected)
    for source in sources.values():
        assert (source.stats.retries, source.backward.retries) == ((1, 0) if method == "answer" else (0, 1))
        assert (source.stats.requests, source.backward.requests) == (1, 1)
    assert same(gradient(ask(sources)), expected)


@pytest.mark.filterwarnings("ignore:Teacher")
def test_a_replica_dies_between_forward_and_backward(specs, pooled):
    sources, replicas = pooled
    expected = gradient(ask(inline(specs)))

    def die():
        for own in replicas.values():
            asked = [r for r in own if r.calls]
            assert len(asked) == 1
            asked[0].alive = False

    assert same(gradient(ask(sources), die), expected)
    assert all(s.stats.retries == 0 for s in sources.values())
    assert all(s.backward.requests == 1 for s in sources.values())


@pytest.mark.filterwarnings("ignore:Teacher")
def test_all_replicas_are_gone(pooled):
    sources, replicas = pooled

    def die():
        for replica in replicas["small"]:
            replica.alive = False

    with pytest.raises(LostError, match=r"'small': all of its 2 replicas are gone"):
        gradient(ask(sources), die)


def test_bytes_and_time_of_both_ways_are_counted_apart(pooled):
    sources, _ = pooled
    gradient(ask(sources))
    images = 6 * 3 * 32 * 32 * 4
    signals = {n: sum(v.nbytes for v in own.values()) for n, own in ask(sources)(makers.maker()(makers.noise())).items()}
    for name, source in sources.items():
        assert (source.stats.requests, source.backward.requests) == (2, 1)
        assert (source.stats.bytes_out, source.stats.bytes_in) == (2 * images, 2 * signals[name])
        assert (source.backward.bytes_out, source.backward.bytes_in) == (images + signals[name], images)
        assert source.stats.teacher_s > 0
        assert source.backward.teacher_s > 0


def test_only_who_is_used_is_asked_back(specs):
    sources = local(specs)
    images = makers.maker()(makers.noise())
    answers = through(sources, images, WANTED)
    (grad,) = torch.autograd.grad(answers["big"]["logits"].logsumexp(1).sum(), images, retain_graph=True)
    assert sources["big"].backward.requests == 1
    assert sources["small"].backward.requests == 0
    (again,) = torch.autograd.grad(answers["big"]["logits"].logsumexp(1).sum(), images)
    assert torch.equal(grad, again)


@pytest.mark.parametrize("make", [inline, local])
def test_the_backward_may_run_twice(make, specs):
    images = makers.maker()(makers.noise())
    loss = makers.loss_of(through(make(specs), images, WANTED))
    (first,) = torch.autograd.grad(loss, images, retain_graph=True)
    (again,) = torch.autograd.grad(loss, images)
    assert torch.equal(first, again)


def test_nothing_flows_where_nothing_learns(specs):
    for sources in (inline(specs), local(specs)):
        images = makers.maker()(makers.noise()).detach()
        answers = through(sources, images, WANTED)
        assert not any(v.requires_grad for own in answers.values() for v in own.values())
        with torch.no_grad():
            probe = through(sources, makers.maker()(makers.noise()), {"small": (Signal("logits"),)})
        assert torch.equal(probe["small"]["logits"], answers["small"]["logits"])
        assert list(probe) == ["small"]


@pytest.mark.parametrize("make", [inline, local])
def test_second_derivatives_are_refused(make, specs):
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    loss = through(make(specs), images, WANTED)["small"]["logits"].square().sum()
    (grad,) = torch.autograd.grad(loss, images, create_graph=True)
    with pytest.raises(SignalError, match="expected first derivatives through a teacher, got a second one"):
        grad.square().sum().backward()


def test_teachers_are_left_as_they_were(specs):
    sources = local(specs)
    before = {n: {k: v.clone() for k, v in s.committee.teachers[n].model.state_dict().items()} for n, s in sources.items()}
    gradient(ask(sources))
    for name, source in sources.items():
        model = source.committee.teachers[name].model
        assert not model.training
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert all(torch.equal(v, before[name][k]) for k, v in model.state_dict().items())


def test_float64_against_finite_differences():
    facts = Facts(10, 3, (2, 6, 6), ((0.4, 0.6), (0.3, 0.2)))
    torch.manual_seed(3)
    own = Spec(model="tests.roles.nets:tiny", options={"widths": (2, 2, 2)}, dtype="float64", input_size=(5, 5))
    source = LocalSource(Committee({"t": Teacher(own, facts, CPU, "t")}, 0), asks("t"))
    images = torch.rand(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    wanted = {"t": (Signal("logits"), Signal("gram", "stage2"))}
    assert torch.autograd.gradcheck(lambda x: tuple(through({"t": source}, x, wanted)["t"].values()), images)


def test_a_bfloat16_teacher_answers_in_float32_wherever_it_is(specs):
    half = dataclasses.replace(specs.of["small"], dtype="bfloat16")
    found = []
    for kind in (InlineSource, LocalSource):
        source = kind(Committee({"small": Teacher(half, makers.FACTS, CPU, "small")}, 5), asks("small"))
        images = makers.maker()(makers.noise()).detach().requires_grad_()
        logits = through({"small": source}, images, {"small": (Signal("logits"),)})["small"]["logits"]
        assert logits.dtype == torch.float32
        found.append((logits, torch.autograd.grad(logits.square().sum(), images)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("codec", ["fp16", "int8", "topk:3"])
@pytest.mark.parametrize("kind", [InlineSource, LocalSource])
def test_lossy_codecs_are_refused(kind, codec, specs):
    source = kind(committee(specs, "small"), Asks((Ask("small", (Signal("logits"),), parse(codec)),)))
    with pytest.raises(ConfigError, match=r"teachers\.small\.codec: expected dense .*got " + codec.partition(":")[0]):
        through({"small": source}, torch.rand(2, 3, 32, 32), {"small": (Signal("logits"),)})


def test_what_cannot_answer_is_refused(specs):
    images, logits = torch.rand(2, 3, 32, 32), (Signal("logits"),)
    store = SimpleNamespace(stats=None, window=1, drop=False, request=None, close=None)
    with pytest.raises(ConfigError, match=r"teachers\.t\.placement: expected inline or pool, got a store"):
        through({"t": store}, images, {"t": logits})
    with pytest.raises(SourceError, match="'t': nobody answers"):
        through(local(specs), images, {"t": logits})
    with pytest.raises(ConfigError, match="draw nothing"):
        through(local(specs), images, {"big": (Signal("logits", view="stochastic"),)})
    with pytest.raises(SignalError, match=r"expected floats .*got torch\.uint8"):
        through(local(specs), (images * 255).byte(), {"big": logits})


def test_images_changed_in_place_before_the_backward_are_noticed(specs):
    images = makers.maker()(makers.noise()).detach().requires_grad_()
    loss = makers.loss_of(through(local(specs), images, WANTED))
    with torch.no_grad():
        images.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
