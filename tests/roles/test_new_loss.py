"""A new loss is one file: written, named, run, live, exported clean; and so are the built-in ones."""

import dataclasses
import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from raykd import models
from raykd.catalogue import methods
from raykd.config import Data, Job, Launch, Loss, Student, Teacher, Training
from raykd.errors import JobFaults
from raykd.launch.run import run

FILE = """
import torch
from torch import nn

LAYERS = ("stage2",)


def my_loss(student_logits, teacher_logits, labels, *, margin: float = 0.01, weight: float = 3.0, ce_weight: float = 0.25):
    gap = (student_logits - teacher_logits).abs().mean(1)
    return torch.relu(gap - margin)


class Bridge(nn.Module):
    def __init__(self, student_feature, teacher_feature, *, kernel: int = 1, weight: float = 2.0, ce_weight: float = 0.5):
        super().__init__()
        self.across = nn.Conv2d(student_feature[0], teacher_feature[0], kernel, padding=kernel // 2)

    def forward(self, student_feature, teacher_feature, *, power: float = 2.0):
        return (self.across(student_feature) - teacher_feature).abs().pow(power).mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def my_package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").write_text("")
    (folder / "my_package" / "my_loss.py").write_text(FILE)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(folder))
    for name in [n for n in sys.modules if n.split(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Weights of a small teacher of digits, untrained."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(models.build("digits_cnn", 10, width=8, in_channels=1).state_dict(), path)
    return Teacher(model="digits_cnn", options={"width": 8}, weights=str(path))


def digits(teacher, losses, **training):
    return Job(
        name="digits",
        data=Data(kind="digits", limit=64, eval_limit=32),
        student=Student(model="digits_cnn", options={"width": 4}),
        teachers={"big": teacher},
        losses=losses,
        training=Training(**{"epochs": 1, "batch_size": 16, "max_steps": 2} | training),
        launch=Launch(backend="local"),
    )


def steps(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def student_keys(folder):
    return load_file(folder / "student.safetensors").keys()


PLAIN = models.build("digits_cnn", 10, width=4, in_channels=1).state_dict()


@pytest.mark.parametrize("name", ["my_loss", "Bridge"])
def test_a_loss_of_ones_own_runs_and_is_live(name, my_package, teacher, tmp_path):
    job = digits(teacher, {"mine": Loss(f"my_package.my_loss:{name}")})
    run(job, folder=tmp_path)
    first = steps(tmp_path)[0]
    assert set(first["terms"]) == {"ce", "mine"}
    assert first["grad_norms"]["mine"] > 0
    assert first["terms"]["mine"] > 0
    kept = json.loads((tmp_path / "job.json").read_text())
    assert kept["ce_weight"] == (0.25 if name == "my_loss" else 0.5)
    assert kept["losses"]["mine"]["weight"] == (3.0 if name == "my_loss" else 2.0)
    assert student_keys(tmp_path) == PLAIN.keys()


def first_term(job, folder):
    run(job, folder=folder)
    return steps(folder)[0]["terms"]["mine"]


def test_options_of_a_function_are_set_by_path(my_package, teacher, tmp_path):
    job = digits(teacher, {"mine": Loss("my_package.my_loss:my_loss", margin=0.0)}, max_steps=1)
    plain = first_term(job, tmp_path / "plain")
    assert first_term(job.replace(**{"losses.mine.weight": "6"}), tmp_path / "twice") == pytest.approx(2 * plain, rel=1e-6)
    assert first_term(job.replace(**{"losses.mine.margin": "1e6"}), tmp_path / "wide") == 0.0
    with pytest.raises(JobFaults, match=r"losses\.mine\.magrin: .*no such option\. Did you mean 'margin'"):
        job.replace(**{"losses.mine.magrin": 1.0})
    with pytest.raises(JobFaults, match=r"losses\.mine\.margin: expected float, got 'x'"):
        job.replace(**{"losses.mine.margin": "x"})


def test_options_and_layers_of_a_class_are_set_by_path(my_package, teacher, tmp_path):
    job = digits(teacher, {"mine": Loss("my_package.my_loss:Bridge")}, max_steps=1)
    plain = first_term(job, tmp_path / "plain")
    changed = {
        "power": {"losses.mine.power": 4.0},
        "kernel": {"losses.mine.kernel": 3},
        "layers": {"losses.mine.layers": ["stage1"]},
    }
    for name, settings in changed.items():
        assert first_term(job.replace(**settings), tmp_path / name) != pytest.approx(plain, rel=1e-3)
    shapes = {}
    for name in ("plain", "kernel"):
        state = torch.load(next((tmp_path / name / "checkpoints").glob("step-*")) / "rank-0.pt", weights_only=True)
        shapes[name] = {key: tuple(value.shape) for key, value in state["losses"]["mine"].items()}
    assert shapes["plain"] == {"module.across.weight": (16, 8, 1, 1), "module.across.bias": (16,)}
    assert shapes["kernel"]["module.across.weight"] == (16, 8, 3, 3)


def test_a_loss_that_is_not_there_is_a_fault_before_the_start(my_package, teacher, tmp_path):
    job = digits(teacher, {"mine": Loss("my_package.my_loss:my_lost")})
    with pytest.raises(JobFaults, match=r"losses\.mine: .*has no 'my_lost'\. Did you mean 'my_loss'"):
        run(job, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


CHAINS = {"takd": {"assistants": ("digits_cnn",)}, "dgkd": {"assistants": ("digits_cnn",)}}
OPTIONS = {"crd": {"num_negatives": 8, "embed_dim": 4}, **CHAINS}
OPTIONS |= {"network-grafting": {"layers": ("stage1",), "block_share": 0.0}}  # one graft


@pytest.mark.parametrize("slug", [s for s, m in methods().items() if m.scheme == "offline" and s != "mt-nguyen"])
def test_an_exported_student_is_the_plain_model(slug, teacher, tmp_path):
    job = digits(teacher, {slug: Loss(slug, **OPTIONS.get(slug, {}))})
    if methods()[slug].teacher_role == "teachers" and slug not in CHAINS:
        job = job.replace(**{"teachers.other": dataclasses.asdict(teacher)})
    run(job, folder=tmp_path)
    exported = load_file(tmp_path / "student.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in exported.items()} == {
        name: (value.shape, value.dtype) for name, value in PLAIN.items()
    }
    models.build("digits_cnn", 10, width=4, in_channels=1).load_state_dict(exported)
    terms = steps(tmp_path)
    assert len(terms) == 2
    live = [name for name, norm in terms[0]["grad_norms"].items() if norm > 0 and name.split(".")[0] == slug]
    assert live or slug == "dkd", "dkd's ramp begins at 0"
