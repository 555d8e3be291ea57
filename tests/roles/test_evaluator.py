"""Top-1 and top-5 against NumPy."""

import numpy as np
import pytest
import torch

from raykd.roles.evaluator import Accuracy, evaluate


def counted(scores, labels, k):
    """Share of rows whose label is among the k largest, by explicit sorting."""
    return sum(int(y) in np.argsort(-row)[:k] for row, y in zip(scores, labels)) / len(labels)


@pytest.mark.parametrize("classes", [2, 5, 6, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_numpy(classes, dtype):
    rng = np.random.default_rng(classes)
    scores = np.stack([rng.permutation(classes) for _ in range(53)]).astype(np.float32)  # no ties
    labels = rng.integers(0, classes, 53)
    batches = [
        {"images": torch.from_numpy(scores[i : i + 10]).to(dtype), "labels": torch.from_numpy(labels[i : i + 10])}
        for i in range(0, 53, 10)
    ]
    found = evaluate(lambda images: images.requires_grad_(True) * 1, batches)
    assert found.count == 53
    assert found.top1 == pytest.approx(counted(scores, labels, 1))
    assert found.top5 == (pytest.approx(counted(scores, labels, 5)) if classes > 5 else None)


def test_nothing_to_measure():
    assert evaluate(lambda images: images, []) == Accuracy(0.0, None, 0)


def test_it_prints_percent():
    assert str(Accuracy(0.5, 0.75, 8)) == "50.00 %, top-5 75.00 % (8 images)"
    assert str(Accuracy(0.125, None, 8)) == "12.50 % (8 images)"
