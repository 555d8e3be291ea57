"""What the papers say of the losses, beyond their values."""

import pytest
import torch

from raykd.errors import ConfigError, SignalError
from raykd.methods.feature.at import at_loss
from raykd.methods.feature.fitnet import Module as FitNet
from raykd.methods.feature.vid import Module as VID
from raykd.methods.online.cl import cl_loss
from raykd.methods.online.codistillation import codistillation_loss
from raykd.methods.online.dcml import dcml_loss
from raykd.methods.online.dml import dml_loss
from raykd.methods.online.kdcl import kdcl_loss
from raykd.methods.online.one import one_loss
from raykd.methods.relation.rkd import rkd_loss
from raykd.methods.relation.sp import sp_loss
from raykd.methods.response.dist import dist_loss
from raykd.methods.response.dkd import dkd_loss
from raykd.methods.response.kd import kd_loss
from raykd.methods.response.kd_mse import kd_mse_loss
from raykd.parts.derived import attention, gram


def logits(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=rng, dtype=torch.float64) * 3 for _ in range(2))


def test_kd_is_dkd_put_together():
    """KD = TCKD + (1 - p_teacher(target)) * NCKD (arXiv:2203.08679, equation 6)."""
    student, teacher = logits(6, 5)
    labels = torch.arange(6) % 5
    parts = dkd_loss(student, teacher, labels, alpha=1.0, beta=1.0, temperature=4.0)
    target = (teacher / 4).softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(parts["tckd"] + (1 - target) * parts["nckd"], kd_loss(student, teacher, temperature=4.0))


def test_kd_tends_to_mse():
    """At high temperature KD is half the mean squared error of centred logits (arXiv:1503.02531, equation 4)."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in logits(4, 6))
    hot = kd_loss(student, teacher, temperature=1e4)
    torch.testing.assert_close(hot, kd_mse_loss(student, teacher) / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", [kd_loss, kd_mse_loss])
def test_positions(loss):
    """Words and pixels: the mean over positions; one position is the plain loss."""
    student, teacher = logits(2, 3, 4, 5)
    each = loss(student.reshape(24, 5), teacher.reshape(24, 5)).reshape(2, 12).mean(1)
    torch.testing.assert_close(loss(student, teacher), each)
    torch.testing.assert_close(loss(student[:, :1, 0], teacher[:, :1, 0]), loss(student[:, 0, 0], teacher[:, 0, 0]))


def test_dkd_leaves_the_target_out_exactly():
    """The non-target term does not feel the target's logit, however large."""
    student, teacher = logits(3, 4)
    labels = torch.tensor([0, 1, 2])
    before = dkd_loss(student, teacher, labels)["nckd"]
    student[torch.arange(3), labels] = 5000.0
    assert torch.equal(dkd_loss(student, teacher, labels)["nckd"], before)


def test_dist_ignores_a_constant_column():
    student, teacher = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    value = dist_loss(student.requires_grad_(), teacher, temperature=1.0)
    assert value["inter"].item() == pytest.approx(1.0)
    assert value["intra"].item() == pytest.approx(1.0)


def test_at_has_two_modes_only():
    maps = [torch.rand(2, 3, 3)]
    with pytest.raises(ConfigError, match="'code' or 'paper', got 'papr'"):
        at_loss(maps, maps, mode="papr")


def test_at_and_sp_ignore_the_scale_of_features():
    feature = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    assert at_loss([attention(feature)], [attention(7 * feature)]).abs().max() < 1e-20
    assert sp_loss(gram(feature), gram(7 * feature)).abs() < 1e-20


def test_rkd_ignores_place_scale_and_rotation():
    """Relations survive any similarity transform of the embedding (arXiv:1904.05068, section 3)."""
    student, _ = logits(7, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert all(value.abs() < 1e-12 for value in rkd_loss(student, 3 * student @ rotation + 5).values())


def test_rkd_stays_finite_where_samples_coincide():
    student = torch.ones(4, 3, requires_grad=True)
    sum(rkd_loss(student, torch.randn(4, 3)).values()).backward()
    assert student.grad.isfinite().all()


def test_rkd_saves_little_for_the_backward_pass():
    """256 samples: no [b b b d] and no [b b b]; what autograd keeps stays under 8 MB (one [b b b] is 67 MB)."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    student = torch.randn(256, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = sum(rkd_loss(student, torch.randn(256, 64)).values())
    assert kept < 8e6
    assert loss.isfinite()


@pytest.mark.parametrize("kind", [FitNet, VID])
def test_modules_name_what_does_not_fit(kind):
    with pytest.raises(SignalError):
        kind((3, 3, 3), (3, 8, 8)) if kind is FitNet else kind([(3, 8, 8)], [(3, 8, 8), (4, 4, 4)])


def test_fitnet_knows_two_regressors():
    with pytest.raises(ConfigError, match="regressor: expected"):
        FitNet((3, 8, 8), (3, 8, 8), regressor="linear")


def test_dml_and_codistillation_with_one_peer_teach_the_same():
    """Cross-entropy and KL differ by the peer's entropy, which no gradient sees (arXiv:1706.00384, arXiv:1804.03235)."""
    student, peer = logits(5, 4)
    student.requires_grad_()
    kl, ce = dml_loss(student, peer), codistillation_loss(student, [peer])
    entropy = -(peer.softmax(1) * peer.log_softmax(1)).sum(1)
    torch.testing.assert_close(ce - kl, entropy)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), student)[0] for value in (kl, ce)))


def test_two_heads_that_learn_from_each_other_are_two_peers():
    """Of two heads, the mean of the others is the other head (arXiv:1805.11761); each is the student of one edge of dml."""
    first, second = logits(5, 4)
    labels, temperature = torch.arange(5) % 4, 3.0
    heads = cl_loss([first, second], labels, 0, mode="okddip", temperature=temperature, ramp_epochs=0.0)["soft"]
    edges = dml_loss(first, second, temperature=temperature) + dml_loss(second, first, temperature=temperature)
    torch.testing.assert_close(heads, edges)


def test_dcml_of_all_pairs_is_same_and_cross():
    own, theirs = ([*logits(5, 4, seed=seed)] for seed in (1, 2))
    labels = torch.arange(5) % 4
    whole = dcml_loss(own, theirs, labels)
    parts = dcml_loss(own, theirs, labels, pairs="same_stage") | dcml_loss(own, theirs, labels, pairs="cross_stage")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name])


def test_peers_that_agree_have_nothing_to_teach():
    """Where all say the same, KL is 0, whatever the target is made of."""
    student, _ = logits(5, 4)
    labels, shares = torch.arange(5) % 4, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    for target in ("naive", "linear", "minlogit", "general"):
        assert kdcl_loss(student, [student.clone(), student.clone()], labels, shares, target=target).abs().max() < 1e-12
    assert dml_loss(student, student.clone()).abs().max() < 1e-12


def test_a_gate_that_opens_for_one_branch_leaves_its_teaching():
    """ONE with all weight on branch 0: the others distil from it (arXiv:1806.04606)."""
    first, second = logits(5, 4)
    gates = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(5, 2)
    found = one_loss([first, second], gates, torch.arange(5) % 4, 0, temperature=3.0, ramp_epochs=0.0)
    torch.testing.assert_close(found["kd"], dml_loss(second, first, temperature=3.0))
