import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"epsilon": 0.1}]
TRACES = [
    {"teachers": 2, "options": {"validation_share": 0.5, "alpha_lr": 300.0, "epsilon": 0.01}},
    {"teachers": 3, "options": {"validation_share": 0.5, "alpha_lr": 3e3, "epsilon": 0.1, "risk": "cross_entropy"}},
    {"teachers": 2, "options": {"validation_share": 0.0}},
]


def similarity(rng, b, d):
    v = rng.normal(size=(b, d))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return v @ v.T


def inputs(seed, b=5):
    rng = np.random.default_rng(seed)
    given = {"student_similarity": similarity(rng, b, 4), "teachers_similarity": [similarity(rng, b, d) for d in (7, 3, 6)]}
    return {**given, "alpha": rng.dirichlet(np.ones(3))}


def wrong(inputs):
    first, *others = inputs["teachers_similarity"]
    return [
        {**inputs, "teachers_similarity": [*others, first[:, :1]]},
        {**inputs, "teachers_similarity": [*others, first[:2, :2]]},
        {**inputs, "teachers_similarity": others},
    ]


def logarithm(matrix):
    """By the square roots that bring a matrix to one and the series of log(1 + x): no eigenvalues."""
    found, doublings = matrix, 0
    while np.abs(found - np.eye(len(found))).max() > 1e-3:
        root, inverse = found, np.eye(len(found))
        for _ in range(60):  # Denman and Beavers
            root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
        found, doublings = root, doublings + 1
    x, power, total = found - np.eye(len(found)), np.eye(len(found)), np.zeros_like(found)
    for n in range(1, 12):
        power = power @ x
        total += (-1) ** (n + 1) * power / n
    return 2**doublings * total


def reference(student_similarity, teachers_similarity, alpha, epsilon=1e-3):
    b = len(student_similarity)
    mixed = sum(a * s for a, s in zip(alpha, teachers_similarity))
    one, other = (logarithm(s + epsilon * np.eye(b)) for s in (student_similarity, mixed))
    return sum((one[i, j] - other[i, j]) ** 2 for i in range(b) for j in range(b)) / b**2


def closed_forms():
    same = similarity(np.random.default_rng(4), 5, 3)
    equal = {"student_similarity": same, "teachers_similarity": [same, same], "alpha": np.array([0.3, 0.7])}
    one, two = np.diag([1.0, 3.0, 7.0]), np.diag([5.0, 3.0, 1.0])
    diagonal = {"student_similarity": np.eye(3), "teachers_similarity": [one, two], "alpha": np.array([0.25, 0.75])}
    logs = [math.log(4.5) - math.log(1.5), math.log(3.5) - math.log(1.5), math.log(3.0) - math.log(1.5)]
    return [(equal, {}, 0.0), (diagonal, {"epsilon": 0.5}, sum(x * x for x in logs) / 9)]


def on_simplex(point):
    """By bisection of the level that is taken from all coordinates."""
    low, high = float(point.min()) - 1, float(point.max())
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if (point - level).clamp_min(0).sum() > 1 else (low, level)
    return (point - high).clamp_min(0)


def trace(
    student,
    teachers,
    state,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=1.0,
    epsilon=1e-3,
    validation_share=0.25,
    alpha_lr=1.0,
    risk="similarity",
):
    alpha = state["alpha"].clone()
    names = [name for name, _ in student.named_parameters()]

    def answers(parameters, images):
        """The student's forward, written out as a function of its parameters, so that steps can be differentiated."""
        named = dict(zip(names, parameters))
        for stage in ("stage1", "stage2", "stage3"):
            stride = getattr(student, stage).stride
            images = torch.relu(F.conv2d(images, named[f"{stage}.weight"], named[f"{stage}.bias"], stride=stride, padding=1))
        pooled = images.mean((2, 3))
        unit = pooled / torch.sqrt((pooled * pooled).sum(1, keepdim=True))
        return pooled @ named["classifier.weight"].T + named["classifier.bias"], unit @ unit.T

    def log(matrix):
        values, vectors = torch.linalg.eigh(matrix + epsilon * torch.eye(len(matrix), dtype=matrix.dtype))
        return vectors @ torch.diag(torch.log(values)) @ vectors.T

    def distance(own, theirs, alpha):
        mixed = sum(alpha[m] * similarity for m, similarity in enumerate(theirs))
        return ((log(own) - log(mixed)) ** 2).mean()

    for batch in batches:
        images, labels = batch["images"], batch["labels"]
        theirs = []
        for teacher in teachers:
            unit = F.normalize(signals(teacher, images)["embedding"].detach(), dim=1)
            theirs.append(unit @ unit.T)
        parameters = [p.detach().clone().requires_grad_() for p in student.parameters()]
        held = round(validation_share * len(labels))
        if held:
            cut = len(labels) - held
            free = alpha.clone().requires_grad_()
            logits, own = answers(parameters, images[:cut])
            first = weight * distance(own, [similarity[:cut, :cut] for similarity in theirs], free)
            gradients = torch.autograd.grad(first, parameters, create_graph=True, allow_unused=True)
            moved = [p if g is None else p - lr * g for p, g in zip(parameters, gradients)]
            logits, own = answers(moved, images[cut:])
            if risk == "cross_entropy":
                second = F.cross_entropy(logits, labels[cut:])
            else:
                pairs = [(i, j) for i in range(held) for j in range(held) if i != j]
                second = sum((own[i, j] - float(labels[cut + i] == labels[cut + j])) ** 2 for i, j in pairs) / len(pairs)
            (gradient,) = torch.autograd.grad(second, [free])
            alpha = on_simplex(alpha - alpha_lr * gradient)
        logits, own = answers(parameters, images)
        loss = ce_weight * F.cross_entropy(logits, labels) + weight * distance(own, theirs, alpha)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, start, gradient in zip(student.parameters(), parameters, gradients):
                parameter.copy_(start - lr * gradient)
    assert (alpha - state["alpha"]).abs().max() > 1e-3 or not validation_share, "the rate of this row shows nothing"
    assert (alpha - state["alpha"]).abs().max() > 1e-3 or not validation_share, "the rate of this row shows nothing"
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {"module.alpha": alpha}
