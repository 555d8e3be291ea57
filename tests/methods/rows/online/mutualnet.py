import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"detach": False}, {"temperature": 2.5}]
TRACES = [  # branches stand for the widths
    {"branching": {"kind": "split", "count": 4}},
    {"branching": {"kind": "split", "count": 2}, "options": {"temperature": 2.0, "detach": False}},
]


def inputs(seed, count=4):
    rng = np.random.default_rng(seed)
    return {"student_logits_branches": [rng.normal(size=(5, 4)) * 3 for _ in range(count)]}


def variants(seed):
    return [inputs(seed, 2), inputs(seed, 3)]


def wrong(inputs):
    first, *others = inputs["student_logits_branches"]
    return [{"student_logits_branches": b} for b in ([first], [first[:, :3], *others], [first[:2], *others])]


def log_softmax(z):
    total = math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - max(z) - total for v in z]


def reference(student_logits_branches, temperature=1.0, detach=True):
    values = []
    for n in range(len(student_logits_branches[0])):
        full, *narrower = [log_softmax(z[n] / temperature) for z in student_logits_branches]
        values.append(temperature**2 * sum(math.exp(a) * (a - b) for own in narrower for a, b in zip(full, own)))
    return np.array(values)


def closed_forms():
    odds, even = np.array([[math.log(3.0), 0.0]]), np.zeros((1, 2))
    nats = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    return [({"student_logits_branches": [odds, even, odds, even]}, {}, [2 * nats])]


def trace(student, state, batches, *, signals, sampler=None, lr, weight=1.0, ce_weight=1.0, temperature=1.0, detach=True):
    for batch in batches:
        (full, *narrower), labels = signals(student, batch["images"])["logits"], batch["labels"]
        p = torch.softmax((full.detach() if detach else full) / temperature, 1)
        loss = ce_weight * F.cross_entropy(full, labels)
        for z in narrower:
            q = torch.softmax(z / temperature, 1)
            loss = loss + weight * temperature**2 * (p * torch.log(p / q)).sum() / len(labels)
        parameters = list(student.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    return {f"student.{name}": value for name, value in student.state_dict().items()}
