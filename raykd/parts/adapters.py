"""Connectors: small trainable modules that bring a student's signal to the teacher's shape."""

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.parts.checks import check_choice
from raykd.parts.numeric import full

Shape = tuple[int, ...]
"""Shape of a signal without its batch axis, as a Module receives it."""


def hint_convolution(student: Shape, teacher: Shape) -> nn.Module:
    """A convolution from the student's feature shape [c h w] to the teacher's.

    Twice the teacher's size: 3x3 of stride 2. Half of it: transposed 4x4 of stride 2. Otherwise larger or equal: a valid
    convolution of kernel 1 + difference.

    Raises:
        SignalError: The student's map is smaller than the teacher's and not half its size.
    """
    (cs, hs, ws), (ct, ht, wt) = student, teacher
    if (hs, ws) == (2 * ht, 2 * wt):
        return nn.Conv2d(cs, ct, 3, stride=2, padding=1)
    if (2 * hs, 2 * ws) == (ht, wt):
        return nn.ConvTranspose2d(cs, ct, 4, stride=2, padding=1)
    if hs >= ht and ws >= wt:
        return nn.Conv2d(cs, ct, (1 + hs - ht, 1 + ws - wt))
    raise SignalError(
        f"student_feature: expected a map of at least {ht}x{wt} or of half that, got {hs}x{ws} (hint regressor). "
        "Choose an earlier student layer or a later teacher layer."
    )


def pointwise(inputs: int, *outputs: int) -> nn.Sequential:
    """1x1 convolutions without bias, a ReLU between every two."""
    layers: list[nn.Module] = []
    for width, wider in zip((inputs, *outputs), outputs):
        layers += [nn.Conv2d(width, wider, 1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def hint_regressor(student: Shape, teacher: Shape, kind: str) -> nn.Sequential:
    """`conv`: the convolution of hint_convolution; `conv_bn_relu`: with batch normalisation and ReLU after it."""
    check_choice("hint regressor", regressor=kind, known=("conv_bn_relu", "conv"))
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=hint_convolution(student, teacher))
    if kind == "conv_bn_relu":
        layers.update(norm=nn.BatchNorm2d(teacher[0]), relu=nn.ReLU())
    return nn.Sequential(layers)


class LinearEmbed(nn.Module):
    """A linear layer onto the unit sphere."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return F.normalize(full(self.linear(full(embedding))), dim=1)
