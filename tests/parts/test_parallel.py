import gather_ranks
import torch

from raykd.parts.parallel import gather


def test_alone_it_is_the_tensor_without_gradient():
    rows = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(gather(rows), rows)
    assert not gather(rows).requires_grad


def test_ranks_of_unequal_length(tmp_path):
    torch.multiprocessing.spawn(gather_ranks.rank, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["rows"].tolist() == [[0.0, 0.0]] * 3 + [[1.0, 1.0]]
    assert not first["rows"].requires_grad
    assert first["index"].tolist() == [0]
    assert first["index"].dtype is torch.int64
    assert first["bank"].tolist() == [[0, 0], [1, 0], [0, 1], [0, 1]]  # the later rank's row counts
