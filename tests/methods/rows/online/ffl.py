import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0}, {"detach": False}, {"ramp_epochs": 0.0}, {"ramp_epochs": 20.0, "detach": False}]
LABELLED = {"ce"}
APART = {"fusion"}  # trains the fusion module, the mean of the sub-networks is its target
TRACES = [
    {"branching": {"kind": "split", "count": 2}},
    {
        "branching": {"kind": "split", "count": 3},
        "steps_per_epoch": 1,
        "options": {"temperature": 1.5, "detach": False, "ramp_epochs": 2.0},
    },
]


def inputs(seed, count=2):
    rng = np.random.default_rng(seed)
    return {
        "student_logits_branches": [rng.normal(size=(5, 4)) * 3 for _ in range(count)],
        "fused_logits": rng.normal(size=(5, 4)) * 3,
        "labels": rng.integers(4, size=5),
        "epoch": 40,
    }


def variants(seed):
    return [{**inputs(seed, 3), "epoch": 0}, {**inputs(seed, 4), "epoch": 80}]


def wrong(inputs):
    first, *others = inputs["student_logits_branches"]
    return [{**inputs, "student_logits_branches": b} for b in ([first], [first[:, :3], *others], [first[:2], *others])]


def log_softmax(z):
    total = math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - max(z) - total for v in z]


def divergence(target, own, temperature):
    p, q = (log_softmax([v / temperature for v in z]) for z in (target, own))
    return temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(p, q))


def reference(student_logits_branches, fused_logits, labels, epoch, temperature=3.0, detach=True, ramp_epochs=80.0):
    ramp = math.exp(-5 * (1 - epoch / ramp_epochs) ** 2) if epoch < ramp_epochs else 1.0
    found = {name: np.zeros(len(labels)) for name in ("ce", "kd", "fusion")}
    for n, label in enumerate(labels):
        branches, fused = [z[n] for z in student_logits_branches], fused_logits[n]
        found["ce"][n] = sum(-log_softmax(z)[label] for z in (fused, *branches))
        found["kd"][n] = ramp * sum(divergence(fused, z, temperature) for z in branches)
        mean = [sum(z[k] for z in branches) / len(branches) for k in range(len(fused))]
        found["fusion"][n] = ramp * divergence(mean, fused, temperature)
    return found


def closed_forms():
    branches, fused = [np.array([[math.log(9.0), 0.0]]), np.zeros((1, 2))], np.zeros((1, 2))
    given = {"student_logits_branches": branches, "fused_logits": fused, "labels": np.array([1])}
    ce, fusion = math.log(10) + 2 * math.log(2), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    kd, early = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), math.exp(-5 / 4)
    return [
        ({**given, "epoch": 80}, {"temperature": 1.0}, {"ce": [ce], "kd": [kd], "fusion": [fusion]}),
        ({**given, "epoch": 40}, {"temperature": 1.0}, {"ce": [ce], "kd": [early * kd], "fusion": [early * fusion]}),
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
    detach=True,
    ramp_epochs=80.0,
):
    state = {name: value.clone() for name, value in state.items()}
    names = [name for name in state if name.endswith(("weight", "bias"))]
    for name in names:
        state[name].requires_grad_(True)

    def normalised(x, norm):
        mean, count = x.mean((0, 2, 3)), x.numel() / x.shape[1]
        variance = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
        state[f"{norm}.running_mean"] = 0.9 * state[f"{norm}.running_mean"] + 0.1 * mean.detach()
        unbiased = variance.detach() * count / (count - 1)
        state[f"{norm}.running_var"] = 0.9 * state[f"{norm}.running_var"] + 0.1 * unbiased
        state[f"{norm}.num_batches_tracked"] = state[f"{norm}.num_batches_tracked"] + 1
        x = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
        return torch.relu(state[f"{norm}.weight"][:, None, None] * x + state[f"{norm}.bias"][:, None, None])

    for batch in batches:
        found, labels = signals(student, batch["images"]), batch["labels"]
        ramp = math.exp(-5 * (1 - min(batch["epoch"] / ramp_epochs, 1)) ** 2)
        maps = torch.cat([stages[2] for stages in found["stages"]], 1)
        kernels = state["depthwise.weight"]
        each = [F.conv2d(maps[:, c : c + 1], kernels[c : c + 1], padding=1) for c in range(maps.shape[1])]
        x = normalised(torch.cat(each, 1), "depthwise_norm")
        x = torch.einsum("oc,bchw->bohw", state["pointwise.weight"][:, :, 0, 0], x)
        x = normalised(x, "pointwise_norm").mean((2, 3))
        fused = x @ state["classifier.weight"].T + state["classifier.bias"]
        mean = sum(found["logits"]) / len(found["logits"])
        target, average = (fused.detach(), mean.detach()) if detach else (fused, mean)
        loss = ce_weight * F.cross_entropy(found["logits"][0], labels) + weight * F.cross_entropy(fused, labels)
        for z in found["logits"]:
            loss = loss + weight * F.cross_entropy(z, labels)
        for own, teacher in [(fused, average), *((z, target) for z in found["logits"])]:
            p, q = torch.softmax(teacher / temperature, 1), torch.softmax(own / temperature, 1)
            loss = loss + weight * ramp * temperature**2 * (p * torch.log(p / q)).sum() / len(labels)
        parameters = [*student.parameters(), *(state[name] for name in names)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
