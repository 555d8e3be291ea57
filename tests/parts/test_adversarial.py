"""Both sides of a game against the closed forms of their probabilities."""

import math

import pytest
import torch

from raykd.errors import ConfigError
from raykd.parts.adversarial import FORMS, passing, telling_apart


def said(probability):
    return torch.tensor([math.log(probability / (1 - probability))], dtype=torch.float64)


@pytest.mark.parametrize("form", ["saturating", "non_saturating"])
def test_of_probabilities(form):
    wanted = {"saturating": math.log(0.75), "non_saturating": -math.log(0.25)}[form]
    assert passing(said(0.25), form).item() == pytest.approx(wanted)
    assert telling_apart(said(0.9), said(0.25), form).item() == pytest.approx(-math.log(0.9) - math.log(0.75))


def test_of_squares():
    assert passing(torch.tensor([-1.0]), "least_squares").tolist() == [4.0]
    assert telling_apart(torch.tensor([3.0]), torch.tensor([-1.0]), "least_squares").tolist() == [5.0]


@pytest.mark.parametrize("form", FORMS)
def test_the_sides_pull_apart(form):
    score = torch.tensor([0.3], requires_grad=True)
    (pass_,) = torch.autograd.grad(passing(score, form).sum(), score)
    (tell,) = torch.autograd.grad(telling_apart(score.detach(), score, form).sum(), score)
    assert pass_.item() < 0 < tell.item()


def test_an_unknown_form():
    with pytest.raises(ConfigError, match="least_squares"):
        passing(torch.zeros(1), "squares")
    with pytest.raises(ConfigError, match="least_squares"):
        telling_apart(torch.zeros(1), torch.zeros(1), "squares")
