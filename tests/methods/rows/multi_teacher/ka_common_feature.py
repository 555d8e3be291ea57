import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [
    {"alpha": 0.3, "lam": 2.0, "bandwidths": (0.5, 3.0)},
    {"targets": "soft", "temperature": 2.0},
]
APART = {"reconstruction"}  # trains the common space, not the student
UNORDERED = {"common"}  # compares distributions: which sample of a teacher stands beside which does not matter
MAPS = [(2, 0), (0, 1, 2)]
TRACES = [
    {"teachers": 2, "label_maps": MAPS, "options": {"common_channels": 5}},
    {
        "teachers": 2,
        "student_strides": (2, 2, 1),
        "teacher_strides": (1, 2, 1),
        "options": {
            "common_channels": 6,
            "targets": "soft",
            "temperature": 2.0,
            "alpha": 0.2,
            "lam": 0.5,
            "bandwidths": (0.7,),
        },
    },
]


def inputs(seed, b=5):
    rng = np.random.default_rng(seed)
    classes = [np.array([3, 1]), np.array([0, 1, 2])]
    shapes = [(2, 2, 1), (3, 1, 2)]
    features = [rng.normal(size=(b, *shape)) for shape in shapes]
    return {
        "student_logits": rng.normal(size=(b, 4)),
        "student_common": rng.normal(size=(b, 3, 2, 2)),
        "teachers_logits": [rng.normal(size=(b, len(own))) for own in classes],
        "teachers_classes": classes,
        "teachers_common": [rng.normal(size=(b, 3, 2, 2)) for _ in classes],
        "teachers_rebuilt": [feature + rng.normal(size=feature.shape) for feature in features],
        "teachers_feature": features,
    }


def wrong(inputs):
    swapped = {name: list(reversed(inputs[name])) for name in ("teachers_logits", "teachers_rebuilt")}
    shorter = {name: inputs[name][:1] for name in swapped}
    return [{**inputs, name: value} for name, value in [*swapped.items(), *shorter.items()]]


def unit(rows):
    rows = [list(row.reshape(-1)) for row in rows]
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]


def kernel(x, y, bandwidths):
    apart = sum((a - b) ** 2 for a, b in zip(x, y))
    return sum(math.exp(-apart / (2 * s * s)) for s in bandwidths)


def discrepancy(u, v, bandwidths):
    n, found = len(u), 0.0
    for i in range(n):
        for j in range(n):
            found += kernel(u[i], u[j], bandwidths) + kernel(v[i], v[j], bandwidths) - 2 * kernel(u[i], v[j], bandwidths)
    return found / n**2


def reference(
    student_logits,
    student_common,
    teachers_logits,
    teachers_classes,
    teachers_common,
    teachers_rebuilt,
    teachers_feature,
    alpha=0.5,
    lam=1.0,
    targets="l2",
    temperature=1.0,
    bandwidths=(0.25, 0.5, 1.0, 2.0),
):
    output, rebuilt = [], []
    for i in range(len(student_logits)):
        pairs = [
            (student_logits[i][k], logits[i][place])
            for logits, classes in zip(teachers_logits, teachers_classes)
            for place, k in enumerate(classes)
        ]
        if targets == "l2":
            value = sum((s - t) ** 2 for s, t in pairs)
        else:
            mass_s, mass_t = (sum(math.exp(pair[role] / temperature) for pair in pairs) for role in (0, 1))
            shares = [(math.exp(s / temperature) / mass_s, math.exp(t / temperature) / mass_t) for s, t in pairs]
            value = temperature**2 * sum(q * math.log(q / p) for p, q in shares)
        output.append(alpha * value)
        errors = 0.0
        for made, feature in zip(teachers_rebuilt, teachers_feature):
            squares = [(a - b) ** 2 for a, b in zip(made[i].reshape(-1), feature[i].reshape(-1))]
            errors += sum(squares) / len(squares)
        rebuilt.append((1 - alpha) * lam * errors)
    common = sum(discrepancy(unit(student_common), unit(other), bandwidths) for other in teachers_common)
    return {"output": np.array(output), "common": (1 - alpha) * common, "reconstruction": np.array(rebuilt)}


def closed_forms():
    space = np.ones((1, 2, 1, 1))
    given = {
        "student_logits": np.array([[1.0, 2.0, 0.0]]),
        "student_common": space,
        "teachers_logits": [np.array([[5.0, 1.0]]), np.array([[2.0]])],
        "teachers_classes": [np.array([2, 0]), np.array([1])],
        "teachers_common": [-3 * space, space],
        "teachers_rebuilt": [space, space * 2],
        "teachers_feature": [space, -space],
    }
    apart = 2 - 2 * math.exp(-2.0)  # of opposite unit vectors under one kernel of width 1
    expected = {"output": [0.5 * 25], "common": 0.5 * apart, "reconstruction": [0.5 * 9.0]}
    return [(given, {"bandwidths": (1.0,)}, expected)]


def trace(
    student,
    teacher,
    state,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=0.0,
    common_channels=128,
    alpha=0.5,
    lam=1.0,
    targets="l2",
    temperature=1.0,
    bandwidths=(0.25, 0.5, 1.0, 2.0),
):
    state = {name: value.clone().requires_grad_(True) for name, value in state.items()}

    def conv(name, x):
        return torch.einsum("oc,bchw->bohw", state[f"{name}.weight"][:, :, 0, 0], x)

    def extract(x):
        assert x.shape[1] == common_channels
        for block in range(3):
            x = torch.relu(x + conv(f"extractor.{block}.layers.2", torch.relu(conv(f"extractor.{block}.layers.0", x))))
        return x.flatten(1)

    def kernels(a, b):
        apart = ((a[:, None] - b[None]) ** 2).sum(2)
        return sum(torch.exp(-apart / (2 * s * s)) for s in bandwidths).mean()

    for batch in batches:
        own, theirs = signals(student, batch["images"]), [signals(one, batch["images"]) for one in teacher]
        maps = [own["stages"][2], *(one["stages"][2].detach() for one in theirs)]
        size = min(x.shape[2] for x in maps)
        maps = [F.avg_pool2d(x, x.shape[2] // size) for x in maps]
        at_student = extract(conv("student_adapter.0", maps[0]))
        u = at_student / at_student.norm(dim=1, keepdim=True)
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        for m, feature in enumerate(maps[1:]):
            space = extract(conv(f"teacher_adapters.{m}.0", feature))
            v = space / space.norm(dim=1, keepdim=True)
            loss = loss + weight * (1 - alpha) * (kernels(u, u) + kernels(v, v) - 2 * kernels(u, v))
            space = space.reshape(len(space), -1, size, size)
            rebuilt = conv(f"decoders.{m}.2", torch.relu(conv(f"decoders.{m}.0", space)))
            loss = loss + weight * (1 - alpha) * lam * ((rebuilt - feature) ** 2).mean()
        pairs = list(zip(theirs, batch["teachers_classes"]))
        goal = torch.cat([one["logits"].detach() for one, _ in pairs], 1)
        made = torch.cat([own["logits"][:, classes] for _, classes in pairs], 1)
        if targets == "l2":
            loss = loss + weight * alpha * ((made - goal) ** 2).sum(1).mean()
        else:
            p, q = torch.softmax(goal / temperature, 1), torch.softmax(made / temperature, 1)
            loss = loss + weight * alpha * temperature**2 * (p * (p / q).log()).sum(1).mean()
        parameters = [*student.parameters(), *state.values()]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
