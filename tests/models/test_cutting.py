"""A model in pieces: what comes after a layer does what the model does; blocks are all of it; adapters go into weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raykd import models
from raykd.errors import ModelError
from raykd.parts.grafts import fold

SHAPE = (3, 32, 32)
FAMILIES = ["cifar_resnet8", "crd_resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "torchvision:resnet18"]
IMAGES = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


def built(name, **options):
    torch.manual_seed(0)
    model = models.build(name, 10, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def at(model, names, images=IMAGES):
    """Outputs of layers, and logits."""
    with models.Taps(model, [*names, "logits"]) as taps, torch.no_grad():
        model(images)
        return taps.take()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_comes_after_a_layer(name):
    model = built(name)
    names = models.stages(model)
    seen = at(model, names)
    found = models.tails(model, names, SHAPE)
    assert len(found) == len(names)
    for stage, tail in zip(names, found):
        torch.testing.assert_close(tail(seen[stage]), seen["logits"], rtol=1e-5, atol=1e-6)
        assert not tail.training
        assert not any(p.requires_grad for p in tail.parameters())
        feature = seen[stage].clone().requires_grad_()
        tail(feature).sum().backward()
        assert feature.grad.abs().max() > 0
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for tail in found for p in tail.parameters()), "no weight is there twice"
    assert all(p.requires_grad for p in model.parameters()), "the model is as it was"


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_all_of_a_model(name):
    model = built(name)
    names = models.stages(model)
    found = models.blocks(model, names, SHAPE)
    assert len(found) == len(names) + 1
    parts = [module for block in found for module in block.modules]
    assert sorted(map(id, parts)) == sorted(map(id, model.modules()))
    assert found[0].readers == ()
    assert any(isinstance(m, nn.Linear) for m in found[-1].modules)
    assert not any(isinstance(m, nn.Linear) for m in found[0].modules)


def test_a_layer_inside_a_stage():
    model = built("cifar_resnet20")
    names = ["layer1.0", "layer2.2.relu1", "layer3.1"]
    with pytest.raises(ModelError, match=r"all that comes after 'layer2\.2\.relu1' to read its output alone"):
        models.tails(model, names, SHAPE)
    names = ["layer1.0", "layer3.1"]
    seen = at(model, names)
    for name, tail in zip(names, models.tails(model, names, SHAPE)):
        torch.testing.assert_close(tail(seen[name]), seen["logits"], rtol=1e-5, atol=1e-6)


def test_a_map_of_channels_goes_into_the_weights_that_read_them():
    model = built("crd_resnet8", widths=(8, 12, 16, 32)).double()
    names = models.stages(model)
    images = IMAGES.double()
    for place, (stage, block) in enumerate(zip(names, models.blocks(model, names, SHAPE)[1:])):
        assert block.readers, stage
        width = at(model, [stage], images)[stage].shape[1]
        matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        handle = model.get_submodule(models.resolve(model, stage).path).register_forward_hook(
            lambda _m, _a, out, matrix=matrix: F.conv2d(out, matrix[:, :, None, None])
        )
        with torch.no_grad():
            wanted = model(images)
            handle.remove()
            before = model(images)
            fold(block.readers, matrix)
            found = model(images)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found, before)


def test_what_something_else_reads_too_takes_no_map():
    """A shortcut without weights, a pool of maxima; also where there are no values."""
    wanted = {
        "cifar_resnet8": [False, False, False, True],
        "crd_resnet8": [False, True, True, True],
        "wrn_16_1": [False, True, True, True],
        "vgg8": [False, False, False, False, True, True],
    }
    for name, takes in wanted.items():
        for device in ("cpu", "meta"):
            with torch.device(device):
                model = models.build(name, 10)
            assert [bool(b.readers) for b in models.blocks(model, models.stages(model), SHAPE)] == takes, name


class Peaks(nn.Module):
    """A classifier that reads the largest value of a channel: no linear map of the channels goes through that."""

    def __init__(self):
        super().__init__()
        self.stage1, self.stage2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.classifier = nn.Linear(4, 10)

    def layer_aliases(self):
        return {"stage1": "stage1", "stage2": "stage2", "embedding": "classifier:in"}

    def forward(self, images):
        return self.classifier(self.stage2(self.stage1(images)).amax((2, 3)))


def test_the_largest_value_takes_no_map():
    assert [bool(b.readers) for b in models.blocks(Peaks(), ["stage1", "stage2"], SHAPE)] == [False, True, False]


class Skips(Peaks):
    """What comes after stage2 reads stage1 too."""

    def forward(self, images):
        first = self.stage1(images)
        return self.classifier((self.stage2(first) + first).mean((2, 3)))


class SeesImages(Peaks):
    """What comes after stage1 reads the images too."""

    def forward(self, images):
        return self.classifier((self.stage2(self.stage1(images)) + images[:, :1].detach()).mean((2, 3)))


FAULTS = [
    (Skips, ["stage2"], r"after 'stage2' to read its output alone, got stage1\.weight past it"),
    (SeesImages, ["stage1"], r"'stage1'.* Name another layer"),
    (Peaks, ["stage2", "stage1"], r"in the order in which they run, got stage2, stage1"),
    (Peaks, ["embedding"], r"output of a module that runs once, got 'embedding'"),
    (Peaks, ["logits"], r"output of a module that runs once, got 'logits'"),
]


@pytest.mark.parametrize("kind, names, told", FAULTS)
def test_where_a_model_cannot_be_cut(kind, names, told):
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=told):
        models.tails(kind(), names, SHAPE)
