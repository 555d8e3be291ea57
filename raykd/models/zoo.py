"""Our own architectures: name to builder. `wrn_<depth>_<width>` is open; the rest is a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from torch import nn

from raykd.models.cifar_resnet import cifar_resnet
from raykd.models.crd_resnet import crd_resnet, crd_resnet50
from raykd.models.mobilenetv2 import mobilenetv2
from raykd.models.shufflenet import shufflenetv1
from raykd.models.shufflenetv2 import shufflenetv2
from raykd.models.small import digits_cnn, mlp
from raykd.models.vgg import CONVOLUTIONS, vgg
from raykd.models.wrn import wrn

Builder = Callable[..., nn.Module]

_WRN = re.compile(r"wrn_(\d+)_(\d+)")
_WRN_LISTED = ("16_1", "16_2", "16_4", "28_2", "28_4", "28_10", "40_1", "40_2", "40_4")

_TABLE: dict[str, Builder] = {
    **{f"cifar_resnet{d}": partial(cifar_resnet, d) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"crd_resnet{d}": partial(crd_resnet, d) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"crd_resnet{d}x4": partial(crd_resnet, d, wide=True) for d in (8, 32)},
    "crd_resnet50": crd_resnet50,
    **{f"wrn_{d}": partial(wrn, *map(int, d.split("_"))) for d in _WRN_LISTED},
    **{f"vgg{d}": partial(vgg, d) for d in CONVOLUTIONS},
    "mobilenetv2": mobilenetv2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
    "mlp": mlp,
    "digits_cnn": digits_cnn,
}


def names() -> list[str]:
    """Names of our own architectures; of the open family `wrn_<depth>_<width>` the usual ones."""
    return list(_TABLE)


def builder(name: str) -> Builder | None:
    """The builder behind a name, called as `builder(num_classes, **options)`; None if it is not ours."""
    if name in _TABLE:
        return _TABLE[name]
    if found := _WRN.fullmatch(name):
        return partial(wrn, int(found[1]), int(found[2]))
    return None
