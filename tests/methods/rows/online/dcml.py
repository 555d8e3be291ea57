import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 3.0}, {"pairs": "same_stage"}, {"pairs": "cross_stage", "temperature": 2.0}]
LABELLED = {"ce"}
TRACES = [
    {"peers": 2, "branching": {"kind": "exits", "at": "hidden"}},
    {"peers": 2, "branching": {"kind": "exits", "at": "hidden"}, "options": {"pairs": "same_stage", "temperature": 2.0}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {
        "student_logits_branches": [rng.normal(size=(6, 5)) * 3 for _ in range(3)],
        "peer_logits_branches": [rng.normal(size=(6, 5)) * 3 for _ in range(3)],
        "labels": rng.integers(5, size=6),
    }


def variants(seed):
    return [{name: value[:2] if isinstance(value, list) else value for name, value in inputs(seed).items()}]


def wrong(inputs):
    student, peer = inputs["student_logits_branches"], inputs["peer_logits_branches"]
    return [
        {**inputs, "student_logits_branches": student[:1]},
        {**inputs, "peer_logits_branches": peer[:1]},
        {**inputs, "student_logits_branches": [student[0], student[1][:, :2]]},
        {**inputs, "peer_logits_branches": [peer[0], peer[1][:3]]},
    ]


def log_softmax(z):
    top = max(z)
    total = math.log(sum(math.exp(v - top) for v in z))
    return [v - top - total for v in z]


def reference(student_logits_branches, peer_logits_branches, labels, pairs="all", temperature=1.0):
    found = {"ce": np.zeros(len(labels))}
    for n, label in enumerate(labels):
        for z in student_logits_branches[1:]:
            found["ce"][n] -= log_softmax(z[n])[label]
        for j, z in enumerate(student_logits_branches):
            for i, p in enumerate(peer_logits_branches):
                term = "same" if i == j else "cross"
                if pairs in ("all", term + "_stage"):
                    own, theirs = log_softmax(z[n] / temperature), log_softmax(p[n] / temperature)
                    values = found.setdefault(term, np.zeros(len(labels)))
                    values[n] += temperature**2 * sum(math.exp(b) * (b - a) for a, b in zip(own, theirs))
    return found


def closed_forms():
    flat, leaning = np.zeros((1, 2)), np.array([[math.log(3.0), 0.0]])
    given = {"student_logits_branches": [leaning, flat], "peer_logits_branches": [flat, flat], "labels": np.array([1])}
    nats = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    three = {**given, "peer_logits_branches": [flat, flat, flat]}  # another number of stages
    return [
        (given, {}, {"ce": [math.log(2.0)], "same": [nats], "cross": [nats]}),
        (given, {"pairs": "same_stage"}, {"ce": [math.log(2.0)], "same": [nats]}),
        (three, {}, {"ce": [math.log(2.0)], "same": [nats], "cross": [2 * nats]}),
    ]


def trace(
    students,
    states,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=1.0,
    pairs="all",
    temperature=1.0,
):
    for batch in batches:
        labels, heads = batch["labels"], [signals(student, batch["images"])["logits"] for student in students]
        updates = []
        for own, student in enumerate(students):
            loss, (peer,) = ce_weight * F.cross_entropy(heads[own][0], labels), [n for n in range(len(students)) if n != own]
            for j, z in enumerate(heads[own]):
                if j:
                    loss = loss + weight * F.cross_entropy(z, labels)
                for i, target in enumerate(heads[peer]):
                    if pairs == "all" or (pairs == "same_stage") == (i == j):
                        p = torch.softmax(target.detach() / temperature, 1)
                        q = torch.softmax(z / temperature, 1)
                        loss = loss + weight * temperature**2 * (p * torch.log(p / q)).sum() / len(labels)
            parameters = list(student.parameters())
            updates += list(zip(parameters, torch.autograd.grad(loss, parameters)))
        with torch.no_grad():
            for parameter, gradient in updates:
                parameter -= lr * gradient
    return {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
