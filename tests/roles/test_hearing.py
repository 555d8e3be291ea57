"""What losses hear when teachers are many, aggregated, of other classes, or gone."""

import pytest
import torch

from raykd.config import Loss
from raykd.errors import SourceError
from raykd.parts.aggregators import aggregate
from raykd.resolve import resolve
from raykd.roles.hearing import hear, with_aggregates
from raykd.roles.losses import plans
from tests.roles import small

NAMES = ("a", "b", "c")


def several(losses, weights=(1.0, 2.0, 1.0), **settings):
    """A job of three tiny teachers."""
    one = small.job(losses, names=NAMES, **settings)
    return resolve(one.replace(**{f"teachers.{n}.weight": w for n, w in zip(NAMES, weights)}))


def moved(job, gone=()):
    """(what a step moves the student by, its terms) without the teachers in `gone`."""
    learner, taught = small.learner(job)
    before = small.weights(learner)
    teachers = taught.committee.teachers
    answers = {n: {"logits": t.logits(small.batch()["images"])} for n, t in teachers.items() if n not in gone}
    report = learner.step(small.batch(), answers, small.BATCH)
    return small.weights(learner) - before, report.terms


def test_the_mean_of_kl_to_each_has_the_gradient_of_kl_to_their_mean():
    kd = {"temperature": 4.0, "weight": 1.0}
    each, _ = moved(several({"kd": Loss("kd", **kd)}, ce_weight=0.0))
    mixed, _ = moved(several({"kd": Loss("kd", aggregate="mean_probs", **kd)}, ce_weight=0.0))
    torch.testing.assert_close(each, mixed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregate_by", [None, "mean_probs"])
def test_without_a_teacher_the_others_share_its_weight(aggregate_by):
    loss = {"kd": Loss("kd", aggregate=aggregate_by, weight=0.9)}
    left, terms = moved(several(loss), gone=("b",))
    only, _ = moved(several({"kd": Loss("kd", teachers=("a", "c"), aggregate=aggregate_by, weight=0.9)}))
    torch.testing.assert_close(left, only, rtol=1e-9, atol=1e-12)
    assert set(terms) == ({"ce", "kd"} if aggregate_by else {"ce", "kd.a", "kd.c"})


@pytest.mark.parametrize("loss", [Loss("kd"), Loss("kd", aggregate="entropy")])
def test_no_teacher_is_left(loss):
    with pytest.raises(SourceError, match=r"losses\.kd: none of its teachers is left \(a, b, c\)"):
        moved(several({"kd": loss}), gone=NAMES)


def test_lists_are_cut_to_the_teachers_that_are_there():
    job = several({"mt": Loss("mt-fukuda")})
    (plan,) = plans(job, dict.fromkeys(("student", *NAMES), small.STAGES))
    answers = {n: {"logits": torch.full((2, 3), float(i))} for i, n in enumerate(NAMES)}
    heard = hear(plan, [plan], {n: answers[n] for n in ("a", "c")})
    assert heard.of == (0, 2)
    assert [float(s["logits"][0, 0]) for s in heard.roles["teachers"]] == [0.0, 2.0]


def test_aggregates_are_drawn_from_the_batchs_keys_alone():
    job = several({"kd": Loss("kd", aggregate="random")})
    bound = plans(job, dict.fromkeys(("student", *NAMES), small.STAGES))
    answers = {n: {"logits": torch.full((small.BATCH, 3), float(i))} for i, n in enumerate(NAMES)}

    def drawn(step):
        return float(with_aggregates(bound, answers, small.batch(step), job.seed)[bound[0].aggregate.key]["logits"][0, 0])

    assert [drawn(s) for s in range(12)] == [drawn(s) for s in range(12)]
    assert {drawn(s) for s in range(3)} | {drawn(0)} <= {0.0, 1.0, 2.0}
    keyed = [float(small.batch(s)["sample_index"][0]) for s in range(3)]
    assert len(set(keyed)) == 3


def test_a_teacher_of_some_classes_teaches_those():
    """With a label map the loss sees the student's logits at the teacher's classes only."""
    job = several({"kd": Loss("kd", teachers="a", weight=1.0)}, ce_weight=0.0)
    job = resolve(job.replace(**{"teachers.a.label_map": [5, 0, 2]}))
    learner, taught = small.learner(job)
    answers = taught.request(small.batch()).result()
    assert answers["a"]["logits"].shape == (small.BATCH, 3)
    terms = learner.step(small.batch(), answers, small.BATCH).terms
    again, _ = small.learner(job)
    student = again.student.train()(again.tapped.inputs(small.batch()["images"]))[:, [5, 0, 2]]
    p = (answers["a"]["logits"] / 4).softmax(1)
    wanted = 16 * (p * (p.log() - (student / 4).log_softmax(1))).sum(1).mean()
    assert terms["kd"] == pytest.approx(float(wanted), rel=1e-9)
    gradient = torch.autograd.grad(wanted, again.student.parameters())
    assert gradient[-1][[1, 3, 4, 6]].abs().max() == 0, "classes the teacher does not know get no gradient"


def test_the_learner_aggregates_as_the_actor_does():
    job = several({"kd": Loss("kd", aggregate="confidence")})
    bound = plans(job, dict.fromkeys(("student", *NAMES), small.STAGES))
    taught = small.source(job, bound)
    key = bound[0].aggregate.key
    there = taught.request(small.batch()).result()
    assert set(there) == {key}, "teachers of one process answer with their aggregate"
    each = {n: {"logits": t.logits(small.batch()["images"])} for n, t in taught.committee.teachers.items()}
    here = with_aggregates(bound, each, small.batch(), job.seed)[key]["logits"]
    assert torch.equal(there[key]["logits"], here)
    given = {"weights": torch.tensor([1.0, 2.0, 1.0]), "temperature": 4.0}
    assert torch.equal(here, aggregate("confidence", [each[n]["logits"] for n in NAMES], given))
