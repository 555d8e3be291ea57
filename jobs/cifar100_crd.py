"""The CRD protocol on CIFAR-100: any method, any pair of the table, any seed, with the published weights.

    raykd run jobs/cifar100_crd.py --arg method=dkd --arg pair=resnet56-resnet20 --arg seed=1 --set data.root=path/to/cifar100

`teacher_weights` names the teacher's file; `Data` reads torchvision's CIFAR-100 (binary archive) below `data.root`.
"""

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training

# teacher, student, learning rate (0.01 for MobileNetV2 and the ShuffleNets), DKD's beta
PAIRS = {
    "wrn_40_2-wrn_16_2": ("wrn_40_2", "wrn_16_2", 0.05, 6.0),
    "wrn_40_2-wrn_40_1": ("wrn_40_2", "wrn_40_1", 0.05, 6.0),
    "resnet56-resnet20": ("crd_resnet56", "crd_resnet20", 0.05, 2.0),
    "resnet110-resnet20": ("crd_resnet110", "crd_resnet20", 0.05, 2.0),
    "resnet110-resnet32": ("crd_resnet110", "crd_resnet32", 0.05, 2.0),
    "resnet32x4-resnet8x4": ("crd_resnet32x4", "crd_resnet8x4", 0.05, 8.0),
    "vgg13-vgg8": ("vgg13", "vgg8", 0.05, 6.0),
    "vgg13-mobilenetv2": ("vgg13", "mobilenetv2", 0.01, 6.0),
    "resnet50-mobilenetv2": ("crd_resnet50", "mobilenetv2", 0.01, 8.0),
    "resnet50-vgg8": ("crd_resnet50", "vgg8", 0.05, 8.0),
    "resnet32x4-shufflenetv1": ("crd_resnet32x4", "shufflenetv1", 0.01, 8.0),
    "resnet32x4-shufflenetv2": ("crd_resnet32x4", "shufflenetv2", 0.01, 8.0),
    "wrn_40_2-shufflenetv1": ("wrn_40_2", "shufflenetv1", 0.01, 8.0),
}

# In the table VGG's first block counts as its stem: layers are counted from the second block on. Other models: all stages.
FOUR = ("stage1", "stage2", "stage3", "stage4")
VGG = ("stage2", "stage3", "stage4", "stage5")


def layers(method: str, teacher: str, student: str) -> dict[str, tuple[str, ...]] | None:
    """Layers of a pair with a VGG in it; None: the method's own."""
    if method not in ("at", "vid", "fitnet") or not (teacher.startswith("vgg") or student.startswith("vgg")):
        return None
    pair = {"student": student, "teacher": teacher}
    counted = {role: VGG if model.startswith("vgg") else FOUR for role, model in pair.items()}
    return {role: names[1:2] for role, names in counted.items()} if method == "fitnet" else counted


# what a method's row of the table used beyond the method's own defaults
WEIGHTS = {
    "kd": {"temperature": 4.0, "weight": 0.9, "ce_weight": 0.1},
    "dist": {"temperature": 4.0},
}


def job(
    method: str = "crd", pair: str = "resnet56-resnet20", seed: int = 0, teacher_weights: str = "", root: str = "data/cifar100"
) -> Job:
    """One cell of the CRD table."""
    if pair not in PAIRS:
        raise ValueError(f"pair: expected one of {', '.join(PAIRS)}, got {pair!r}")
    teacher, student, lr, beta = PAIRS[pair]
    options = WEIGHTS.get(method, {}) | ({"beta": beta} if method == "dkd" else {})
    return Job(
        name=f"cifar100-{method}-{pair}",
        seed=seed,
        data=Data(
            kind="torchvision:CIFAR100",
            root=root,
            train="train",
            eval="test",
            num_classes=100,
            normalise="cifar100",
            augmentation=Augmentation(crop=4, flip=True),
        ),
        student=Student(model=student),
        teachers={"teacher": Teacher(model=teacher, weights=teacher_weights or "{data.root}/teacher.pth")},
        losses={method: Loss(method, layers=layers(method, teacher, student), **options)},
        training=Training(recipe="crd", lr=lr),
    )
