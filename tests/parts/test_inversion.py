"""Terms of what a network remembers, in closed form."""

import doctest
import math

import pytest
import torch

from raykd.errors import SignalError
from raykd.parts import inversion
from raykd.parts.inversion import softened, statistics_gap, where_they_agree


def test_examples():
    assert doctest.testmod(inversion).failed == 0


def test_statistics_that_are_known_have_no_gap_and_no_gradient():
    kept = torch.rand(2, 3)
    norm = torch.cat([kept, kept]).requires_grad_()
    gap = statistics_gap("cmi", [norm])
    gap.backward()
    assert gap == 0
    assert torch.equal(norm.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (4,), (1, 4, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(SignalError, match=r"teacher_norms\[1\]: expected .* \(cmi\)"):
        statistics_gap("cmi", [torch.zeros(4, 7), torch.zeros(shape)])


def test_where_they_differ_nothing_is_heard():
    student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    found = where_they_agree(student, torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
    found.sum().backward()
    assert found[0] == 0
    assert found[1] > 0
    assert torch.equal(student.grad[0], torch.zeros(2))


def test_softened_is_per_sample_and_scaled():
    teacher = torch.tensor([[5 * math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = softened("cmi", torch.zeros(2, 2, dtype=torch.float64), teacher, 5.0)
    expected = 25 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    torch.testing.assert_close(found, torch.tensor([expected, 0.0], dtype=torch.float64))
