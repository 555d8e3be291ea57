import copy
import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [
    {"temperature": 1.0},
    {"mean_teachers": "own"},
    {"detach": False},
    {"ramp_epochs": 0.0},
    {"ramp_epochs": 20.0, "detach": False},
]
LABELLED = {"ce"}
DECAY = 0.9
TRACES = [
    {"ema": DECAY, "branching": {"kind": "split", "count": 3, "views": "own"}},
    {
        "ema": DECAY,
        "branching": {"kind": "split", "count": 2},
        "steps_per_epoch": 1,
        "options": {"temperature": 1.5, "detach": False, "mean_teachers": "own", "ramp_epochs": 2.0},
    },
]


def inputs(seed, count=3):
    rng = np.random.default_rng(seed)
    return {
        "student_logits_branches": [rng.normal(size=(5, 4)) * 3 for _ in range(count)],
        "ema_logits_branches": [rng.normal(size=(5, 4)) * 3 for _ in range(count)],
        "ensemble_logits": rng.normal(size=(5, 4)) * 3,
        "labels": rng.integers(4, size=5),
        "epoch": 40,
    }


def variants(seed):
    return [{**inputs(seed, 2), "epoch": 0}, {**inputs(seed, 4), "epoch": 80}]


def wrong(inputs):
    cases = []
    for name in ("student_logits_branches", "ema_logits_branches"):
        first, *others = inputs[name]
        cases += [{**inputs, name: b} for b in ([first], others, [first[:, :3], *others], [first[:2], *others])]
    return cases


def log_softmax(z):
    total = math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - max(z) - total for v in z]


def divergence(target, own, temperature):
    p, q = log_softmax(target / temperature), log_softmax(own / temperature)
    return temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(p, q))


def reference(
    student_logits_branches,
    ema_logits_branches,
    ensemble_logits,
    labels,
    epoch,
    temperature=3.0,
    mean_teachers="others",
    detach=True,
    ramp_epochs=80.0,
):
    ramp = math.exp(-5 * (1 - epoch / ramp_epochs) ** 2) if epoch < ramp_epochs else 1.0
    found = {name: np.zeros(len(labels)) for name in ("ce", "ensemble", "ema")}
    count = len(student_logits_branches)
    for n, label in enumerate(labels):
        found["ce"][n] = -log_softmax(ensemble_logits[n])[label]
        for i in range(count):
            own = student_logits_branches[i][n]
            found["ce"][n] -= log_softmax(own)[label]
            found["ensemble"][n] += ramp * divergence(ensemble_logits[n], own, temperature)
            for j in range(count):
                if mean_teachers == "own" and i == j:
                    found["ema"][n] += ramp * divergence(ema_logits_branches[j][n], own, temperature)
                if mean_teachers == "others" and i != j:
                    found["ema"][n] += ramp * divergence(ema_logits_branches[j][n], own, temperature) / (count - 1)
    return found


def closed_forms():
    odds, even = np.array([[math.log(3.0), 0.0]]), np.zeros((1, 2))
    given = {"student_logits_branches": [even, odds], "ema_logits_branches": [even, odds], "ensemble_logits": even}
    given |= {"labels": np.array([0]), "epoch": 80}
    ce, kd = 2 * math.log(2) + math.log(4 / 3), 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    crossed = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + kd
    plain = {"temperature": 1.0}
    return [
        (given, plain, {"ce": [ce], "ensemble": [kd], "ema": [crossed]}),
        (given, {**plain, "mean_teachers": "own"}, {"ce": [ce], "ensemble": [kd], "ema": [0.0]}),
    ]


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
    temperature=3.0,
    mean_teachers="others",
    detach=True,
    ramp_epochs=80.0,
):
    state = {name: value.clone().requires_grad_(True) for name, value in state.items()}
    averaged = copy.deepcopy(student)
    for batch in batches:
        images, labels = batch.get("views", batch["images"]), batch["labels"]
        found, copies = signals(student, images), [z.detach() for z in signals(averaged, images)["logits"]]
        ramp = math.exp(-5 * (1 - min(batch["epoch"] / ramp_epochs, 1)) ** 2)
        ensemble = torch.cat(found["embedding"], 1) @ state["ensemble.weight"].T + state["ensemble.bias"]
        loss = ce_weight * F.cross_entropy(found["logits"][0], labels) + weight * F.cross_entropy(ensemble, labels)
        for i, z in enumerate(found["logits"]):
            loss = loss + weight * F.cross_entropy(z, labels)
            others = [c for j, c in enumerate(copies) if j != i] if mean_teachers == "others" else [copies[i]]
            targets = [(ensemble.detach() if detach else ensemble, 1.0), *((c, 1 / len(others)) for c in others)]
            for target, share in targets:
                p, q = torch.softmax(target / temperature, 1), torch.softmax(z / temperature, 1)
                kd = temperature**2 * (p * torch.log(p / q)).sum() / len(labels)
                loss = loss + weight * ramp * share * kd
        parameters = [*student.parameters(), *state.values()]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
            for kept, now in zip(averaged.parameters(), student.parameters()):
                kept.copy_(DECAY * kept + (1 - DECAY) * now)
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
