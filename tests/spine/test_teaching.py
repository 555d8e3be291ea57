"""A teacher really teaches: with labels replaced by noise and no cross-entropy at all, the student still learns CIFAR-10."""

import pytest

from tests.spine.small import cifar, go


def teach(real_data, folder, teacher: str, weights: str, steps: int) -> float:
    job = cifar(real_data).replace(
        **{
            "student.model": "cifar_resnet8",
            "teachers.big.model": teacher,
            "teachers.big.weights": str(real_data / "weights" / "cifar10" / weights),
            "losses": {"kd": {"method": "kd", "weight": 1.0}},
            "ce_weight": 0.0,
            "data.noisy_labels": True,
            "data.limit": 10000,
            "data.eval_limit": 1000,
            "data.augmentation.mixup": 0.0,
            "training.batch_size": 64,
            "training.max_steps": steps,
            "training.lr": 0.05,
            "training.scheduler": "cosine",
            "training.epochs": -(-steps * 64 // 10000),
            "training.checkpoint_every": 1000,
        }
    )
    return go(job, folder)["student"]["last"]["top1"]


def test_a_student_learns_from_the_teacher_alone(real_data, tmp_path):
    assert teach(real_data, tmp_path / "run", "cifar_resnet20", "resnet20-12fca82f.th", 150) > 0.25


@pytest.mark.slow
def test_a_student_learns_from_resnet56_alone(real_data, tmp_path):
    assert teach(real_data, tmp_path / "run", "cifar_resnet56", "resnet56-4bfd9763.th", 600) > 0.40


@pytest.mark.slow
def test_noise_alone_teaches_nothing(real_data, tmp_path):
    """The control: the same noisy labels with cross-entropy and without the teacher stay at chance."""
    job = cifar(real_data).replace(
        **{
            "teachers": {},
            "losses": {},
            "ce_weight": 1.0,
            "data.noisy_labels": True,
            "data.limit": 10000,
            "data.eval_limit": 1000,
            "training.batch_size": 64,
            "training.max_steps": 100,
            "training.checkpoint_every": 1000,
        }
    )
    assert go(job, tmp_path / "run")["student"]["last"]["top1"] < 0.17
