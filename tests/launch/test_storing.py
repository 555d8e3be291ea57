"""From a store a student learns exactly as from the live teacher; what is broken is named and built again, alone.

Real CIFAR-10 with crop, flip and mixup; a real ResNet-20; kd, fitnet, at and sp together.
"""

import dataclasses
import fcntl
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raykd.config import Job
from raykd.errors import ConfigError, JobFaults, SourceError
from raykd.exchange import store, store_files
from raykd.exchange.store import Place
from raykd.exchange.stored import StoreSource
from raykd.launch import storing
from raykd.launch.checks import inspect
from raykd.models import build as build_model
from tests.spine.small import cifar, go, kill_tree, trace

ROOT = Path(__file__).resolve().parents[2]
LOSSES = {name: {"method": name} for name in ("kd", "fitnet", "at", "sp")}
SMALL = {"losses": LOSSES, "data.limit": 192, "data.eval_limit": 64, "training.epochs": 3}
STEPS = 6  # an epoch
ROWS = 64


def small(root, **settings) -> Job:
    return cifar(root, **{**SMALL, **settings})


def stored(root, folder, **settings) -> Job:
    return small(root, **{"teachers.big.placement": "store", "teachers.big.store": str(folder), **settings})


@pytest.fixture(scope="module")
def whole(real_data, tmp_path_factory):
    """A store of two epochs' views, in three shards each."""
    folder = tmp_path_factory.mktemp("stores") / "dense"
    result = storing.build(small(real_data), folder, 2, rows=ROWS)
    assert result["forwards"] == {"big": 384}
    assert (result["built"], result["kept"], result["damaged"]) == (6, 0, [])
    return folder


@pytest.fixture(scope="module")
def reference(real_data, tmp_path_factory):
    """Trace of the live inline teacher, three epochs over the views of two."""
    folder = tmp_path_factory.mktemp("live") / "run"
    go(small(real_data, **{"teachers.big.placement": "inline", "data.augmentation_epochs": 2}), folder)
    return trace(folder)


@pytest.fixture
def copy(whole, tmp_path):
    """The store, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def logits_file(folder, epoch=0, shard=1) -> Path:
    return folder / "big" / "logits" / f"epoch-{epoch:03d}" / f"shard-{shard:05d}.arrow"


def flip_byte(path, at=-200):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def times(folder) -> dict[Path, int]:
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.suffix in (".arrow", ".json")}


def test_a_training_from_the_store_is_the_live_one(real_data, whole, reference, tmp_path):
    result = go(stored(real_data, whole), tmp_path / "run")
    assert trace(tmp_path / "run") == reference
    assert result["exchange"]["big"]["requests"] == 3 * STEPS + 1  # the probe and each step once
    assert result["exchange"]["big"]["teacher_s"] == 0


def test_an_epoch_beyond_the_kept_ones_sees_their_views_in_its_own_order(real_data, reference, tmp_path):
    go(small(real_data, **{"teachers.big.placement": "inline"}), tmp_path / "fresh")
    fresh = trace(tmp_path / "fresh")
    assert fresh[: 2 * STEPS] == reference[: 2 * STEPS]
    assert fresh[2 * STEPS] != reference[2 * STEPS], "the third epoch of the reference should see old views"
    assert reference[0] != reference[2 * STEPS]


CODECS = {
    "fp16": {"losses": {n: LOSSES[n] for n in ("kd", "fitnet", "at")}},
    "int8": {"losses": {n: LOSSES[n] for n in ("kd", "fitnet", "at")}},
    "topk:4": {"losses": {"kd": LOSSES["kd"]}},
}


@pytest.mark.parametrize("codec", CODECS)
def test_a_lossy_store_is_the_lossy_teacher_within_the_codecs_bound(codec, real_data, whole, tmp_path):
    settings = CODECS[codec] | {"teachers.big.codec": codec, "training.epochs": 2}
    result = storing.build(small(real_data, **settings), tmp_path / "store", 2, rows=ROWS)
    go(small(real_data, **settings, **{"teachers.big.placement": "inline"}), tmp_path / "live")
    go(stored(real_data, tmp_path / "store", **settings), tmp_path / "stored")
    assert trace(tmp_path / "stored") == trace(tmp_path / "live")
    signals = [k.signal for k in store.read_header(tmp_path / "store").teachers["big"].signals]
    exact, lossy = (StoreSource(f, "big", signals).request(every_row(1)).result()["big"] for f in (whole, tmp_path / "store"))
    errors = result["errors"]["big"]
    for key, value in exact.items():
        if codec == "fp16":
            assert ((lossy[key] - value).abs() <= value.abs() * 2**-11 + 2**-25).all(), key
        elif codec == "int8":
            assert float((lossy[key] - value).abs().max()) <= errors["int8_scale"] / 2 * 1.0001, key
        else:
            p, q = (torch.softmax(z.double() / 4.0, 1) for z in (value, lossy[key]))
            assert float(0.5 * (p - q).abs().sum(1).max()) <= errors["topk_tv"] + 1e-6
            assert float((p * (p / q).log()).sum(1).max()) <= errors["topk_kl"] + 1e-6
            assert errors["topk_tv"] > 0
        assert not torch.equal(lossy[key], value), key


def every_row(epoch):
    return {"sample_index": torch.arange(192), "augmentation_seed": torch.full((192,), epoch, dtype=torch.int32)}


SPOILS = {
    "damaged": (lambda folder: flip_byte(logits_file(folder)), r"logits/epoch-000/shard-00001\.arrow: .* the file is damaged"),
    "truncated": (lambda folder: logits_file(folder).write_bytes(b"ARROW1"), r"shard-00001\.arrow: expected \d+ bytes, got 6"),
    "unfinished": (lambda folder: marker(folder).unlink(), r"done/epoch-000/shard-00001\.json: expected a marker, got none"),
}


def marker(folder) -> Path:
    return store_files.marker_file(folder, Place("big", 0, 1))


@pytest.mark.parametrize("name", SPOILS)
def test_only_the_broken_shard_is_built_again(name, real_data, whole, copy):
    spoil, told = SPOILS[name]
    spoil(copy)
    found = storing.verify(copy)
    assert (found["shards"], found["whole"]) == (6, 5)
    [fault] = found["faults"]
    assert re.search(told, fault)
    before = times(copy)
    result = storing.build(small(real_data), copy, 2)
    assert (result["built"], result["kept"]) == (1, 5)
    assert result["forwards"] == {"big": ROWS}
    assert len(result["damaged"]) == (name != "unfinished")
    changed = {p for p, t in times(copy).items() if before.get(p) != t} - {Path(store.HEADER), Path(store.JOB)}
    assert changed
    assert all(p.parent.name == "epoch-000" and p.stem == "shard-00001" for p in changed)
    assert storing.verify(copy)["whole"] == 6
    assert logits_file(copy).read_bytes() == logits_file(whole).read_bytes()


def test_a_killed_build_goes_on_where_it_was(real_data, whole, tmp_path):
    folder = tmp_path / "cut"
    code = (
        "import sys; from pathlib import Path; from raykd.launch import storing; from tests.launch.test_storing import small\n"
        "storing.build(small(Path(sys.argv[1])), sys.argv[2], 2, rows=32)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(real_data), str(folder)], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(list(folder.glob("big/done/*/*.json"))) < 3:
        assert process.poll() is None, "the build ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill_tree(process)
    assert process.returncode == -signal.SIGKILL
    there = len(list(folder.glob("big/done/*/*.json")))
    assert 3 <= there < 12
    before = times(folder)
    result = storing.build(small(real_data), folder, 2)
    assert (result["built"], result["kept"]) == (12 - there, there)
    assert storing.verify(folder, recompute=True) == {
        "folder": str(folder),
        "shards": 12,
        "whole": 12,
        "faults": [],
        "recomputed": 2,
    }
    assert not list(folder.rglob("*.part"))
    kept = [p for p in before if "epoch" in str(p) and times(folder)[p] == before[p]]
    assert len([p for p in kept if p.suffix == ".json"]) == there
    for a, b in zip(all_signals(whole), all_signals(folder)):
        assert torch.equal(a, b)


def all_signals(folder):
    signals = [k.signal for k in store.read_header(folder).teachers["big"].signals]
    return StoreSource(folder, "big", signals).request(every_row(1)).result()["big"].values()


def other_weights(root, tmp_path) -> str:
    """The same model with one weight changed."""
    path = tmp_path / "other.safetensors"
    state = build_model("cifar_resnet20", 10).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return str(path)


REFUSALS = {
    "weights": (
        lambda root, tmp: {"teachers.big.weights": other_weights(root, tmp)},
        "expected outputs of this teacher, got those of another (weights ",
    ),
    "normalisation": (
        lambda root, tmp: {"teachers.big.normalise": "cifar100"},
        "got those of another (normalise 'cifar100' where it has 'imagenet')",
    ),
    "number format": (lambda root, tmp: {"teachers.big.dtype": "float64"}, "(dtype 'float64' where it has 'float32'"),
    "augmentation": (
        lambda root, tmp: {"data.augmentation.flip": False},
        "expected views of the job's augmentation, got those of another (flip False where it has True)",
    ),
    "data": (lambda root, tmp: {"data.limit": 160}, "expected the outputs for this training set (160 images, "),
    "noisy labels": (lambda root, tmp: {"data.noisy_labels": True}, "expected the outputs for this training set (192 images, "),
    "seed": (lambda root, tmp: {"seed": 4}, "expected views of seed 4, got those of seed 3"),
    "layer": (
        lambda root, tmp: {"losses.fitnet.layers": ["stage1"]},
        "expected feature@stage1, got logits, feature@stage2, ",
    ),
    "codec": (lambda root, tmp: {"teachers.big.codec": "fp16"}, "expected codec 'fp16', got 'dense'"),
    "epochs": (
        lambda root, tmp: {"data.augmentation_epochs": 3},
        "expected the views of 3 epochs (data.augmentation_epochs), got 2",
    ),
    "folder": (lambda root, tmp: {"teachers.big.store": str(tmp / "none")}, "expected a store, got no such folder"),
    "no folder": (lambda root, tmp: {"teachers.big.store": None}, "placement='store' needs the folder"),
    "placement": (lambda root, tmp: {"teachers.big.placement": "inline"}, "only placement='store' reads a store, got 'inline'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_store_of_something_else_is_refused_with_the_reason(name, real_data, whole, tmp_path):
    change, told = REFUSALS[name]
    found = inspect(stored(real_data, whole, **change(real_data, tmp_path)))
    assert len(found.faults) == 1, found.faults
    assert found.faults[0].startswith("teachers.big.store: ")
    assert told in found.faults[0]
    with pytest.raises(JobFaults):
        go(stored(real_data, whole, **change(real_data, tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tail_of_another_temperature_is_refused(real_data, tmp_path):
    settings = {"losses": {"kd": {"method": "kd"}}, "teachers.big.codec": "topk:4"}
    storing.build(small(real_data, **settings), tmp_path / "store", 1)
    assert inspect(stored(real_data, tmp_path / "store", **settings)).faults == []
    warmer = {"losses": {"kd": {"method": "kd", "temperature": 2.0}}}
    [fault] = inspect(stored(real_data, tmp_path / "store", **settings | warmer)).faults
    assert "expected topk:4 with its tail at temperature 2, got 4" in fault


def test_two_builds_do_not_share_a_folder(real_data, copy):
    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another build is writing into it"):
            storing.build(small(real_data), copy, 2)


def test_a_build_anew_keeps_nothing(real_data, copy):
    result = storing.build(small(real_data), copy, 2, resume=False)
    assert (result["built"], result["kept"], result["damaged"]) == (6, 0, [])


def test_weights_of_a_stage_are_known_when_it_has_run(real_data, whole, tmp_path):
    stage = cifar(real_data, **{"data.limit": 192, "training.max_steps": 1, "student.model": "cifar_resnet20"})
    stage = dataclasses.replace(stage, teachers={}, losses={}, ce_weight=1.0)
    job = stored(real_data, whole, **{"teachers.big.weights": "stage:first"})
    job = dataclasses.replace(job, stages={"first": stage})
    assert inspect(job).faults == []
    with pytest.raises(JobFaults, match="expected outputs of this teacher, got those of another"):
        go(job, tmp_path / "run")
    with pytest.raises(JobFaults, match=r"teachers\.big\.weights: a store needs weights that are there"):
        storing.build(job, tmp_path / "store", 1)


def test_the_right_store_passes_and_fills_the_epochs(real_data, whole):
    found = inspect(stored(real_data, whole))
    assert found.faults == []
    assert found.job.data.augmentation_epochs == 2
    assert inspect(stored(real_data, whole, losses={"at": {"method": "at", "layers": ["stage2"]}})).faults == []


def test_an_unfinished_store_is_refused_before_anything_starts(real_data, copy):
    marker(copy).unlink()
    [fault] = inspect(stored(real_data, copy)).faults
    assert "1 of 6 shards are not whole" in fault
    assert "done/epoch-000/shard-00001.json" in fault
    assert inspect(stored(real_data, copy, **{"teachers.big.fill": "inline"})).faults == []


def test_damage_ends_a_run_with_its_rows_named(real_data, copy, tmp_path):
    flip_byte(logits_file(copy))
    with pytest.raises(SourceError, match=r"of the 32 rows of a batch are not there: sample_index .*shard-00001\.arrow"):
        go(stored(real_data, copy), tmp_path / "run")


@pytest.mark.parametrize("fill", ["inline", "pool"])
def test_the_live_teacher_fills_what_is_missing(fill, real_data, copy, reference, tmp_path):
    flip_byte(logits_file(copy))
    store_files.marker_file(copy, Place("big", 1, 2)).unlink()
    with pytest.warns(UserWarning, match="the live teacher answers"):
        go(stored(real_data, copy, **{"teachers.big.fill": fill}), tmp_path / "run")
    assert trace(tmp_path / "run") == reference


def test_more_epochs_add_to_a_store(real_data, copy):
    result = storing.build(small(real_data), copy, 3)
    assert (result["built"], result["kept"], result["epochs"]) == (3, 6, 3)
    assert storing.verify(copy, recompute=True)["recomputed"] == 3


def test_a_store_of_another_job_is_not_built_over(real_data, copy):
    before = times(copy)
    with pytest.raises(ConfigError, match=r"expected one of this job, got another \(seed: has 3, needs 4\)"):
        storing.build(small(real_data, seed=4), copy, 2)
    with pytest.raises(ConfigError, match=r"augmentation\.flip: has True, needs False"):
        storing.build(small(real_data, **{"data.augmentation.flip": False}), copy, 2)
    assert times(copy) == before


def test_without_augmentation_one_epoch_is_kept_for_any_seed(real_data, tmp_path):
    settings = {"data.augmentation": {}, "losses": {"kd": {"method": "kd"}}, "training.epochs": 2}
    result = storing.build(small(real_data, **settings), tmp_path / "store", 5, rows=ROWS)
    assert (result["epochs"], result["built"]) == (1, 3)
    go(stored(real_data, tmp_path / "store", **settings, seed=9), tmp_path / "run")
    go(small(real_data, **settings, seed=9, **{"teachers.big.placement": "inline"}), tmp_path / "live")
    assert trace(tmp_path / "run") == trace(tmp_path / "live")


def test_the_bytes_are_those_of_the_dry_run(real_data, whole, tmp_path):
    planned = storing.plan(small(real_data), tmp_path / "store", 2, ROWS)
    assert planned["bytes"] == sum(p.stat().st_size for p in whole.rglob("*.arrow")) == storing.info(whole)["bytes"]
    assert not (tmp_path / "store").exists()
    per_sample = planned["teachers"]["big"]["bytes_per_sample"]
    assert per_sample == 4 * (10 + 32 * 16 * 16 + 32 * 32 + 16 * 16 + 8 * 8 + 64 * 8 * 8)


def test_a_teacher_that_is_not_finite_makes_no_store(real_data, tmp_path):
    weights = load_file(other_weights(real_data, tmp_path))
    weights["linear.bias"][3] = float("nan")
    save_file(weights, tmp_path / "other.safetensors")
    job = small(real_data, **{"teachers.big.weights": str(tmp_path / "other.safetensors")})
    with pytest.raises(SourceError, match="Teacher 'big', signal logits: expected finite values"):
        storing.build(job, tmp_path / "store", 1)
    assert not list((tmp_path / "store").glob("big/done/*/*"))


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_the_files_are_the_same_and_so_is_the_training(real_data, whole, reference, tmp_path, ray_cluster):
    settings = {"launch.backend": "ray", "teachers.big.replicas": 2}
    result = storing.build(small(real_data, **settings), tmp_path / "store", 2, rows=ROWS)
    assert result["forwards"] == {"big": 384}
    for path in whole.rglob("*.arrow"):
        assert (tmp_path / "store" / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    marker(tmp_path / "store").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        go(stored(real_data, tmp_path / "store", **settings, **{"teachers.big.fill": "pool"}), tmp_path / "run")
    assert trace(tmp_path / "run") == reference
    again = storing.build(small(real_data, **settings), tmp_path / "store", 2)
    assert (again["built"], again["kept"]) == (1, 5)
    go(stored(real_data, tmp_path / "store", **settings), tmp_path / "plain")
    assert trace(tmp_path / "plain") == reference
