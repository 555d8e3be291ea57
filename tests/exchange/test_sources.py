"""Sources without Ray: what a pickled request gives is, bit for bit, what the teacher next door gives."""

import pickle

import numpy as np
import pytest
import torch

from raykd.config import Teacher as TeacherSpec
from raykd.errors import SourceError
from raykd.exchange.codec import Reply, encode, parse
from raykd.exchange.sources import InlineSource, LocalSource, Stats, to_send
from raykd.roles.network import Facts
from raykd.roles.teacher import Teacher, check_finite
from raykd.signals import Signal

FACTS = Facts(100, 10, (3, 16, 16), "cifar10")
SIGNALS = (
    Signal("logits"),
    Signal("embedding"),
    Signal("feature", "stage2"),
    Signal("attention", "stage1", (("power", 2.0),)),
    Signal("gram", "stage3"),
)


def teacher(codec="dense", restore=None):
    torch.manual_seed(0)
    return Teacher(TeacherSpec(model="tests.roles.nets:tiny"), SIGNALS, FACTS, parse(codec), torch.device("cpu"), restore)


def fields(seed=0, count=6):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 16, 16), generator=rng, dtype=torch.uint8)
    index = torch.arange(count)
    return {"images": images, "sample_index": index, "augmentation_seed": index.int(), "labels": index % 3}


@pytest.mark.parametrize("codec", ["dense", "fp16", "int8", "topk:3"])
def test_local_equals_inline(codec):
    inline, local = InlineSource(teacher(codec)), LocalSource(teacher(codec))
    for seed in (0, 1):
        one, other = inline.request(fields(seed)).result(), local.request(fields(seed)).result()
        assert set(one) == {s.key for s in SIGNALS} == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert all(other[key].is_contiguous() and not other[key].requires_grad for key in other)
    assert inline.stats.errors == local.stats.errors
    assert inline.stats.bytes_in == local.stats.bytes_in


def test_dense_signals_are_those_of_the_model():
    role = teacher()
    given = fields()
    found = InlineSource(role).request(given).result()
    model = role.tapped.model
    x = role.tapped.inputs(given["images"])
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
        return given["images"][torch.from_numpy(recipe["sample_index"].copy())]

    local = LocalSource(teacher(restore=restore), inputs="recipe")
    found = local.request(given).result()
    pixels = LocalSource(teacher())
    assert all(torch.equal(found[key], value) for key, value in pixels.request(given).result().items())
    assert set(seen[0]) == {"sample_index", "augmentation_seed"}
    assert sum(a.nbytes for a in seen[0].values()) == 12 * 6
    assert local.stats.bytes_out < pixels.stats.bytes_out


def test_a_recipe_needs_a_data_set():
    with pytest.raises(SourceError, match=r"no data set\. Set inputs='pixels'"):
        LocalSource(teacher(), inputs="recipe").request(fields())


def test_only_what_is_needed_is_sent():
    assert set(to_send(fields(), "pixels")) == {"images"}
    assert set(to_send(fields(), "recipe")) == {"sample_index", "augmentation_seed"}


def test_the_request_is_a_copy():
    class Spoiler:
        def answer(self, sent):
            sent["images"][:] = 0
            return encode({"logits": torch.zeros(6, 2)}, parse("dense"))

    given = fields()
    kept = given["images"].clone()
    LocalSource(Spoiler()).request(given)
    assert torch.equal(given["images"], kept)


def test_several_in_flight_are_answered_as_asked():
    source = LocalSource(teacher())
    pending = [source.request(fields(seed)) for seed in (0, 1, 2)]
    for seed, one in enumerate(pending):
        alone = InlineSource(teacher()).request(fields(seed)).result()
        assert torch.equal(one.result()["logits"], alone["logits"])


def test_stats_add_up():
    stats = Stats()
    stats.count(Reply({"logits": {"dense": np.zeros((2, 3), np.float32)}}, {"topk_tv": 0.25}, seconds=1.0))
    stats.count(Reply({"logits": {"dense": np.zeros((2, 3), np.float32)}}, {"topk_tv": 0.125, "topk_kl": 0.5}, seconds=2.0))
    assert (stats.bytes_in, stats.teacher_s) == (48, 3.0)
    assert stats.errors == {"topk_tv": 0.25, "topk_kl": 0.5}
    source = LocalSource(teacher("topk:3"))
    source.request(fields())
    assert source.stats.requests == 1
    assert source.stats.errors["topk_tv"] > 0
    assert source.stats.bytes_out == len(pickle.dumps(to_send(fields(), "pixels")))


def test_the_teacher_is_frozen_and_does_not_change():
    role = teacher()
    model = role.tapped.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = (role.answer(fields()).signals["logits"]["dense"] for _ in range(2))
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
