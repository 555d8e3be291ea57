"""Without data, in lock-step: a real LeNet-5 and images that a generator makes; no training image is opened."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs import mnist_data_free
from raykd.config import Augmentation, Job, Launch, Loss, Synthesis, Teacher
from raykd.data import sets, splits
from raykd.errors import Interrupted
from raykd.launch import hosts
from raykd.launch import settings as checked
from raykd.launch.checks import inspect
from raykd.resolve import resolve
from raykd.roles.losses import image_plans
from raykd.roles.network import Facts, build
from raykd.roles.recorder import read
from raykd.roles.synthesizer import Synthesizer
from tests.spine.small import assert_equal_states, final_state, go, trace

STEPS = 8
TERMS = {"dafl": {"one_hot", "activation", "entropy"}, "dfad": {"dfad"}, "zskt": {"zskt"}}
STUDENT = {"dafl": {"dafl"}, "dfad": {"dfad"}, "zskt": {"zskt.kl", "zskt.attention"}}
each_method = pytest.mark.parametrize("method", TERMS)


def small(root: Path, method: str = "dfad", **settings):
    """The job as it is shipped, with a small generator: two epochs of four steps, rounds of two."""
    job = getattr(mnist_data_free, method)(str(root / "mnist"), str(root / "weights" / "mnist" / "lenet5_mnist.pth.tar"))
    return job.replace(
        **{
            "launch.backend": "local",
            "data.eval": "test.parquet",
            "data.eval_limit": 64,
            "synthesis.options.width": 4,
            "synthesis.student_steps": 2,
            "synthesis.steps_per_epoch": STEPS // 2,
            "synthesis.show": 24,
            "training.epochs": 2,
            "training.batch_size": 16,
            "training.grad_norms_every": 1,
            **settings,
        }
    )


def two(root: Path, folder: Path) -> dict[str, Teacher]:
    """The real one, and one of half its width with weights of its own."""
    weights = folder / "half.safetensors"
    save_file(mnist_data_free.lenet5(10, width=0.5).state_dict(), weights)
    real = small(root).teachers["lenet5"]
    return {"real": real, "half": replace(real, options={"width": 0.5}, weights=str(weights), weight=3.0)}


@each_method
def test_every_term_is_alive(method, real_data, tmp_path):
    go(small(real_data, method), tmp_path / "run")
    steps = read(tmp_path / "run" / "metrics.jsonl", "step")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        assert step["grad_norms"].keys() == STUDENT[method]
        assert all(0 < norm < math.inf for norm in step["grad_norms"].values())
    made = [step["images_terms"] for step in steps if "images_terms" in step]
    assert [step["step"] for step in steps if "images_terms" in step] == [1, 3, 5, 7], "once a round"
    assert all(terms.keys() == TERMS[method] for terms in made)
    assert all(math.isfinite(value) for terms in made for value in terms.values())
    for name in TERMS[method]:
        assert len({terms[name] for terms in made}) == len(made), f"{name} stands still"


def test_images_are_put_out_for_the_eye(real_data, tmp_path):
    go(small(real_data), tmp_path / "run")
    shown = [record["shown"] for record in read(tmp_path / "run" / "metrics.jsonl", "eval")]
    assert [own["file"] for own in shown] == ["images/epoch-0001.png", "images/epoch-0002.png"]
    for own in shown:
        with Image.open(tmp_path / "run" / own["file"]) as grid:
            assert grid.size == (8 * 30 + 2, 3 * 30 + 2), "three rows of eight 28 px wide"
        assert sum(own["classes"]) == 24
        assert len(own["classes"]) == 10
        assert own["shown"] == 24
        assert 0 < own["confidence"] <= 1
        assert [c is None for c in own["confidences"]] == [n == 0 for n in own["classes"]]
        told = sum(n * c for n, c in zip(own["classes"], own["confidences"]) if n)
        assert told / 24 == pytest.approx(own["confidence"])
        assert own["wanted"] is None, "dfad wants no class"
    first, second = ((tmp_path / "run" / own["file"]).read_bytes() for own in shown)
    assert first != second


def test_images_are_put_out_where_nothing_is_evaluated(real_data, tmp_path):
    go(small(real_data, **{"data.eval": "none", "data.test": "test.parquet"}), tmp_path / "run")
    assert not read(tmp_path / "run" / "metrics.jsonl", "eval")
    shown = [record["shown"]["file"] for record in read(tmp_path / "run" / "metrics.jsonl", "shown")]
    assert shown == ["images/epoch-0001.png", "images/epoch-0002.png"]
    assert all((tmp_path / "run" / file).is_file() for file in shown)


def test_options_of_a_job_are_laid_over_those_of_its_method():
    job = small(Path("data"), "zskt").replace(**{"synthesis.options": {"width": 4}})
    assert resolve(job).synthesis.options == {"width": 4, "last": "norm"}
    assert resolve(resolve(job)).synthesis == resolve(job).synthesis
    assert resolve(job.replace(**{"synthesis.options.last": "sigmoid"})).synthesis.options["last"] == "sigmoid"
    assert resolve(job.replace(**{"synthesis.generator": "pixels"})).synthesis.options == {"width": 4}, "of another generator"


@pytest.mark.slow
@each_method
def test_no_training_image_is_opened(method, real_data, tmp_path, monkeypatch):
    """Files other than those of the test set may even be missing."""
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "test.parquet").symlink_to(real_data / "mnist" / "test.parquet")
    opened, honest = [], sets.open_split

    def counting(spec, split):
        opened.append(split)
        return honest(spec, split)

    monkeypatch.setattr(splits, "open_split", counting)
    monkeypatch.setattr(sets, "open_split", counting)
    job = small(real_data, method).replace(**{"data.root": str(tmp_path / "mnist"), "training.epochs": 1})
    go(job, tmp_path / "run")
    assert opened
    assert "train" not in opened
    said = json.loads((tmp_path / "run" / "job.json").read_text())
    assert said["data"]["train"] == "none"


def stopped_and_resumed(job: Job, at: int, folder: Path, monkeypatch) -> tuple[Path, Path]:
    """A whole run, and one that is stopped at a batch and resumed: the same steps, the same end, bit for bit."""
    whole, cut = folder / "whole", folder / "cut"
    go(job, whole)
    honest = Synthesizer.batch

    def stopping(self, number):
        if number == at:
            (cut / "STOP").touch()
        return honest(self, number)

    monkeypatch.setattr(hosts, "STOP_POLL_S", 0.0)
    monkeypatch.setattr(Synthesizer, "batch", stopping)
    with pytest.raises(Interrupted):
        go(job, cut)
    monkeypatch.setattr(Synthesizer, "batch", honest)
    assert at <= len(trace(cut)) < STEPS
    go(job, cut, resume=True)
    assert trace(cut) == trace(whole)
    assert_equal_states(final_state(whole), final_state(cut))
    return whole, cut


@pytest.mark.slow
@pytest.mark.parametrize("method, at", [("dafl", 3), ("dfad", 4), ("dfad", 5), ("zskt", 3)])
def test_resume_is_exact(method, at, real_data, tmp_path, monkeypatch):
    """Stopped within a round and between two: the same images, the same student, generator and momenta, bit for bit."""
    whole, cut = stopped_and_resumed(small(real_data, method), at, tmp_path, monkeypatch)
    assert any("feed.generator" in name for name in final_state(cut))
    one, other = ([read(folder / "metrics.jsonl", "step"), read(folder / "metrics.jsonl", "eval")] for folder in (whole, cut))
    assert [step.get("images_terms") for step in one[0]] == [step.get("images_terms") for step in other[0]]
    assert [record["shown"] for record in one[1]] == [record["shown"] for record in other[1]]


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 4])
def test_a_run_that_ends_early_is_the_beginning_of_a_longer_one(at, real_data, tmp_path):
    go(small(real_data), tmp_path / "whole")
    go(small(real_data, **{"training.max_steps": at}), tmp_path / "early")
    assert trace(tmp_path / "early") == trace(tmp_path / "whole")[:at]


@pytest.mark.slow
def test_two_teachers_are_heard_by_their_weights(real_data, tmp_path):
    """The images' loss is shared out as the student's is: of two equal teachers it is that of one."""
    one, both = tmp_path / "one", tmp_path / "both"
    real = small(real_data).teachers["lenet5"]
    go(small(real_data), one)
    go(small(real_data).replace(teachers={"a": real, "b": real}), both)
    alone, together = (read(folder / "metrics.jsonl", "step") for folder in (one, both))
    for a, b in zip(alone, together):
        assert sum(b["terms"].values()) == pytest.approx(sum(a["terms"].values()), rel=1e-4)
        assert sum(b.get("images_terms", {}).values()) == pytest.approx(sum(a.get("images_terms", {}).values()), rel=1e-4)
    unlike = tmp_path / "unlike"
    go(small(real_data).replace(teachers=two(real_data, tmp_path)), unlike)
    assert set(read(unlike / "metrics.jsonl", "step")[0]["terms"]) == {"dfad.real", "dfad.half"}


@pytest.mark.slow
def test_teachers_stay_as_they_are_and_the_export_is_the_plain_student(real_data, tmp_path):
    go(small(real_data, "zskt"), tmp_path / "run")
    plain = mnist_data_free.lenet5(10, width=0.5)
    exported = load_file(tmp_path / "run" / "student.safetensors")
    assert {name: value.shape for name, value in exported.items()} == {n: v.shape for n, v in plain.state_dict().items()}
    assert all(value.isfinite().all() for value in exported.values())


@pytest.mark.slow
def test_backends_agree(real_data, tmp_path):
    """A teacher in the student's process and one behind a copy: the same trace."""
    job = small(real_data, "dafl")
    go(job, tmp_path / "inline")
    go(job.replace(**{"teachers.lenet5.placement": "pool"}), tmp_path / "pool")
    assert trace(tmp_path / "inline") == trace(tmp_path / "pool")


FAULTS = {
    "data.augmentation: these images are made anew": {"data.augmentation": Augmentation(crop=2)},
    "data.limit: it is of training images": {"data.limit": 100},
    "data.per_class: it is of training images": {"data.per_class": 3},
    "data.holdout, data.noisy_labels: they": {"data.holdout": 0.1},
    "data.holdout, data.noisy_labels": {"data.noisy_labels": True},
    "data.test: expected images to measure on": {"data.test": None, "data.eval": None},
    "baseline: without images": {"baseline": True},
    "losses: expected one that makes images, got dfad, second": {"losses": {"dfad": Loss("dfad"), "second": Loss("dafl")}},
    "teachers.lenet5.codec: images that are made need 'dense'": {"teachers.lenet5.codec": "fp16"},
    "teachers.lenet5.inputs: images that are made need 'pixels'": {"teachers.lenet5.inputs": "recipe"},
    "teachers.lenet5.placement: nothing is kept": {"teachers.lenet5.placement": "store", "teachers.lenet5.store": "kept"},
    "synthesis.generator: no generator 'dcgen'. Did you mean 'dcgan'": {"synthesis.generator": "dcgen"},
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_a_job_without_data_cannot_have(told):
    found = checked.synthesis(resolve(small(Path("data")).replace(**FAULTS[told])))
    assert any(fault.startswith(told) for fault in found), found


def test_a_job_as_it_is_has_no_fault(real_data):
    for method in TERMS:
        assert checked.synthesis(resolve(small(Path("data"), method))) == []
        assert inspect(small(real_data, method)).faults == []


def test_settings_of_the_generator_are_checked_without_a_run(real_data):
    assert any("width" in f for f in inspect(small(real_data, **{"synthesis.options.width": 0})).faults)
    assert any("divisible" in f for f in inspect(small(real_data, **{"synthesis.options.doublings": 3})).faults)


def test_training_images_of_a_job_that_makes_its_own_are_refused():
    with pytest.raises(ValueError, match=r"data.train: this job makes its own images"):
        resolve(small(Path("data")).replace(**{"data.train": "train.parquet"}))


def test_synthesis_without_a_loss_that_makes_images():
    job = small(Path("data")).replace(losses={"kd": Loss("kd")}, synthesis=Synthesis(latent=7), launch=Launch())
    (fault,) = checked.synthesis(resolve(job))
    assert fault.startswith("synthesis: no loss of this job makes images")


def test_the_probe_leaves_the_student_alone():
    """Batch norm of a student in training mode hears no image before the first step."""
    job = resolve(small(Path("data")).replace(**{"student.model": "digits_cnn", "student.options": {}}))
    facts = Facts(64, 10, (1, 28, 28), "mnist")
    student = build(job.student, facts).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    stages = {"student": [], "lenet5": []}
    made = Synthesizer(job, image_plans(job, stages), facts, student, torch.device("cpu"))
    made.bind(lambda images, wanted: {"lenet5": {"logits": images.flatten(1)[:, :10]}})
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training


@pytest.mark.parametrize("noise", ["step", "round"])
def test_one_draw_of_noise_at_each_step_or_in_each_round(noise):
    job = resolve(small(Path("data"), "zskt").replace(**{"synthesis.before": 3, "synthesis.generator_steps": 2}))
    assert job.synthesis.noise == "round", "as the paper says"
    facts = Facts(64, 10, (1, 28, 28), "mnist")
    made = Synthesizer(job.replace(**{"synthesis.noise": noise}), [], facts, torch.nn.Identity(), torch.device("cpu"))
    before, first, second = ([made.draw("generator", n)["latents"] for n in own] for own in (range(3), (3, 4), (5, 6)))
    seen = [made.batch(step) for step in range(4)]
    same = noise == "round"
    assert len({tuple(z.flatten().tolist()) for z in (*before, *first, *second)}) == (5 if same else 7)
    for round_, noises in enumerate((first, second)):
        one, other = seen[2 * round_ : 2 * round_ + 2]
        assert torch.equal(*noises) == same
        assert torch.equal(noises[0], made.draw("student", 2 * round_)["latents"]) == same
        assert torch.equal(one["images"], other["images"]) == same
        assert torch.equal(one["sample_index"], other["sample_index"]) == same
    assert not torch.equal(seen[1]["images"], seen[2]["images"])
