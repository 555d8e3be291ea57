"""Aggregators: logits of several teachers as one teacher's, by name.

A public function here is a value of `Loss.aggregate`. Its first parameter is the list of logits; the others are asked for by
name: `weights` [m] of the teachers, `labels` [b], `generator` keyed by the batch. Teachers that share an actor are aggregated
there, so that one tensor travels; the result is the same anywhere. Where probabilities are combined, they are so at
`temperature`, in the log domain, and the answer softens back to them: softmax(answer / temperature) is the mixture.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.numeric import full

Logits = list[Float[Tensor, "b *p c"]]


def mean_logits(logits: Logits, weights: Float[Tensor, "m"]) -> Float[Tensor, "b *p c"]:
    """The weighted mean of the logits: the normalised geometric mean of the teachers' distributions.

    Example:
        >>> import torch
        >>> mean_logits([torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0, 2.0]])], torch.ones(2))
        tensor([[2., 2.]])
    """
    stacked = torch.stack([full(z) for z in logits])
    return (stacked * _as_factor(weights / weights.sum(), stacked)).sum(0)


def mean_probs(logits: Logits, weights: Float[Tensor, "m"], *, temperature: float = 1.0) -> Float[Tensor, "b *p c"]:
    """The weighted mean of the softened probabilities (Hinton et al., arXiv:1503.02531, section 2; You et al., KDD 2017).

    Example:
        >>> import torch
        >>> mean_probs([torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])], torch.ones(2)).exp()
        tensor([[0.5000, 0.5000]])
    """
    scores = _log_probs(logits, temperature)
    return temperature * _mixed(scores, _as_factor((weights / weights.sum()).log(), scores))


def confidence(logits: Logits, weights: Float[Tensor, "m"], *, temperature: float = 1.0) -> Float[Tensor, "b *p c"]:
    """The mean of the softened probabilities, each sample's weights in proportion to each teacher's largest probability."""
    scores = _log_probs(logits, temperature)
    trust = _log_probs(logits, 1.0).amax(-1, keepdim=True) + _as_factor(weights.log(), scores)
    return temperature * _mixed(scores, trust.log_softmax(0))


def entropy(logits: Logits, weights: Float[Tensor, "m"], *, temperature: float = 1.0) -> Float[Tensor, "b *p c"]:
    """The mean of the softened probabilities, each sample's weights in proportion to exp(-entropy of each teacher), nats."""
    scores, plain = _log_probs(logits, temperature), _log_probs(logits, 1.0)
    certainty = (plain.exp() * plain).sum(-1, keepdim=True) + _as_factor(weights.log(), scores)
    return temperature * _mixed(scores, certainty.log_softmax(0))


def label(
    logits: Logits, weights: Float[Tensor, "m"], labels: Int[Tensor, "b"], *, temperature: float = 1.0
) -> Float[Tensor, "b c"]:
    """The mean of the softened probabilities, each sample's weights in proportion to what each teacher gives the true class."""
    scores, plain = _log_probs(logits, temperature), _log_probs(logits, 1.0)
    agreement = plain.gather(-1, labels.expand(len(plain), -1)[..., None]) + _as_factor(weights.log(), scores)
    return temperature * _mixed(scores, agreement.log_softmax(0))


def random(logits: Logits, weights: Float[Tensor, "m"], generator: torch.Generator) -> Float[Tensor, "b *p c"]:
    """One teacher, drawn for the whole batch in proportion to the weights (Fukuda et al., Interspeech 2017, "switching")."""
    chosen = torch.multinomial(weights.double(), 1, generator=generator)
    return full(logits[int(chosen)])


def aggregators() -> dict[str, Callable[..., Tensor]]:
    """Every aggregator by name: the public functions of this file whose first parameter is `logits`."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    own = {name: fn for name, fn in functions if fn.__module__ == __name__ and not name.startswith("_")}
    return {name: fn for name, fn in own.items() if next(iter(inspect.signature(fn).parameters), "") == "logits"}


def needs(how: str) -> tuple[str, ...]:
    """What an aggregator asks for beside the logits: among weights, labels, generator, temperature."""
    return tuple(inspect.signature(aggregators()[how]).parameters)[1:]


def aggregate(how: str, logits: Logits, given: dict[str, Any]) -> Tensor:
    """Calls an aggregator with what it asks for out of `given`."""
    return aggregators()[how](logits, **{name: given[name] for name in needs(how)}).contiguous()


def _log_probs(logits: Logits, temperature: float) -> Float[Tensor, "m b *p c"]:
    return F.log_softmax(torch.stack([full(z) for z in logits]) / temperature, dim=-1)


def _mixed(scores: Float[Tensor, "m b *p c"], log_weights: Float[Tensor, "m *q"]) -> Float[Tensor, "b *p c"]:
    return torch.logsumexp(scores + log_weights, dim=0)


def _as_factor(values: Float[Tensor, "m"], like: Tensor) -> Tensor:
    """[m] with axes of length one up to those of `like`, in its type."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
