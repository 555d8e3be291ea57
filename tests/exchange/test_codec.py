"""Codecs: what they lose is bounded, measured and paid for as promised."""

import math

import numpy as np
import pytest
import torch

from raykd.errors import ConfigError, SourceError
from raykd.exchange.codec import Codec, bytes_per_sample, decode, encode, parse


def draw(*shape, scale=3.0, dtype=torch.float32, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def round_trip(signals, codec):
    return decode(encode(signals, codec).signals)


@pytest.mark.parametrize(
    "text, expected", [("dense", Codec("dense")), ("int8", Codec("int8")), ("topk:5", Codec("topk", 5, 4.0))]
)
def test_parse(text, expected):
    assert parse(text, temperature=4.0) == expected
    assert parse(text).exact == (text == "dense")


@pytest.mark.parametrize("text", ["dens", "topk", "topk:", "topk:0", "topk:-1", "topk:x", "topk:<k>x", "fp16:2", ""])
def test_an_unknown_codec(text):
    with pytest.raises(ConfigError, match="expected one of dense, fp16, int8, topk:<k>"):
        parse(text)


def test_the_hint_of_a_misspelt_codec():
    with pytest.raises(ConfigError, match="Did you mean 'dense'"):
        parse("densee")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_is_exact(dtype):
    signals = {"logits": draw(4, 7, dtype=dtype), "feature@s": draw(4, 2, 3, 3, dtype=dtype), "gram@s": draw(4, 4, dtype=dtype)}
    signals["logits"][0, 0], signals["logits"][1, 1] = torch.inf, torch.nan
    found = round_trip(signals, parse("dense"))
    for key, value in signals.items():
        assert found[key].dtype == dtype
        assert found[key].numpy().tobytes() == value.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_signals_leave_exactly_as_float32(dtype):
    value = draw(3, 5).to(dtype)
    found = round_trip({"logits": value}, parse("dense"))["logits"]
    assert found.dtype == torch.float32
    assert torch.equal(found, value.float())


def test_what_is_decoded_shares_no_memory():
    for text in ("dense", "fp16", "int8", "topk:2"):
        reply = encode({"logits": draw(3, 5)}, parse(text))
        for parts in reply.signals["logits"].values():
            if isinstance(parts, np.ndarray):
                parts.flags.writeable = False  # as in the object store
        first = decode(reply.signals)["logits"]
        kept = first.clone()
        first.zero_()
        assert torch.equal(decode(reply.signals)["logits"], kept)


def test_strided_and_graph_bound_signals_travel():
    value = draw(3, 4, 5).requires_grad_(True).transpose(1, 2) * 2
    found = round_trip({"feature@s": value}, parse("dense"))["feature@s"]
    assert torch.equal(found, value)
    assert found.is_contiguous()
    assert not found.requires_grad


def test_fp16_is_within_its_bound():
    value = torch.cat([draw(2000, 8), draw(2000, 8, scale=1e4).clamp(-65504, 65504), draw(2000, 8, scale=1e-6)])
    found = round_trip({"feature@s": value}, parse("fp16"))["feature@s"]
    assert found.dtype == torch.float32
    error = (found - value).abs()
    normal = value.abs() >= 2.0**-14
    assert (error[normal] <= 2.0**-11 * value.abs()[normal]).all()
    assert (error[~normal] <= 2.0**-25).all()
    assert (error[normal] / value.abs()[normal]).max() > 2.0**-12.5, "the bound is met from below, it is not slack"


@pytest.mark.parametrize("bad", [7e4, -1e6, math.inf, math.nan])
def test_fp16_refuses_what_it_cannot_hold(bad):
    value = draw(3, 4)
    value[2, 1] = bad
    with pytest.raises(SourceError, match=r"Signal feature@s: expected values within fp16's \+-65504.*codec='dense'"):
        encode({"feature@s": value}, parse("fp16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_is_within_half_a_scale(dtype):
    value = draw(50, 3, 4, 4, dtype=dtype) * torch.logspace(-6, 6, 50, dtype=dtype)[:, None, None, None]
    value[7] = 0.0
    reply = encode({"feature@s": value}, parse("int8"))
    found = decode(reply.signals)["feature@s"]
    scale = value.abs().amax((1, 2, 3)) / 127
    error = (found - value).abs().amax((1, 2, 3))
    assert found.dtype == dtype
    assert (error <= scale / 2 * (1 + 1e-5)).all()
    assert (error[:7] > scale[:7] / 4).all()
    assert torch.equal(found[7], torch.zeros_like(found[7]))
    assert reply.errors == {"int8_scale": pytest.approx(float(scale.max()))}
    peak = value.flatten(1).abs().argmax(1)[:, None]
    torch.testing.assert_close(found.flatten(1).gather(1, peak), value.flatten(1).gather(1, peak))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_int8_refuses_what_is_not_finite(bad):
    value = draw(3, 4)
    value[2, 1] = bad
    with pytest.raises(SourceError, match="Signal logits: expected finite values"):
        encode({"logits": value}, parse("int8"))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 40), (3, 5, 40)])
def test_topk_in_closed_form(shape, temperature):
    """softmax at the temperature is exact on the kept classes; the rest share their true mass evenly."""
    logits, k = draw(*shape, dtype=torch.float64), 6
    found = round_trip({"logits": logits}, Codec("topk", k, temperature))["logits"]
    true, seen = (torch.softmax(z / temperature, -1) for z in (logits, found))
    kept = logits >= logits.topk(k).values[..., -1:]
    torch.testing.assert_close(seen[kept], true[kept], rtol=1e-12, atol=0)
    assert torch.equal(found[kept], logits[kept])
    tail = true.masked_fill(kept, 0.0).sum(-1, keepdim=True)
    torch.testing.assert_close(seen.masked_fill(~kept, 0.0).sum(-1, keepdim=True), 1 - tail, rtol=1e-12, atol=0)
    torch.testing.assert_close(seen[~kept], (tail / (shape[-1] - k)).expand(shape)[~kept], rtol=1e-12, atol=0)


def test_topk_measures_its_own_error():
    """Total variation and KL at the temperature, by explicit loops."""
    rng = np.random.default_rng(3)
    logits, temperature, k = rng.normal(size=(5, 12)) * 3, 2.0, 4
    reply = encode({"logits": torch.from_numpy(logits)}, Codec("topk", k, temperature))
    worst_tv = worst_kl = 0.0
    for row in logits:
        weight = [math.exp(z / temperature) for z in row]
        true = [w / sum(weight) for w in weight]
        kept = sorted(range(12), key=lambda i: -row[i])[:k]
        share = sum(true[i] for i in range(12) if i not in kept) / (12 - k)
        seen = [true[i] if i in kept else share for i in range(12)]
        worst_tv = max(worst_tv, sum(abs(p - q) for p, q in zip(true, seen)) / 2)
        worst_kl = max(worst_kl, sum(p * math.log(p / q) for p, q in zip(true, seen)))
    assert worst_tv > 0.01
    assert reply.errors["topk_tv"] == pytest.approx(worst_tv, rel=1e-10)
    assert reply.errors["topk_kl"] == pytest.approx(worst_kl, rel=1e-10)


def test_topk_touches_only_logits():
    signals = {"logits": draw(3, 9), "feature@s": draw(3, 9), "logits|rot90": draw(3, 9, seed=1)}
    reply = encode(signals, parse("topk:2"))
    assert torch.equal(decode(reply.signals)["feature@s"], signals["feature@s"])
    assert "top" in reply.signals["logits"]
    assert "top" in reply.signals["logits|rot90"]


def test_topk_of_every_class_is_dense():
    logits = draw(3, 4)
    reply = encode({"logits": logits}, parse("topk:4"))
    assert torch.equal(decode(reply.signals)["logits"], logits)
    assert reply.errors == {}


def test_topk_survives_far_apart_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0, 5e3]])
    found = round_trip({"logits": logits}, parse("topk:1"))["logits"]
    assert torch.isfinite(found).all()
    assert found[0, 0] == 1e4


@pytest.mark.parametrize("text", ["dense", "fp16", "int8", "topk:3", "topk:9"])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (40000,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_bytes_are_those_that_travel(text, shape, dtype):
    batch, codec = 5, parse(text)
    reply = encode({"logits": draw(batch, *shape, dtype=dtype)}, codec)
    assert bytes_per_sample(shape, codec, True, itemsize=dtype.itemsize) * batch == reply.num_bytes


def test_bytes_of_a_feature():
    reply = encode({"feature@s": draw(5, 2, 3, 3)}, parse("topk:3"))
    assert bytes_per_sample((2, 3, 3), parse("topk:3"), False) * 5 == reply.num_bytes == 5 * 18 * 4
