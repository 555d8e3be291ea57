from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ModelError, SignalError
from raykd.models import Taps, build, classifier, layers, resolve
from raykd.models import taps as taps_module


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return build("torchvision:resnet18", 10).eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Awkward(nn.Module):
    """A module of every kind that taps have to cope with."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.pair = Pair()
        self.unused = nn.Linear(4, 4)
        self.list = nn.ModuleList([nn.Identity()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += 1  # changes what a tap of `first` saw
        y = self.second(input=y)
        a, b = self.pair(y)
        return self.head(self.list[0](a + b))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, -2 * x


class Verbose(nn.Module):
    """Answers with a dict, like many language models."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.sum(), "logits": self.head(x)}


def test_docstring() -> None:
    assert doctest.testmod(taps_module).failed == 0


def test_inplace_activation_does_not_reach_a_tap_of_what_it_overwrites(resnet18: nn.Module) -> None:
    bn, relu = resnet18.bn1, resnet18.relu
    relu.inplace = True
    with Taps(resnet18, ["bn1", "stem"]) as taps:
        resnet18(IMAGES)
        got = taps.take()
    x = F.conv2d(IMAGES, resnet18.conv1.weight, stride=2, padding=3)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    by_hand = (x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]
    assert got["bn1"].min() < 0
    assert torch.allclose(got["bn1"], by_hand, atol=1e-5)
    assert torch.equal(got["stem"], got["bn1"].relu())
    assert not relu.inplace


def test_taps_do_not_change_what_the_model_computes() -> None:
    torch.manual_seed(0)
    model = build("torchvision:resnet18", 10).eval()
    plain = model(IMAGES)
    with Taps(model, ["stage1", "bn1", "embedding"]):
        assert torch.equal(model(IMAGES), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tapping_logits_alone_leaves_inplace_activations_on() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    Taps(model, ["logits"])
    assert model[1].inplace
    Taps(model, ["logits", "0"])
    assert not model[1].inplace


def test_a_module_that_fires_twice_is_addressed_by_firing(resnet18: nn.Module) -> None:
    block = resnet18.layer1[0]
    names = ["layer1.0.relu", "layer1.0.relu#1", "layer1.0.relu#2", "layer1.0.relu#2", "layer1.0.relu#3", "layer1.0"]
    with Taps(resnet18, [*names, "layer1:in"]) as taps:
        resnet18(IMAGES)
        first = block.bn1(block.conv1(taps["layer1:in"]))
        assert torch.allclose(taps["layer1.0.relu#1"], first.relu())
        assert torch.equal(taps["layer1.0.relu#2"], taps["layer1.0"])
        with pytest.raises(SignalError, match=r"got 2\. Choose one of layer1\.0\.relu#1 \.\.\. layer1\.0\.relu#2"):
            taps["layer1.0.relu"]
        with pytest.raises(SignalError, match="got 2 firing"):
            taps["layer1.0.relu#3"]


def test_input_of_a_firing(resnet18: nn.Module) -> None:
    with Taps(resnet18, ["layer1.0.relu:in#1", "layer1.0.bn1"]) as taps:
        resnet18(IMAGES)
        assert torch.equal(taps["layer1.0.relu:in#1"], taps["layer1.0.bn1"])


def test_functional_inplace_operation_is_found(resnet18: nn.Module) -> None:
    with Taps(resnet18, ["layer1.0.bn2", "stage1"]) as taps:  # torchvision: out += identity
        resnet18(IMAGES)
        assert taps["stage1"].shape == (2, 64, 8, 8)
        with pytest.raises(SignalError, match=r"layer 'layer1\.0\.bn2'.*in-place"):
            taps["layer1.0.bn2"]


def test_copies_survive_inplace_operations() -> None:
    model = Awkward()
    x = torch.ones(3, 4)
    with Taps(model, ["first"], copy=True) as taps:
        model(x)
        assert torch.equal(taps["first"], model.first(x))
        assert taps["first"].requires_grad


def test_keyword_inputs_tuples_and_unused_modules() -> None:
    model = Awkward()
    with Taps(model, ["second:in", "pair", "unused", "list.0"]) as taps:
        out = model(torch.ones(3, 4))
        assert torch.equal(model.head(taps["list.0"]), out)
        assert taps["second:in"].shape == (3, 4)
        with pytest.raises(SignalError, match="expected a tensor, got tuple"):
            taps["pair"]
        with pytest.raises(SignalError, match=r"'unused'.*never fired"):
            taps["unused"]


def test_logits_inside_a_dict() -> None:
    model = Verbose()
    with Taps(model, ["logits"]) as taps:
        assert taps is not None
        out = model(torch.ones(3, 4))
        assert taps["logits"] is out["logits"]


@pytest.mark.parametrize(
    "name, told",
    [
        ("layer2.0.bn3", "Did you mean 'layer2.0.bn[12]'"),
        ("stage5", "Did you mean 'stage"),
        ("stage-5", "Did you mean 'stage"),
        ("stage1:pre", "Did you mean 'stage1'"),
        ("", "found neither"),
        ("bn1#0", "counted from 1"),
        ("bn1#x", "counted from 1"),
    ],
)
def test_wrong_names_are_refused_at_construction(resnet18: nn.Module, name: str, told: str) -> None:
    with pytest.raises(SignalError, match=told):
        Taps(resnet18, ["stage1", name])


def test_containers_that_never_fire_are_refused() -> None:
    with pytest.raises(SignalError, match=r"children: list\.0"):
        Taps(Awkward(), ["list"])
    assert "list" not in layers(Awkward())


def test_reading_a_layer_that_is_not_tapped(resnet18: nn.Module) -> None:
    with Taps(resnet18, ["stage1"]) as taps, pytest.raises(SignalError, match="Did you mean 'stage1'"):
        taps["stage2"]


def test_persistent_form_holds_the_latest_forward_only() -> None:
    model = build("cifar_resnet8", 4).eval()
    taps = Taps(model, ["embedding", "logits"])
    with pytest.raises(SignalError, match="taps are closed"):
        taps.take()
    taps.open().open()
    for _ in range(3):
        model(torch.zeros(2, 3, 32, 32))
    out = model(IMAGES)
    taken = taps.take()
    assert list(taken) == taps.names == ["embedding", "logits"]
    assert taken["logits"] is out
    assert torch.equal(classifier(model)(taken["embedding"]), out)
    with pytest.raises(SignalError, match="no forward has run"):
        taps.take()
    taps.close()
    model(IMAGES)
    with pytest.raises(SignalError, match="taps are closed"):
        taps.take()


def test_what_fires_outside_a_forward_does_not_count() -> None:
    model = build("cifar_resnet8", 4).eval()
    with Taps(model, ["embedding", "stem", "stage1"]) as taps:
        model(IMAGES)
        classifier(model)(torch.zeros(5, 64))  # as SRRL and SimKD do
        assert taps["embedding"].shape == (2, 64)
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 5, 32, 32))
        model.relu(IMAGES)
        with pytest.raises(SignalError, match=r"'stem'.*never fired"):
            taps["stem"]


def test_gradient_flows_through_a_tap() -> None:
    model = build("cifar_resnet8", 4)
    with Taps(model, ["stage1"]) as taps:
        model(IMAGES)
        taps["stage1"].sum().backward()
    assert model.conv1.weight.grad is not None
    assert model.linear.weight.grad is None


def test_inference_mode_works() -> None:
    model = build("cifar_resnet8", 4).eval()
    with torch.inference_mode(), Taps(model, ["stage-1"]) as taps:
        model(IMAGES)
        assert taps["stage-1"].shape == (2, 64, 8, 8)


def test_copies_of_a_tapped_model_are_independent() -> None:
    model = build("cifar_resnet8", 4)
    with Taps(model, ["stage1"]) as taps:
        model(IMAGES)
        held = taps["stage1"]
        twin = copy.deepcopy(model)  # would fail if held tensors, which are no leaves, were copied too
        pickle.dumps(model)
        twin(2 * IMAGES)
        assert taps["stage1"] is held


def test_resolve_tells_where_a_name_leads() -> None:
    model = build("cifar_resnet20", 10)
    found = {name: resolve(model, name) for name in ("stage1", "stage-1:pre", "embedding", "logits", "stage2:in#1")}
    told = {name: (layer.path, layer.side, layer.call, layer.flat) for name, layer in found.items()}
    assert told == {
        "stage1": ("layer1", "out", None, False),
        "stage-1:pre": ("layer3.2.relu2", "in", None, False),
        "embedding": ("linear", "in", None, True),
        "logits": ("", "out", None, False),
        "stage2:in#1": ("layer2", "in", 1, False),
    }


def test_model_without_a_linear_classifier() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert layers(model) == ["logits", "0"]
    with pytest.raises(ModelError, match="got none"):
        classifier(model)
