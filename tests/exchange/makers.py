"""Two teachers of unlike kind, images that somebody makes, a loss on what the teachers say; and its gradient without raykd."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from raykd import models
from raykd.config import Teacher as TeacherSpec
from raykd.exchange.asking import Ask, Asks
from raykd.exchange.codec import parse
from raykd.roles.network import Facts
from raykd.signals import Signal
from tests.roles.nets import Tiny

FACTS = Facts(100, 10, (3, 32, 32), "cifar10")
NORMS = ["bn1", "layer1.0.bn1", "layer3.2.bn2"]
WANTED = {
    "big": (Signal("logits"), Signal("embedding"), *(Signal("norm", n) for n in NORMS)),
    "small": (Signal("logits"), Signal("feature", "stage2"), Signal("attention", "stage1", (("power", 2.0),))),
}
STATS = {"big": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "small": ((0.5,), (0.25,))}
SMALL_SIZE = 20


def specs(folder, real=None) -> dict[str, TeacherSpec]:
    """A ResNet-20, with the real weights where they are, and a small net that sees the images smaller; both from files."""
    torch.manual_seed(0)
    big, small = models.build("cifar_resnet20", 10), Tiny(10, norm=True)
    for model in (big, small):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    torch.save(big.state_dict(), folder / "big.pt")
    torch.save(small.state_dict(), folder / "small.pt")
    weights = folder / "big.pt" if real is None else real / "weights" / "cifar10" / "resnet20-12fca82f.th"
    return {
        "big": TeacherSpec(model="cifar_resnet20", weights=str(weights), normalise="imagenet", cpus=0.5, replicas=2),
        "small": TeacherSpec(
            model="tests.roles.nets:tiny",
            options={"norm": True},
            weights=str(folder / "small.pt"),
            normalise=STATS["small"],
            input_size=(SMALL_SIZE, SMALL_SIZE),
            cpus=0.5,
            replicas=2,
        ),
    }


def asks(name: str, codec: str = "dense") -> Asks:
    """What a source is asked for beside: logits."""
    return Asks((Ask(name, (Signal("logits"),), parse(codec)),))


def maker(seed: int = 1) -> nn.Module:
    """Makes images out of noise; always the same."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.ConvTranspose2d(4, 8, 4, 4), nn.Tanh(), nn.ConvTranspose2d(8, 3, 2, 2), nn.Sigmoid())


def noise(count: int = 6):
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(2))


def loss_of(answers) -> torch.Tensor:
    """Every signal takes part, and each teacher's place depends on the other's."""
    big, small = answers["big"], answers["small"]
    soft = F.kl_div(big["logits"].log_softmax(1), small["logits"].softmax(1), reduction="batchmean")
    moments = [big[f"norm@{n}"] for n in NORMS]
    norms = sum((m[0] - m[2]).square().sum() + (m[1] - m[3]).abs().sum() for m in moments)
    maps = small["attention@stage1(power=2.0)"].square().mean() + small["feature@stage2"].abs().mean()
    return soft + 0.1 * norms + maps - big["embedding"].std(0).mean()


def plain_gradient(folder, real=None):
    """The loss, and its gradient at images and maker, by models and hooks of torch alone."""
    both = specs(folder, real)
    big = models.build("cifar_resnet20", 10)
    models.load_weights(big, both["big"].weights)
    small = Tiny(10, norm=True)
    small.load_state_dict(torch.load(folder / "small.pt", weights_only=True))
    answers = {"big": {}, "small": {}}

    def note_norm(name):
        def note(module, given):
            x = given[0]
            answers["big"][f"norm@{name}"] = torch.stack(
                [x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False), module.running_mean, module.running_var]
            )

        return note

    for name in NORMS:
        big.get_submodule(name).register_forward_pre_hook(note_norm(name))
    models.classifier(big).register_forward_pre_hook(lambda _, given: answers["big"].update(embedding=given[0].flatten(1)))
    small.stage1.register_forward_hook(
        lambda _m, _a, x: answers["small"].update({"attention@stage1(power=2.0)": x.square().mean(1)})
    )
    small.stage2.register_forward_hook(lambda _m, _a, x: answers["small"].update({"feature@stage2": x}))
    make = maker()
    images = make(noise())
    images.retain_grad()

    def seen(name, size=None):
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in STATS[name])
        x = images if size is None else F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return (x - mean) / std

    for name, model in (("big", big), ("small", small)):
        model.eval().requires_grad_(False)
        answers[name]["logits"] = model(seen(name, SMALL_SIZE if name == "small" else None))
    loss = loss_of(answers)
    loss.backward()
    return loss.detach(), [images.grad, *(p.grad for p in make.parameters())]


def gradient(ask, between=lambda: None):
    """The same by `ask(images)`; `between` happens when the signals are there and the gradient is not."""
    make = maker()
    images = make(noise())
    images.retain_grad()
    loss = loss_of(ask(images))
    between()
    loss.backward()
    return loss.detach(), [images.grad, *(p.grad for p in make.parameters())]


def error(found, expected) -> float:
    """The largest relative error of a list of tensors, each in its own norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected))
