import pytest
import torch

from raykd.parts.memory import bank_scores, blend_rows, uniform_bank


@pytest.mark.parametrize("rows", [6, 50], ids=["whole bank", "its rows"])
def test_scores_and_gradient_survive_an_update(rows):
    torch.manual_seed(0)
    bank, anchor = torch.randn(rows, 3), torch.randn(2, 3, requires_grad=True)
    index = torch.randint(0, rows, (2, 4))
    expected = torch.stack([torch.stack([anchor[i] @ bank[j] for j in index[i]]) for i in range(2)])
    wanted = torch.autograd.grad(expected.square().sum(), anchor)[0]
    scores = bank_scores(anchor, bank, index)
    blend_rows(bank, index[0], torch.randn(4, 3), momentum=0.5)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(torch.autograd.grad(scores.square().sum(), anchor)[0], wanted)


def test_blended_rows_have_unit_length_and_the_last_of_a_sample_counts():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    blend_rows(bank, torch.tensor([2, 0, 2]), torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), momentum=0.5)
    half = 0.5**0.5
    torch.testing.assert_close(bank, torch.tensor([[half, half], [1.0, 0.0], [0.8 / 0.8**0.5, 0.4 / 0.8**0.5]]))


def test_uniform_bank_has_rows_of_about_unit_length():
    bank = uniform_bank(2000, 128)
    assert bank.abs().max() <= (3 / 128) ** 0.5
    assert bank.norm(dim=1).mean().item() == pytest.approx(1.0, abs=0.01)
