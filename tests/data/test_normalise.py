"""uint8 to the numbers a model expects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_samples import pixels
from PIL import Image

from raykd.data.normalise import PRESETS, Normalise
from raykd.errors import ConfigError, DataError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_the_formula(name):
    mean, std = PRESETS[name]
    images = pixels(3, (len(mean), 5, 6))
    shape = (-1, 1, 1)
    expected = (images / 255.0 - np.reshape(mean, shape)) / np.reshape(std, shape)
    out = Normalise.preset(name)(torch.from_numpy(images))
    assert out.dtype == torch.float32
    assert np.abs(out.numpy() - expected).max() < 1e-5


def test_one_mean_serves_all_channels():
    images = torch.from_numpy(pixels(2))
    assert torch.allclose(Normalise.preset("half")(images), images / 127.5 - 1, atol=1e-6)


def test_dtype_and_input_stay():
    images = torch.from_numpy(pixels(2))
    before = images.clone()
    assert Normalise.preset("cifar10")(images, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [None, 24, (40, 12)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_floats_are_pixels_in_0_to_1(size, kind):
    images = torch.from_numpy(pixels(2, (3, 32, 32)))
    normalise = Normalise.preset("cifar10", size)
    given = (images / 255).to(kind)
    before = given.clone()
    found = normalise(given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, normalise(images), rtol=0, atol=4e-2 if kind == torch.bfloat16 else 1e-5)
    assert torch.equal(given, before)


def test_floats_carry_gradient():
    normalise = Normalise((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), size=(5, 3))
    images = torch.rand(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalise(x, torch.float64), images)
    plain = Normalise((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    (grad,) = torch.autograd.grad(plain(images, torch.float64).sum(), images)
    closed = torch.tensor([1 / 0.2, 1 / 0.3, 1 / 0.4], dtype=torch.float64).view(3, 1, 1).expand_as(images)
    torch.testing.assert_close(grad, closed)


def test_resize_is_bilinear_with_antialias():
    image = pixels(1, (3, 64, 64))
    out = Normalise((0.0,), (1.0,), size=24)(torch.from_numpy(image))[0].numpy() * 255
    expected = np.asarray(Image.fromarray(image[0].transpose(1, 2, 0)).resize((24, 24), Image.Resampling.BILINEAR))
    assert np.abs(out - expected.transpose(2, 0, 1)).max() <= 1.01
    assert Normalise((0.0,), (1.0,), size=(10, 12))(torch.from_numpy(image)).shape == (1, 3, 10, 12)


def test_wrong_inputs():
    images = torch.from_numpy(pixels(1, (1, 8, 8)))
    with pytest.raises(DataError, match="expected 3 channels as the means have, got 1"):
        Normalise.preset("cifar10")(images)
    with pytest.raises(DataError, match="expected uint8 or floats"):
        Normalise.preset("mnist")(images.int())
    with pytest.raises(ConfigError, match="Did you mean 'cifar100' or 'cifar10'"):
        Normalise.preset("cifar1000")
    with pytest.raises(ConfigError, match="positive std"):
        Normalise((0.5,), (0.0,))
