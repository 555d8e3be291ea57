import doctest
import inspect
import math

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped

from raykd.parts import checks, derived
from raykd.parts.derived import attention, derived_signals, gram, similarity


def test_names_parents_and_coupling():
    found = derived_signals()
    assert set(found) == {"attention", "gram", "similarity"}
    assert {n: next(iter(inspect.signature(f).parameters)) for n, f in found.items()} == {
        "attention": "feature",
        "gram": "feature",
        "similarity": "embedding",
    }
    assert {n for n, f in found.items() if getattr(f, "per_batch", False)} == {"gram", "similarity"}


@pytest.mark.parametrize("power", [1, 2, 4])
def test_attention(power):
    feature = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    expected = np.zeros((2, 4, 5))
    for i in range(2):
        for y in range(4):
            for x in range(5):
                expected[i, y, x] = sum(abs(feature[i, c, y, x]) ** power for c in range(3)) / 3
    found = jaxtyped(typechecker=beartype)(attention)(torch.from_numpy(feature), power=float(power))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_gram_and_similarity():
    feature = np.random.default_rng(0).normal(size=(3, 2, 2, 2))
    flat = feature.reshape(3, -1)
    products = [[sum(a * b for a, b in zip(x, y)) for y in flat] for x in flat]
    cosines = [[products[i][j] / math.sqrt(products[i][i] * products[j][j]) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(jaxtyped(typechecker=beartype)(gram)(torch.from_numpy(feature)), products, rtol=1e-12)
    found = jaxtyped(typechecker=beartype)(similarity)(torch.from_numpy(flat))
    np.testing.assert_allclose(found, cosines, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(derived_signals()))
def test_half_precision_and_gradient(name):
    fn = derived_signals()[name]
    shape = (2, 3, 2, 2) if next(iter(inspect.signature(fn).parameters)) == "feature" else (2, 3)
    large = torch.full(shape, 1e4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert fn(large.to(dtype)).dtype is torch.float32
        assert fn(large.to(dtype)).isfinite().all()
    assert torch.autograd.gradcheck(fn, torch.randn(shape, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("module", [derived, checks])
def test_doctests(module):
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed
