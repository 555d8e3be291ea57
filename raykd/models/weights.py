"""Weights from files. Nothing in a file is ever run: pickles are read with `weights_only=True`, no exceptions."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raykd.errors import ModelError
from raykd.models.factory import build_default, check_published

WRAPPERS = ("state_dict", "model", "model_ema", "model_state", "student")
TIMEOUT_S = 60.0


def load_weights(model: nn.Module, path_or_url: str | Path, *, expect_sha256: str | None = None) -> str:
    """Puts the weights of a file into a model, all of them or none; returns the file's SHA-256 (hex).

    Reads `.safetensors` and anything `torch.save` wrote (.th .pt .pth .pth.tar): a state dict, or a checkpoint that holds
    one under `state_dict`, `model`, `model_ema`, `model_state` or `student` (the first of these). Prefixes that
    DDP and torch.compile leave on names are taken off. Names and shapes must be the model's exactly.

    Args:
        model: any model; its dtypes and devices stay.
        path_or_url: a local or shared path, `file://`, or `http(s)://` (downloaded once into torch's cache).
        expect_sha256: hex digest, or its first digits (at least 8), that the file must have.

    Raises:
        ModelError: missing, truncated or altered file; a pickle that would run code; weights of another model.
    """
    path = _local(str(path_or_url))
    digest = sha256_of(path)
    if expect_sha256 is not None and (len(expect_sha256) < 8 or not digest.startswith(expect_sha256.lower())):
        raise ModelError(f"weights {path}: expected sha256 {expect_sha256}, got {digest}. The file is not the one meant.")
    wanted = model.state_dict()
    found = _named_like(wanted, _unwrapped(_read(path), path))
    _check_fit(wanted, found, path)
    model.load_state_dict(found, strict=False)  # _check_fit was strict; counters of old files may be missing
    return digest


def pretrained(name: str, cache_dir: str | Path | None = None) -> tuple[nn.Module, str]:
    """A `timm:` or `torchvision:` model with its library's default published weights, and the SHA-256 of their file."""
    path, digest = resolve_pretrained(name, cache_dir)
    model = build_default(name)
    load_weights(model, path, expect_sha256=digest)
    return model, digest


def resolve_pretrained(name: str, cache_dir: str | Path | None = None) -> tuple[Path, str]:
    """Published weights of a `timm:` or `torchvision:` model as one local file and its SHA-256.

    The library downloads and converts them once; they are kept as `<cache_dir>/<name>.safetensors`, and later calls,
    on this node or on others that see `cache_dir`, only read that file. Pass the hash on to `load_weights`.
    """
    check_published(name)
    source, _, rest = name.partition(":")
    folder = Path(cache_dir) if cache_dir is not None else _cache()
    path = folder / f"{name.replace(':', '-').replace('/', '-')}.safetensors"
    if not path.exists():
        try:
            state = _published(source, rest)
        except Exception as error:
            raise ModelError(
                f"pretrained {name}: expected its weights to be downloaded, got {type(error).__name__}: {error}. "
                f"Put them at {path} (safetensors, names as in the model's state_dict), or use load_weights with a file."
            ) from error
        _save(state, path)
    return path, sha256_of(path)


def _published(source: str, name: str) -> dict[str, Tensor]:
    if source == "timm":
        import timm

        model = timm.create_model(name, pretrained=True)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights="DEFAULT")
    return model.state_dict()


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file; a reader sees all of it or nothing."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, part)
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "raykd"


def _local(address: str) -> Path:
    """The local file behind a path or URL."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        path = Path(address).expanduser()
    elif scheme == "file":
        path = Path(urllib.request.url2pathname(rest))
    elif scheme in ("http", "https"):
        path = _downloaded(address)
    else:
        raise ModelError(f"weights {address}: expected a path, file:// or http(s)://, got {scheme}://. Copy it first.")
    if not path.is_file():
        raise ModelError(f"weights {path}: expected a file, got {'a folder' if path.is_dir() else 'none'}. Check the path.")
    return path


def _downloaded(url: str) -> Path:
    path = _cache() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rsplit('/', 1)[-1].partition('?')[0]}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            shutil.copyfileobj(answer, file)
        os.replace(part, path)
    except OSError as error:
        raise ModelError(f"weights {url}: expected a download, got {type(error).__name__}: {error}.") from error
    finally:
        Path(part).unlink(missing_ok=True)
    return path


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and _would_run(path, text):
            raise ModelError(_refusal(path, text)) from error
        if "TorchScript" in text:
            raise ModelError(_refusal(path, "a TorchScript archive")) from error
        raise ModelError(_unreadable(path, error)) from error


def _would_run(path: Path, text: str) -> bool:
    """Whether torch refused a real pickle for what it asks for (text files fail as unknown opcodes, too)."""
    with open(path, "rb") as file:
        is_pickle = file.read(1) in (b"\x80", b"P")  # a bare pickle, or the zip torch wraps one in
    return is_pickle and ("GLOBAL" in text or "Unsupported" in text)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(_unreadable(path, error)) from error


def _refusal(path: Path, text: str) -> str:
    detail = next((line.strip() for line in text.splitlines() if "GLOBAL" in line or "Unsupported" in line), text)
    detail = detail.partition(". Please use")[0]
    return (
        f"weights {path}: expected plain tensors, got a pickle that was refused because reading it would run code "
        f"({detail[:160]}). Save model.state_dict() where the file came from and use that."
    )


def _unreadable(path: Path, error: Exception) -> str:
    size, cause = path.stat().st_size, str(error).partition("\n")[0].partition(". ")[0]
    return (
        f"weights {path}: expected a complete weight file, got {size:,} bytes that cannot be read "
        f"({type(error).__name__}: {cause}). It is truncated or no weight file: copy it again."
    )


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file held."""
    while isinstance(loaded, Mapping):
        inner = next((key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = loaded[inner]
    if isinstance(loaded, Mapping) and loaded and all(isinstance(v, Tensor) for v in loaded.values()):
        return {str(name): value for name, value in loaded.items()}
    got = f"a dict of {_some(map(str, loaded))}" if isinstance(loaded, Mapping) else type(loaded).__name__
    raise ModelError(
        f"weights {path}: expected a state dict (also under {', '.join(WRAPPERS)}), got {got}. Save model.state_dict()."
    )


def _named_like(wanted: Mapping[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """`found` without the prefixes of wrappers (torch.compile's anywhere; DDP's and averaging's in front)."""
    found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    while True:
        rest = {name: value for name, value in found.items() if name != "n_averaged"}
        if not rest or not all(name.startswith("module.") for name in rest):
            return found
        if wanted and all(name.startswith("module.") for name in wanted):
            return found
        found = {name.removeprefix("module."): value for name, value in rest.items()}


def _check_fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """All differences between a model's names and shapes and a file's, in one error."""
    missing = [n for n in wanted if n not in found and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in found if n not in wanted]
    shared = [n for n in found if n in wanted and found[n].shape != wanted[n].shape]
    shapes = [f"{n}: model {tuple(wanted[n].shape)}, file {tuple(found[n].shape)}" for n in shared]
    faults = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    told = [f"{len(items)} {kind} ({_some(items)})" for kind, items in faults if items]
    if told:
        raise ModelError(
            f"weights {path}: expected exactly the {len(wanted)} entries of the model, got {'; '.join(told)}. "
            f"Are these the weights of another architecture or number of classes?"
        )


def _some(items: Iterable[str], count: int = 3) -> str:
    listed = list(items)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")
