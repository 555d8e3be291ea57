import torch

from raykd.parts.numeric import full, pearson, per_sample, to_smaller


def test_full_widens_half_precision_only():
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
    wide = [full(torch.ones(1, dtype=t)).dtype for t in types]
    assert wide == [torch.float32, torch.float32, torch.float32, torch.float64, torch.int64]


def test_per_sample_keeps_the_batch():
    values = torch.arange(12.0).reshape(2, 3, 2)
    assert per_sample(values).tolist() == [2.5, 8.5]
    assert per_sample(values[:, 0, 0]).tolist() == [0.0, 6.0]


def test_to_smaller_pools_axis_by_axis():
    student, teacher = torch.rand(2, 3, 8, 4), torch.rand(2, 5, 4, 8)
    small, other = to_smaller(student, teacher)
    assert small.shape == (2, 3, 4, 4)
    assert other.shape == (2, 5, 4, 4)
    torch.testing.assert_close(small[0, 0, 0, 1], student[0, 0, :2, 1].mean())
    assert to_smaller(student, student)[0] is student


def test_pearson():
    a = torch.randn(4, 50, dtype=torch.float64)
    b = a + torch.randn(4, 50, dtype=torch.float64)
    for row, (x, y) in zip(pearson(a, b, axis=1), zip(a, b)):
        torch.testing.assert_close(row, torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert pearson(a, torch.ones_like(a), axis=1).abs().max() == 0
