"""CRD's memory: who its negatives are, what enters the banks, and that data-parallel ranks agree."""

import crd_ranks
import pytest
import torch

from raykd.errors import DataError
from raykd.methods.relation import crd


def uneven():
    """Classes of 1, 3 and 6 samples in mixed order."""
    labels = torch.tensor([2, 1, 2, 0, 2, 1, 2, 2, 1, 2])
    module = crd.Module((2,), (2,), 10, 3, embed_dim=2, num_negatives=20000)
    crd.prepare(module, labels)
    return module, labels


def test_negatives_are_uniform_over_the_other_classes():
    module, labels = uneven()
    own = torch.tensor([0, 1, 2, 2])
    drawn = module.sample_negatives(own, torch.Generator().manual_seed(0))
    assert drawn.shape == (4, 20000)
    assert not (labels[drawn] == own[:, None]).any()
    for label, row in zip(own, drawn):
        others = labels != label
        share = torch.bincount(row, minlength=10)[others] / 20000
        expected = 1 / others.sum()
        assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / 20000).sqrt()
    assert not torch.equal(drawn[2], drawn[3])


def test_negatives_follow_the_generator_alone():
    module, labels = uneven()
    torch.manual_seed(1)
    first = module.sample_negatives(labels, torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    assert torch.equal(first, module.sample_negatives(labels, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, module.sample_negatives(labels, torch.Generator().manual_seed(8)))


@pytest.mark.parametrize(
    "labels", [torch.zeros(10, dtype=torch.int64), torch.arange(9) % 3, torch.arange(10) % 4], ids=["one", "few", "new"]
)
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(DataError, match="dataset_labels: expected"):
        crd.prepare(crd.Module((2,), (2,), 10, 3, embed_dim=2), labels)


def test_evaluation_leaves_the_memory_alone():
    module = crd_ranks.module()
    module(*crd_ranks.batch(), torch.Generator().manual_seed(0), temperature=0.07)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()(*crd_ranks.batch(), torch.Generator().manual_seed(1), temperature=0.07)
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


def test_ranks_hold_one_memory(tmp_path):
    torch.multiprocessing.spawn(crd_ranks.rank, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    whole = crd_ranks.module()
    for step in range(2):
        whole(*crd_ranks.batch(), torch.Generator().manual_seed(step), temperature=0.07)
    for name in ("student_bank", "teacher_bank"):
        torch.testing.assert_close(first[name], getattr(whole, name))
    torch.testing.assert_close(first["student_z"], whole.student_z, rtol=0.5, atol=0)  # other negatives, same size
