"""raykd: multi-model knowledge distillation on Ray.

import raykd

job = raykd.Job(
    student=raykd.Student(model="crd_resnet20"),
    teachers={"big": raykd.Teacher(model="cifar_resnet56", weights="resnet56.th", replicas=2)},
    losses={"kd": raykd.Loss("kd", temperature=4.0)},
)
result = raykd.run(job)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raykd import errors

if TYPE_CHECKING:
    from raykd.api import check, run, sweep
    from raykd.config import Augmentation, Data, Job, Launch, Loss, Student, Teacher, Training

_CONFIG = ("Augmentation", "Data", "Job", "Launch", "Loss", "Student", "Teacher", "Training")
__all__ = ["Augmentation", "Data", "Job", "Launch", "Loss", "Student", "Teacher", "Training", "check", "errors", "run", "sweep"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads the public names when they are first used, so that `import raykd` and `raykd list` stay instant."""
    if name in _CONFIG:
        from raykd import config

        return getattr(config, name)
    if name in ("run", "check", "sweep"):
        from raykd import api

        return getattr(api, name)
    raise AttributeError(f"module 'raykd' has no attribute {name!r}")
