import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0}, {"detach": False}, {"ramp_epochs": 0.0}, {"ramp_epochs": 20.0, "detach": False}]
LABELLED = {"ce", "ensemble"}
TRACES = [
    {"branching": {"kind": "split", "count": 3}, "still": {"linear.bias"}},  # batch normalisation takes a bias away
    {
        "branching": {"kind": "split", "count": 2},
        "steps_per_epoch": 1,
        "still": {"linear.bias"},
        "options": {"temperature": 1.5, "detach": False, "ramp_epochs": 2.0},
    },
]


def inputs(seed, count=3):
    rng = np.random.default_rng(seed)
    powers = np.exp(rng.normal(size=(5, count)))
    return {
        "student_logits_branches": [rng.normal(size=(5, 4)) * 3 for _ in range(count)],
        "gates": powers / powers.sum(1, keepdims=True),
        "labels": rng.integers(4, size=5),
        "epoch": 40,
    }


def variants(seed):
    return [{**inputs(seed, 2), "epoch": 0}, {**inputs(seed, 4), "epoch": 80}]


def wrong(inputs):
    first, *others = inputs["student_logits_branches"]
    branches = [first], others, [first[:, :3], *others], [first[:2], *others]
    return [*({**inputs, "student_logits_branches": b} for b in branches), {**inputs, "gates": inputs["gates"][:, :1]}]


def log_softmax(z):
    total = math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - max(z) - total for v in z]


def reference(student_logits_branches, gates, labels, epoch, temperature=3.0, detach=True, ramp_epochs=80.0):
    ramp = math.exp(-5 * (1 - epoch / ramp_epochs) ** 2) if epoch < ramp_epochs else 1.0
    found = {name: np.zeros(len(labels)) for name in ("ce", "ensemble", "kd")}
    for n, label in enumerate(labels):
        branches = [z[n] for z in student_logits_branches]
        ensemble = [sum(gates[n, i] * z[k] for i, z in enumerate(branches)) for k in range(len(branches[0]))]
        found["ensemble"][n] = -log_softmax(ensemble)[label]
        target = log_softmax([v / temperature for v in ensemble])
        for z in branches:
            found["ce"][n] -= log_softmax(z)[label]
            own = log_softmax(z / temperature)
            found["kd"][n] += ramp * temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(target, own))
    return found


def closed_forms():
    branches = [np.array([[math.log(9.0), 0.0]]), np.zeros((1, 2))]
    given = {"student_logits_branches": branches, "gates": np.array([[0.5, 0.5]]), "labels": np.array([1])}
    nats = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1) + 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    values = {"ce": [math.log(10) + math.log(2)], "ensemble": [math.log(4)], "kd": [nats]}
    first = {"ce": values["ce"], "ensemble": values["ensemble"], "kd": [nats * math.exp(-5)]}
    return [({**given, "epoch": 80}, {"temperature": 1.0}, values), ({**given, "epoch": 0}, {"temperature": 1.0}, first)]


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
    detach=True,
    ramp_epochs=80.0,
):
    state = {name: value.clone() for name, value in state.items()}
    names = [name for name in state if name.endswith(("weight", "bias"))]
    for name in names:
        state[name].requires_grad_(True)
    for batch in batches:
        found, labels = signals(student, batch["images"]), batch["labels"]
        ramp = math.exp(-5 * (1 - min(batch["epoch"] / ramp_epochs, 1)) ** 2)
        pooled = found["stages"][0][1].mean((2, 3))
        x = pooled @ state["linear.weight"].T + state["linear.bias"]
        mean, variance, count = x.mean(0), ((x - x.mean(0)) ** 2).mean(0), len(x)
        state["norm.running_mean"] = 0.9 * state["norm.running_mean"] + 0.1 * mean.detach()
        state["norm.running_var"] = 0.9 * state["norm.running_var"] + 0.1 * variance.detach() * count / (count - 1)
        state["norm.num_batches_tracked"] = state["norm.num_batches_tracked"] + 1
        x = state["norm.weight"] * (x - mean) / torch.sqrt(variance + 1e-5) + state["norm.bias"]
        gates = torch.softmax(torch.relu(x), 1)
        ensemble = sum(gates[:, i : i + 1] * z for i, z in enumerate(found["logits"]))
        loss = ce_weight * F.cross_entropy(found["logits"][0], labels) + weight * F.cross_entropy(ensemble, labels)
        target = torch.softmax((ensemble.detach() if detach else ensemble) / temperature, 1)
        for z in found["logits"]:
            p = torch.softmax(z / temperature, 1)
            kd = ramp * temperature**2 * (target * torch.log(target / p)).sum() / count
            loss = loss + weight * (F.cross_entropy(z, labels) + kd)
        parameters = [*student.parameters(), *(state[name] for name in names)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
