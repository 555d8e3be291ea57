"""Codecs: how signals are written on the wire and in a store, and what each costs in accuracy.

    dense      as computed; exact
    fp16       half the bytes; relative error 2^-11 in range, a value out of range is an error
    int8       one byte and a scale a sample; absolute error at most scale / 2
    topk:<k>   logits only: the k largest and the log-sum-exp of the rest at the job's temperature; the mass of the tail is
               exact, spread evenly over its classes

Arrays travel as NumPy (the object store's fast path). Encoders of lossy codecs measure their own error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raykd.errors import ConfigError, SourceError, near
from raykd.signals import Signals

NAMES = ("dense", "fp16", "int8", "topk:<k>")


@dataclass(frozen=True)
class Codec:
    """A parsed codec: its kind and, for topk, the number of classes kept and the temperature of the tail."""

    kind: str
    k: int = 0
    temperature: float = 1.0

    @property
    def exact(self) -> bool:
        """Whether decode(encode(x)) is x bit for bit."""
        return self.kind == "dense"


@dataclass
class Encoded:
    """Encoded signals of one teacher and batch, with the codec's largest errors."""

    signals: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for parts in self.signals.values() for a in parts.values() if isinstance(a, np.ndarray))


@dataclass
class Reply:
    """What an actor answers for one batch: each of its teachers' signals (or their aggregate's), and its working time."""

    teachers: dict[str, Encoded]
    seconds: float = 0.0
    queue: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(encoded.num_bytes for encoded in self.teachers.values())

    def decoded(self) -> dict[str, Signals]:
        """Teacher -> its signals, in fresh tensors that pin no shared memory."""
        return {name: decode(encoded.signals) for name, encoded in self.teachers.items()}


def parse(text: str, temperature: float = 1.0) -> Codec:
    """Parses a codec's name.

    Raises:
        ConfigError: there is no such codec.
    """
    kind, _, number = text.partition(":")
    if kind == "topk" and number.isdigit() and int(number) > 0:
        return Codec("topk", int(number), temperature)
    if text not in NAMES:
        raise ConfigError(f"Codec {text!r}: expected one of {', '.join(NAMES)}. {near(text, NAMES)}")
    return Codec(kind)


def encode(signals: Signals, codec: Codec) -> Encoded:
    """Encodes one batch of signals; a topk codec applies to `logits`, all else stays dense under it.

    Args:
        signals: key -> tensor, batch axis first; on any device.
        codec: how.

    Raises:
        SourceError: a value does not fit fp16, or is not finite under int8.
    """
    reply = Encoded({})
    for key, tensor in signals.items():
        array = _to_numpy(tensor)
        if codec.kind == "topk":
            is_logits = re.split(r"[|#]", key)[0] == "logits"
            reply.signals[key] = _encode_topk(array, codec, reply.errors) if is_logits else {"dense": array}
        elif codec.kind == "fp16":
            reply.signals[key] = _encode_fp16(key, array)
        elif codec.kind == "int8":
            reply.signals[key] = _encode_int8(key, array, reply.errors)
        else:
            reply.signals[key] = {"dense": array}
    return reply


def decode(signals: Mapping[str, Mapping[str, Any]]) -> Signals:
    """Decodes what `encode` wrote, into fresh tensors that pin no shared memory."""
    return {key: _decode(parts) for key, parts in signals.items()}


def bytes_per_sample(shape: tuple[int, ...], codec: Codec, is_logits: bool, itemsize: int = 4) -> float:
    """Bytes one sample of a signal takes on the wire; `shape` without the batch axis, classes last."""
    count = float(np.prod(shape)) if shape else 1.0
    if codec.kind == "topk" and is_logits and codec.k < shape[-1]:
        return count / shape[-1] * (codec.k * (itemsize + (2 if shape[-1] <= 2**15 else 4)) + itemsize)
    if codec.kind == "fp16":
        return 2 * count
    return count + itemsize if codec.kind == "int8" else itemsize * count


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.contiguous().cpu().numpy()


def _encode_fp16(key: str, array: np.ndarray) -> dict[str, Any]:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise SourceError(
            f"Signal {key}: expected values within fp16's +-65504, got {np.abs(array).max():.4g}. Use codec='dense' or 'int8'."
        )
    return {"fp16": half, "dtype": str(array.dtype)}


def _encode_int8(key: str, array: np.ndarray, errors: dict[str, float]) -> dict[str, Any]:
    if not np.isfinite(array).all():
        raise SourceError(f"Signal {key}: expected finite values, got NaN or infinite ones, which int8 cannot hold.")
    flat = array.reshape(len(array), -1)
    scale = np.abs(flat).max(axis=1).astype(array.dtype) / 127.0 if flat.size else np.zeros(len(array), array.dtype)
    safe = np.where(scale > 0, scale, 1.0).astype(array.dtype)
    quantised = np.rint(flat / safe[:, None]).astype(np.int8).reshape(array.shape)
    errors["int8_scale"] = max(errors.get("int8_scale", 0.0), float(scale.max(initial=0.0)))
    return {"int8": quantised, "scale": safe}


def _encode_topk(logits: np.ndarray, codec: Codec, errors: dict[str, float]) -> dict[str, Any]:
    num_classes = logits.shape[-1]
    if codec.k >= num_classes:
        return {"dense": logits}
    order = np.argpartition(-logits, codec.k - 1, axis=-1)
    top = np.sort(order[..., : codec.k], axis=-1)
    values = np.take_along_axis(logits, top, axis=-1)
    rest = np.take_along_axis(logits, order[..., codec.k :], axis=-1).astype(np.float64) / codec.temperature
    peak = rest.max(axis=-1, keepdims=True)
    tail = (np.log(np.exp(rest - peak).sum(axis=-1)) + peak[..., 0]).astype(logits.dtype)
    index = top.astype(np.int16 if num_classes <= 2**15 else np.int32)
    parts = {"top": values, "index": index, "tail": tail, "num_classes": num_classes, "temperature": codec.temperature}
    for name, value in _topk_error(logits, _decode_topk(parts), codec.temperature).items():
        errors[name] = max(errors.get(name, 0.0), value)
    return parts


def _topk_error(logits: np.ndarray, decoded: np.ndarray, temperature: float) -> dict[str, float]:
    """Largest total variation and KL(true || decoded), nats, over the batch at one temperature."""
    true, seen = (_log_softmax(z.astype(np.float64) / temperature) for z in (logits, decoded))
    p = np.exp(true)
    variation = 0.5 * np.abs(p - np.exp(seen)).sum(axis=-1)
    return {"topk_tv": float(variation.max()), "topk_kl": float((p * (true - seen)).sum(axis=-1).max())}


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _decode_topk(parts: Mapping[str, Any]) -> np.ndarray:
    tail, temperature, top = parts["tail"], parts["temperature"], parts["top"]
    count = parts["num_classes"] - top.shape[-1]
    fill = (temperature * (tail.astype(np.float64) - np.log(count))).astype(top.dtype)
    dense = np.repeat(fill[..., None], parts["num_classes"], axis=-1)
    np.put_along_axis(dense, parts["index"].astype(np.int64), top, axis=-1)
    return dense


def _decode(parts: Mapping[str, Any]) -> Tensor:
    if "dense" in parts:
        return torch.from_numpy(np.array(parts["dense"]))
    if "fp16" in parts:
        return torch.from_numpy(parts["fp16"].astype(parts["dtype"]))
    if "int8" in parts:
        scale = parts["scale"].reshape(-1, *[1] * (parts["int8"].ndim - 1))
        return torch.from_numpy(parts["int8"].astype(scale.dtype) * scale)
    return torch.from_numpy(_decode_topk(parts))
