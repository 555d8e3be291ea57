"""Models with branches: branch 0 is the plain model, the rest is what the structure says, on any backbone and on meta."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raykd.errors import ModelError, SignalError
from raykd.models import Branched, Taps, branched, build, stages
from raykd.models.slimmable import channels, grid

SHAPE = (3, 32, 32)
FAMILIES = [
    "cifar_resnet20",
    "crd_resnet20",
    "wrn_16_1",
    "vgg8",
    "mobilenetv2",
    "shufflenetv1",
    "shufflenetv2",
    "timm:resnet18",
    "torchvision:resnet18",
]
IMAGES = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))


def make(name, classes=10, **fixed):
    return lambda **options: build(name, classes, **fixed | options)


def small(spec, name="crd_resnet8", classes=10, seed=0):
    torch.manual_seed(seed)
    return branched(make(name, classes), spec, classes, SHAPE)


def count_forwards(model, path):
    seen = []
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    return seen


# ---------------------------------------------------------------- split


@pytest.mark.parametrize("name", FAMILIES)
def test_a_split_of_any_family(name):
    torch.manual_seed(0)
    plain = make(name)()
    model = small({"kind": "split", "count": 3}, name)
    assert isinstance(model, Branched)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.plain.state_dict().values()))
    split = stages(plain)[-2]
    for mode in (True, False):
        plain.train(mode)
        model.train(mode)
        runs = count_forwards(model.plain, model.at.path)
        logits = model(IMAGES)
        assert len(runs) == 1
        assert [own.shape for own in logits] == [(4, 10)] * 3
        assert torch.equal(logits[0], plain(IMAGES))
    assert not torch.allclose(logits[0], logits[1])
    assert model.at.name == split
    for i in range(3):  # deployed by itself it answers the same
        alone = make(name)().eval()
        alone.load_state_dict(model.state_of(i), strict=True)
        assert torch.equal(alone(IMAGES), logits[i])
    for tail in model.tails:  # with the plain model's weights a tail is the plain model
        tail.load_state_dict({k: model.plain.state_dict()[k] for k in tail.state_dict()})
    assert all(torch.equal(own, logits[0]) for own in model(IMAGES))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_each_branch_reach_the_trunk_and_its_own_tail_alone(name):
    model = small({"kind": "split", "count": 3}, name)
    first = next(n for n, _ in model.named_parameters())
    for i, logits in enumerate(model(IMAGES)):
        model.zero_grad(set_to_none=True)
        logits.square().sum().backward(retain_graph=True)
        reached = {n for n, p in model.named_parameters() if p.grad is not None}
        assert first in reached
        own, other = (f"tails.{i - 1}." if i else "plain."), {"tails.0.", "tails.1."} - {f"tails.{i - 1}."}
        assert {n for n, _ in model.named_parameters() if n.startswith(own)} <= reached or i == 0
        assert not any(n.startswith(tuple(other)) for n in reached)


@pytest.mark.parametrize("spec", [{"kind": "split", "count": 3}, {"kind": "exits"}, {"kind": "heads"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_on_meta_with_the_same_names(name, spec):
    with torch.device("meta"):
        model = branched(make(name), spec, 10, SHAPE)
        answers = model(torch.zeros(2, *SHAPE))
    assert all(p.is_meta for p in model.parameters())
    real = small(spec, name)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert [a.shape[1:] for a in answers] == [a.shape[1:] for a in real.eval()(IMAGES)]


def test_a_split_by_hand():
    """Against a forward written out from the modules."""
    model = small({"kind": "split", "count": 2, "at": "stage1"}, "cifar_resnet8")
    plain, tail = model.plain, model.tails[0]
    assert {n.split(".")[0] for n, _ in tail.named_parameters()} == {"layer2", "layer3", "linear"}
    trunk = plain.layer1(plain.relu(plain.bn1(plain.conv1(IMAGES))))
    by_hand = tail.linear(tail.layer3(tail.layer2(trunk)).mean((2, 3)))
    torch.testing.assert_close(model(IMAGES)[1], by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_rescale_divides_the_trunks_gradient_only(count):
    plain, scaled = (small({"kind": "split", "count": count, "rescale": r}).double() for r in (False, True))
    for model in (plain, scaled):
        sum(own.square().sum() for own in model(IMAGES.double())).backward()
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters()):
        shared = name.startswith(("plain.conv1", "plain.bn1", "plain.layer1", "plain.layer2"))
        torch.testing.assert_close(b.grad, a.grad / (count if shared else 1), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(plain(IMAGES.double()), scaled(IMAGES.double())))


def test_views_of_their_own():
    model = small({"kind": "split", "count": 3, "views": "own"}).eval()
    views = [IMAGES, IMAGES.flip(3), IMAGES + 1]
    answers = model(IMAGES, views)
    for i, view in enumerate(views):
        alone = make("crd_resnet8")().eval()
        alone.load_state_dict(model.state_of(i))
        assert torch.equal(alone(view), answers[i])
    with Taps(model, [model.path(i, layer) for i in range(3) for layer in ("stage1", "stage-1", "layer1.0.relu1:in")]) as taps:
        model(IMAGES, views)
        seen = taps.take()
    with Taps(model.plain, ["stage1", "layer1.0.relu1:in"]) as taps:
        for i, view in enumerate(views):
            model.plain(view)
            assert torch.equal(seen[model.path(i, "stage1")], taps["stage1"])
            assert torch.equal(seen[model.path(i, "layer1.0.relu1:in")], taps["layer1.0.relu1:in"])
    assert [model.path(i, "stage1") for i in range(3)] == [f"plain.layer1#{i + 1}" for i in range(3)]
    same = model(IMAGES)
    assert torch.equal(same[0], answers[0])
    assert not torch.equal(same[1], answers[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_find_the_layers_of_every_branch(name):
    model = small({"kind": "split", "count": 2}, name).eval()
    every = [*stages(model.plain), "embedding"]
    wanted = {(i, layer): model.path(i, layer) for i in range(2) for layer in every}
    with Taps(model, sorted(set(wanted.values()))) as taps:
        logits = model(IMAGES)
        seen = taps.take()
    for i in range(2):
        alone = make(name)().eval()
        alone.load_state_dict(model.state_of(i))
        with Taps(alone, every) as taps:
            assert torch.equal(alone(IMAGES), logits[i])
            for layer in every:
                assert torch.equal(seen[wanted[i, layer]], taps[layer])
    assert wanted[0, "stage1"] == wanted[1, "stage1"]
    assert wanted[0, every[-2]] != wanted[1, every[-2]]


def test_addresses_keep_sides_and_firings():
    model = small({"kind": "split"}, "torchvision:resnet18")
    assert model.path(0, "layer1.0.relu#2") == model.path(1, "layer1.0.relu#2") == "plain.layer1.0.relu#2"
    assert model.path(1, "layer4.0.relu#2") == "tails.0.layer4.0.relu#2"
    assert model.path(1, "stage-1:in") == "tails.0.layer4:in"
    assert model.path(1, "logits") == "tails.0"
    assert model.path(0, "logits") == "plain"
    assert model.path(0, "embedding") == "embedding"
    with pytest.raises(SignalError, match="Did you mean"):
        model.path(1, "layer9")
    with pytest.raises(ModelError, match="one of 0 to 1"):
        model.path(2, "stage1")


def test_students_of_other_widths():
    options = [{"widths": (16, 16, 24, 48)}, {"widths": [16, 16, 8, 8]}]
    model = small({"kind": "split", "at": "stage1", "options": options}).eval()
    logits = model(IMAGES)
    for i, own in enumerate([{}, *options]):
        alone = make("crd_resnet8", **own)().eval()
        alone.load_state_dict(model.state_of(i))
        assert torch.equal(alone(IMAGES), logits[i])
    with Taps(model, [model.path(2, "stage-1"), model.path(2, "stage2")]) as taps:
        model(IMAGES)
        assert [v.shape[1] for v in taps.take().values()] == [8, 8]


def test_widths_of_the_zoo():
    assert build("crd_resnet8", 10, widths=(4, 8, 12, 20)).fc.in_features == 20
    assert build("cifar_resnet8", 10, widths=(4, 8, 12, 20))(IMAGES).shape == (4, 10)
    for name, wrong in (("crd_resnet8", (1, 2, 3)), ("cifar_resnet8", (16, 16, 32, 8)), ("crd_resnet8", (0, 1, 1, 1))):
        with pytest.raises(ModelError, match=r"expected .*widths"):
            build(name, 10, widths=wrong)


@pytest.mark.parametrize(
    "name", ["timm:vit_tiny_patch16_224", "timm:convnext_atto", "torchvision:densenet121", "timm:mobilenetv3_small_050"]
)
def test_other_networks_can_be_cut_too(name):
    options = {"img_size": 32} if "vit" in name else {}
    torch.manual_seed(0)
    model = branched(make(name, **options), {"kind": "split"}, 10, SHAPE).eval()
    logits = model(IMAGES)
    for i in range(2):
        alone = make(name, **options)().eval()
        alone.load_state_dict(model.state_of(i))
        assert torch.equal(alone(IMAGES), logits[i])


class Odd(nn.Module):
    """Goes on from more than its last stage, changes a feature in place, and uses a parameter before and after."""

    def __init__(self, way="plain"):
        super().__init__()
        self.way = way
        self.layer1, self.layer2, self.layer3 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        y = self.layer1(x)
        if self.way == "both":
            y = y * self.scale
        z = self.layer2(y)
        if self.way == "inplace":
            z.add_(1)
        z = self.layer3(z)
        z = z + y if self.way == "skip" else z * self.scale if self.way == "both" else z
        return self.head(z.mean((2, 3)))


@pytest.mark.parametrize("way", ["skip", "inplace"])
def test_whatever_happens_between_modules_happens_in_a_tail(way):
    torch.manual_seed(0)
    model = branched(lambda: Odd(way), {"kind": "split", "count": 3}, 10, SHAPE)
    logits = model(IMAGES)
    sum(own.sum() for own in logits).backward()
    for i in range(3):
        alone = Odd(way)
        alone.load_state_dict(model.state_of(i))
        assert torch.equal(alone(IMAGES), logits[i])


@pytest.mark.parametrize(
    "spec, name, told",
    [
        ({"kind": "spilt"}, "crd_resnet8", "Did you mean 'split'"),
        ({"kind": "split", "cuont": 3}, "crd_resnet8", "Did you mean 'count'"),
        ({"kind": "split", "classes": 4}, "crd_resnet8", "classes=4"),
        ({"kind": "split", "count": 1}, "crd_resnet8", "at least 2"),
        ({"kind": "split", "at": "stage7"}, "crd_resnet8", "Did you mean 'stage"),
        ({"kind": "split", "at": ("stage1", "stage2")}, "crd_resnet8", "to be one layer"),
        ({"kind": "split", "at": "embedding"}, "crd_resnet8", "runs once"),
        ({"kind": "split", "at": "logits"}, "crd_resnet8", "runs once"),
        ({"kind": "split", "at": "layer1.0.relu"}, "torchvision:resnet18", "runs once"),
        ({"kind": "split", "views": "all"}, "crd_resnet8", "'same' or 'own'"),
        ({"kind": "split", "count": 3, "options": [{}]}, "crd_resnet8", "2 further branches, got 1"),
        ({"kind": "split", "options": [{"widths": (16, 16, 32, 64)}]}, "wrn_10_1", "option among"),
        ({"kind": "split", "options": [{"widths": (16, 8, 32, 64)}]}, "crd_resnet8", "expected the trunk's layer1"),
        ({"kind": "split", "at": "stem", "options": [{"widths": (16, 8, 8, 8)}]}, "crd_resnet8", None),
        ({"kind": "exits", "at": "stages1"}, "crd_resnet8", "'hidden', 'stages'"),
        ({"kind": "exits", "at": ("stage9",)}, "crd_resnet8", "Did you mean 'stage"),
        ({"kind": "exits", "at": ("stage2", "stage1")}, "crd_resnet8", "order in which they run"),
        ({"kind": "widths", "least": 1.0}, "crd_resnet8", "below 1"),
        ({"kind": "widths"}, "cifar_resnet8", "runs at width 0.25"),
        ({"kind": "widths"}, "shufflenetv2", "concatenates"),
        ({"kind": "widths", "count": 3, "least": 0.5}, "torchvision:resnext50_32x4d", "whole groups of 4 channels"),
        ({"kind": "widths"}, "timm:vit_tiny_patch16_224", "BatchNorm2d and Linear layers only"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(spec, name, told):
    for device in ("meta", "cpu"):
        with torch.device(device):
            if told is None:
                branched(make(name), spec, 10, SHAPE)
                continue
            with pytest.raises(ModelError, match=told):
                branched(make(name), spec, 10, SHAPE)


def test_models_that_cannot_be_cut():
    with pytest.raises(ModelError, match="two stages or more, got stage1"):
        branched(lambda: build("mlp", 10, hidden=(8,)), {"kind": "split"}, 10, SHAPE)
    with pytest.raises(ModelError, match="got scale on both"):
        branched(lambda: Odd("both"), {"kind": "split"}, 10, SHAPE)
    with pytest.raises(ModelError, match="got layer1 too"):
        branched(lambda: Odd("skip"), {"kind": "split", "rescale": True}, 10, SHAPE)
    wide = make("crd_resnet8", widths=(16, 16, 24, 48))
    with pytest.raises(ModelError, match="trunk's layer2"):
        branched(lambda **o: build("crd_resnet8", 10) if o else wide(), {"kind": "split", "options": [{"a": 1}]}, 10, SHAPE)


# ---------------------------------------------------------------- any kind


KINDS = [
    {"kind": "split", "count": 3},
    {"kind": "exits", "at": "stages", "classes": 4},
    {"kind": "heads", "outputs": 6},
    {"kind": "widths", "count": 4},
]


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec["kind"])
def test_copies_states_and_seeds(spec):
    model = small(spec)
    plain = build("crd_resnet8", 10)
    plain.load_state_dict(model.state_of(0), strict=True)
    twin = copy.deepcopy(model)
    other = small(spec, seed=5)
    other.load_state_dict(model.state_dict())
    again = pickle.loads(pickle.dumps(model))
    expected = None
    for found in (model, twin, other, again):
        torch.manual_seed(7)
        answers = found(IMAGES)
        expected = expected or answers
        assert all(torch.equal(a, b) for a, b in zip(answers, expected))
    assert torch.equal(expected[0], plain(IMAGES))
    assert set(dict(model.plain.named_modules())) >= set(dict(plain.named_modules()))
    twin.plain.conv1.weight.data.zero_()
    assert model.plain.conv1.weight.abs().sum() > 0
    with torch.no_grad():
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    assert len(averaged(IMAGES)) == model.count
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_threads_and_failures_do_not_mix_forwards():
    model = small({"kind": "split", "count": 3}).eval()
    inputs = [IMAGES + k for k in range(8)]
    expected = [model(images) for images in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model, inputs))
    assert all(torch.equal(a, b) for mine, theirs in zip(found, expected) for a, b in zip(mine, theirs))
    with pytest.raises(RuntimeError):
        model(IMAGES[:, :2])
    with pytest.raises(ModelError, match="Call the whole model"):
        model.tails[0](IMAGES)
    assert torch.equal(model(inputs[3])[2], expected[3][2])


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec["kind"])
def test_the_same_forward_taps_what_it_answers(spec):
    model = small(spec).eval()
    with Taps(model, [model.path(i, "logits") for i in range(model.count)]) as taps:
        answers = model(IMAGES)
        assert all(torch.equal(taps[model.path(i, "logits")], own) for i, own in enumerate(answers))


@pytest.mark.parametrize("spec", [*KINDS[1:], {"kind": "split"}], ids=lambda spec: spec["kind"])
def test_views_need_to_be_declared(spec):
    with pytest.raises(ModelError, match="expected no views"):
        small(spec)(IMAGES, [IMAGES, IMAGES])


def test_options_of_other_kinds_may_be_there_as_they_are():
    every = {"count": None, "at": None, "classes": 1, "outputs": 128, "options": (), "rescale": False, "least": 0.25}
    every |= {"resolutions": None, "views": "same"}
    assert [small({**every, "kind": kind}).count for kind in ("split", "exits", "heads", "widths")] == [2, 3, 2, 2]


@pytest.mark.parametrize("spec", KINDS[1:], ids=lambda spec: spec["kind"])
def test_what_is_not_deployed_by_itself(spec):
    with pytest.raises(ModelError, match="not"):
        small(spec).state_of(1)


# ---------------------------------------------------------------- exits and heads


@pytest.mark.parametrize("name", [*FAMILIES, "mlp"])
def test_exits_of_any_family(name):
    model = small({"kind": "exits", "at": "stages", "classes": 4}, name)
    every = stages(model.plain)
    assert model.count == 1 + len(every)
    logits = model(IMAGES)
    assert [own.shape[1] for own in logits] == [10] + [40] * len(every)
    logits[1].sum().backward()
    assert model.exits[0].linear.weight.grad is not None
    assert next(model.plain.parameters()).grad is not None
    assert all(p.grad is None for p in model.exits[1].parameters())


def test_an_exit_by_hand():
    model = small({"kind": "exits"}).eval()
    first, second = model.exits
    assert [m.weight.shape for m in first.blocks if isinstance(m, nn.Conv2d)] == [(32, 16, 3, 3), (64, 32, 3, 3)]
    assert [m.weight.shape for m in second.blocks if isinstance(m, nn.Conv2d)] == [(64, 32, 3, 3)]
    names = {layer: model.path(1, layer) for layer in ("stage1", "stage-1", "embedding", "logits")}
    assert names == {
        "stage1": "plain.layer1",
        "stage-1": "exits.0.blocks",
        "embedding": "exits.0.linear:in",
        "logits": "exits.0",
    }
    assert model.path(1, "stage3") == "exits.0.blocks"
    with Taps(model, list(names.values())) as taps:
        logits = model(IMAGES)
        x = taps[names["stage1"]]
        for k in (0, 3):
            conv, norm = first.blocks[k], first.blocks[k + 1]
            x = F.relu(norm(F.conv2d(x, conv.weight, stride=2, padding=1)))
        assert x.shape == (4, 64, 8, 8)
        torch.testing.assert_close(taps[names["stage-1"]], x)
        torch.testing.assert_close(taps[names["embedding"]], x.mean((2, 3)))
    torch.testing.assert_close(logits[1], first.linear(x.mean((2, 3))))
    with pytest.raises(ModelError, match="before its exit at 'stage1'"):
        model.path(1, "stage2")


def test_exits_with_views_of_their_own():
    model = small({"kind": "exits", "views": "own"}).eval()
    views = [IMAGES, IMAGES.flip(3), IMAGES + 1]
    names = {i: model.path(i, "stage1") for i in range(3)}
    deeper = {i: model.path(i, "stage2") for i in (0, 2)}
    with Taps(model, [*names.values(), *deeper.values()]) as taps:
        answers = model(IMAGES, views)
        seen = taps.take()
    with Taps(model.plain, ["stage1", "stage2"]) as taps:
        for i, view in enumerate(views):
            model.plain(view)
            assert torch.equal(seen[names[i]], taps["stage1"])
            assert i == 1 or torch.equal(seen[deeper[i]], taps["stage2"])
            if i:
                assert torch.equal(model.exits[i - 1](taps[f"stage{i}"]), answers[i])


def test_a_head_by_hand():
    model = small({"kind": "heads", "outputs": 6})
    with Taps(model, [model.path(1, "embedding"), model.path(1, "stage-1")]) as taps:
        logits = model(IMAGES)
        seen = taps.take()
    features = seen["embedding"]
    first, _, second = model.heads[0]
    torch.testing.assert_close(features, seen["plain.layer3"].mean((2, 3)))
    torch.testing.assert_close(
        logits[1], F.linear(F.linear(features, first.weight, first.bias).relu(), second.weight, second.bias)
    )
    assert first.weight.shape == (64, 64)
    assert model.path(1, "logits") == "heads.0"


# ---------------------------------------------------------------- widths


WIDE = ["crd_resnet8", "wrn_10_1", "vgg8", "mobilenetv2", "torchvision:resnet18", "torchvision:resnext50_32x4d", "mlp"]


@pytest.mark.parametrize("name", WIDE)
def test_widths_of_any_family(name):
    spec = {"kind": "widths", "count": 4, "resolutions": ()} | ({"least": 0.5} if "resnext" in name else {})
    if "resnext" in name:
        spec["count"] = 2
    with torch.device("meta"):
        on_meta = branched(make(name), spec, 10, SHAPE)
    model = small(spec, name)
    assert {n: p.shape for n, p in on_meta.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    torch.manual_seed(0)
    plain = make(name)()
    for mode in (True, False):
        model.train(mode)
        plain.train(mode)
        logits = model(IMAGES)
        assert torch.equal(logits[0], plain(IMAGES))
        assert [own.shape for own in logits] == [(4, 10)] * spec["count"]
        assert not torch.allclose(logits[0], logits[1])


def conv(x, weight):
    """3x3, padded with zeros, written out: [b c h w], [o c 3 3] to [b o h w]."""
    b, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = np.zeros((b, weight.shape[0], h, w))
    for o in range(weight.shape[0]):
        for i in range(h):
            for j in range(w):
                found[:, o, i, j] = (padded[:, :, i : i + 3, j : j + 3] * weight[o]).sum((1, 2, 3))
    return found


def test_a_narrow_network_by_explicit_loops():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(8, 5)).double()
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 1.5)
        net[1].bias.uniform_(-1, 1)
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    model = branched(lambda: net, {"kind": "widths", "count": 3, "least": 0.5, "resolutions": ()}, 5, (3, 6, 6)).double()
    own = model.norms[0]
    assert torch.equal(own.weight, net[1].weight[:4])
    with torch.no_grad():
        own.weight.mul_(2)

    def by_hand(count, weight, bias):
        p = {n: v.detach().numpy() for n, v in net.named_parameters()}
        x = conv(images.numpy(), p["0.weight"][:count]) + p["0.bias"][:count, None, None]
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        x = (x - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None] * weight[:, None, None] + bias[:, None, None]
        return np.maximum(x, 0).mean((2, 3)) @ p["5.weight"][:, :count].T + p["5.bias"], mean

    answers = model(images)
    expected, mean = by_hand(4, own.weight.detach().numpy(), own.bias.detach().numpy())
    np.testing.assert_allclose(answers[1].detach().numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(own.running_mean.numpy(), 0.1 * mean, atol=1e-10)
    model.eval()  # width 0.5 + 0.5 / 2 of 8 channels
    full = {n: v.detach().numpy() for n, v in net[1].named_parameters()}
    before = net[1].running_mean.clone()
    expected, _ = by_hand(6, full["weight"][:6], full["bias"][:6])
    np.testing.assert_allclose(model(images)[2].detach().numpy(), expected, atol=1e-10)
    assert torch.equal(net[1].running_mean, before)


def test_widths_share_weights_and_not_statistics():
    model = small({"kind": "widths", "count": 2, "resolutions": ()})
    before = {n: b.clone() for n, b in model.plain.named_buffers()}
    alone = build("crd_resnet8", 10)
    alone.load_state_dict(model.state_of(0))
    logits = model(IMAGES)
    alone.train()(IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(alone.buffers(), model.plain.buffers()))
    assert not torch.equal(before["bn1.running_mean"], model.plain.bn1.running_mean)
    assert model.norms[0].running_mean.abs().sum() > 0
    logits[1].sum().backward()
    gradient = model.plain.layer2[0].conv1.weight.grad
    assert gradient[:8, :4].abs().sum() > 0
    assert gradient[8:].abs().sum() == gradient[:, 4:].abs().sum() == 0
    assert model.plain.bn1.weight.grad is None


def test_widths_and_resolutions_are_drawn_in_training_only():
    assert grid(0.25) == [k / 20 for k in range(5, 21)]
    assert grid(0.33) == [k / 20 for k in range(7, 21)]
    assert [channels(16, w) for w in (0.25, 0.3, 0.35, 1.0)] == [4, 5, 6, 16]
    assert channels(1, 0.25) == 1
    model = small({"kind": "widths", "count": 4})
    assert model.resolutions == (32, 28, 24, 20)
    seen = []
    model.plain.conv1.register_forward_hook(lambda _m, args, out: seen.append((args[0].shape[2], out.shape[1])))
    for step in range(40):
        torch.manual_seed(step)
        model(IMAGES)
    sides, widths = zip(*[entry for k, entry in enumerate(seen) if k % 4])
    assert set(sides) == {32, 28, 24, 20}
    assert {w for k, w in enumerate(widths) if k % 3 == 0} == {4}
    assert {w for k, w in enumerate(widths) if k % 3} == {channels(16, w) for w in grid(0.25)}
    assert {entry for k, entry in enumerate(seen) if k % 4 == 0} == {(32, 16)}
    seen.clear()
    model.eval()(IMAGES)
    assert seen == [(32, 16), (32, 4), (32, 8), (32, 12)]


def test_only_the_full_width_has_layers():
    model = small({"kind": "widths", "count": 3}).eval()
    address = model.path(0, "stage1")
    with Taps(model, [address, model.path(0, "embedding")]) as taps:
        model(IMAGES)
        assert taps[address].shape[1] == 16
        assert taps[model.path(0, "embedding")].shape == (4, 64)
    with pytest.raises(ModelError, match="branch 1 of 'widths': expected 'logits'"):
        model.path(1, "stage1")
