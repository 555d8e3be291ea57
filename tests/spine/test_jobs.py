"""The job files as they are shipped: every method of the CRD protocol takes a few steps on real images, with its term alive."""

from pathlib import Path

import pytest

from raykd import catalogue
from raykd.cli.jobfile import load
from raykd.launch.checks import inspect
from raykd.roles.recorder import read
from tests.spine.small import go

ROOT = Path(__file__).resolve().parents[2]
ON_CIFAR10 = {
    "data.kind": "parquet",
    "data.train": "train-00000-of-00005.parquet",
    "data.eval": "test_first1000.parquet",
    "data.num_classes": 10,
    "data.limit": 256,
    "data.eval_limit": 64,
    "training.max_steps": 3,
    "launch.backend": "local",
    "teachers.teacher.model": "cifar_resnet20",
    "teachers.teacher.normalise": "imagenet",
}


# Others: test_multi_teacher_methods; those that make their images: test_data_free.
ONE_TEACHER = [s for s, m in catalogue.methods().items() if m.teacher_role == "teacher" and m.images is None]


@pytest.mark.parametrize("method", ONE_TEACHER)
def test_every_method_runs_the_crd_protocol(method, real_data, tmp_path):
    weights = str(real_data / "weights" / "cifar10" / "resnet20-12fca82f.th")
    arguments = {"method": method, "seed": "1", "root": str(real_data / "cifar10"), "teacher_weights": weights}
    job = load(str(ROOT / "jobs" / "cifar100_crd.py"), arguments)
    settings = ON_CIFAR10 | ({"losses.crd.num_negatives": 256} if method == "crd" else {})
    settings |= {"losses.dkd.schedule": "constant"} if method == "dkd" else {}
    settings |= {"losses.network-grafting.block_share": 0.0} if method == "network-grafting" else {}
    settings |= {"losses.takd.assistants": ["crd_resnet14"]} if method == "takd" else {}
    go(job.replace(**settings), tmp_path / "run")
    steps = read(tmp_path / "run" / "metrics.jsonl", "step")
    assert len(steps) == 3
    terms = {name: norm for name, norm in steps[0]["grad_norms"].items() if name != "ce"}
    assert terms
    assert all(norm > 0 for norm in terms.values()), f"a dead term: {terms}"


def test_the_weights_of_the_table():
    path = str(ROOT / "jobs" / "cifar100_crd.py")
    kd = load(path, {"method": "kd"})
    assert (kd.losses["kd"].options["temperature"], kd.losses["kd"].options["weight"]) == (4.0, 0.9)
    assert load(path, {"method": "dkd", "pair": "resnet32x4-shufflenetv2"}).losses["dkd"].options["beta"] == 8.0
    assert load(path, {"method": "dkd", "pair": "resnet56-resnet20"}).losses["dkd"].options["beta"] == 2.0
    assert load(path, {"pair": "vgg13-mobilenetv2"}).training.lr == 0.01


@pytest.mark.parametrize("pair", ["vgg13-mobilenetv2", "resnet32x4-shufflenetv1", "wrn_40_2-wrn_16_2", "resnet50-vgg8"])
@pytest.mark.parametrize("method", ["at", "vid", "sp", "crd", "fitnet"])
def test_every_pair_connects(method, pair, real_data):
    """Layers, shapes and connectors of unlike architectures, by shapes alone."""
    job = load(str(ROOT / "jobs" / "cifar100_crd.py"), {"method": method, "pair": pair, "root": str(real_data / "cifar10")})
    settings = {k: v for k, v in ON_CIFAR10.items() if not k.startswith("teachers")}
    faults = inspect(job.replace(**settings)).faults
    assert [f for f in faults if not f.startswith("teachers.teacher.weights")] == []


@pytest.mark.parametrize("teacher", ["resnet20-12fca82f", "resnet32-d509ac18"])
@pytest.mark.parametrize("method", ["fastdfkd", "dfad"])
def test_cifar10_without_data_has_no_faults_and_reads_no_training_image(method, teacher, real_data):
    weights = str(real_data / "weights" / "cifar10" / f"{teacher}.th")
    model = f"cifar_{teacher.partition('-')[0]}"
    arguments = {"root": str(real_data / "cifar10"), "weights": weights, "teacher": model}
    job = load(f"{ROOT / 'jobs' / 'cifar10_data_free.py'}:{method}", arguments)
    report = inspect(job.replace(**{"launch.backend": "local"}))
    assert not report.faults
    assert "Real data: none, beside the images it is measured on." in report.notes
    assert job.teachers["resnet"].normalise == "imagenet"  # what these weights were trained on
