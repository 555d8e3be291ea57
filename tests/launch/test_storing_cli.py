"""`raykd store` as a user types it, on the job that ships as an example."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raykd.cli import main
from raykd.exchange import store_files
from raykd.exchange.store import Place

ROOT = Path(__file__).resolve().parents[2]
FILE = f"{ROOT / 'jobs' / 'cifar10_from_store.py'}:short"
SMALL = {"data.limit": 256, "data.eval_limit": 128, "launch.backend": "local", "training.batch_size": 64, "runs": "runs"}


def settings(root) -> list[str]:
    pairs = SMALL | {"data.root": str(root / "cifar10")}
    return [word for path, value in pairs.items() for word in ("--set", f"{path}={value}")]


def answer(capsys, *words) -> tuple[int, dict]:
    """Exit code, and the one JSON object on stdout."""
    capsys.readouterr()
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_example_from_build_to_export(real_data, place, capsys):
    build = ["store", "build", FILE, "--epochs", "2", "--rows", "128", *settings(real_data)]
    code, planned = answer(capsys, *build, "--dry-run")
    assert code == 0
    assert not (place / "stores").exists()
    code, built = answer(capsys, *build)
    assert code == 0
    folder = Path(built["folder"])
    assert folder == place / "stores" / "cifar10-short"
    assert built["bytes"] == planned["bytes"] == sum(p.stat().st_size for p in folder.rglob("*.arrow"))
    assert (built["built"], built["forwards"]) == (4, {"resnet56": 512})

    code, about = answer(capsys, "store", "info", str(folder))
    assert (code, about["complete"], about["epochs"], about["samples"]) == (0, True, 2, 256)
    assert about["teachers"]["resnet56"]["signals"]["logits"]["bytes_per_sample"] == 40

    code, checked = answer(capsys, "check", FILE, *settings(real_data))
    assert (code, checked["faults"]) == (0, [])
    code, result = answer(capsys, "run", FILE, *settings(real_data), "--quiet")
    assert code == 0
    assert result["exchange"]["resnet56"]["requests"] == 17  # four epochs of four steps, and the probe
    assert result["teachers"]["resnet56"]["top1"] > 0.9

    broken = store_files.marker_file(folder, Place("resnet56", 1, 0))
    broken.unlink()
    code, verified = answer(capsys, "store", "verify", str(folder))
    assert (code, verified["whole"]) == (1, 3)
    assert "done/epoch-001/shard-00000.json" in verified["faults"][0]
    code, repaired = answer(capsys, "store", "build", str(folder), "--out", str(folder))
    assert (code, repaired["built"], repaired["kept"]) == (0, 1, 3)
    code, verified = answer(capsys, "store", "verify", str(folder), "--recompute")
    assert (code, verified["whole"], verified["recomputed"]) == (0, 4, 2)

    code, exported = answer(capsys, "store", "export", str(folder), "--out", "parquet")
    assert (code, exported["files"]) == (0, 4)
    assert exported["bytes"] == sum(p.stat().st_size for p in (place / "parquet").rglob("*.parquet"))


def test_what_is_printed(real_data, place, capsys):
    build = ["store", "build", FILE, "--epochs", "1", *settings(real_data)]
    assert main([*build, "--dry-run"]) == 0
    assert "bytes would be written to" in capsys.readouterr().out
    assert main(build) == 0
    told = capsys.readouterr()
    assert "256 rows of 1 epoch" in told.out
    assert "Views computed: resnet56 256" in told.out
    assert "256/256 rows" in told.err
    assert "ETA" in told.err
    assert main(["store", "info", "stores/cifar10-short"]) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["store", "verify", "stores/cifar10-short"]) == 0
    assert "4 of 4 shards are whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, told",
    [
        (["info", "nowhere"], "Store nowhere: expected a store, got no such folder"),
        (["verify", "nowhere"], "expected a store, got no such folder"),
        (["export", "nowhere", "--out", "x"], "expected a store, got no such folder"),
    ],
)
def test_a_mistake_is_one_message(words, told, place, capsys):
    code, found = answer(capsys, "store", *words)
    assert code == 2
    assert told.replace("Store nowhere", "nowhere") in found["error"]["message"]


def test_what_build_needs_to_know(real_data, place, capsys):
    code, found = answer(capsys, "store", "build", FILE, *settings(real_data))
    assert code == 2
    assert "--epochs: expected the number of epochs whose views are kept" in found["error"]["message"]
    unnamed = [*settings(real_data), "--set", "teachers.resnet56.store=none", "--set", "teachers.resnet56.placement=pool"]
    code, found = answer(capsys, "store", "build", FILE, "--epochs", "1", *unnamed)
    assert code == 2
    assert "Give --out DIR" in found["error"]["message"]
    code, found = answer(capsys, "store", "build", FILE, "--epochs", "1", *settings(real_data), "--set", "data.limit=7")
    assert code == 2
    assert any("training.batch_size" in fault for fault in found["error"]["faults"])


def test_a_misspelt_action_is_told_its_near_name():
    done = subprocess.run([sys.executable, "-m", "raykd", "store", "verfy"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "Did you mean 'verify'?" in done.stderr
