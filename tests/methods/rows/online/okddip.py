import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0}, {"detach": "logits"}, {"ramp_epochs": 0.0}, {"ramp_epochs": 20.0, "temperature": 2.0}]
LABELLED = {"ce"}
TRACES = [
    {"branching": {"kind": "split", "count": 4}, "options": {"ramp_epochs": 0.0}},
    {
        "branching": {"kind": "split", "count": 3},
        "steps_per_epoch": 1,
        "options": {"detach": "logits", "reduction": 2, "temperature": 1.5, "ramp_epochs": 2.0},
    },
]


def inputs(seed, peers=3):
    rng = np.random.default_rng(seed)
    powers = np.exp(rng.normal(size=(5, peers, peers)))
    return {
        "student_logits_branches": [rng.normal(size=(5, 4)) * 3 for _ in range(1 + peers)],
        "attention": powers / powers.sum(2, keepdims=True),
        "labels": rng.integers(4, size=5),
        "epoch": 40,
    }


def variants(seed):
    return [{**inputs(seed, 2), "epoch": 0}, {**inputs(seed, 4), "epoch": 80}]


def wrong(inputs):
    first, *others = inputs["student_logits_branches"]
    branches = [first], [first, others[0]], others, [first[:, :3], *others], [first[:2], *others]
    cut = inputs["attention"][:, :1]
    attentions = cut, cut[:, :, :1]
    return [
        *({**inputs, "student_logits_branches": b} for b in branches),
        *({**inputs, "attention": attention} for attention in attentions),
    ]


def log_softmax(z):
    total = math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - max(z) - total for v in z]


def divergence(target, own, temperature):
    p, q = (log_softmax([v / temperature for v in z]) for z in (target, own))
    return temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(p, q))


def reference(student_logits_branches, attention, labels, epoch, temperature=3.0, detach="none", ramp_epochs=80.0):
    ramp = math.exp(-5 * (1 - epoch / ramp_epochs) ** 2) if epoch < ramp_epochs else 1.0
    found = {name: np.zeros(len(labels)) for name in ("ce", "peers", "leader")}
    for n, label in enumerate(labels):
        leader, *peers = [z[n] for z in student_logits_branches]
        classes = range(len(leader))
        found["ce"][n] = sum(-log_softmax(z)[label] for z in (leader, *peers))
        for i, own in enumerate(peers):
            target = [sum(attention[n, i, j] * z[k] for j, z in enumerate(peers)) for k in classes]
            found["peers"][n] += ramp * divergence(target, own, temperature)
        mean = [sum(z[k] for z in peers) / len(peers) for k in classes]
        found["leader"][n] = ramp * divergence(mean, leader, temperature)
    return found


def closed_forms():
    branches = [np.zeros((1, 2)), np.array([[math.log(9.0), 0.0]]), np.zeros((1, 2))]
    given = {"student_logits_branches": branches, "labels": np.array([1]), "epoch": 80}
    ce, leader = 2 * math.log(2) + math.log(10), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    swapped = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1) + 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    alone, other = np.eye(2)[None], np.eye(2)[None, ::-1].copy()
    return [
        ({**given, "attention": alone}, {"temperature": 1.0}, {"ce": [ce], "peers": [0.0], "leader": [leader]}),
        ({**given, "attention": other}, {"temperature": 1.0}, {"ce": [ce], "peers": [swapped], "leader": [leader]}),
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
    detach="none",
    ramp_epochs=80.0,
    reduction=8,
):
    state = {name: value.clone().requires_grad_(True) for name, value in state.items()}
    for batch in batches:
        found, labels = signals(student, batch["images"]), batch["labels"]
        leader, *peers = found["logits"]
        ramp = math.exp(-5 * (1 - min(batch["epoch"] / ramp_epochs, 1)) ** 2) if ramp_epochs else 1.0
        loss = ce_weight * F.cross_entropy(leader, labels)
        for z in found["logits"]:
            loss = loss + weight * F.cross_entropy(z, labels)
        queries = [h @ state["query.weight"].T for h in found["embedding"][1:]]
        keys = [h @ state["key.weight"].T for h in found["embedding"][1:]]
        assert queries[0].shape[1] == max(found["embedding"][1].shape[1] // reduction, 1)
        given = [z.detach() for z in peers] if detach == "logits" else peers
        taught = [(leader, sum(given) / len(given))]
        for query, own in zip(queries, peers):
            powers = [torch.exp((query * key).sum(1, keepdim=True)) for key in keys]
            taught.append((own, sum(power * z for power, z in zip(powers, given)) / sum(powers)))
        for own, target in taught:
            p, q = torch.softmax(target / temperature, 1), torch.softmax(own / temperature, 1)
            loss = loss + weight * ramp * temperature**2 * (p * torch.log(p / q)).sum() / len(labels)
        parameters = [*student.parameters(), *state.values()]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
