from __future__ import annotations

import pickle
import urllib.error
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raykd.errors import ModelError
from raykd.models import build, fingerprint, load_weights, pretrained, resolve_pretrained
from raykd.models.weights import sha256_of


def net(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


STATE = dict(net(1).state_dict())
WRAPPINGS = {
    "plain": STATE,
    "state_dict": {"epoch": 3, "best_prec1": 91.2, "state_dict": STATE},
    "model": {"model": STATE, "opt": {"lr": 0.1}},
    "model_ema": {"model_ema": STATE},
    "model_state": {"model_state": STATE},
    "student": {"student": {"state_dict": STATE}, "step": 7},
    "ddp": prefixed(STATE, "module."),
    "compiled ddp": {"model": prefixed(STATE, "module._orig_mod.")},
    "compiled part": {name.replace("0.", "0._orig_mod.", 1): value for name, value in STATE.items()},
    "averaged": {"n_averaged": torch.tensor(4), **prefixed(STATE, "module.")},
    "half": {name: value.half() if value.is_floating_point() else value for name, value in STATE.items()},
    "old, without counters": {name: value for name, value in STATE.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_wrapping_loads(tmp_path: Path, wrapping: str, legacy: bool) -> None:
    path = tmp_path / "weights.pth.tar"
    torch.save(WRAPPINGS[wrapping], path, _use_new_zipfile_serialization=not legacy)
    model = net(0)
    assert load_weights(model, path) == sha256_of(path)
    if wrapping == "half":
        assert torch.allclose(model[0].weight, STATE["0.weight"], atol=1e-3)
        assert model[0].weight.dtype == torch.float32
    else:
        assert fingerprint(model) == fingerprint(net(1))


def test_safetensors_and_file_urls(tmp_path: Path) -> None:
    path = tmp_path / "with space.safetensors"
    save_file(STATE, path)
    model = net(0)
    load_weights(model, path.as_uri())
    assert fingerprint(model) == fingerprint(net(1))


def test_a_model_whose_own_names_start_with_module(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": net(0)})
    torch.save(prefixed(STATE, "module."), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert fingerprint(model["module"]) == fingerprint(net(1))


def test_all_differences_in_one_error_and_nothing_loaded(tmp_path: Path) -> None:
    state = dict(net(1, width=5).state_dict())
    state["extra.weight"] = state.pop("1.bias")
    torch.save(state, tmp_path / "w.pt")
    model = net(0)
    with pytest.raises(ModelError) as caught:
        load_weights(model, tmp_path / "w.pt")
    told = str(caught.value)
    assert "1 missing (1.bias)" in told
    assert "1 unexpected (extra.weight)" in told
    assert "6 of another shape (0.weight: model (4, 3), file (5, 3), " in told
    assert "another architecture" in told
    assert fingerprint(model) == fingerprint(net(0))


class Runs:
    """A pickle that would run code when read."""

    def __reduce__(self) -> tuple:
        return (print, ("the file was run",))


@pytest.mark.parametrize("content", [Runs(), net(1), {"state_dict": STATE, "args": Namespace(lr=0.1)}])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_pickles_that_would_run_code_are_refused(tmp_path: Path, capsys, content: object, how: str) -> None:
    path = tmp_path / "w.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ModelError, match="would run code"):
        load_weights(net(0), path)
    assert "the file was run" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(ModelError, match="would run code"):
        load_weights(net(0), tmp_path / "w.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("left", [0.0, 0.3, 0.95])
def test_truncated_files(tmp_path: Path, kind: str, left: float) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    state = dict(net(1, width=64).state_dict())
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(ModelError, match="truncated"):
        load_weights(net(0, width=64), path)


def test_garbage_is_not_a_weight_file(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("<html>404 not found</html>")
    with pytest.raises(ModelError, match="no weight file"):
        load_weights(net(0), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}, torch.zeros(3), {"a": STATE}])
def test_plain_content_that_holds_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="expected a state dict"):
        load_weights(net(0), tmp_path / "w.pt")


def test_missing_files_and_schemes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.pt: expected a file, got none"):
        load_weights(net(0), tmp_path / "nowhere.pt")
    with pytest.raises(ModelError, match="got a folder"):
        load_weights(net(0), tmp_path)
    with pytest.raises(ModelError, match="s3://"):
        load_weights(net(0), "s3://bucket/w.pt")


def test_downloads_are_kept_and_failures_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(STATE, tmp_path / "w.pt")
    asked = []

    def answer(url: str, timeout: float):
        asked.append(url)
        if "lost" in url:
            raise urllib.error.URLError("no route")
        return open(tmp_path / "w.pt", "rb")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "cache"))
    model = net(0)
    for _ in range(2):
        load_weights(model, "https://example.org/w.pt?x=1")
    assert len(asked) == 1
    assert fingerprint(model) == fingerprint(net(1))
    with pytest.raises(ModelError, match=r"URLError.*no route"):
        load_weights(model, "https://example.org/lost.pt")
    assert not list((tmp_path / "cache" / "raykd").glob("*.part"))


def test_hash(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(STATE, path)
    digest = sha256_of(path)
    load_weights(net(0), path, expect_sha256=digest)
    load_weights(net(0), path, expect_sha256=digest[:8].upper())
    for wrong in ("0" * 64, digest[:4], ""):
        with pytest.raises(ModelError, match="expected sha256"):
            load_weights(net(0), path, expect_sha256=wrong)


def test_real_weights_of_another_depth(cifar_weights: dict[int, Path]) -> None:
    with pytest.raises(ModelError, match=r"60 unexpected.*another architecture"):
        load_weights(build("cifar_resnet20", 10), cifar_weights[32])
    with pytest.raises(ModelError, match=r"2 of another shape \(linear"):
        load_weights(build("cifar_resnet20", 100), cifar_weights[20])


def test_pretrained_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    published = build("torchvision:squeezenet1_1", 1000)
    downloads = []

    def from_url(url: str, *args: object, **kwargs: object) -> dict:
        downloads.append(url)
        return published.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", from_url)
    path, digest = resolve_pretrained("torchvision:squeezenet1_1", tmp_path)
    model, again = pretrained("torchvision:squeezenet1_1", tmp_path)
    assert digest == again == sha256_of(path)
    assert path.parent == tmp_path
    assert len(downloads) == 1
    assert fingerprint(model) == fingerprint(published)


def test_pretrained_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    monkeypatch.setattr("timm.create_model", no_network)
    for name in ("torchvision:squeezenet1_1", "timm:resnet18"):
        with pytest.raises(ModelError, match=r"expected its weights to be downloaded, got URLError.*Put them at"):
            resolve_pretrained(name, tmp_path)
    with pytest.raises(ModelError, match="Did you mean 'resnet18'"):
        resolve_pretrained("timm:resnt18", tmp_path)
    with pytest.raises(ModelError, match="expected timm:<name>"):
        resolve_pretrained("cifar_resnet20", tmp_path)
    assert list(tmp_path.iterdir()) == []
