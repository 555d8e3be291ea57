"""Sources without Ray: what a pickled request gives is, bit for bit, what the teacher next door gives."""

import pickle

import numpy as np
import pytest
import torch

from raykd.config import Teacher as TeacherSpec
from raykd.errors import SourceError
from raykd.exchange.asking import Ask, Asks
from raykd.exchange.codec import Encoded, Reply, encode, parse
from raykd.exchange.sources import InlineSource, LocalSource, Stats, to_send
from raykd.roles.hearing import combine
from raykd.roles.network import Facts
from raykd.roles.teacher import Committee, Teacher, check_finite
from raykd.signals import Aggregate, Signal

CPU = torch.device("cpu")
FACTS = Facts(100, 10, (3, 16, 16), "cifar10")
SIGNALS = (
    Signal("logits"),
    Signal("embedding"),
    Signal("feature", "stage2"),
    Signal("attention", "stage1", (("power", 2.0),)),
    Signal("gram", "stage3"),
)


NAMES = ("big", "wide")


def committee(restore=None, names=("big",)):
    """Teachers of one process, always with the same weights."""
    torch.manual_seed(0)
    return Committee({n: Teacher(TeacherSpec(model="tests.roles.nets:tiny"), FACTS, CPU, n) for n in names}, 5, restore)


def asks(codec="dense", signals=SIGNALS):
    return Asks((Ask("big", signals, parse(codec)),))


def teacher(codec="dense", restore=None):
    """What sources are made of: a committee of one, and what it is asked for."""
    return committee(restore), asks(codec)


def fields(seed=0, count=6):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 16, 16), generator=rng, dtype=torch.uint8)
    index = torch.arange(count)
    return {"images": images, "sample_index": index, "augmentation_seed": index.int(), "labels": index % 3}


@pytest.mark.parametrize("codec", ["dense", "fp16", "int8", "topk:3"])
def test_local_equals_inline(codec):
    inline, local = InlineSource(*teacher(codec)), LocalSource(*teacher(codec))
    for seed in (0, 1):
        one, other = (s.request(fields(seed)).result()["big"] for s in (inline, local))
        assert set(one) == {s.key for s in SIGNALS} == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert all(other[key].is_contiguous() and not other[key].requires_grad for key in other)
    assert inline.stats.errors == local.stats.errors
    assert inline.stats.bytes_in == local.stats.bytes_in


def test_dense_signals_are_those_of_the_model():
    role = committee()
    given = fields()
    found = InlineSource(role, asks()).request(given).result()["big"]
    tapped = role.teachers["big"].tapped
    model = tapped.model
    x = tapped.inputs(given["images"])
    logits = model(x)
    stage1 = model.stage1(x)
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=0)
    torch.testing.assert_close(found["attention@stage1(power=2.0)"], (stage1**2).mean(1))
    rows = model.stage3(model.stage2(stage1)).flatten(1)
    torch.testing.assert_close(found["gram@stage3"], rows @ rows.T)


def test_recipes_travel_instead_of_pixels():
    given = fields()
    seen = []

    def restore(recipe):
        seen.append(recipe)
        return {"images": given["images"][recipe["sample_index"]]}

    local = LocalSource(*teacher(restore=restore), inputs="recipe")
    found = local.request(given).result()["big"]
    pixels = LocalSource(*teacher())
    assert all(torch.equal(found[key], value) for key, value in pixels.request(given).result()["big"].items())
    assert set(seen[0]) == {"sample_index", "augmentation_seed"}
    assert sum(a.nbytes for a in seen[0].values()) == 12 * 6
    assert local.stats.bytes_out < pixels.stats.bytes_out


def test_a_recipe_needs_a_data_set():
    with pytest.raises(SourceError, match=r"no data set\. Set inputs='pixels'"):
        LocalSource(*teacher(), inputs="recipe").request(fields())


def test_only_what_is_needed_is_sent():
    assert set(to_send(fields(), "pixels")) == {"images"}
    assert set(to_send(fields(), "recipe")) == {"sample_index", "augmentation_seed"}


def test_the_request_is_a_copy():
    class Spoiler:
        def answer(self, sent, _):
            sent["images"][:] = 0
            return Reply({"big": encode({"logits": torch.zeros(6, 2)}, parse("dense"))})

    given = fields()
    kept = given["images"].clone()
    LocalSource(Spoiler(), asks()).request(given)
    assert torch.equal(given["images"], kept)


def test_several_in_flight_are_answered_as_asked():
    source = LocalSource(*teacher())
    pending = [source.request(fields(seed)) for seed in (0, 1, 2)]
    for seed, one in enumerate(pending):
        alone = InlineSource(*teacher()).request(fields(seed)).result()
        assert torch.equal(one.result()["big"]["logits"], alone["big"]["logits"])


def test_stats_add_up():
    stats = Stats()
    parts = {"logits": {"dense": np.zeros((2, 3), np.float32)}}
    stats.count(Reply({"a": Encoded(parts, {"topk_tv": 0.25})}, seconds=1.0))
    stats.count(Reply({"a": Encoded(parts, {"topk_tv": 0.125, "topk_kl": 0.5})}, seconds=2.0))
    assert (stats.bytes_in, stats.teacher_s) == (48, 3.0)
    assert stats.errors == {"topk_tv": 0.25, "topk_kl": 0.5}
    source = LocalSource(*teacher("topk:3"))
    source.request(fields())
    assert source.stats.requests == 1
    assert source.stats.errors["topk_tv"] > 0
    assert source.stats.bytes_out == len(pickle.dumps(to_send(fields(), "pixels")))


def test_the_teacher_is_frozen_and_does_not_change():
    role = committee()
    model = role.teachers["big"].tapped.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = (role.answer(fields(), asks()).teachers["big"].signals["logits"]["dense"] for _ in range(2))
    assert np.array_equal(first, again)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_teacher_that_is_not_finite_is_named():
    with pytest.raises(
        SourceError, match=r"Teacher 'big', signal feature@s: expected finite values, got 2 of 6 NaN or infinite"
    ):
        check_finite("big", {"logits": torch.zeros(2), "feature@s": torch.tensor([[0, 1, torch.nan], [1, 2, torch.inf]])})
    check_finite("big", {"logits": torch.zeros(2)})


@pytest.mark.parametrize("how", ["mean_probs", "label", "random", "entropy"])
@pytest.mark.parametrize("inputs", ["pixels", "recipe"])
def test_teachers_of_one_actor_send_their_aggregate_alone(how, inputs):
    given = fields()
    wanted = Aggregate(how, NAMES, (1.0, 3.0), 4.0)
    role = committee(lambda recipe: given, NAMES)
    of = tuple(Ask(name, (), parse("dense")) for name in NAMES)
    there = LocalSource(role, Asks(of, (wanted,)), inputs)
    found = there.request(given).result()
    assert {name: set(signals) for name, signals in found.items()} == {wanted.key: {"logits"}}
    each = (
        InlineSource(role, Asks(tuple(Ask(name, (Signal("logits"),), parse("dense")) for name in NAMES)))
        .request(given)
        .result()
    )
    here = combine(wanted, [each[name]["logits"] for name in NAMES], given, 5)
    assert torch.equal(found[wanted.key]["logits"], here)
    assert there.stats.bytes_in == 6 * 10 * 4
    beside = {"pixels": {"images", *there.asks.fields}, "recipe": {"sample_index", "augmentation_seed"}}
    assert set(to_send(given, inputs, there.asks.fields)) == beside[inputs]


def test_a_signal_asked_for_later_is_tapped_from_then_on():
    role = committee()
    few, more = asks(signals=(Signal("logits"),)), asks()
    first = role.answer(fields(), few).decoded()["big"]
    later = role.answer(fields(), more).decoded()["big"]
    again = role.answer(fields(), few).decoded()["big"]
    assert set(first) == set(again) == {"logits"}
    assert set(later) == {s.key for s in SIGNALS}
    assert torch.equal(first["logits"], later["logits"])
    assert torch.equal(first["logits"], again["logits"])
