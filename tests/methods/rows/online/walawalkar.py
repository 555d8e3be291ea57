import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [
    {"temperature": 1.0},
    {"detach": False},
    {"ce_share": 1.0, "feature_share": 2.0, "kd_share": 0.5, "detach": False},
]
LABELLED = {"ce"}
TRACES = [
    {"branching": {"kind": "split", "count": 3, "at": "stage1"}},
    {
        "branching": {"kind": "split", "count": 2, "at": "stage1"},
        "options": {"temperature": 1.5, "detach": False, "feature_share": 0.5, "kd_share": 0.7, "ce_share": 0.2},
    },
]


def inputs(seed, count=3, layers=2):
    rng = np.random.default_rng(seed)
    shapes = [(5, 3, 4, 2), (5, 2, 2, 2), (5, 4, 1, 1)][:layers]
    return {
        "student_logits_branches": [rng.normal(size=(5, 4)) * 3 for _ in range(count)],
        "student_features_branches": [[rng.normal(size=shape) for shape in shapes] for _ in range(count)],
        "labels": rng.integers(4, size=5),
    }


def variants(seed):
    return [inputs(seed, 2, 3), inputs(seed, 4, 1)]


def wrong(inputs):
    first, *others = inputs["student_logits_branches"]
    logits = [first], others, [first[:, :3], *others], [first[:2], *others]
    features = inputs["student_features_branches"]
    map0, *rest = features[0]
    cuts = [map0[:, :1], map0[:, :, :1], map0[..., :1], map0[:1]]
    return [
        *({**inputs, "student_logits_branches": b} for b in logits),
        *({**inputs, "student_features_branches": [[cut, *rest], *features[1:]]} for cut in cuts),
        {**inputs, "student_features_branches": [features[0][:-1], *features[1:]]},
        {**inputs, "student_features_branches": features[:1]},
    ]


def log_softmax(z):
    total = math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - max(z) - total for v in z]


def reference(
    student_logits_branches,
    student_features_branches,
    labels,
    ce_share=0.7,
    feature_share=0.15,
    kd_share=0.15,
    temperature=2.0,
    detach=True,
):
    found = {name: np.zeros(len(labels)) for name in ("ce", "feature", "kd")}
    for n, label in enumerate(labels):
        branches = [z[n] for z in student_logits_branches]
        mean = [sum(z[k] for z in branches) / len(branches) for k in range(len(branches[0]))]
        target = log_softmax([v / temperature for v in mean])
        for z in branches:
            found["ce"][n] -= ce_share * log_softmax(z)[label]
            own = log_softmax(z / temperature)
            found["kd"][n] += kd_share * temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(target, own))
        for features in student_features_branches[1:]:
            for wide, narrow in zip(student_features_branches[0], features):
                squares = [(a - b) ** 2 for a, b in zip(wide[n].reshape(-1), narrow[n].reshape(-1))]
                found["feature"][n] += feature_share * sum(squares) / len(squares)
    return found


def closed_forms():
    branches = [np.array([[math.log(9.0), 0.0]]), np.zeros((1, 2))]
    twos, fives = np.full((1, 2, 1, 3), 2.0), np.full((1, 2, 1, 3), 5.0)
    given = {"student_logits_branches": branches, "labels": np.array([1])}
    given["student_features_branches"] = [[twos, twos], [fives, twos]]
    kd = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1) + 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    ce = math.log(10) + math.log(2)
    return [(given, {"temperature": 1.0}, {"ce": [0.7 * ce], "feature": [0.15 * 9], "kd": [0.15 * kd]})]


def trace(
    student,
    state,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=0.0,
    ce_share=0.7,
    feature_share=0.15,
    kd_share=0.15,
    temperature=2.0,
    detach=True,
):
    state = {name: value.clone().requires_grad_(True) for name, value in state.items()}
    for batch in batches:
        found, labels = signals(student, batch["images"]), batch["labels"]
        mean = sum(found["logits"]) / len(found["logits"])
        p = torch.softmax((mean.detach() if detach else mean) / temperature, 1)
        loss = ce_weight * F.cross_entropy(found["logits"][0], labels)
        for z in found["logits"]:
            q = torch.softmax(z / temperature, 1)
            kd = temperature**2 * (p * torch.log(p / q)).sum() / len(labels)
            loss = loss + weight * (ce_share * F.cross_entropy(z, labels) + kd_share * kd)
        for s, stages in enumerate(found["stages"][1:]):
            for place, stage in enumerate((1, 2)):
                kernel = state[f"adapters.{s}.{place}.0.weight"][:, :, 0, 0]
                own = torch.einsum("oc,bchw->bohw", kernel, stages[stage])
                target = found["stages"][0][stage]
                apart = (own - (target.detach() if detach else target)) ** 2
                loss = loss + weight * feature_share * apart.mean()
        parameters = [*student.parameters(), *state.values()]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
