import doctest

import pytest
import torch

from raykd.errors import ConfigError
from raykd.parts import shares as module
from raykd.parts.shares import shares


def test_shares_add_up_to_one():
    assert shares("mt-you", (), 4).tolist() == [0.25] * 4
    assert shares("mt-you", [3, 1], 2).tolist() == [0.75, 0.25]
    assert shares("mt-you", (0.0, 2.0), 2).tolist() == [0.0, 1.0]
    assert shares("mt-you", (), 3).dtype is torch.float64


@pytest.mark.parametrize("given", [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, 1.0, 1.0)])
def test_weights_that_do_not_fit_the_teachers(given):
    with pytest.raises(ConfigError, match=r"teacher_weights: expected 2 numbers .* \(mt-fukuda\)"):
        shares("mt-fukuda", given, 2)


def test_example():
    result = doctest.testmod(module)
    assert result.attempted == 1
    assert result.failed == 0
