"""Aggregators against NumPy float64, with explicit loops, and in closed form."""

import doctest

import numpy as np
import pytest
import torch

from raykd.parts import aggregators
from raykd.parts.aggregators import aggregate

WEIGHTS = [1.0, 3.0, 2.0]
PER_SAMPLE = ("confidence", "entropy", "label")


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def draw(seed=0, teachers=3, batch=4, classes=5):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, classes)) * 3 for _ in range(teachers)], rng.integers(classes, size=batch)


def call(how, logits, labels=None, temperature=1.0, weights=WEIGHTS):
    given = {"weights": torch.tensor(weights, dtype=torch.float64), "temperature": temperature}
    given |= {"labels": torch.from_numpy(labels)} if labels is not None else {}
    given |= {"generator": torch.Generator().manual_seed(0)}
    return aggregate(how, [torch.from_numpy(z) for z in logits], given)


def trust(how, z, y):
    p = softmax(z)
    return {"confidence": p.max(), "entropy": np.exp((p * np.log(p)).sum()), "label": p[y], "mean_probs": 1.0}[how]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("how", ["mean_probs", *PER_SAMPLE])
def test_the_answer_softens_to_the_mixture(how, temperature):
    logits, labels = draw()
    found = call(how, logits, labels, temperature)
    for i, y in enumerate(labels):
        shares = np.array([w * trust(how, z[i], y) for w, z in zip(WEIGHTS, logits)])
        mixture = sum(s * softmax(z[i] / temperature) for s, z in zip(shares / shares.sum(), logits))
        np.testing.assert_allclose(softmax(found[i].numpy() / temperature), mixture, rtol=1e-12, atol=1e-14)


def test_mean_of_logits():
    logits, _ = draw()
    wanted = sum(w * z for w, z in zip(WEIGHTS, logits)) / 6
    np.testing.assert_allclose(call("mean_logits", logits).numpy(), wanted, rtol=1e-13)


def test_random_is_one_teacher_for_the_whole_batch_in_proportion_to_the_weights():
    logits, _ = draw()
    counts = np.zeros(3)
    generator = torch.Generator().manual_seed(3)
    given = {"weights": torch.tensor(WEIGHTS), "generator": generator}
    for _ in range(1200):
        found = aggregate("random", [torch.from_numpy(z) for z in logits], given).numpy()
        (chosen,) = [i for i, z in enumerate(logits) if np.array_equal(z, found)]
        counts[chosen] += 1
    np.testing.assert_allclose(counts / 1200, np.array(WEIGHTS) / 6, atol=0.05)


@pytest.mark.parametrize("how", sorted(aggregators.aggregators()))
def test_one_teacher_is_itself(how):
    logits, labels = draw(teachers=1)
    found = call(how, logits, labels, 2.0, [0.5]).numpy()
    for z, own in zip(found, logits[0]):
        np.testing.assert_allclose(softmax(z / 2), softmax(own / 2), rtol=1e-12)


@pytest.mark.parametrize("how", sorted(aggregators.aggregators()))
def test_finite_at_large_logits_and_in_half_precision(how):
    given = {"weights": torch.tensor([1.0, 1.0]), "temperature": 1.0, "labels": torch.tensor([1, 0])}
    given["generator"] = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        far = [torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=dtype), torch.tensor([[-1e4, 1e4], [5.0, 1.0]], dtype=dtype)]
        found = aggregate(how, far, given)
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()


def test_a_sure_teacher_outweighs_an_unsure_one():
    sure, unsure = np.array([[8.0, 0.0, 0.0]]), np.zeros((1, 3))
    even = softmax(call("mean_probs", [sure, unsure], weights=[1.0, 1.0])[0].numpy())[0]
    for how in PER_SAMPLE:
        assert softmax(call(how, [sure, unsure], np.array([0]), weights=[1.0, 1.0])[0].numpy())[0] > even
    wrong = softmax(call("label", [sure, unsure], np.array([1]), weights=[1.0, 1.0])[0].numpy())[0]
    assert wrong < 0.35, "the label takes the word from a teacher that is sure and wrong"


def test_examples():
    assert doctest.testmod(aggregators).failed == 0
