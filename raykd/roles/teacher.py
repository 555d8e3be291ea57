"""The teacher: a frozen model that derives and encodes what the job's losses ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raykd.config import Teacher as TeacherSpec
from raykd.errors import SourceError
from raykd.exchange import codec as codecs
from raykd.roles.network import Facts, Tapped, build
from raykd.signals import Signal, Signals

Restore = Callable[[Mapping[str, Any]], Tensor]


class Teacher:
    """Evaluation mode, no gradient, no state that a request could change: any replica answers any request, as often as asked.

    Args:
        spec: the job's teacher.
        signals: what its losses ask for.
        facts: of the training data.
        codec: how replies are written.
        device: where the model lives.
        restore: re-creates uint8 images from a recipe (`inputs="recipe"`).
        name: in the job, for messages.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        signals: tuple[Signal, ...],
        facts: Facts,
        codec: codecs.Codec,
        device: torch.device,
        restore: Restore | None = None,
        name: str = "teacher",
    ) -> None:
        self.name = name
        model = build(spec, facts, device).eval().requires_grad_(False)
        self.codec = codec
        self.tapped = Tapped(spec, model, signals, facts, device)
        self._wanted = tuple(s.key for s in self.tapped.signals)
        self._restore = restore

    @torch.no_grad()
    def signals(self, images: Tensor) -> Signals:
        """The requested signals of uint8 images `[b c h w]`; batch axis first, contiguous."""
        found = self.tapped(images)
        return {key: found[key].contiguous() for key in self._wanted}

    def answer(self, fields: Mapping[str, Any]) -> codecs.Reply:
        """Encoded signals of one batch, given as pixels (`images`) or as a recipe (`sample_index`, `augmentation_seed`).

        Raises:
            SourceError: a signal does not fit the codec; names teacher and signal.
        """
        started = time.perf_counter()
        try:
            reply = codecs.encode(self.signals(self._images(fields)), self.codec)
        except SourceError as error:
            raise SourceError(f"Teacher {self.name!r}: {error}") from None
        reply.seconds = time.perf_counter() - started
        return reply

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits `[b c]` of uint8 images `[b c h w]`."""
        return self.tapped(images)["logits"]

    def _images(self, fields: Mapping[str, Any]) -> Tensor:
        if "images" in fields:
            images = fields["images"]
            return images if isinstance(images, Tensor) else torch.from_numpy(images.copy())
        if self._restore is None:
            raise SourceError("A recipe was sent to a teacher that has no data set. Set inputs='pixels'.")
        return self._restore(fields)


def check_finite(name: str, signals: Signals) -> None:
    """Raises SourceError naming the teacher and the signal that is not finite."""
    for key, tensor in signals.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise SourceError(
                f"Teacher {name!r}, signal {key}: expected finite values, got {bad} of {tensor.numel()} NaN or infinite. "
                "Check its weights, its normalisation and its dtype."
            )
