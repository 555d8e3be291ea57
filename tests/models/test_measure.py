from __future__ import annotations

import torch
from torch import nn

from raykd.models import build, cost, fingerprint


class Reads(nn.Module):
    """Looks at its values, so it cannot run on the meta device, and counts its forwards in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x if x.sum().item() >= 0 else -x)


def test_macs_in_closed_form() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),  # 8 x 5 x 5 outputs, 2 * 9 products each
        nn.ConvTranspose2d(8, 3, 2, stride=2),  # 8 x 5 x 5 inputs, 3 * 4 products each
        nn.Flatten(),
        nn.Linear(300, 7),
    )
    assert cost(model, (4, 10, 10)).macs == 200 * 18 + 200 * 12 + 2100


def test_cost_leaves_the_model_alone() -> None:
    model = build("cifar_resnet8", 10).train()
    model.bn1.eval()
    before, modes = fingerprint(model), [m.training for m in model.modules()]
    cost(model, (3, 32, 32))
    assert fingerprint(model) == before
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_cost_of_a_model_that_reads_values_runs_on_copies() -> None:
    model = Reads()
    assert cost(model, (6,)).macs == 30
    assert model.calls.item() == 0


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert cost(model, (4,)).parameters == 16 + 4 + 4


def test_fingerprint_sees_values_names_and_dtypes() -> None:
    torch.manual_seed(0)
    model = nn.BatchNorm1d(3)
    first = fingerprint(model)
    assert first == fingerprint(nn.BatchNorm1d(3))
    model.running_mean[1] += 1e-7
    second = fingerprint(model)
    assert len({first, second, fingerprint(nn.Sequential(model)), fingerprint(model.bfloat16())}) == 4
