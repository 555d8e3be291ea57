import pytest
import torch

from raykd.errors import ConfigError, SignalError
from raykd.parts.adapters import LinearEmbed, hint_convolution, hint_regressor, pointwise


@pytest.mark.parametrize("student", [(3, 8, 8), (3, 16, 16), (3, 4, 4), (3, 11, 9)])
def test_hint_convolution_reaches_the_teachers_shape(student):
    assert hint_convolution(student, (5, 8, 8))(torch.rand(2, *student)).shape == (2, 5, 8, 8)


@pytest.mark.parametrize("student", [(3, 7, 7), (3, 4, 8)])
def test_hint_convolution_refuses_other_sizes(student):
    with pytest.raises(SignalError, match=f"got {student[1]}x{student[2]}"):
        hint_convolution(student, (5, 8, 8))


def test_hint_regressor_has_two_kinds():
    plain, usual = hint_regressor((3, 8, 8), (5, 8, 8), "conv"), hint_regressor((3, 8, 8), (5, 8, 8), "conv_bn_relu")
    images = torch.randn(4, 3, 8, 8)
    assert plain(images).min() < 0 <= usual(images).min()
    with pytest.raises(ConfigError):
        hint_regressor((3, 8, 8), (5, 8, 8), "convolution")


def test_pointwise_mixes_channels_only():
    layers = pointwise(3, 4, 5)
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "ReLU", "Conv2d"]
    images = torch.rand(1, 3, 2, 2)
    torch.testing.assert_close(layers(images)[..., 1, 0], layers(images[..., 1:, :1])[..., 0, 0])
    assert all(parameter.ndim == 4 for parameter in layers.parameters())


def test_linear_embed_has_unit_length_in_full_precision():
    out = LinearEmbed(3, 4)(torch.randn(5, 3).bfloat16())
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))
