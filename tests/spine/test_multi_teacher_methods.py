"""Every multi-teacher method, two real teachers, real images of CIFAR-10: each term is alive, and the teachers make it."""

import math

import pytest
import torch

from raykd import catalogue
from raykd.config import Loss, Teacher
from raykd.data.batches import Plan, make_batch, recipe
from raykd.data.splits import open_data
from raykd.launch.assembly import connect, facts, local_sources
from raykd.launch.checks import inspect
from raykd.roles.learner import Learner
from raykd.roles.recorder import read
from tests.spine.small import assert_equal_states, cifar, final_state, go

FILES = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th"}
EXPERTS = {20: (0, 1, 2, 3, 4), 32: (9, 8, 7, 6, 5, 4)}  # classes of the two experts; both know 4
METHODS = {slug: method for slug, method in catalogue.methods().items() if method.path.parent.name == "multi_teacher"}
OF_CONNECTORS = {"knowledge-flow": {"dependence"}, "ka-common-feature": {"reconstruction"}}  # terms that train these alone
each_method = pytest.mark.parametrize("slug", METHODS)


def expert(path, classes, folder):
    """A real teacher that knows some of the classes only: the rows of its classifier."""
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    state = {key: value[list(classes)] if "linear" in key else value for key, value in state.items()}
    place = folder / f"expert-{path.name}.pth"
    torch.save(state, place)
    return str(place)


def job(slug, root, folder):
    """Two real ResNets teach a ResNet-8 by one method; experts of parts of the classes where the method knows such."""
    parts = "teachers_classes" in METHODS[slug].parameters
    teachers = {}
    for depth, name in FILES.items():
        path = root / "weights" / "cifar10" / name
        teachers[f"r{depth}"] = Teacher(
            model=f"cifar_resnet{depth}",
            weights=expert(path, EXPERTS[depth], folder) if parts else str(path),
            label_map=EXPERTS[depth] if parts else None,
            normalise="imagenet",
        )
    return cifar(root).replace(
        **{
            "teachers": teachers,
            "losses": {slug: Loss(slug)},
            "ce_weight": None,
            "data.limit": 128,
            "data.eval_limit": 64,
            "training.batch_size": 32,
            "training.max_steps": 3,
            "training.grad_norms_every": 1,
        }
    )


@each_method
def test_every_term_is_alive(slug, real_data, tmp_path):
    go(job(slug, real_data, tmp_path), tmp_path / "run")
    steps = read(tmp_path / "run" / "metrics.jsonl", "step")
    assert len(steps) == 3
    for step in steps:
        assert all(math.isfinite(value) for value in step["terms"].values())
        norms = {name: norm for name, norm in step["grad_norms"].items() if name != "ce"}
        assert norms
        for name, norm in norms.items():
            assert math.isfinite(norm)
            assert (norm > 0) != (name.rpartition(".")[2] in OF_CONNECTORS.get(slug, ())), f"{name}: {norm}"


def movement(made, order=None):
    """How one step on one real batch moves the student, with the teachers' signals in another order."""
    known, found = facts(made), connect(made, facts(made))
    sources = local_sources(made, found, known, pickled=True)
    train = open_data(made.data, "train", made.seed)
    plan = Plan(len(train), made.training.batch_size, made.seed)
    batch = make_batch(train, plan.indices(0, 0), made.data.augmentation, made.seed, 0)
    batch = batch | recipe(batch, 0)
    answers = {name: own for source in sources.values() for name, own in source.request(batch).result().items()}
    learner = Learner(made, found, known, torch.tensor(train.labels), torch.device("cpu"), plan.steps_per_epoch)
    learner.bind(batch, answers)
    learner.on_epoch(0)
    if order is not None:
        answers = {name: {key: shuffled(value, order) for key, value in own.items()} for name, own in answers.items()}
    before = [p.detach().clone() for p in learner.student.parameters()]
    learner.step(batch, answers, len(batch["labels"]))
    return torch.cat([(a - p.detach()).flatten() for a, p in zip(before, learner.student.parameters())])


def shuffled(value, order):
    """Samples in another order; both axes of a signal of pairs."""
    return value[order][:, order] if value.shape == (len(order), len(order)) else value[order]


@each_method
def test_the_teachers_of_other_images_teach_otherwise(slug, real_data, tmp_path):
    found = inspect(job(slug, real_data, tmp_path).replace(ce_weight=0.0))
    assert not found.faults
    right, again = movement(found.job), movement(found.job)
    wrong = movement(found.job, torch.arange(found.job.training.batch_size).roll(5))
    assert torch.equal(right, again)
    assert right.norm() > 0
    assert (right - wrong).norm() > 1e-3 * right.norm()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "slug, memory, option", [("lfme", "expert_weights", {"threshold": 0.0}), ("mt-wu", "alpha", {"alpha_lr": 100.0})]
)
def test_two_workers_agree_on_the_teachers(slug, memory, option, real_data, tmp_path, ray_cluster):
    """What is learnt of the teachers is the same on all workers, and no longer what it was at the start."""
    made = job(slug, real_data, tmp_path).replace(
        **{"launch.backend": "ray", "launch.workers": 2, "training.max_steps": 6, "losses": {slug: Loss(slug, **option)}}
    )
    go(made, tmp_path / "run")
    first, second = (
        {name: value for name, value in final_state(tmp_path / "run", rank).items() if name.endswith(memory)} for rank in (0, 1)
    )
    assert len(first) == 1
    assert_equal_states(first, second)
    (found,) = first.values()
    assert found.shape == (2,)
    assert found.min() < 1
    assert not torch.equal(found, torch.full((2,), 0.5))
