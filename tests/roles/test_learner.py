"""One optimizer step, against hand computations on a tiny float64 net."""

import math

import pytest
import torch

from raykd.config import Loss
from raykd.data.normalise import Normalise
from raykd.errors import ConfigError, DivergenceError, SignalError
from tests.roles import small
from tests.roles.nets import Tiny

KD = {"kd": Loss("kd", temperature=2.0, weight=0.7)}


def inputs(images):
    return Normalise.preset("cifar10")(images, dtype=torch.float64)


def plain(learner):
    """The student as a plain net with equal weights."""
    net = Tiny(small.CLASSES).double()
    net.load_state_dict(learner.student.state_dict())
    return net


def nll(logits, labels):
    """Cross-entropy of each sample, from the definition."""
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    return -torch.stack([p[int(y)].log() for p, y in zip(probabilities, labels)])


def kl(student, teacher, temperature):
    p, q = ((z / temperature).exp() for z in (teacher, student))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return temperature**2 * (p * (p.log() - q.log())).sum(1)


def gradient(value, net):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(net.parameters()), retain_graph=True)])


def test_a_step_by_hand():
    """Loss, terms, gradient norms and the update of SGD with momentum and weight decay, over two steps."""
    made = small.job(
        KD, ce_weight=0.4, training={"momentum": 0.9, "weight_decay": 1e-2, "decay_norms": False, "grad_norms_every": 1}
    )
    learner, taught = small.learner(made)
    net = plain(learner)
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in range(2):
        batch = small.batch(step)
        logits = net(inputs(batch["images"]))
        teacher = taught.request(batch).result()["big"]["logits"]
        terms = {"ce": 0.4 * nll(logits, batch["labels"]).mean(), "kd": 0.7 * kl(logits, teacher, 2.0).mean()}
        report = learner.step(batch, {"big": {"logits": teacher}}, small.BATCH)
        assert report.terms == pytest.approx({n: float(v.detach()) for n, v in terms.items()}, rel=1e-10)
        assert report.loss == pytest.approx(float(sum(terms.values()).detach()), rel=1e-10)
        assert report.grad_norms == pytest.approx({n: float(gradient(v, net).norm()) for n, v in terms.items()}, rel=1e-10)
        assert report.lr == 0.05
        grads = torch.autograd.grad(sum(terms.values()), list(net.parameters()))
        with torch.no_grad():
            for (name, p), grad in zip(net.named_parameters(), grads):
                velocity[name] = 0.9 * velocity[name] + grad + (1e-2 * p if p.ndim > 1 else 0)
                p -= 0.05 * velocity[name]
        for name, value in net.state_dict().items():
            torch.testing.assert_close(learner.student.state_dict()[name], value, rtol=1e-10, atol=1e-10)


def test_a_share_of_a_larger_batch_counts_as_such():
    learner, taught = small.learner(small.job(KD))
    other, _ = small.learner(small.job(KD))
    whole, third = small.step(learner, taught), small.step(other, taught, count=3 * small.BATCH)
    assert third.terms == pytest.approx({name: value / 3 for name, value in whole.terms.items()}, rel=1e-12)


def test_a_coupled_loss_counts_by_its_share_of_the_batch():
    learner, taught = small.learner(small.job({"rkd": Loss("rkd")}))
    other, _ = small.learner(small.job({"rkd": Loss("rkd")}))
    whole, half = small.step(learner, taught), small.step(other, taught, count=2 * small.BATCH)
    assert set(whole.terms) == {"ce", "rkd.distance", "rkd.angle"}
    assert half.terms == pytest.approx({name: value / 2 for name, value in whole.terms.items()}, rel=1e-12)


@pytest.mark.parametrize("chunks", [2, 3, 8])
def test_accumulation_changes_nothing(chunks):
    """Per-sample losses, a connector among them, without batch norm; 3 does not divide the batch of 8."""
    losses = {"kd": Loss("kd"), "vid": Loss("vid"), "dkd": Loss("dkd", schedule="constant")}
    one, taught = small.learner(small.job(losses, training={"momentum": 0.9}))
    many, _ = small.learner(small.job(losses, training={"momentum": 0.9, "accumulate": chunks}))
    for step in range(3):
        whole, parts = small.step(one, taught, small.batch(step)), small.step(many, taught, small.batch(step))
        assert parts.terms == pytest.approx(whole.terms, rel=1e-10)
        assert parts.grad_norms == pytest.approx(whole.grad_norms, rel=1e-10)
    assert whole.grad_norms == {}, "measured at the first step and every 50th"
    torch.testing.assert_close(small.weights(many), small.weights(one), rtol=1e-10, atol=1e-10)
    for name, value in one.losses["vid"].state_dict().items():
        torch.testing.assert_close(many.losses["vid"].state_dict()[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_clipping(share):
    """The gradient of everything trainable is cut to the norm, or left alone below it."""
    free, taught = small.learner(small.job({"vid": Loss("vid")}))
    before = torch.cat([p.detach().reshape(-1).clone() for p in free.parameters])
    small.step(free, taught)
    full = before - torch.cat([p.detach().reshape(-1) for p in free.parameters])
    limit = share * float(full.norm()) / 0.05
    cut, _ = small.learner(small.job({"vid": Loss("vid")}, training={"clip_norm": limit}))
    small.step(cut, taught)
    moved = before - torch.cat([p.detach().reshape(-1) for p in cut.parameters])
    torch.testing.assert_close(moved, min(share, 1.0) * full, rtol=1e-5, atol=1e-12)


def test_the_averaged_copy_follows_its_recurrence():
    """It begins as a copy; copy = d * copy + (1 - d) * student after each step, batch-norm statistics too."""
    made = small.job({}, training={"ema": 0.75, "evaluate": "ema"}, student={"norm": True})
    learner, taught = small.learner(made)
    expected = {n: v.clone() for n, v in learner.student.state_dict().items() if v.is_floating_point()}
    for step in range(3):
        small.step(learner, taught, small.batch(step))
        now = {n: v.clone() for n, v in learner.student.state_dict().items() if v.is_floating_point()}
        expected = {n: 0.75 * expected[n] + 0.25 * v for n, v in now.items()}
        copy = learner.evaluated_model().state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(copy[name], value, rtol=1e-12, atol=1e-12)
    assert set(copy) == set(learner.student.state_dict())
    assert not torch.equal(copy["stage1.1.running_mean"], learner.student.state_dict()["stage1.1.running_mean"])


def test_the_student_itself_is_evaluated_by_default():
    learner, _ = small.learner(small.job({}, training={"ema": 0.9}))
    assert learner.evaluated_model() is learner.student


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(bad):
    made = small.job(KD | {"vid": Loss("vid")}, training={"momentum": 0.9, "ema": 0.9})
    learner, taught = small.learner(made)
    small.step(learner, taught)
    before = {name: value.clone() for name, value in flat(learner.state()).items()}
    signals = taught.request(small.batch(1)).result()
    signals["big"]["logits"][0, 0] = bad
    with pytest.raises(DivergenceError, match=r"Step 1: a loss or its gradient is not finite \(ce [\d.]+, kd (nan|inf), vid"):
        learner.step(small.batch(1), signals, small.BATCH)
    after = flat(learner.state())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert learner.step_count == 1


def flat(value, path=""):
    if isinstance(value, dict):
        return {p: v for k, inner in value.items() for p, v in flat(inner, f"{path}.{k}").items()}
    return {path: value} if isinstance(value, torch.Tensor) else {}


def test_label_smoothing_and_mixing_by_hand():
    """w * CE(y) + (1 - w) * CE(y'), each with share 0.2 of the label spread over all classes."""
    learner, _ = small.learner(small.job({}, training={"label_smoothing": 0.2}))
    batch = small.batch()
    rng = torch.Generator().manual_seed(8)
    mixed = {"mix_labels": batch["labels"].flip(0), "mix_weight": torch.rand(small.BATCH, generator=rng)}
    net = plain(learner)
    probabilities = torch.softmax(net(inputs(batch["images"])), 1).detach()
    expected = 0.0
    for row, label, other, weight in zip(probabilities, batch["labels"], mixed["mix_labels"], mixed["mix_weight"]):
        for share, answer in ((float(weight), int(label)), (1 - float(weight), int(other))):
            for c, p in enumerate(row.tolist()):
                expected -= share * ((0.8 if c == answer else 0.0) + 0.2 / small.CLASSES) * math.log(p)
    assert learner.step(batch | mixed, {}, small.BATCH).loss == pytest.approx(expected / small.BATCH, rel=1e-7)


def test_weights_follow_their_schedules():
    """Three steps an epoch: linear(2) grows by a sixth a step, stop(1) ends with the first epoch."""
    losses = {"kd": Loss("kd", weight=3.0, schedule="linear(2)"), "kd-mse": Loss("kd-mse", weight=2.0, schedule="stop(1)")}
    learner, taught = small.learner(small.job(losses))
    steady, _ = small.learner(small.job({"kd": Loss("kd", weight=1.0), "kd-mse": Loss("kd-mse", weight=1.0)}))
    for step in range(8):
        batch = small.batch(step)
        steady.student.load_state_dict(learner.student.state_dict())
        one, plainly = small.step(learner, taught, batch).terms, small.step(steady, taught, batch).terms
        assert one["kd"] == pytest.approx(3.0 * min(step / 6, 1.0) * plainly["kd"], rel=1e-10)
        assert one["kd-mse"] == pytest.approx(2.0 * (step < 3) * plainly["kd-mse"], rel=1e-10)


def test_the_learning_rate_follows_the_steps():
    learner, taught = small.learner(small.job({}, training={"scheduler": "multistep", "milestones": (1.0,), "gamma": 0.5}))
    assert [small.step(learner, taught, small.batch(s)).lr for s in range(4)] == pytest.approx([0.05, 0.05, 0.05, 0.025])


def test_binding_leaves_the_student_alone():
    made = small.job({"vid": Loss("vid")}, student={"norm": True})
    learner, taught = small.learner(made)
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    learner.student.stage1.eval()
    learner.bind(small.batch(), taught.request(small.batch()).result())
    assert all(torch.equal(before[name], value) for name, value in learner.student.state_dict().items())
    assert (learner.student.stage1[1].training, learner.student.stage2[1].training) == (False, True)


def test_connectors_are_trained_by_the_same_optimizer():
    learner, taught = small.learner(small.job({"vid": Loss("vid")}))
    held = {id(p) for p in learner.parameters}
    connectors = list(learner.losses["vid"].parameters())
    assert connectors
    assert held == {id(p) for p in [*learner.student.parameters(), *connectors]}
    before = [p.detach().clone() for p in connectors]
    small.step(learner, taught)
    assert all(not torch.equal(a, p) for a, p in zip(before, connectors))
    assert all(p.dtype == torch.float64 for p in connectors)


def test_a_method_is_prepared_before_the_first_step():
    learner, _ = small.learner(small.job({"crd": Loss("crd", num_negatives=4)}))
    assert learner.losses["crd"].module.others.count.tolist() == torch.bincount(small.LABELS).tolist()


def test_a_wrong_shape_names_the_loss():
    made = small.job({"fitnet": Loss("fitnet", layers={"student": "stage3", "teacher": "stage1"})})
    with pytest.raises(SignalError, match=r"losses\.fitnet: student_feature: expected a map of at least 12x12"):
        small.learner(made)


def test_nothing_to_learn_from_is_an_error():
    learner, taught = small.learner(small.job({}, ce_weight=0.0))
    with pytest.raises(ConfigError, match="nothing to learn from"):
        small.step(learner, taught)


def test_dropout_is_keyed_by_seed_step_and_rank():
    made = small.job({}, student={"dropout": 0.5})

    def loss(rank=0, skip=0, noise=0):
        learner, taught = small.learner(made, rank=rank)
        learner.step_count = skip
        torch.manual_seed(noise)
        return small.step(learner, taught, small.batch()).loss

    assert loss() == loss(noise=5)
    assert len({loss(), loss(rank=1), loss(skip=1)}) == 3


def test_the_student_starts_from_the_seed_alone():
    starts = []
    for noise, seed in ((0, 3), (1, 3), (0, 4)):
        made = small.job({}, seed=seed)
        torch.manual_seed(noise)
        starts.append(small.weights(small.learner(made)[0]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_resumed_learner_goes_on_bit_for_bit(tmp_path):
    losses = {"vid": Loss("vid"), "crd": Loss("crd", num_negatives=4, embed_dim=3)}
    made = small.job(losses, training={"momentum": 0.9, "ema": 0.9}, student={"norm": True, "dropout": 0.3}, dtype="float32")
    whole, taught = small.learner(made)
    cut, _ = small.learner(made)
    for step in range(2):
        small.step(cut, taught, small.batch(step))
    torch.save(cut.state(), tmp_path / "state.pt")
    resumed, _ = small.learner(made)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(4):
        small.step(whole, taught, small.batch(step))
    for step in range(2, 4):
        small.step(resumed, taught, small.batch(step))
    one, other = flat(whole.state()), flat(resumed.state())
    assert one.keys() == other.keys()
    assert len(one) > 40
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_trains_in_full_precision_weights():
    made = small.job(KD, dtype="bfloat16")
    learner, taught = small.learner(made)
    before = small.weights(learner)
    report = small.step(learner, taught)
    assert math.isfinite(report.loss)
    assert before.dtype == torch.float32
    assert not torch.equal(before, small.weights(learner))
