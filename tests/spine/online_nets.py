"""A small model that ends or disturbs its own process at a step of its own: what tests do to a peer.

It trains like any other. At its `at`-th forward of the training (from 0) it does what `does` says, unless the file `marker` is
there already; it makes that file first, so that it happens once.
"""

import math
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from tests.spine.plain import Plain


class Fragile(Plain):
    """`kill` before it has said anything in that step; `kill late` when it has; `hang`; `nan`; `slow`: in every step."""

    def __init__(self, num_classes: int, does: str, at: int, marker: str) -> None:
        super().__init__(num_classes)
        self.does, self.at, self.marker, self.forwards = does, at, Path(marker), 0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if not (self.training and torch.is_grad_enabled()) or logits.device.type == "meta":
            return logits
        number, self.forwards = self.forwards, self.forwards + 1
        if self.does == "slow":
            time.sleep(self.at / 1000)
        elif number == self.at and (self.does == "kill always" or not self.marker.exists()):
            self.marker.write_text(str(os.getpid()))
            if self.does.startswith("kill") and self.does != "kill late":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.does == "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif self.does == "nan":
                logits = logits * math.nan
            elif self.does == "kill late":
                logits.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return logits


def fragile(num_classes: int, does: str = "kill", at: int = 5, marker: str = "marker") -> Fragile:
    """The factory."""
    return Fragile(num_classes, does, at, marker)
