"""What two sides of a game minimise: a critic that tells real from fake, and what wants to pass for real."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_choice
from raykd.parts.numeric import full

FORMS = ("saturating", "non_saturating", "least_squares")
"""Forms of a game. With D = sigmoid(score), 1 for real, the first two share their critic."""


def passing(score: Float[Tensor, "b"], form: str) -> Float[Tensor, "b"]:
    """What one who wants to pass for real minimises.

    saturating: log(1 - D); non_saturating: -log D; least_squares: (1 - score)^2

    Args:
        score: What the critic says of him.
        form: One of FORMS.

    Returns:
        Per sample, in nats or without unit; the saturating form is below 0.

    Raises:
        ConfigError: No such form.
    """
    check_choice("adversarial", gan=form, known=FORMS)
    score = full(score)
    if form == "least_squares":
        return (1 - score).square()
    return -F.softplus(score) if form == "saturating" else F.softplus(-score)


def telling_apart(real: Float[Tensor, "b"], fake: Float[Tensor, "b"], form: str) -> Float[Tensor, "b"]:
    """What the critic minimises.

    saturating, non_saturating: -log D(real) - log(1 - D(fake)); least_squares: (1 - real)^2 + fake^2

    Args:
        real: Its scores of real samples.
        fake: Of as many fake ones.
        form: One of FORMS.

    Returns:
        Per pair, in nats or without unit.

    Raises:
        ConfigError: No such form.
    """
    check_choice("adversarial", gan=form, known=FORMS)
    if form == "least_squares":
        return (1 - full(real)).square() + full(fake).square()
    return F.softplus(-full(real)) + F.softplus(full(fake))
