"""Two real processes: sums are those of the whole batch, both ranks agree on everything."""

import pytest
import torch

from tests.roles import rank_work, small


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_work.rank, (folder / "rendezvous", folder), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in (0, 1)]


def test_gradients_and_flags_are_summed(ranks):
    for found in (r["gradients"] for r in ranks):
        assert torch.equal(found["first"], torch.arange(6.0).view(2, 3) * 3)
        assert found["third"].tolist() == [1.5] * 4
        assert found["none"]
        assert found["flags"].tolist() == [1.0, 2.0]


def test_statistics_are_averaged_and_counts_are_not(ranks):
    assert [r["buffers"][0].tolist() for r in ranks] == [[2.0, 2.0]] * 2
    assert [r["buffers"][1] for r in ranks] == [0, 1]


def test_two_ranks_equal_one_with_the_whole_batch(ranks):
    one, other = (r["trained"] for r in ranks)
    assert torch.equal(one["weights"], other["weights"])
    assert all(torch.equal(value, other["connectors"][name]) for name, value in one["connectors"].items())
    learner, taught = small.learner(small.job(rank_work.LOSSES, training={"grad_norms_every": 1}))
    start = small.weights(learner)
    for step in range(rank_work.STEPS):
        report = small.step(learner, taught, small.batch(step))
        for found in (one, other):
            loss, terms, norms, stop = found["reports"][step]
            assert loss == pytest.approx(report.loss, rel=1e-10)
            assert terms == pytest.approx(report.terms, rel=1e-10)
            assert norms == pytest.approx(report.grad_norms, rel=1e-10)
            assert stop == (step == 1), "a stop that one rank asked for is seen by both at the same step"
    assert not torch.equal(small.weights(learner), start)
    torch.testing.assert_close(one["weights"], small.weights(learner), rtol=1e-10, atol=1e-10)
    for name, value in learner.losses["vid"].state_dict().items():
        torch.testing.assert_close(one["connectors"][name], value, rtol=1e-10, atol=1e-10)


def test_one_rank_that_diverges_stops_both(ranks):
    assert [r["diverges"] for r in ranks] == [("DivergenceError", True)] * 2


def test_accuracy_is_that_of_all_images(ranks):
    assert [r["accuracy"] for r in ranks] == [(0.75, 1.0, 4)] * 2


def test_the_averaged_copy_is_one_on_all_ranks(ranks):
    assert torch.equal(ranks[0]["averaged"], ranks[1]["averaged"])


def test_each_rank_reads_its_own_file(ranks):
    assert [r["loaded"] for r in ranks] == [{"rank": 0}, {"rank": 1}]
