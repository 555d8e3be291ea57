"""Free pixels, a real ResNet-20: what zskd and df-lopes draw, images that come to be what was wanted, what the run says."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from raykd import models
from raykd.config import Launch, Loss, Synthesis
from raykd.data.normalise import Normalise
from raykd.errors import ConfigError
from raykd.launch.assembly import connect_images, facts
from raykd.launch.checks import inspect
from raykd.launch.synthesizers import own_sources
from raykd.methods.data_free import deepinversion, df_lopes, zskd
from raykd.models import Taps
from raykd.parts.records import Records
from raykd.resolve import resolve
from raykd.schemes.data_free import Snapshot, Workshop
from tests.spine.making import making, records
from tests.spine.small import go

CPU = torch.device("cpu")


def teacher(root):
    model = models.build("cifar_resnet20", 10)
    models.load_weights(model, root / "weights" / "cifar10" / "resnet20-12fca82f.th")
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def recorded(real_data, tmp_path_factory):
    """Records of the teacher's logits, as its documentation says; of noise, as a test needs no more."""
    path = tmp_path_factory.mktemp("records") / "records.safetensors"
    model, record = teacher(real_data), Records(10)
    torch.manual_seed(0)
    with torch.no_grad(), Taps(model, ["logits"]) as taps:
        for _ in range(2):
            model(torch.randn(64, 3, 32, 32) * 2)
            record.add([taps["logits"]], torch.arange(64) % 10)
    record.save(path)
    return str(path)


def job(root, method, recorded="", steps=3, options=None, **settings):
    own = {"records": recorded} if method == "df-lopes" else {}
    free = Synthesis(steps=steps, capacity=3, start=2, steps_per_epoch=4, show=8, cpus=0.5)
    losses = {method: Loss(method, **own | (options or {}))}
    found = making(root, method, synthesis=free, losses=losses, **{"training.epochs": 1, "training.milestones": None})
    return found.replace(**settings)


def made(job, count=1, student=None):
    """The first batches of its bank."""
    job = resolve(job)
    known = facts(job)
    work = Workshop(job, connect_images(job, known), known, own_sources(job, known), CPU)
    return [work.make(number, student) for number in range(count)]


@pytest.mark.parametrize("method", ["deepinversion", "zskd", "df-lopes"])
def test_a_run_learns_from_them_and_says_what_they_are_made_of(method, real_data, recorded, tmp_path):
    go(job(real_data, method, recorded), tmp_path / "run")
    steps = records(tmp_path / "run", "step")
    assert len(steps) == 4
    assert all(step["loss"] > 0 for step in steps)
    assert steps[-1]["bank"] == 3, "grows once, to its capacity"
    said = json.loads((tmp_path / "run" / "result.json").read_text())["real_data"]
    assert said.startswith("metadata: mean and covariance") if method == "df-lopes" else said == "none"
    told = [note for note in inspect(job(real_data, method, recorded)).notes if note.startswith("Real data")]
    assert told == [f"Real data: {said}, beside the images it is measured on."]


@pytest.mark.parametrize("method", ["deepinversion", "zskd", "df-lopes"])
def test_images_become_what_was_wanted(method, real_data, recorded):
    """The loss falls; in DeepInversion the teacher sees the classes wanted. No generator knows of them."""
    settings = {"synthesis.lr": 0.05, "synthesis.keep": "last"}
    options = {"norms": 0.1} if method == "deepinversion" else None
    (before,) = made(job(real_data, method, recorded, 1, options, **settings))
    (after,) = made(job(real_data, method, recorded, 40, options, **settings))
    assert (before.labels == after.labels).all()
    assert after.loss < 0.9 * before.loss
    if method == "deepinversion":
        images = Normalise.preset("imagenet")(torch.from_numpy(after.images))
        said = teacher(real_data)(images).argmax(1)
        assert (said == torch.from_numpy(after.labels)).float().mean() > 0.8


def test_the_adaptive_variant_hears_the_student(real_data):
    """Another student, other images; without it none is heard."""
    students = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        students.append(Snapshot(seed, models.build("cifar_resnet8", 10).state_dict()))
    for adi in (0.0, 10.0):
        wanted = job(real_data, "deepinversion", options={"adi": adi}, **{"synthesis.keep": "last"})
        first, second = (made(wanted, student=student)[0].images for student in students)
        assert (first == second).all() == (adi == 0.0)


def test_concentrations_are_the_similarity_of_the_teachers_classes(real_data):
    """Of the weights of its last layer, which are asked for once wherever it lives."""
    wanted = resolve(job(real_data, "zskd"))
    known = facts(wanted)
    work = Workshop(wanted, connect_images(wanted, known), known, own_sources(wanted, known), CPU)
    found = work.synthesizer.losses["zskd"].module.concentration.double()
    weights = models.classifier(teacher(real_data)).weight.double()
    cosines = F.cosine_similarity(weights[:, None], weights[None], dim=2)
    expected = torch.stack([(row - row.min()) / (row.max() - row.min()) for row in cosines])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.argmax(1), torch.arange(10))


def test_distributions_are_dirichlet():
    """Means and variances of 2 x 20,000 draws; the factors in turn; the draws follow from the generator alone."""
    torch.manual_seed(0)
    module = zskd.Images(torch.randn(4, 6), betas=(1.0, 0.1))
    labels = torch.full((40_000,), 2)
    found = zskd.targets(module, labels, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.sum(1), torch.ones(40_000, dtype=torch.float64))
    for place, beta in enumerate((1.0, 0.1)):
        alpha = beta * module.concentration[2] + 1e-4
        mean = alpha / alpha.sum()
        own = found[place::2]
        torch.testing.assert_close(own.mean(0), mean, rtol=0, atol=0.02)
        torch.testing.assert_close(own.var(0), mean * (1 - mean) / (alpha.sum() + 1), rtol=0, atol=0.02)
    assert torch.equal(found, zskd.targets(module, labels, torch.Generator().manual_seed(1)))
    assert not torch.equal(found, zskd.targets(module, labels, torch.Generator().manual_seed(2)))


def test_distributions_that_a_float_cannot_hold():
    """Where every draw is too small for a float, the class itself is certain."""
    module = zskd.Images(torch.eye(3), betas=(1e-6,))
    found = zskd.targets(module, torch.arange(3).repeat(100), torch.Generator().manual_seed(0))
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(300, dtype=torch.float64))
    for betas in ((), (1.0, 0.0)):
        with pytest.raises(ConfigError, match="positive"):
            zskd.Images(torch.eye(3), betas=betas)


@pytest.mark.parametrize("num_classes", [None, 2])
def test_activations_are_drawn_as_recorded(num_classes, tmp_path):
    """Mean and covariance of 20,000 draws of a class; an activation that never varied does not."""
    torch.manual_seed(0)
    seen = torch.randn(500, 4) @ torch.randn(4, 4) + 1
    seen[:, 3] = 2.0
    record = Records(num_classes)
    record.add([seen], torch.arange(500) % 2)
    record.save(tmp_path / "records.safetensors")
    module = df_lopes.Images([(4,)], records=str(tmp_path / "records.safetensors"))
    found = df_lopes.targets(module, torch.ones(20_000, dtype=torch.int64), torch.Generator().manual_seed(0))
    own = seen if num_classes is None else seen[1::2]
    spread = float(own.var(0).max())
    torch.testing.assert_close(found.mean(0).float(), own.mean(0), rtol=0, atol=0.03 * spread)
    np.testing.assert_allclose(np.cov(found.numpy().T), np.cov(own.numpy().T), atol=0.05 * spread)
    assert found[:, 3].std() < 1e-5


def test_records_that_do_not_fit(recorded):
    with pytest.raises(ConfigError, match=r"expected 7 activations \(3 \+ 4 of the layers\), got 10"):
        df_lopes.Images([(3, 8, 8), (4,)], records=recorded)
    module = df_lopes.Images([(10,)], records=recorded)
    with pytest.raises(ConfigError, match="expected 11 classes at least, got 10"):
        df_lopes.targets(module, torch.tensor([10]), torch.Generator())


def test_all_layers(real_data, tmp_path):
    """A record of several layers, and the layers named in the job."""
    layers, record = ("stage1", "stage3", "logits"), Records()
    model = teacher(real_data)
    with torch.no_grad(), Taps(model, list(layers)) as taps:
        model(torch.randn(64, 3, 32, 32))
        record.add([taps[layer] for layer in layers])
    record.save(tmp_path / "records.safetensors")
    wanted = job(real_data, "df-lopes", str(tmp_path / "records.safetensors"))
    wanted = wanted.replace(losses={"df-lopes": Loss("df-lopes", layers=layers, records=str(tmp_path / "records.safetensors"))})
    assert not inspect(wanted).faults
    (found,) = made(wanted)
    assert found.loss > 0


def test_adaptive_divergence_is_symmetric():
    """In both modes, and at most log 2 in the paper's."""
    student, apart = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    plain = {
        "teacher_norms": [torch.zeros(4, 1)],
        "normalised_images": torch.zeros(50, 1, 2, 2),
        "labels": torch.zeros(50).long(),
    }
    for mode in ("code", "paper"):
        one, other = (
            deepinversion.images_loss(a, b, **plain, adi=1.0, mode=mode)["adaptive"]
            for a, b in ((student, apart), (apart, student))
        )
        torch.testing.assert_close(one, other)
        assert (one >= 1 - np.log(2) - 1e-9).all() or mode == "code"


WRONG = [
    ({"synthesis.mode": "lockstep"}, "zskd", "synthesis.mode: free pixels are made a batch at a time"),
    ({"synthesis.generator": "dcgan", "synthesis.latent": 8, "synthesis.clip": True}, "zskd", "synthesis.clip: it is of free"),
    ({"losses.df-lopes.records": ""}, "df-lopes", "absolute path of a file of activation records, got ''"),
    ({"losses.df-lopes.records": "/none/records.safetensors"}, "df-lopes", "/none/records.safetensors cannot be read"),
    ({"losses.df-lopes.layers": ("stage1", "logits")}, "df-lopes", "expected 26 activations"),
    (
        {"teachers.big.model": "tests.spine.plain:plain", "teachers.big.weights": None},
        "deepinversion",
        "at least one batch norm",
    ),
    ({"losses.zskd.betas": ()}, "zskd", "betas: expected positive factors"),
]


@pytest.mark.parametrize("settings, method, told", WRONG)
def test_bad_jobs(settings, method, told, real_data, recorded):
    """Told before anything starts."""
    faults = inspect(job(real_data, method, recorded).replace(**settings)).faults
    assert any(told in fault for fault in faults), faults


def test_another_generator_brings_no_clipping(real_data):
    """What a method sets for free pixels is not of a generator that the job names."""
    found = resolve(job(real_data, "deepinversion").replace(**{"synthesis.generator": "dcgan", "synthesis.latent": 8}))
    assert found.synthesis.clip is False
    assert not inspect(found).faults


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray(real_data, recorded, tmp_path, ray_cluster):
    """Synthesizers in actors of their own ask their teacher, and read the records, there."""
    for method in ("zskd", "df-lopes"):
        own = job(real_data, method, recorded, launch=Launch(backend="ray", cpus=0.5))
        go(own, tmp_path / method)
        assert len(records(tmp_path / method, "step")) == 4
