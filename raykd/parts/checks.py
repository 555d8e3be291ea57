"""Shape checks of the losses: a wrong shape is an error, never a broadcast."""

from __future__ import annotations

from collections.abc import Sequence, Sized

from torch import Tensor

from raykd.errors import ConfigError, SignalError, near


def check_axes(where: str, **signals: tuple[Tensor, str]) -> None:
    """Checks each signal against its axes; a letter has one length throughout the call.

    Args:
        where: Slug of the loss, for the message.
        signals: `name=(tensor, axes)`. Axes are letters parted by spaces, `b b` is a square; one axis may be starred
            (`b *p c`) and stands for any number of axes.

    Raises:
        SignalError: A tensor has another number of axes, or a letter has two lengths.

    Example:
        >>> import torch
        >>> check_axes("kd", student_logits=(torch.zeros(2, 3), "b c"), teacher_logits=(torch.zeros(2, 3), "b c"))
        >>> check_axes("kd", student_logits=(torch.zeros(2, 3), "b c"), teacher_logits=(torch.zeros(2, 1), "b c"))
        Traceback (most recent call last):
        raykd.errors.SignalError: teacher_logits: expected [b=2 c=3], got [2, 1] (kd). Check the layers, classes ...
    """
    known: dict[str, tuple[int, ...]] = {}
    for name, (tensor, axes) in signals.items():
        lengths = _lengths(tuple(tensor.shape), axes.split())
        if lengths is None or any(known.setdefault(letter, length) != length for letter, length in lengths):
            wanted = " ".join(_shown(letter, known) for letter in axes.split())
            raise SignalError(
                f"{name}: expected [{wanted}], got {list(tensor.shape)} ({where}). "
                "Check the layers, classes and batch of both roles."
            )


def same_length(where: str, **lists: Sized) -> None:
    """Checks that lists over layers or models are not empty and have one length.

    Raises:
        SignalError: A list is empty or longer than another.
    """
    counts = {name: len(entries) for name, entries in lists.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        got = ", ".join(f"{name} with {count}" for name, count in counts.items())
        raise SignalError(f"layers: expected one list length, at least 1, got {got} ({where}). Name as many per role.")


def check_choice(where: str, *, known: Sequence[str], **option: str) -> None:
    """Checks that an option is one of the known words.

    Raises:
        ConfigError: It is not.
    """
    for name, value in option.items():
        if value not in known:
            raise ConfigError(
                f"{name}: expected {' or '.join(map(repr, known))}, got {value!r} ({where}). {near(str(value), known)}"
            )


def _lengths(shape: tuple[int, ...], axes: list[str]) -> list[tuple[str, tuple[int, ...]]] | None:
    """(letter, lengths) pairs of a shape, or None where the number of axes does not fit."""
    starred = [i for i, letter in enumerate(axes) if letter.startswith("*")]
    if not starred:
        return [(letter, (length,)) for letter, length in zip(axes, shape)] if len(axes) == len(shape) else None
    if len(shape) < len(axes) - 1:
        return None
    first = starred[0]
    after = len(shape) - (len(axes) - first - 1)
    spans = [shape[i : i + 1] for i in range(first)] + [shape[first:after]]
    return list(zip(axes, spans + [shape[i : i + 1] for i in range(after, len(shape))]))


def _shown(letter: str, known: dict[str, tuple[int, ...]]) -> str:
    return f"{letter}={'x'.join(map(str, known[letter]))}" if known.get(letter) else letter
