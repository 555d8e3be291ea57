"""Generators: from noise to images, for a student that has none to learn from. No Ray here.

made = generator("dcgan", shape=(3, 32, 32), num_classes=10, latent=256)
z = draw(made, 128, torch.Generator().manual_seed(0))
images = made(z)                       # [128 3 32 32] float, 0 black and 1 white; gradient reaches z
reset(made, 1)                         # other weights, as if made anew

Of 64 channels by default (w below); what the linear layer makes is doubled in size until it is an image:

| px       | channels by size                                  | as in                                      |
| -------- | ------------------------------------------------- | ------------------------------------------ |
| 28       | 2w at 7, 2w at 14, w at 28                        | DAFL, DFAD, CMI                            |
| 32       | 2w at 8, 2w at 16, w at 32                        | the same; ZSKT with `base=10`              |
| 64       | 8w at 4, 4w at 8, 2w at 16, w at 32, w at 64      | DCGAN, with `upsample="transposed"`        |
| 224      | 8w at 7, 4w at 14, ..., w at 56, w at 112, w at 224 | ours, by the same rule                   |
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raykd.errors import ConfigError, ModelError, near

# Doublings -> channels, in widths, of what the linear layer makes and after each doubling.
CHANNELS: dict[int, tuple[int, ...]] = {
    1: (2, 1),
    2: (2, 2, 1),
    3: (4, 2, 1, 1),
    4: (8, 4, 2, 1, 1),
    5: (8, 4, 2, 1, 1, 1),
}
LASTS = ("sigmoid", "tanh", "norm", "tanh_norm", "tanh_each")


@dataclass(frozen=True)
class Wanted:
    """What a generator makes, and of what.

    Attributes:
        shape: (c, h, w) of an image.
        num_classes: of the labels.
        latent: axes of the noise.
        mean: of each channel, or one for all channels, in units [0, 1]; where the generator works in normalised space.
        std: likewise.
    """

    shape: tuple[int, int, int]
    num_classes: int
    latent: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Generator(nn.Module):
    """What makes images: called as `(z [b latent], labels [b] or None)`, it returns `[b c h w]`, 0 black and 1 white.

    Attributes:
        latent: axes of the noise.
        again: makes the same once more, its weights drawn from torch's global generator.
    """

    latent: int
    again: Callable[[], "Generator"]


def generators() -> list[str]:
    """The names that `generator` knows."""
    return list(_KINDS)


def generator(
    name: str,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
    latent: int,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.25,
    **options: Any,
) -> Generator:
    """A generator with fresh weights, which follow from `torch.manual_seed`; on `meta` too.

    Args:
        name: dcgan | conditional | pixels.
        shape: (c, h, w) of an image, px.
        num_classes: of the labels.
        latent: axes of the noise, which is standard normal.
        mean: of the images' normalisation, of each channel or one for all, in units [0, 1]; read by the kinds of `last` that
            normalise and by `pixels`.
        std: likewise.
        options: of the kind; see Dcgan, Conditional and Pixels.

    Raises:
        ConfigError: unknown name or option, or a value that is none of an option's.
        ModelError: it cannot make images of this size.
    """
    if name not in _KINDS:
        raise ConfigError(f"generator {name!r}: expected a known generator, got none of that name. {near(name, _KINDS)}")
    known = _options(_KINDS[name])
    for option in options:
        if option not in known:
            wanted = f"expected an option among {', '.join(known)}"
            raise ConfigError(f"{name}: {wanted}, got {option!r}. {near(option, known)}")
    if len(shape) != 3:
        raise ModelError(f"{name}: expected shape (c, h, w), got {tuple(shape)}. Set the images' channels and size.")
    for what, number in zip(("channels", "height", "width", "num_classes", "latent"), (*shape, num_classes, latent)):
        _check_count(name, what, number)
    stats = tuple((float(v),) if isinstance(v, (int, float)) else tuple(map(float, v)) for v in (mean, std))
    if any(len(v) not in (1, shape[0]) for v in stats) or min(stats[1], default=0.0) <= 0:
        raise ConfigError(
            f"{name}: expected mean and std with one number, or one for each of {shape[0]} channels, std positive, "
            f"got {mean} and {std}. Give the images' normalisation."
        )
    make = partial(_KINDS[name], Wanted((shape[0], shape[1], shape[2]), num_classes, latent, *stats), **options)
    made = make()
    made.latent, made.again = latent, make
    return made


def draw(module: Generator, count: int, generator: torch.Generator) -> Float[Tensor, "b d"]:
    """Standard normal noise for `count` images, drawn on the CPU, on the module's device and in its dtype.

    Args:
        module: for whom.
        count: b.
        generator: on the CPU; b * latent numbers are drawn.
    """
    like = next(module.parameters())
    return torch.randn(count, module.latent, generator=generator).to(like.device, like.dtype)


def reset(module: Generator, generator_seed: int, *, only: Sequence[str] = ()) -> None:
    """Fresh weights and statistics, in place: what construction after `torch.manual_seed(generator_seed)` gives, on any device.

    The parameters stay the same objects; the state of their optimizer is the caller's to clear. The global generators are
    left as they were.

    Args:
        module: made by `generator`.
        generator_seed: of the weights.
        only: names of submodules (`project`, `norm`, ...) outside which nothing changes; empty: all.

    Raises:
        ConfigError: no such submodule.
    """
    names = [name for name, _ in module.named_modules()][1:]
    for name in only:
        if name not in names:
            raise ConfigError(f"reset: expected a submodule of {type(module).__name__}, got {name!r}. {near(name, names)}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(generator_seed)
        fresh = module.again().state_dict()
    inside = tuple(f"{name}." for name in only) or ("",)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if key.startswith(inside):
                value.copy_(fresh[key])


class Units(nn.Module):
    """From normalised space to units: `x * std + mean`, a channel each. `[b c h w]` to the same."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return x * std + mean

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


class Dcgan(Generator):
    """A linear layer, batch norm, then blocks that double the size; labels are ignored.

    Block: nearest upsampling and a convolution 3x3 (or a transposed one, 4x4 of stride 2), batch norm, LeakyReLU(0.2). A
    convolution 3x3 and `last` make the image. See the module for the channels.

    Args:
        wanted: what it makes.
        width: channels before the last convolution.
        doublings: 1 to 5; None: 2 up to 32 px, 4 up to 128 px, 5 above. Height and width are divisible by 2^doublings.
        base: rows and columns that the linear layer makes; None: the image's / 2^doublings. The first block then brings them to
            the image's / 2^(doublings - 1), so that only those must be whole. ZSKT has 10 for 32 px (10, 16, 32).
        upsample: nearest | transposed (DCGAN).
        last: what ends it:
            sigmoid: the values are in [0, 1] (CMI, FastDFKD).
            tanh: (1 + tanh) / 2, in [0, 1] (DCGAN).
            norm: batch norm without weights, a channel each; `mean`, `std` map it to units, unbounded (ZSKT).
            tanh_norm: tanh, then as `norm` (DAFL, DFAD).
            tanh_each: tanh, then each channel of each image to mean 0 and variance 1, mapped as `norm` (KegNet).
        init: default (torch's) | normal: weights N(0, 0.02), biases 0, scales of batch norms N(1, 0.02) (DCGAN).
        eps: added to the variance in the batch norms of the blocks.

    Raises:
        ConfigError: a value that is none of an option's.
        ModelError: the size cannot be reached by doubling.

    References:
        DCGAN: Radford et al., arXiv:1511.06434. DAFL: Chen et al., arXiv:1904.01186. DFAD: Fang et al., arXiv:1912.11006.
        ZSKT: Micaelli and Storkey, arXiv:1905.09768. CMI: Fang et al., arXiv:2105.08584. KegNet: Yoo et al., NeurIPS 2019.

    Note:
        Convolutions before a batch norm have no bias, as in CMI; DAFL, DFAD and ZSKT have one, which the norm cancels.
        `eps` is 0.8 in the GAN code that DAFL's descends from; we are not sure that its results need it. KegNet's variance is
        unbiased, ours biased; its two hidden linear layers and its widths of 64, 16, 4 are not offered.
    """

    def __init__(
        self,
        wanted: Wanted,
        *,
        width: int = 64,
        doublings: int | None = None,
        base: int | None = None,
        upsample: str = "nearest",
        last: str = "sigmoid",
        init: str = "default",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check_choice("dcgan", "upsample", upsample, ("nearest", "transposed"))
        _check_choice("dcgan", "last", last, LASTS)
        _check_choice("dcgan", "init", init, ("default", "normal"))
        _check_count("dcgan", "width", width)
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or eps <= 0:
            raise ConfigError(f"dcgan: expected eps to be positive, got {eps!r}.")
        if base is not None and upsample == "transposed":
            raise ConfigError(
                "dcgan: a transposed convolution doubles exactly, and base asks for another factor. Leave one out."
            )
        sizes = _sizes(wanted.shape, doublings, base)
        channels = [width * c for c in CHANNELS[len(sizes) - 1]]
        self.grid = (channels[0], *sizes[0])
        self.project = nn.Linear(wanted.latent, channels[0] * sizes[0][0] * sizes[0][1])
        self.norm = nn.BatchNorm2d(channels[0])
        blocks = (_block(a, b, size, upsample, eps) for a, b, size in zip(channels, channels[1:], sizes[1:]))
        self.blocks = nn.Sequential(*blocks)
        self.last = _last(channels[-1], wanted, last)
        if init == "normal":
            _normal_init(self)

    def forward(
        self,
        z: Float[Tensor, "b d"],
        labels: Int[Tensor, "b"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "b c h w"]:
        """Images. Raises ModelError where z is of another shape."""
        _check_noise("dcgan", z, self.project.in_features)
        return self.last(self.blocks(self.norm(self.project(z).unflatten(1, self.grid))))


class Conditional(Generator):
    """A Dcgan that is told the class wanted of each image.

    Args:
        wanted: what it makes.
        join: embedding: a learnt vector of the class is appended to the noise; onehot: the class itself is (KegNet); product:
            the noise is multiplied by a learnt vector of as many axes (public code of AC-GAN).
        embedding: axes of the learnt vector of `join="embedding"`.
        options: of Dcgan.

    References:
        AC-GAN: Odena et al., arXiv:1610.09585. KegNet: Yoo et al., NeurIPS 2019.
    """

    def __init__(self, wanted: Wanted, *, join: str = "embedding", embedding: int = 50, **options: Any) -> None:
        super().__init__()
        _check_choice("conditional", "join", join, ("embedding", "onehot", "product"))
        _check_count("conditional", "embedding", embedding)
        self.join, self.num_classes, self.latent = join, wanted.num_classes, wanted.latent
        axes = {"embedding": embedding, "onehot": wanted.num_classes, "product": wanted.latent}[join]
        self.label = nn.Identity() if join == "onehot" else nn.Embedding(wanted.num_classes, axes)
        self.image = Dcgan(replace(wanted, latent=wanted.latent + axes if join != "product" else axes), **options)

    def forward(self, z: Float[Tensor, "b d"], labels: Int[Tensor, "b"] | None = None) -> Float[Tensor, "b c h w"]:
        """Images of these classes. Raises ModelError where there are no labels, or z is of another shape."""
        _check_noise("conditional", z, self.latent)
        if labels is None or labels.shape != z.shape[:1]:
            got = "none" if labels is None else list(labels.shape)
            raise ModelError(f"conditional: expected labels [{len(z)}], the class wanted of each image, got {got}. Give them.")
        if self.join == "onehot":
            known = torch.arange(self.num_classes, device=labels.device)
            vectors = (labels[:, None] == known).to(z.dtype)
        else:
            vectors = self.label(labels)
        return self.image(z * vectors if self.join == "product" else torch.cat([z, vectors], 1))


class Pixels(Generator):
    """Free pixels: the images are the parameters; noise and labels are ignored, but for their number.

    The parameters are in normalised space (`mean`, `std`), where papers state the rate of learning. They are unbounded.

    Args:
        wanted: what it holds.
        n: number of images.
        start: normal: N(0, 1) in normalised space (DeepInversion); grey: 0.5 + noise * N(0, 1) in units.
        noise: of `start="grey"`, in units.

    References:
        DeepInversion: Yin et al., arXiv:1912.08795.
    """

    def __init__(self, wanted: Wanted, *, n: int = 256, start: str = "normal", noise: float = 0.1) -> None:
        super().__init__()
        _check_count("pixels", "n", n)
        _check_choice("pixels", "start", start, ("normal", "grey"))
        if isinstance(noise, bool) or not isinstance(noise, (int, float)) or noise < 0:
            raise ConfigError(f"pixels: expected noise of at least 0, got {noise!r}.")
        self.units = Units(wanted.mean, wanted.std)
        values = torch.randn(n, *wanted.shape)
        if start == "grey":
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (wanted.mean, wanted.std))
            values = (0.5 + noise * values - mean) / std
        self.pixels = nn.Parameter(values)

    def forward(
        self,
        z: Float[Tensor, "b _"],
        labels: Int[Tensor, "b"] | None = None,  # noqa: ARG002
        rows: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """The first b images, or those of `rows`. Raises ModelError where there are fewer than b."""
        if rows is not None:
            return self.units(self.pixels[rows])
        if len(z) > len(self.pixels):
            raise ModelError(f"pixels: expected at most {len(self.pixels)} images, got {len(z)} asked for. Raise n.")
        return self.units(self.pixels[: len(z)])

    @torch.no_grad()
    def become(self, images: Float[Tensor, "n c h w"]) -> None:
        """Its images are now these, in units."""
        mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (self.units.mean, self.units.std))
        self.pixels.copy_((images - mean) / std)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Moves values beyond black and white to these, as DeepInversion does after each step."""
        mean, std = (self.pixels.new_tensor(v).view(-1, 1, 1) for v in (self.units.mean, self.units.std))
        self.pixels.clamp_(-mean / std, (1 - mean) / std)


_KINDS: dict[str, Callable[..., Generator]] = {"dcgan": Dcgan, "conditional": Conditional, "pixels": Pixels}


def _options(kind: Callable[..., Generator]) -> list[str]:
    """Names of its options; those that it passes on are Dcgan's."""
    parameters = inspect.signature(kind).parameters.values()
    passed = [] if all(p.kind is not p.VAR_KEYWORD for p in parameters) else _options(Dcgan)
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] + passed


def _sizes(shape: tuple[int, int, int], doublings: int | None, base: int | None) -> list[tuple[int, int]]:
    """(rows, columns) of what the linear layer makes and after each doubling."""
    rows, columns = shape[1:]
    given = doublings
    if doublings is None:
        doublings = 2 if max(rows, columns) <= 32 else 4 if max(rows, columns) <= 128 else 5
    if isinstance(doublings, bool) or doublings not in CHANNELS:
        raise ConfigError(f"dcgan: expected doublings from {min(CHANNELS)} to {max(CHANNELS)}, got {doublings!r}.")
    exact = doublings - (base is not None)
    if rows % 2**exact or columns % 2**exact:
        fits = [d for d in CHANNELS if rows % 2**d == columns % 2**d == 0]
        advice = f"Set doublings={fits[-1]}" if fits else "Choose another size, such as 28, 32, 64 or 224"
        of = f"{doublings} doublings" + (" by default" if given is None else "") + (f" from {base}" if base is not None else "")
        raise ModelError(
            f"dcgan: expected a height and width divisible by {2**exact}, got {rows} x {columns} ({of}). {advice}."
        )
    sizes = [(rows >> d, columns >> d) for d in range(doublings - 1, -1, -1)]
    if base is None:
        return [(rows >> doublings, columns >> doublings), *sizes]
    _check_count("dcgan", "base", base)
    if base > min(sizes[0]):
        raise ModelError(f"dcgan: expected a base of at most {min(sizes[0])} px, got {base}. It is only enlarged: lower it.")
    return [(base, base), *sizes]


def _block(c_in: int, c_out: int, size: tuple[int, int], upsample: str, eps: float) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if upsample == "nearest":
        layers["up"] = nn.Upsample(size=size, mode="nearest")
        layers["conv"] = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    else:
        layers["conv"] = nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=False)
    return nn.Sequential(layers | OrderedDict(bn=nn.BatchNorm2d(c_out, eps), relu=nn.LeakyReLU(0.2)))


def _last(c_in: int, wanted: Wanted, last: str) -> nn.Sequential:
    channels = wanted.shape[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=nn.Conv2d(c_in, channels, 3, padding=1))
    if last == "sigmoid":
        layers["sigmoid"] = nn.Sigmoid()
        return nn.Sequential(layers)
    if last.startswith("tanh"):
        layers["tanh"] = nn.Tanh()
    if last.endswith("norm"):
        layers["bn"] = nn.BatchNorm2d(channels, affine=False)
    elif last.endswith("each"):
        layers["each"] = nn.InstanceNorm2d(channels)
    layers["units"] = Units((0.5,), (0.5,)) if last == "tanh" else Units(wanted.mean, wanted.std)
    return nn.Sequential(layers)


def _normal_init(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_noise(name: str, z: Tensor, latent: int) -> None:
    if z.ndim != 2 or z.shape[1] != latent:
        raise ModelError(f"{name}: expected noise [b {latent}], got {list(z.shape)}. Draw it with `draw`.")


def _check_count(name: str, what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected {what} to be a positive whole number, got {value!r}.")


def _check_choice(name: str, option: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: expected {option} among {', '.join(known)}, got {value!r}. {near(str(value), known)}")
