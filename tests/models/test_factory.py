from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from raykd.errors import ModelError
from raykd.models import Taps, build, classifier, layers, stages

USER_MODULE = """
from torch import nn

def net(num_classes, *, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, num_classes))

def stubborn(num_classes):
    return nn.Linear(12, 3)

def text(num_classes):
    return "not a model"

def picky(classes):
    return nn.Linear(12, classes)

class Named(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Linear(12, 6)
        self.out = nn.Linear(6, num_classes)
        self.unused = nn.Linear(6, 6)

    def layer_aliases(self):
        return {"stage1": "body", "embedding": "out:in"}

    def forward(self, x):
        return self.out(self.body(x))
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_own_models.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "users_own_models"


def test_a_users_factory(user_module: str) -> None:
    model = build(f"{user_module}:net", 5, width=8)
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, 5)
    assert stages(model) == []
    assert layers(model) == ["embedding", "logits", "0", "1", "2", "3"]
    with pytest.raises(ModelError, match=r"option among width, got 'widht'\. Did you mean 'width'"):
        build(f"{user_module}:net", 5, widht=8)


def test_a_users_model_may_name_its_layers(user_module: str) -> None:
    model = build(f"{user_module}:Named", 5)
    assert classifier(model) is model.out
    with Taps(model, ["stage-1", "embedding"]) as taps:
        model(torch.ones(2, 12))
        assert torch.equal(taps["stage-1"], taps["embedding"])


@pytest.mark.parametrize(
    "attribute, told",
    [
        ("stubborn", "5 classes, got 3"),
        ("text", "torch.nn.Module, got str"),
        ("picky", "called as factory\\(num_classes"),
        ("nett", "Did you mean 'net'"),
    ],
)
def test_a_users_factory_that_does_not_fit(user_module: str, attribute: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build(f"{user_module}:{attribute}", 5)


@pytest.mark.parametrize(
    "name, told",
    [
        ("resnet18", "Write timm:resnet18 or torchvision:resnet18"),
        ("vgg11_bn", "Write timm:vgg11_bn or torchvision:vgg11_bn"),
        ("convnext_atto", "Write timm:convnext_atto\\."),
        ("cifar_resnet21", "Did you mean .*'cifar_resnet20'"),
        ("timm:resnt18", "Did you mean 'resnet18'"),
        ("torchvision:resnt18", "Did you mean 'resnet18'"),
        ("no_such_package.models:net", "importable module 'no_such_package.models'"),
    ],
)
def test_unknown_names_say_what_to_write(name: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build(name, 10)


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("cifar_resnet20", {"widht": 2}, "Did you mean 'widths'"),
        ("digits_cnn", {"widht": 2}, "Did you mean 'width'"),
        ("timm:resnet18", {"drop_rte": 0.1}, "Did you mean 'drop_rate'"),
        ("torchvision:resnet18", {"zero_init_residul": True}, "Did you mean 'zero_init_residual'"),
        ("torchvision:resnet18", {"in_channels": 1}, "in_channels=3, got 1"),
        ("timm:resnet18", {"pretrained": True}, "Use raykd.models.pretrained"),
        ("torchvision:resnet18", {"norm_layer": 3}, "could not be built"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build(name, 10, **options)


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_number_of_classes_must_be_positive(count: float) -> None:
    with pytest.raises(ModelError, match="num_classes"):
        build("cifar_resnet8", count)  # type: ignore[arg-type]


# name: number of stages, shape of the last stage, width of the embedding, for images of 64 pixels
LIBRARY = {
    "timm:resnet18": (4, (2, 512, 2, 2), 512),
    "timm:convnext_atto": (4, (2, 320, 2, 2), 320),
    "timm:mobilenetv3_small_050": (4, (2, 288, 2, 2), 1024),
    "torchvision:resnet18": (4, (2, 512, 2, 2), 512),
    "torchvision:mobilenet_v2": (5, (2, 1280, 2, 2), 1280),
    "torchvision:vgg11_bn": (5, (2, 512, 4, 4), 4096),
    "torchvision:densenet121": (5, (2, 1024, 2, 2), 1024),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_library_models(name: str) -> None:
    count, last, width = LIBRARY[name]
    with torch.device("meta"):
        model = build(name, 7).eval()
    assert stages(model) == [f"stage{k}" for k in range(1, count + 1)]
    assert isinstance(classifier(model), nn.Linear)
    assert classifier(model).out_features == 7
    with Taps(model, [*stages(model), "stage-1", "embedding", "logits"]) as taps:
        model(torch.zeros(2, 3, 64, 64, device="meta"))
        taken = taps.take()
    assert taken["stage-1"].shape == last
    assert taken["embedding"].shape == (2, width)
    assert taken["logits"].shape == (2, 7)


def test_vision_transformer_blocks_yield_tokens() -> None:
    with torch.device("meta"):
        model = build("timm:vit_tiny_patch16_224", 7, img_size=32, depth=3).eval()
    assert stages(model) == ["stage1", "stage2", "stage3"]
    with Taps(model, ["stem", "stage-1", "embedding"]) as taps:
        model(torch.zeros(2, 3, 32, 32, device="meta"))
        assert [tuple(t.shape) for t in taps.take().values()] == [(2, 4, 192), (2, 5, 192), (2, 192)]


def test_timm_takes_in_channels() -> None:
    with torch.device("meta"):
        assert build("timm:resnet18", 7, in_channels=1).conv1.in_channels == 1
