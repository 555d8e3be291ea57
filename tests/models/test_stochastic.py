"""The view `stochastic`: which blocks can be left out, what a model without them answers, and that keys alone decide."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raykd import catalogue, models
from raykd.config import Teacher as TeacherSpec
from raykd.errors import ConfigError, ModelError, SignalError
from raykd.launch import shapes
from raykd.models.stochastic import skippable, stochastic, without
from raykd.roles.network import Facts, Tapped
from raykd.signals import Signal, wires

CPU = torch.device("cpu")
FACTS = Facts(32, 10, (3, 32, 32), "cifar10")
BLOCKS = {  # model -> number of blocks that add onto an input of their own shape
    "cifar_resnet20": 7,
    "crd_resnet20": 7,
    "crd_resnet50": 12,
    "wrn_16_2": 3,
    "mobilenetv2": 10,
    "torchvision:resnet18": 5,
    "torchvision:mobilenet_v2": 10,
    "torchvision:convnext_tiny": 18,
    "timm:resnet18": 5,
    "timm:seresnet18": 5,
    "timm:regnetx_002": 9,
    "timm:vit_tiny_patch16_224": 12,
    "timm:mixer_s16_224": 8,
}


def side(name):
    return 224 if ":" in name else 32


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_any_family_are_found(name, device):
    with torch.device(device):
        model = models.build(name, 10)
    before = {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
    found = skippable(model, (3, side(name), side(name)))
    assert len(found) == BLOCKS[name]
    assert {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()} == before
    order = [n for n, _ in model.named_modules()]
    assert found == sorted(found, key=order.index)


@pytest.mark.parametrize("name", ["vgg8", "crd_resnet8x4", "shufflenetv2", "torchvision:densenet121"])
def test_a_model_without_such_blocks_is_refused(name):
    with torch.device("meta"):
        model = models.build(name, 10)
    with pytest.raises(ModelError, match=r"expected residual blocks .* found none\. Choose a residual network"):
        skippable(model, (3, side(name), side(name)))


class Odd(nn.Module):
    """Blocks that keep their shape: one residual, one that is none, one that scales its input, one that runs twice."""

    def __init__(self):
        super().__init__()
        self.residual, self.plain, self.scaled, self.twice = (Part(kind) for kind in ("add", "plain", "scale", "add"))
        self.head = nn.Linear(3, 10)

    def forward(self, x):
        x = self.twice(self.twice(self.scaled(self.plain(self.residual(x)))))
        return self.head(x.mean((2, 3)))


class Part(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.conv(x)
        return {"add": lambda: F.relu(x + y), "plain": lambda: F.relu(y), "scale": lambda: 0.5 * x + y}[self.kind]()


def test_only_what_hands_its_input_on_is_a_block():
    assert skippable(Odd(), (3, 8, 8)) == ["residual"]


@torch.no_grad()
def plain_cifar_resnet(model, images, left_out):
    """A CIFAR ResNet's forward, written out, without some blocks."""
    x = model.relu(model.bn1(model.conv1(images)))
    for name in ("layer1", "layer2", "layer3"):
        for place, block in enumerate(getattr(model, name)):
            if f"{name}.{place}" not in left_out:
                y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
                x = torch.relu(y + block.shortcut(x))
    return model.linear(x.mean((2, 3)))


def test_without_leaves_blocks_out_and_puts_them_back():
    torch.manual_seed(0)
    model = models.build("cifar_resnet20", 10).eval()
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        whole = model(images)
        for left_out in (["layer1.1"], ["layer1.0", "layer2.2", "layer3.1"], skippable(model, (3, 32, 32))):
            with without(model, left_out):
                seen = model(images)
            torch.testing.assert_close(seen, plain_cifar_resnet(model, images, left_out), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(seen, whole, atol=1e-3)
        assert torch.equal(model(images), whole)
        with pytest.raises(RuntimeError, match="halt"), without(model, ["layer1.1"]):
            raise RuntimeError("halt")
        assert torch.equal(model(images), whole)


def draws(rule, rate, count=4000):
    blocks = [f"b{k}" for k in range(4)]
    generator = torch.Generator().manual_seed(0)
    seen = [stochastic(blocks, generator, drop_rate=rate, drop_rule=rule) for _ in range(count)]
    return [sum(block in found for found in seen) / count for block in blocks]


def test_the_rules():
    np.testing.assert_allclose(draws("uniform", 0.3), [0.3] * 4, atol=0.03)
    np.testing.assert_allclose(draws("linear", 0.4), [0.1, 0.2, 0.3, 0.4], atol=0.03)
    assert draws("uniform", 0.0, 10) == [0.0] * 4
    for wrong in ({"drop_rate": 1.0}, {"drop_rate": -0.1}, {"drop_rule": "none"}):
        with pytest.raises(ConfigError, match="expected"):
            stochastic(["b"], torch.Generator(), **wrong)


def signals(**options):
    given = {"drop_rate": 0.5, "drop_rule": "uniform"} | options
    wired = wires(
        ("teacher_logits", "teacher_logits_stochastic", "teacher_feature_stochastic"),
        {"teacher": ("stage1",)},
        given,
        catalogue.derived(),
        catalogue.views(),
    )
    return [s for wire in wired for s in wire.signals]


def tapped(wanted, name="cifar_resnet20"):
    torch.manual_seed(0)
    return Tapped(TeacherSpec(model=name), models.build(name, 10).eval(), wanted, FACTS, CPU)


def test_a_view_is_a_forward_of_its_own():
    plain, logits, feature = signals()
    model = tapped([plain, logits, feature])
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        whole = model(images)
        one, again, other = model(images, key=1), model(images, key=1), model(images, key=2)
    assert set(whole) == {"logits"}, "without a batch's key there is no view"
    assert set(one) == {"logits", logits.key, feature.key}
    assert torch.equal(one["logits"], whole["logits"])
    assert torch.equal(one[logits.key], again[logits.key])
    assert not torch.equal(one[logits.key], other[logits.key])
    inputs = model.inputs(images)
    masks = [plain_cifar_resnet(model.model, inputs, left_out) for left_out in subsets(skippable(model.model, (3, 32, 32)))]
    assert min((one[logits.key] - mask).abs().max() for mask in masks) < 1e-5
    assert one[feature.key].shape == (4, 16, 32, 32)
    with torch.no_grad():
        alone = tapped([logits])(images, key=1)
    assert set(alone) == {logits.key}
    assert torch.equal(alone[logits.key], one[logits.key])


def subsets(blocks):
    return [[b for k, b in enumerate(blocks) if number >> k & 1] for number in range(2 ** len(blocks))]


def test_views_with_other_options_are_drawn_apart():
    some, many = signals(drop_rate=0.1)[1], signals(drop_rate=0.9)[1]
    assert some.key != many.key
    model = tapped([some, many])
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = model(images, key=3)
    assert not torch.equal(found[some.key], found[many.key])


def test_wiring():
    found = signals(drop_rate=0.25, drop_rule="linear")[1]
    assert found == Signal("logits", None, (("drop_rate", 0.25), ("drop_rule", "linear")), "stochastic")
    method = catalogue.method("mt-nguyen")
    assert {"drop_rate", "drop_rule", "temperature"} <= set(method.options)
    assert method.defaults()["drop_rate"] == 0.2
    with pytest.raises(SignalError, match="expected the view stochastic of a teacher, got it of student"):
        wires(("student_logits_stochastic",), {}, {}, catalogue.derived(), catalogue.views())
    with pytest.raises(ModelError, match="not tapped here"):
        tapped([Signal("logits", None, (), "rot90")])
    with pytest.raises(ConfigError, match="drop_rate"):
        tapped([signals(drop_rate=2.0)[1]])


def test_shapes_are_known_without_values():
    spec = TeacherSpec(model="cifar_resnet20")
    plain, logits, feature = signals()
    found = shapes.signals(shapes.model(spec, FACTS), [plain, logits, feature], FACTS, batch=8)
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "logits": (8, 10),
        logits.key: (8, 10),
        feature.key: (8, 16, 32, 32),
    }
    with pytest.raises(ModelError, match="found none"):
        shapes.signals(shapes.model(dataclasses.replace(spec, model="vgg8"), FACTS), [logits], FACTS, batch=8)
