import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 2.0}, {"mean": "logits"}, {"mean": "logits", "temperature": 3.0}]
TRACES = [{"peers": 2}, {"peers": 3, "options": {"temperature": 2.0}}, {"peers": 3, "options": {"mean": "logits"}}]


def inputs(seed, shape=(5, 4), peers=2):
    rng = np.random.default_rng(seed)
    others = [rng.normal(size=shape) * 3 for _ in range(peers)]
    return {"student_logits": rng.normal(size=shape) * 3, "peers_logits": others}


def variants(seed):
    return [inputs(seed, (3, 2, 4)), inputs(seed, peers=1), inputs(seed, (2, 3, 2, 4), peers=3)]


def wrong(inputs):
    first = inputs["peers_logits"][0]
    return [{**inputs, "peers_logits": [first, first[:, :1]]}, {**inputs, "peers_logits": [first, first[:1]]}]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def value(student, peers, mean, temperature):
    if student.ndim > 1:
        return sum(value(s, [p[i] for p in peers], mean, temperature) for i, s in enumerate(student)) / len(student)
    if mean == "probs":
        found = [softmax(p / temperature) for p in peers]
        q = [sum(f[k] for f in found) / len(found) for k in range(len(student))]
    else:
        q = softmax([sum(p[k] for p in peers) / len(peers) / temperature for k in range(len(student))])
    return -(temperature**2) * sum(a * math.log(b) for a, b in zip(q, softmax(student / temperature)))


def reference(student_logits, peers_logits, mean="probs", temperature=1.0):
    rows = range(len(student_logits))
    return np.array([value(student_logits[i], [p[i] for p in peers_logits], mean, temperature) for i in rows])


def closed_forms():
    leaning, even = np.array([[math.log(3.0), 0.0]]), np.zeros((1, 2))
    given = {"student_logits": leaning, "peers_logits": [even, leaning]}  # q = 5/8, 3/8
    probs = -0.625 * math.log(0.75) - 0.375 * math.log(0.25)
    root = math.sqrt(3.0)
    logits = -(root * math.log(0.75) + math.log(0.25)) / (1 + root)
    alone = {"student_logits": even, "peers_logits": [leaning]}
    return [(given, {}, [probs]), (given, {"mean": "logits"}, [logits]), (alone, {"temperature": 2.0}, [4 * math.log(2.0)])]


def trace(students, states, batches, *, signals, sampler=None, lr, weight=1.0, ce_weight=1.0, mean="probs", temperature=1.0):
    for batch in batches:
        labels, logits = batch["labels"], [signals(student, batch["images"])["logits"] for student in students]
        updates = []
        for own, student in enumerate(students):
            others = [z.detach() for i, z in enumerate(logits) if i != own]
            if mean == "probs":
                q = sum(torch.softmax(z / temperature, 1) for z in others) / len(others)
            else:
                q = torch.softmax(sum(others) / len(others) / temperature, 1)
            soft = -(q * torch.log(torch.softmax(logits[own] / temperature, 1))).sum() / len(labels)
            loss = ce_weight * F.cross_entropy(logits[own], labels) + weight * temperature**2 * soft
            parameters = list(student.parameters())
            updates += list(zip(parameters, torch.autograd.grad(loss, parameters)))
        with torch.no_grad():
            for parameter, gradient in updates:
                parameter -= lr * gradient
    return {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
