import doctest
import math

import pytest
import torch

from raykd.errors import ConfigError, SignalError
from raykd.parts import branches
from raykd.parts.branches import check_branches, cross_entropies, mean_logits, sigmoid_ramp


def test_doctests():
    result = doctest.testmod(branches, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0


def test_the_ramp_is_the_papers_at_its_ends_and_half_way():
    assert [sigmoid_ramp(e, 80) for e in (0, 40, 80, 500)] == [math.exp(-5), math.exp(-1.25), 1.0, 1.0]
    assert sigmoid_ramp(0, 0) == 1.0
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        sigmoid_ramp(0, -1)


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 4)], [(2, 3), (1, 3)], [(2, 3), (2, 3, 1)], []])
def test_branches_that_do_not_fit_are_named(shapes):
    with pytest.raises(SignalError, match=r"student_logits_branches.*\(one\)"):
        check_branches("one", [torch.zeros(shape) for shape in shapes])


def test_what_stands_beside_the_branches_is_checked_with_them():
    check_branches("one", [torch.zeros(2, 3)] * 2, labels=(torch.zeros(2), "b"))
    with pytest.raises(SignalError, match=r"labels: expected \[b=2\], got \[3\] \(one\)"):
        check_branches("one", [torch.zeros(2, 3)] * 2, labels=(torch.zeros(3), "b"))


def test_half_precision_is_widened():
    logits = [torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16), torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)]
    assert mean_logits(logits).tolist() == [[0.5, 0.5]]
    found = cross_entropies(logits, torch.tensor([0]))
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, torch.tensor([2 * math.log(1 + math.e) - 1]))
