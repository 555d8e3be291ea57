import pickle

import pytest
import torch

from raykd.errors import ConfigError, SignalError
from raykd.parts.checks import check_axes, check_choice, same_length


def fits(*pairs):
    try:
        check_axes("x", **{f"s{i}": (torch.zeros(shape), axes) for i, (shape, axes) in enumerate(pairs)})
    except SignalError:
        return False
    return True


@pytest.mark.parametrize(
    "expected, pairs",
    [
        (True, [((2, 3), "b c"), ((2, 3), "b c"), ((2,), "b")]),
        (False, [((2, 3), "b c"), ((2, 1), "b c")]),
        (False, [((2, 3), "b c"), ((1, 3), "b c")]),
        (False, [((2, 3), "b c"), ((3,), "b")]),
        (False, [((2, 3, 1), "b c")]),
        (False, [((2,), "b c")]),
        (True, [((2, 2), "b b")]),
        (False, [((2, 3), "b b")]),
        (True, [((), "")]),
        (False, [((1,), "")]),
        (True, [((2, 3), "b *p c"), ((2, 3), "b *p c")]),
        (True, [((2, 5, 6, 3), "b *p c"), ((2, 5, 6, 3), "b *p c")]),
        (False, [((2, 5, 6, 3), "b *p c"), ((2, 5, 1, 3), "b *p c")]),
        (False, [((2, 5, 3), "b *p c"), ((2, 3), "b *p c")]),
        (False, [((2,), "b *p c")]),
        (True, [((2,), "b *p")]),
        (True, [((4, 2), "*p c"), ((2,), "c")]),
    ],
)
def test_axes(expected, pairs):
    assert fits(*pairs) is expected


def test_messages_name_both_sides_and_survive_pickle():
    with pytest.raises(SignalError, match=r"t: expected \[b=2 \*p c=3\], got \[4, 3\] \(kd\)\. Check") as caught:
        check_axes("kd", s=(torch.zeros(2, 3), "b *p c"), t=(torch.zeros(4, 3), "b *p c"))
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), SignalError)


def test_lists():
    same_length("at", s=[1, 2], t=[3, 4])
    for lists in ({"s": [1], "t": [1, 2]}, {"s": [], "t": []}):
        with pytest.raises(SignalError, match="list length"):
            same_length("at", **lists)


def test_choice():
    check_choice("at", mode="code", known=("code", "paper"))
    with pytest.raises(ConfigError, match="Did you mean 'paper'"):
        check_choice("at", mode="papr", known=("code", "paper"))
