"""What all rows share: data, models, training. ResNet-32 teaches ResNet-20 on CIFAR-10, batch 128, KD at temperature 4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raykd import Augmentation, Data, Job, Launch, Loss, Student, Teacher, Training
from raykd.resolve import resolve

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
TRAIN = "cifar10/train-0000{}-of-00005.parquet"
WEIGHTS = "weights/cifar10/resnet32-d509ac18.th"
TEACHER, STUDENT = "cifar_resnet32", "cifar_resnet20"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Scene:
    """One run's surroundings.

    Attributes:
        data: folder with `cifar10/` and `weights/cifar10/`.
        scratch: emptied after the run.
        shards: number of CIFAR-10's five training files.
        grad_norms_every: steps between raykd's measurements of gradient norms: more often than by default, to see several.
    """

    data: Path
    scratch: Path
    shards: int = 5
    grad_norms_every: int = 20
    batch_size: int = 128
    temperature: float = 4.0
    weight: float = 0.9
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    padding: int = 4

    @property
    def files(self) -> list[Path]:
        """The Parquet files every row reads."""
        return [self.data / TRAIN.format(k) for k in range(self.shards)]

    @property
    def weights(self) -> Path:
        """The teacher's."""
        return self.data / WEIGHTS

    def missing(self) -> list[str]:
        """Files that are not there."""
        return [str(p) for p in [*self.files, self.weights] if not p.is_file()]


def job(scene: Scene, placement: str | None) -> Job:
    """The resolved job of a raykd row; placement None is the student alone. It never evaluates, and checkpoints at the end."""
    teacher = Teacher(model=TEACHER, weights=str(scene.weights), placement=placement or "pool")  # type: ignore[arg-type]
    return resolve(
        Job(
            name=f"bench-{placement or 'student'}",
            data=Data(
                kind="parquet",
                root=str(scene.data),
                train=tuple(TRAIN.format(k) for k in range(scene.shards)),
                normalise="imagenet",
                augmentation=Augmentation(crop=scene.padding, flip=True),
            ),
            student=Student(model=STUDENT),
            teachers={"big": teacher} if placement else {},
            losses={"kd": Loss("kd", temperature=scene.temperature, weight=scene.weight)} if placement else {},
            ce_weight=1 - scene.weight if placement else 1.0,
            training=Training(
                batch_size=scene.batch_size,
                epochs=10**4,
                lr=scene.lr,
                momentum=scene.momentum,
                weight_decay=scene.weight_decay,
                scheduler="constant",
                eval_every=10**6,
                checkpoint_every=10**9,
                grad_norms_every=scene.grad_norms_every,
            ),
            launch=Launch(threads=1),
        )
    )
