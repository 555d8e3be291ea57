"""What the papers say of the losses of several teachers, beyond their values; and what their modules do by themselves."""

from types import SimpleNamespace

import lfme_ranks
import pytest
import torch
import tracing
from torch import nn

from raykd.errors import SignalError
from raykd.methods.multi_teacher import lfme, mt_wu, mt_you
from raykd.methods.multi_teacher.feed import feed_loss
from raykd.methods.multi_teacher.mt_fukuda import mt_fukuda_loss
from raykd.methods.multi_teacher.mt_wu import mt_wu_loss
from raykd.methods.multi_teacher.mt_you import mt_you_loss
from raykd.methods.multi_teacher.two_teacher import two_teacher_loss
from raykd.methods.response.kd import kd_loss
from raykd.parts.derived import gram, similarity


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64) * 3


STUDENT, TEACHERS = normal(6, 5), [normal(6, 5, seed=1), normal(6, 5, seed=2)]


def test_equal_weights_are_the_mean_over_teachers():
    """The gradient of the cross-entropy under a mixture is the mean of kd's to each teacher."""
    student = STUDENT.clone().requires_grad_()
    (together,) = torch.autograd.grad(mt_fukuda_loss(student, TEACHERS, rng()).sum(), student)
    each = [torch.autograd.grad(kd_loss(student, t, temperature=1.0).sum(), student)[0] for t in TEACHERS]
    torch.testing.assert_close(together, sum(each) / 2)


def test_switching_hears_one_teacher_a_batch_and_augmenting_one_a_sample():
    each = torch.stack([mt_fukuda_loss(STUDENT, [t], rng(), mode="switch") for t in TEACHERS])
    switched = [mt_fukuda_loss(STUDENT, TEACHERS, rng(seed), mode="switch") for seed in range(400)]
    heard = torch.tensor([[torch.equal(value, own) for own in each] for value in switched])
    assert (heard.sum(1) == 1).all()
    assert 0.4 < heard[:, 0].double().mean() < 0.6
    chances = {"mode": "augment", "teacher_weights": (3.0, 1.0)}
    augmented = torch.stack([mt_fukuda_loss(STUDENT, TEACHERS, rng(seed), **chances) for seed in range(400)])
    first = augmented == each[0]
    assert (first ^ (augmented == each[1])).all()
    assert ((first.double().mean(0) - 0.75).abs() < 0.1).all()
    assert (first.any(1) & ~first.all(1)).any(), "samples of one batch hear different teachers"


def you(student, teachers, **options):
    grams = [gram(t) for t in teachers]
    even = torch.zeros(len(student), 2, dtype=torch.float64)
    return mt_you_loss(even, [even] * len(teachers), gram(student), grams, rng(), **options)["triplet"]


@pytest.mark.parametrize("distance", ["unit", "euclidean"])
def test_the_order_is_all_that_matters(distance):
    """No loss without a margin where the student's samples lie in the teacher's order, whatever its space."""
    features = normal(7, 4)
    rotation = torch.linalg.qr(normal(4, 4, seed=3)).Q
    assert you(2 * features @ rotation, [features], margin=0.0, distance=distance) == 0
    assert you(normal(7, 3, seed=4), [features], margin=0.0, distance=distance) > 0


def test_the_majority_decides():
    one, other, student = normal(7, 4), normal(7, 4, seed=1), normal(7, 3, seed=2)
    assert you(student, [one, other, one]) == you(student, [one])
    assert you(student, [one, other], teacher_weights=(1.0, 3.0)) == you(student, [other])
    assert you(student, [one, other]) not in (you(student, [one]), you(student, [other]))


def test_drawn_triplets_are_three_samples_and_all_alike_often():
    places = torch.arange(16.0).reshape(4, 4)  # distance 4 i + j of samples i and j
    near, far, _, _ = mt_you._drawn(places, places[None], 24000, rng())
    anchors, first, second = near.long() // 4, near.long() % 4, far.long() % 4
    assert torch.equal(anchors, far.long() // 4)
    kinds, counts = torch.stack([anchors, first, second], 1).unique(dim=0, return_counts=True)
    assert all(len(set(kind.tolist())) == 3 for kind in kinds)
    assert len(kinds) == 24
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_drawn_triplets_estimate_all():
    student, teachers = normal(9, 3, seed=5), [normal(9, 4, seed=6)]
    torch.testing.assert_close(you(student, teachers, num_triplets=200000), you(student, teachers), rtol=0.01, atol=0)


def test_all_triplets_save_little_for_the_backward_pass():
    """128 samples: no [b b b]; what autograd keeps stays under 4 MB (one of them is 8 MB)."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    grams = [gram(torch.randn(128, 8)) for _ in range(2)]
    own, even = gram(torch.randn(128, 8)).requires_grad_(), torch.zeros(128, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = mt_you_loss(even, [even] * 2, own, grams, rng())["triplet"]
    assert kept < 4e6
    loss.backward()
    assert own.grad.isfinite().all()


def test_samples_that_coincide_keep_gradients_finite():
    features = torch.ones(5, 3, requires_grad=True)
    for distance in ("unit", "euclidean"):
        grams = gram(features), [gram(torch.randn(5, 3))]
        even = torch.zeros(5, 2)
        mt_you_loss(even, [even], *grams, rng(), distance=distance)["triplet"].backward()
        assert features.grad.isfinite().all()


def test_feed_ignores_the_scale_of_features():
    features = normal(4, 3, 2, 2)
    assert feed_loss([5 * features], [features]).abs().max() < 1e-15


@pytest.mark.parametrize("count", [1, 3])
def test_two_teachers_are_two(count):
    even, one = torch.zeros(2, 3), torch.zeros(2, 3, 4, 4)
    with pytest.raises(SignalError, match=f"teachers: expected 2, .* got {count}"):
        two_teacher_loss(even, [even] * count, one, [one] * count)


def weighed(right, seen, threshold=0.5):
    module = lfme.Module([(2,)] * len(seen), threshold=threshold).double()
    module.right.copy_(torch.tensor(right))
    module.seen.copy_(torch.tensor(seen))
    module.expert_weights.fill_(0.3)
    lfme.on_epoch(module, 1)
    assert not module.right.any()
    assert not module.seen.any()
    return module.expert_weights.tolist()


def test_an_expert_counts_until_the_student_has_caught_up():
    """w = 1 below a * E, then falling to 0 at E and no further (arXiv:2001.01536, section 4.2); unseen experts keep theirs."""
    student, expert = [39, 40, 60, 80, 90, 0, 0], [80, 80, 80, 80, 80, 0, 0]
    found = weighed([student, expert], [100, 100, 100, 100, 100, 0, 50])
    assert found == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0, 0.3, 0.0])


def test_evaluation_is_not_counted():
    module = lfme_ranks.module().eval()
    lfme_ranks.count(module)
    assert not module.seen.any()
    lfme_ranks.count(module.train())
    assert module.seen.tolist() == [4, 4]
    assert module.right.tolist() == [[2, 1], [4, 3]]


def test_ranks_agree_on_the_experts(tmp_path):
    torch.multiprocessing.spawn(lfme_ranks.rank, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt")["expert_weights"] for number in (0, 1))
    whole = lfme_ranks.module()
    lfme_ranks.count(whole)
    lfme.on_epoch(whole, 1)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole.expert_weights)
    assert first.tolist() == pytest.approx([0.5 / 0.75, 0.5 / 0.5625])


def spread(seed, b=6):
    return similarity(normal(b, 9, seed=seed))


def test_log_euclidean_distance_is_alike_for_inverses_and_turned_bases():
    one, other, alpha = spread(0), spread(1), torch.ones(1, dtype=torch.float64)
    basis = torch.linalg.qr(normal(6, 6, seed=2)).Q
    plain = mt_wu_loss(one, [other], alpha, epsilon=1e-9)
    torch.testing.assert_close(mt_wu_loss(one.inverse(), [other.inverse()], alpha, epsilon=1e-9), plain, rtol=1e-5, atol=0)
    turned = [basis @ m @ basis.T for m in (one, other)]
    torch.testing.assert_close(mt_wu_loss(turned[0], turned[1:], alpha, epsilon=1e-9), plain, rtol=1e-6, atol=0)


def test_equal_eigenvalues_have_a_gradient():
    """At c I the logarithm's derivative is 1 / c; eigenvectors by themselves have none there."""
    matrix = (3 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    target = spread(3, 4)
    loss = mt_wu_loss(matrix, [target], torch.ones(1, dtype=torch.float64), epsilon=1.0)
    (found,) = torch.autograd.grad(loss, matrix)
    values, vectors = torch.linalg.eigh(target + torch.eye(4))
    log_four = torch.eye(4, dtype=torch.float64) * torch.tensor(4.0, dtype=torch.float64).log()
    log_target = vectors @ values.log().diag() @ vectors.T
    torch.testing.assert_close(found, 2 * (log_four - log_target) / 16 / 4)


def test_fewer_dimensions_than_samples():
    """A similarity of rank 2 among 32 samples, float32."""
    rows = torch.randn(32, 2, generator=rng(), requires_grad=True)
    mt_wu_loss(similarity(rows), [similarity(torch.randn(32, 2))], torch.ones(1)).backward()
    assert rows.grad.isfinite().all()
    assert rows.grad.abs().max() > 0


@pytest.mark.parametrize("seed", range(5))
def test_the_simplex_is_met_at_its_nearest_point(seed):
    point = normal(4, seed=seed)
    found = mt_wu._on_simplex(point)
    assert found.sum().item() == pytest.approx(1)
    others = torch.rand(2000, 4, generator=rng(seed), dtype=torch.float64)
    others = others / others.sum(1, keepdim=True)
    assert (others - point).norm(dim=1).min() >= (found - point).norm() - 1e-12


class Normed(nn.Module):
    """A student with what a virtual step could disturb: batch norm, dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.classifier = nn.Linear(8, 2)

    def signals(self, images):
        embedding = self.layers(images)
        return {"logits": self.classifier(embedding), "similarity": similarity(embedding)}


def wu_step(risk, swapped=False):
    """(the student before, after, alpha) of one step with a teacher that sees the classes and one that sees noise."""
    torch.manual_seed(0)
    labels = torch.arange(32) % 2
    images = torch.randn(32, 3, 2, 2) + 2 * labels[:, None, None, None]
    taught = [similarity(torch.eye(2)[labels] + 0.1), similarity(torch.randn(32, 8, generator=rng(1)).abs())]
    taught = taught[::-1] if swapped else taught
    student = Normed()
    module = mt_wu.Module([(32,)] * 2, epsilon=1.0, validation_share=0.5, alpha_lr=40.0, risk=risk)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    bound = {"mt-wu": SimpleNamespace(module=module, weight=1.0)}
    hand = SimpleNamespace(student=student, tapped=student.signals, optimizer=optimizer, losses=bound)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    random = torch.get_rng_state()
    mt_wu.step(module, hand, {"images": images, "labels": labels}, {"teachers": [{"similarity": t} for t in taught]})
    assert torch.equal(random, torch.get_rng_state())
    return before, student.state_dict(), module.alpha.tolist()


@pytest.mark.parametrize("risk", ["similarity", "cross_entropy"])
def test_the_virtual_step_leaves_no_trace(risk):
    before, after, alpha = wu_step(risk)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert alpha != [0.5, 0.5]


def test_the_teacher_that_knows_the_classes_gains():
    assert wu_step("similarity")[2][0] > 0.55
    assert wu_step("similarity", swapped=True)[2][1] > 0.55


def test_too_few_samples_to_judge_leave_the_weights_alone():
    module = mt_wu.Module([(4,)] * 2, epsilon=0.01, validation_share=0.25)
    mt_wu.step(module, None, tracing.batches()[0], {"teachers": []})  # one held-out sample makes no pair
    assert module.alpha.tolist() == [0.5, 0.5]
