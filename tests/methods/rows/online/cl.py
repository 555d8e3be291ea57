import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [
    {"beta": 0.2, "temperature": 1.0},
    {"detach": False},
    {"mode": "okddip", "temperature": 3.0, "detach": False},
    {"mode": "okddip", "ramp_epochs": 0.0},
]
LABELLED = {"ce"}
BRANCHING = {"kind": "split", "count": 3, "rescale": True}
TRACES = [
    {"branching": BRANCHING},
    {"branching": {**BRANCHING, "count": 2}, "options": {"beta": 0.3, "detach": False}},
    {"branching": BRANCHING, "steps_per_epoch": 1, "options": {"mode": "okddip", "temperature": 3.0, "ramp_epochs": 2.0}},
]


def inputs(seed, count=3):
    rng = np.random.default_rng(seed)
    heads = [rng.normal(size=(5, 4)) * 3 for _ in range(count)]
    return {"student_logits_branches": heads, "labels": rng.integers(4, size=5), "epoch": 30}


def variants(seed):
    return [{**inputs(seed, 2), "epoch": 0}, {**inputs(seed, 5), "epoch": 80}]


def wrong(inputs):
    first, *others = inputs["student_logits_branches"]
    return [{**inputs, "student_logits_branches": heads} for heads in ([first], [first[:, :3], *others], [first[:2], *others])]


def log_softmax(z):
    total = math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - max(z) - total for v in z]


def reference(student_logits_branches, labels, epoch, beta=0.5, temperature=2.0, mode="paper", detach=True, ramp_epochs=80.0):
    heads, ramp = student_logits_branches, math.exp(-5 * (1 - epoch / ramp_epochs) ** 2) if epoch < ramp_epochs else 1.0
    found = {"ce": np.zeros(len(labels)), "soft": np.zeros(len(labels))}
    for i, label in enumerate(labels):
        for h in range(len(heads)):
            others = [heads[j][i] for j in range(len(heads)) if j != h]
            mean = [sum(z[k] for z in others) / len(others) for k in range(len(others[0]))]
            log_q = log_softmax([v / temperature for v in mean])
            log_p = log_softmax(heads[h][i] / temperature)
            plain = -log_softmax(heads[h][i])[label]
            if mode == "paper":
                found["ce"][i] += beta * plain
                found["soft"][i] -= (1 - beta) * sum(math.exp(a) * b for a, b in zip(log_q, log_p))
            else:
                found["ce"][i] += plain
                found["soft"][i] += ramp * temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(log_q, log_p))
    return found


def closed_forms():
    heads = [np.array([[math.log(3.0), 0.0]]), np.zeros((1, 2))]
    given = {"student_logits_branches": heads, "labels": np.array([0]), "epoch": 80}
    ce = math.log(4 / 3) + math.log(2)
    own, other = -0.5 * math.log(0.75) - 0.5 * math.log(0.25), math.log(2)
    nats = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    return [
        (given, {"temperature": 1.0}, {"ce": [ce / 2], "soft": [(own + other) / 2]}),
        (given, {"temperature": 1.0, "beta": 0.75}, {"ce": [0.75 * ce], "soft": [(own + other) / 4]}),
        (given, {"temperature": 1.0, "mode": "okddip"}, {"ce": [ce], "soft": [sum(nats)]}),
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
    beta=0.5,
    temperature=2.0,
    mode="paper",
    detach=True,
    ramp_epochs=80.0,
):
    for batch in batches:
        heads, labels = signals(student, batch["images"])["logits"], batch["labels"]
        ramp = math.exp(-5 * (1 - min(batch["epoch"] / ramp_epochs, 1)) ** 2)
        loss = ce_weight * F.cross_entropy(heads[0], labels)
        for h, z in enumerate(heads):
            mean = sum(other for j, other in enumerate(heads) if j != h) / (len(heads) - 1)
            q = torch.softmax((mean.detach() if detach else mean) / temperature, 1)
            p = torch.softmax(z / temperature, 1)
            if mode == "paper":
                loss = loss + weight * beta * F.cross_entropy(z, labels)
                loss = loss - weight * (1 - beta) * (q * torch.log(p)).sum() / len(labels)
            else:
                loss = loss + weight * F.cross_entropy(z, labels)
                loss = loss + weight * ramp * temperature**2 * (q * torch.log(q / p)).sum() / len(labels)
        named = dict(student.named_parameters())
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), torch.autograd.grad(loss, list(named.values()))):
                shared = "stage1." in name or "stage2." in name  # the branches part after them
                parameter -= lr * gradient / (len(heads) if shared else 1)
    return {f"student.{name}": value for name, value in student.state_dict().items()}
