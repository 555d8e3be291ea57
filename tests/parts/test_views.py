"""Parts of images: inside, enlarged, mirrored, differentiable, a function of the generator."""

import torch

from raykd.parts.views import local_view


def keyed(seed=0):
    return torch.Generator().manual_seed(seed)


def ramp(count, size=16):
    """Images whose first channel rises to the right and whose second one rises downwards, by 1 a pixel."""
    across = torch.arange(size, dtype=torch.float64).expand(size, size)
    return torch.stack([across, across.T]).expand(count, 2, size, size).clone()


def test_a_part_is_a_rectangle_of_the_image_enlarged():
    size, images = 16, ramp(200)
    seen = local_view(images, keyed())
    assert seen.shape == images.shape
    assert seen.dtype == images.dtype
    inner = seen[:, :, 2:-2, 2:-2]  # away from the border, where values are cut off
    steps = inner[:, 0, :, 1:] - inner[:, 0, :, :-1], inner[:, 1, 1:] - inner[:, 1, :-1]
    width, height = (s.flatten(1).mean(1) for s in steps)
    for step, found in zip(steps, (width, height)):
        torch.testing.assert_close(step, found[:, None, None].expand_as(step))
    assert (height > 0).all(), "upright"
    assert 0.35 < (width < 0).double().mean() < 0.65, "mirrored at even odds"
    area, ratio = width.abs() * height, width.abs() / height
    assert area.min() >= 0.2
    assert area.max() <= 1 + 1e-9
    assert ratio.min() >= 0.75 - 1e-9
    assert ratio.max() <= 4 / 3 + 1e-9
    assert seen.min() >= 0
    assert seen.max() <= size - 1


def test_it_is_a_function_of_the_generator_and_each_image_has_its_own():
    images = ramp(4)
    first, again = local_view(images, keyed(1)), local_view(images, keyed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, local_view(images, keyed(2)))
    assert not torch.equal(first[0], first[1])
    used, other = keyed(1), keyed(1)
    local_view(images.float(), used)
    torch.rand(4, 5, generator=other, dtype=torch.float64)
    assert torch.equal(used.get_state(), other.get_state()), "five numbers an image"


def test_gradient():
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: local_view(x, keyed(3)), images)
