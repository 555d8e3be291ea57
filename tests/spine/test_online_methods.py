"""Every method of online distillation, real images of CIFAR-10, a few steps: each term is alive, and what is exported is the
plain model."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file

from raykd import Augmentation, Data, Job, Launch, Loss, Student, Training, catalogue, models
from raykd.config import Branching, Exchange, Peer
from raykd.roles.recorder import read
from tests.spine.online_jobs import of
from tests.spine.small import go

STEPS = 4
METHODS = {slug: method for slug, method in catalogue.methods().items() if method.path.parent.name == "online"}


@dataclass(frozen=True)
class Case:
    """A method in a job; without names of peers, one student with branches."""

    slug: str
    names: str = "ab"
    options: dict = field(default_factory=dict)
    exchange: dict = field(default_factory=dict)
    branching: Branching = field(default_factory=Branching)
    models: tuple[str, ...] = ("crd_resnet8", "crd_resnet14", "crd_resnet8")  # of the peers, in order
    learns: tuple[str, ...] = ()  # parts of the method, by name, that move in the second epoch


TAILS = Branching("split", count=3, at="stage1", options=({"widths": (16, 16, 24, 48)}, {"widths": (16, 16, 16, 32)}))
COPIES = {"what": "weights", "every": 2, "shards": "disjoint"}
CASES = {
    "dml": Case("dml"),
    "dml, three in a ring": Case("dml", "abc", exchange={"graph": "ring"}),
    "kdcl naive": Case("kdcl", options={"target": "naive"}, exchange={"views": "own"}),
    "kdcl linear": Case("kdcl", options={"target": "linear"}, exchange={"views": "own"}),
    "kdcl minlogit": Case("kdcl", "abc", exchange={"views": "own"}),
    "kdcl general": Case("kdcl", options={"target": "general"}, exchange={"views": "own"}, learns=("network_weights",)),
    "codistillation": Case("codistillation", "abc", exchange=COPIES),
    "mcl": Case("mcl", options={"logit_distill": True}),
    "afd-online": Case("afd-online", learns=("critic", "adapter"), models=("crd_resnet8", "wrn_16_2")),
    "afd-online, three, one optimizer": Case(
        "afd-online", "abc", {"separate_optimizer": False}, {"graph": "ring"}, learns=("critic",)
    ),
    "amln": Case("amln", learns=("critics", "aligners")),
    "amln, cross-entropy": Case(
        "amln", options={"gan": "cross_entropy"}, models=("crd_resnet8", "wrn_16_1"), learns=("critics",)
    ),
    "dcml": Case("dcml"),
    "mmt": Case("mmt", exchange={"views": "own"}),
    "mmt, three, pseudo labels": Case("mmt", "abc", {"pseudo_labels": True}, learns=("bank", "pseudo")),
    "hssakd": Case("hssakd", models=("crd_resnet8", "crd_resnet8")),
    "cl": Case("cl", ""),
    "one": Case("one", "", learns=("linear",)),
    "okddip": Case("okddip", "", learns=("query", "key")),
    "ffl": Case("ffl", "", learns=("pointwise", "classifier")),
    "pcl": Case("pcl", "", learns=("ensemble",)),
    "walawalkar": Case("walawalkar", ""),
    "walawalkar, compressed": Case("walawalkar", "", branching=TAILS, learns=("adapters",)),
    "mutualnet": Case("mutualnet", ""),
}


def job(case: Case, root) -> Job:
    """Two epochs of two steps; the first of each tells the gradient norms of its terms."""
    spec = {"branching": case.branching}
    peers = {name: Peer(model=model, **spec) for name, model in zip(case.names, case.models)}
    return Job(
        name="online",
        seed=4,
        data=Data(
            kind="parquet",
            root=str(root / "cifar10"),
            train="train-00000-of-00005.parquet",
            eval="test_first1000.parquet",
            normalise="cifar10",
            limit=16 * STEPS // 2 * (len(case.names) if case.exchange.get("shards") == "disjoint" else 1),
            eval_limit=32,
            augmentation=Augmentation(crop=4, flip=True),
        ),
        student=Student() if peers else Student(model="crd_resnet8", **spec),
        peers=peers,
        exchange=Exchange(**case.exchange),
        losses={case.slug: Loss(case.slug, **case.options)},
        training=Training(recipe="online", epochs=2, batch_size=16, lr=0.05, grad_norms_every=2, eval_every=2),
        launch=Launch(backend="local", cpus=0.5),
    )


def test_every_method_has_a_case():
    assert {case.slug for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("name", CASES)
def test_every_term_is_alive_and_the_export_is_clean(name, real_data, tmp_path):
    case, run = CASES[name], tmp_path / "run"
    made = job(case, real_data)
    result = go(made, run)  # refuses a job of which `raykd.check` finds faults
    specs = {of(run, n): spec for n, spec in made.peers.items()} or {run: made.student}
    for place, spec in specs.items():
        check_steps(read(place / "metrics.jsonl", "step"))
        check_export(place, spec, split=METHODS[case.slug].branching.get("kind") == "split")
        check_learnt(case.learns, place)
    if case.names:
        assert result["together"]["peers"] == list(case.names)
    else:
        assert len(result["student"]["branches"]["each"]) == (case.branching.count or METHODS[case.slug].branching["count"])


def check_steps(steps):
    """No step is missing, every term is finite, and each of them has had a gradient to the student."""
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    greatest: dict[str, float] = {}
    for step in steps:
        assert all(math.isfinite(value) for value in step["terms"].values())
        for term, norm in step.get("grad_norms", {}).items():
            assert math.isfinite(norm)
            greatest[term] = max(norm, greatest.get(term, 0.0))
    assert greatest.keys() == steps[0]["terms"].keys()
    assert len(greatest) > 1
    assert not [term for term, norm in greatest.items() if norm == 0]


def check_export(place, spec, split):
    """Exactly the plain model's parameters, all finite; of a split each further branch too."""
    check_file(place / "student.safetensors", models.build(spec.model, 10))
    tails = sorted(place.glob("student_branch*"))
    assert bool(tails) == split
    options = spec.branching.options or [{}] * len(tails)
    assert len(options) == len(tails)
    for path, own in zip(tails, options):
        check_file(path, models.build(spec.model, 10, **own))


def check_file(path, plain):
    """A model's weights and nothing else; they answer."""
    state, wanted = load_file(path), plain.state_dict()
    assert state.keys() == wanted.keys()
    assert all(value.isfinite().all() for value in state.values())
    plain.load_state_dict(state)
    with torch.no_grad():
        assert plain.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def check_learnt(parts, place):
    """The student, and these parts of the method, are not at the end what they were after the first epoch."""
    before, after = (torch.load(path / "rank-0.pt", weights_only=True) for path in sorted(place.glob("checkpoints/step-*")))
    moved = {key for key, value in after["student"].items() if not torch.equal(value, before["student"][key])}
    assert all(any(key.endswith(kind) for key in moved) for kind in ("weight", "running_mean"))
    old, new = ({f"{n}.{key}": v for n, own in state["losses"].items() for key, v in own.items()} for state in (before, after))
    for part in parts:
        keys = [key for key in new if f".{part}" in key and isinstance(new[key], torch.Tensor)]
        assert any(not torch.equal(new[key], old[key]) for key in keys), f"{part}: nothing of {sorted(new)} has moved"
        assert all(new[key].isfinite().all() for key in keys)
