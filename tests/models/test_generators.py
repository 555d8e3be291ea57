"""Generators: counts known by hand, values by explicit loops, gradient to the noise, fresh weights, what they refuse."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from raykd import models
from raykd.errors import ConfigError, ModelError
from raykd.models.generators import LASTS, draw, reset

MNIST = {"shape": (1, 28, 28), "num_classes": 10, "latent": 100}
CIFAR = {"shape": (3, 32, 32), "num_classes": 10, "latent": 256}
FACES = {"shape": (3, 64, 64), "num_classes": 10, "latent": 256}
IMAGENET = {"shape": (3, 224, 224), "num_classes": 1000, "latent": 256}
SMALL = {"shape": (2, 8, 8), "num_classes": 5, "latent": 6, "mean": (0.2, 0.6), "std": (0.1, 0.3)}
STATS = (np.array([0.2, 0.6])[:, None, None], np.array([0.1, 0.3])[:, None, None])


def make(name="dcgan", *, seed=0, dtype=torch.float64, **given):
    torch.manual_seed(seed)
    return models.generator(name, **(SMALL | given)).to(dtype)


def noise(made, count=4, seed=0):
    return draw(made, count, torch.Generator().manual_seed(seed))


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Sizes.


@pytest.mark.parametrize(
    "name, given, options, count",
    [
        ("dcgan", MNIST, {}, 633_472 + 256 + 147_712 + 73_856 + 577),
        ("dcgan", CIFAR, {}, 2_105_344 + 256 + 147_712 + 73_856 + 1_731),  # CMI's: 2,328,899
        ("dcgan", CIFAR, {"last": "tanh_norm"}, 2_328_899),
        ("dcgan", CIFAR, {"width": 32}, 1_052_672 + 128 + 36_992 + 18_496 + 867),
        # ZSKT's, which has 192 more: biases that the norms cancel
        ("dcgan", CIFAR | {"latent": 100}, {"last": "norm", "base": 10}, 1_292_800 + 256 + 147_712 + 73_856 + 1_731),
        # DFAD's second generator, and CMI's for 64 px
        ("dcgan", FACES, {"upsample": "transposed"}, 2_105_344 + 1_024 + 2_097_664 + 524_544 + 131_200 + 65_664 + 1_731),
        ("dcgan", FACES, {}, 2_105_344 + 1_024 + 1_180_160 + 295_168 + 73_856 + 36_992 + 1_731),
        ("dcgan", IMAGENET, {}, 6_447_616 + 1_024 + 1_180_160 + 295_168 + 73_856 + 2 * 36_992 + 1_731),
        ("conditional", CIFAR, {}, 2_328_899 + 10 * 50 + 50 * 8_192),
        ("conditional", CIFAR, {"join": "onehot"}, 2_328_899 + 10 * 8_192),
        ("conditional", CIFAR, {"join": "product"}, 2_328_899 + 10 * 256),
        ("pixels", CIFAR, {"n": 4}, 4 * 3 * 32 * 32),
    ],
)
def test_parameters_as_counted_by_hand(name, given, options, count):
    with torch.device("meta"):
        made = models.generator(name, **given, **options)
        images = made(torch.zeros(4, given["latent"]), torch.zeros(4, dtype=torch.int64))
    assert sum(p.numel() for p in made.parameters()) == count
    assert images.is_meta
    assert images.shape == (4, *given["shape"])


@pytest.mark.parametrize(
    "size, options, grid",
    [
        ((8, 8), {}, (2, 2)),
        ((28, 28), {}, (7, 7)),
        ((32, 32), {}, (8, 8)),
        ((32, 20), {}, (8, 5)),
        ((32, 32), {"doublings": 3}, (4, 4)),
        ((32, 32), {"base": 10}, (10, 10)),
        ((28, 28), {"doublings": 2, "base": 9}, (9, 9)),
        ((14, 14), {"base": 5}, (5, 5)),
        ((30, 30), {"doublings": 1}, (15, 15)),
        ((64, 64), {}, (4, 4)),
        ((64, 64), {"upsample": "transposed"}, (4, 4)),
        ((96, 128), {}, (6, 8)),
        ((224, 224), {}, (7, 7)),
    ],
)
def test_any_size_reached_by_doubling(size, options, grid):
    with torch.device("meta"):
        made = models.generator("dcgan", shape=(3, *size), num_classes=2, latent=8, width=4, **options)
        assert made(torch.zeros(2, 8)).shape == (2, 3, *size)
    assert made.grid[1:] == grid


# Values.


def convolved(x, weight, bias=0.0):
    """3x3, padded by 1: `[b i h w]` to `[b o h w]`."""
    count, _, rows, columns = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((count, len(weight), rows, columns))
    for r in range(rows):
        for c in range(columns):
            patch = padded[:, :, r : r + 3, c : c + 3]
            out[:, :, r, c] = np.einsum("bihw,oihw->bo", patch, weight)
    return out + bias


def spread(x, weight):
    """A transposed convolution 4x4 of stride 2, its outermost ring cut off: `[b i h w]` to `[b o 2h 2w]`."""
    count, _, rows, columns = x.shape
    out = np.zeros((count, weight.shape[1], 2 * rows + 2, 2 * columns + 2))
    for r in range(rows):
        for c in range(columns):
            out[:, :, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4] += np.einsum("bi,iohw->bohw", x[:, :, r, c], weight)
    return out[:, :, 1:-1, 1:-1]


def normed(x, scale=None, shift=None, axes=(0, 2, 3)):
    """Batch norm in training: by mean and biased variance over `axes`."""
    x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    return x if scale is None else x * scale[:, None, None] + shift[:, None, None]


def reference(made, z, last, transposed):
    """Images of a dcgan of one doubling, in NumPy."""
    state = {key: value.double().numpy() for key, value in made.state_dict().items()}
    x = z.numpy() @ state["project.weight"].T + state["project.bias"]
    x = normed(x.reshape(len(z), *made.grid), state["norm.weight"], state["norm.bias"])
    kernel = state["blocks.0.conv.weight"]
    x = spread(x, kernel) if transposed else convolved(x.repeat(2, axis=2).repeat(2, axis=3), kernel)
    x = normed(x, state["blocks.0.bn.weight"], state["blocks.0.bn.bias"])
    x = np.where(x > 0, x, 0.2 * x)
    x = convolved(x, state["last.conv.weight"], state["last.conv.bias"][:, None, None])
    mean, std = STATS
    return {
        "sigmoid": lambda: 1 / (1 + np.exp(-x)),
        "tanh": lambda: (1 + np.tanh(x)) / 2,
        "norm": lambda: normed(x) * std + mean,
        "tanh_norm": lambda: normed(np.tanh(x)) * std + mean,
        "tanh_each": lambda: normed(np.tanh(x), axes=(2, 3)) * std + mean,
    }[last]()


@pytest.mark.parametrize("upsample", ["nearest", "transposed"])
@pytest.mark.parametrize("last", LASTS)
def test_images_equal_explicit_loops(last, upsample):
    made = make(shape=(2, 6, 4), width=3, doublings=1, last=last, upsample=upsample, init="normal")
    with torch.no_grad():  # all that starts at 0 or 1 counts
        for parameter in made.parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    z = noise(made, 5)
    wanted = reference(made, z, last, upsample == "transposed")
    np.testing.assert_allclose(made(z).detach().numpy(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", LASTS)
def test_the_last_layer_bounds_or_normalises(last):
    images = make(last=last, width=8)(torch.randn(64, 6, dtype=torch.float64) * 3).detach()
    if last in ("sigmoid", "tanh"):
        assert images.min() >= 0
        assert images.max() <= 1
    axes = (2, 3) if last == "tanh_each" else (0, 2, 3)
    if last.endswith(("norm", "each")):
        mean, std = (torch.tensor(SMALL[k], dtype=torch.float64).expand(images.mean(axes).shape) for k in ("mean", "std"))
        torch.testing.assert_close(images.mean(axes), mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(images.std(axes, correction=0), std, rtol=1e-2, atol=0)


def test_base_of_ten_repeats_every_fifth_twice_as_zskt_does():
    made = make(shape=(3, 32, 32), mean=0.5, std=0.25, base=10, width=2)
    source = torch.arange(100.0).view(1, 1, 10, 10)
    torch.testing.assert_close(made.blocks[0].up(source), nn.Upsample(scale_factor=1.6)(source), rtol=0, atol=0)


def test_eps_is_of_the_blocks_only():
    made = make(eps=0.8)
    assert made.norm.eps == 1e-5
    assert [block.bn.eps for block in made.blocks] == [0.8, 0.8]


def test_normal_init_is_dcgans():
    made = make(shape=(3, 32, 32), latent=64, mean=0.5, std=0.25, init="normal")
    assert made.project.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert made.blocks[0].conv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert made.norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert made.norm.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not made.project.bias.any()
    assert not made.last.conv.bias.any()


# Classes.


@pytest.mark.parametrize("join", ["embedding", "onehot", "product"])
def test_a_class_reaches_the_image(join):
    made = make("conditional", join=join).eval()
    z, labels = noise(made), torch.tensor([0, 3, 4, 3])
    vectors = torch.eye(5, dtype=torch.float64)[labels] if join == "onehot" else made.label.weight[labels]
    wanted = z * vectors if join == "product" else torch.cat([z, vectors], 1)
    assert torch.equal(made(z, labels), made.image(wanted))
    changed = made(z, torch.tensor([0, 3, 2, 3]))
    assert [torch.equal(a, b) for a, b in zip(made(z, labels), changed)] == [True, True, False, True]


def test_a_plain_generator_hears_no_class():
    made = make().eval()
    z = noise(made)
    assert torch.equal(made(z), made(z, labels=torch.tensor([0, 1, 2, 3])))


@pytest.mark.parametrize("labels", [None, torch.zeros(4, 2, dtype=torch.int64)])
def test_classes_must_be_given(labels):
    made = make("conditional")
    with pytest.raises(ModelError, match=r"expected labels \[4\], the class wanted of each image"):
        made(noise(made), labels)


# Gradients.


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("name", ["dcgan", "conditional"])
def test_gradient_reaches_the_noise_and_every_weight(name, last):
    made = make(name, shape=(2, 4, 4), width=2, doublings=1, latent=3, last=last)
    z, labels = noise(made, 3).requires_grad_(), torch.tensor([0, 1, 4])
    assert torch.autograd.gradcheck(lambda noise: made(noise, labels), (z,))
    (made(z, labels) * torch.linspace(-1, 1, 96, dtype=torch.float64).view(3, 2, 4, 4)).sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is not None for p in made.parameters())


# Pixels.


def test_pixels_are_their_own_images():
    made = make("pixels", n=6)
    mean, std = (torch.tensor(SMALL[k], dtype=torch.float64).view(-1, 1, 1) for k in ("mean", "std"))
    images = made(torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(images, made.pixels[:4] * std + mean)
    rows = torch.tensor([5, 0])
    chosen = made(torch.zeros(2, 6, dtype=torch.float64), rows=rows)
    assert torch.equal(chosen, (made.pixels * std + mean)[rows])
    chosen.sum().backward()
    assert made.pixels.grad.flatten(1).any(1).tolist() == [True, False, False, False, False, True]
    with pytest.raises(ModelError, match="expected at most 6 images, got 7 asked for"):
        made(torch.zeros(7, 6, dtype=torch.float64))


def test_pixels_start_as_noise_or_around_grey():
    many = {"n": 64, "shape": (2, 32, 32)}
    normal, grey = make("pixels", **many), make("pixels", **many, start="grey", noise=0.05)
    assert normal.pixels.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.pixels.std().item() == pytest.approx(1, rel=0.02)
    images = grey(torch.zeros(64, 6))
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0.5, 0.5], abs=0.002)
    assert images.std((0, 2, 3)).tolist() == pytest.approx([0.05, 0.05], rel=0.02)


def test_pixels_are_cut_off_at_black_and_white_when_asked():
    made = make("pixels", n=4)
    z = torch.zeros(4, 6, dtype=torch.float64)
    before = made(z).detach()
    assert before.min() < 0
    assert before.max() > 1
    made.clamp_()
    torch.testing.assert_close(made(z), before.clamp(0, 1))


# Weights and noise.


KINDS = [("dcgan", {}), ("dcgan", {"init": "normal", "last": "norm"}), ("conditional", {}), ("pixels", {"n": 3})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, options", KINDS)
def test_reset_gives_what_construction_gives(name, options, dtype):
    made, other = (make(name, seed=seed, dtype=dtype, **options) for seed in (3, 4))
    assert not same(made, other)
    used = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    used(noise(used, 3), torch.tensor([0, 1, 2])).sum().backward()  # the norms' statistics move
    identities = [id(p) for p in used.parameters()]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    reset(used, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(used, other)
    assert [id(p) for p in used.parameters()] == identities
    assert {p.dtype for p in used.parameters()} == {dtype}
    reset(used, 3)
    assert same(used, made)


def test_reset_of_some_submodules_leaves_the_others():
    made, fresh = make(seed=3), make(seed=4)
    old = copy.deepcopy(made)
    reset(made, 4, only=("project", "blocks.1"))
    for part in ("project", "blocks.1"):
        assert same(made.get_submodule(part), fresh.get_submodule(part))
    for part in ("blocks.0", "last"):
        assert same(made.get_submodule(part), old.get_submodule(part))
    with pytest.raises(ConfigError, match="Did you mean 'project'"):
        reset(made, 4, only=("projekt",))


def test_noise_follows_from_its_generator_alone():
    made = make(latent=50)
    first = noise(made, 2000)
    torch.rand(3)
    assert torch.equal(first, noise(made, 2000))
    assert not torch.equal(first, noise(made, 2000, seed=1))
    assert first.shape == (2000, 50)
    assert first.dtype == torch.float64
    assert first.mean().item() == pytest.approx(0, abs=0.02)
    assert first.std().item() == pytest.approx(1, rel=0.02)
    assert torch.equal(noise(make(dtype=torch.float32)).double(), noise(make()))
    with torch.device("meta"):
        nowhere = models.generator("dcgan", **SMALL)
    assert draw(nowhere, 2, torch.Generator()).is_meta


def test_images_follow_from_weights_and_noise():
    one, other = make(seed=5), make(seed=5)
    assert torch.equal(one(noise(one)), other(noise(other)))


# Refusals.


@pytest.mark.parametrize(
    "name, given, error, told",
    [
        ("dcgam", {}, ConfigError, r"generator 'dcgam': .*Did you mean 'dcgan'\?"),
        ("dcgan", {"widht": 3}, ConfigError, r"option among width, .*, got 'widht'\. Did you mean 'width'\?"),
        ("conditional", {"embeding": 3}, ConfigError, r"Did you mean 'embedding'\?"),
        ("conditional", {"widht": 3}, ConfigError, r"Did you mean 'width'\?"),
        ("pixels", {"width": 3}, ConfigError, r"option among n, start, noise, got 'width'"),
        ("dcgan", {"num_classes": 0}, ConfigError, "num_classes to be a positive whole number, got 0"),
        ("dcgan", {"latent": 2.0}, ConfigError, "latent to be a positive whole number, got 2.0"),
        ("dcgan", {"width": True}, ConfigError, "width to be a positive whole number, got True"),
        ("dcgan", {"last": "tanhnorm"}, ConfigError, r"got 'tanhnorm'\. Did you mean 'tanh_norm'"),
        ("dcgan", {"upsample": "bilinear"}, ConfigError, "upsample among nearest, transposed, got 'bilinear'"),
        ("dcgan", {"init": "he"}, ConfigError, "init among default, normal, got 'he'"),
        ("dcgan", {"eps": 0}, ConfigError, "eps to be positive, got 0"),
        ("dcgan", {"doublings": 6}, ConfigError, "doublings from 1 to 5, got 6"),
        ("dcgan", {"base": 0}, ConfigError, "base to be a positive whole number, got 0"),
        ("dcgan", {"base": 2, "upsample": "transposed"}, ConfigError, "Leave one out"),
        ("dcgan", {"base": 5}, ModelError, "a base of at most 4 px, got 5"),
        ("dcgan", {"shape": (2, 30, 32)}, ModelError, r"by 4, got 30 x 32 \(2 doublings by default\)\. Set doublings=1"),
        ("dcgan", {"shape": (2, 40, 40)}, ModelError, r"by 16, got 40 x 40 \(4 doublings by default\)\. Set doublings=3"),
        ("dcgan", {"shape": (2, 29, 29)}, ModelError, r"by 4, got 29 x 29 .* Choose another size"),
        ("conditional", {"shape": (2, 29, 29)}, ModelError, "Choose another size"),
        ("dcgan", {"shape": (8, 8)}, ModelError, r"shape \(c, h, w\), got \(8, 8\)"),
        ("dcgan", {"mean": (0.1, 0.2, 0.3)}, ConfigError, "one for each of 2 channels"),
        ("pixels", {"std": 0.0}, ConfigError, "std positive"),
        ("conditional", {"join": "add"}, ConfigError, "join among embedding, onehot, product, got 'add'"),
        ("pixels", {"n": 0}, ConfigError, "n to be a positive whole number, got 0"),
        ("pixels", {"start": "gray"}, ConfigError, r"got 'gray'\. Did you mean 'grey'"),
        ("pixels", {"noise": -1}, ConfigError, "noise of at least 0, got -1"),
    ],
)
def test_what_cannot_be_made_is_told(name, given, error, told):
    with pytest.raises(error, match=told):
        make(name, **given)


@pytest.mark.parametrize("name", ["dcgan", "conditional"])
def test_noise_of_another_size_is_told(name):
    with pytest.raises(ModelError, match=r"expected noise \[b 6\], got \[3, 7\]"):
        make(name)(torch.zeros(3, 7, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))


def test_the_names_are_listed():
    assert models.generators() == ["dcgan", "conditional", "pixels"]
