import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"target": "naive"}, {"target": "linear"}, {"target": "general"}, {"temperature": 1.0}]
TRACES = [
    {"peers": 2},
    {"peers": 3, "options": {"target": "general"}, "steps_per_epoch": 1},
    {"peers": 2, "options": {"target": "general", "temperature": 1.0}, "steps_per_epoch": 2},
    {"peers": 3, "options": {"target": "naive"}},
    {"peers": 2, "options": {"target": "linear", "temperature": 4.0}},
]


def inputs(seed, peers=2):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 1.0, size=peers + 1)
    return {
        "student_logits": rng.normal(size=(5, 4)) * 3,
        "peers_logits": [rng.normal(size=(5, 4)) * 3 for _ in range(peers)],
        "labels": rng.integers(4, size=5),
        "network_weights": weights / weights.sum(),
    }


def variants(seed):
    return [inputs(seed, 1)]


def wrong(inputs):
    peers, weights = inputs["peers_logits"], inputs["network_weights"]
    return [
        {**inputs, "network_weights": weights[:-1]},
        {**inputs, "peers_logits": peers[:-1]},
        {**inputs, "peers_logits": [], "network_weights": weights[:1]},
        {**inputs, "peers_logits": [peers[0][:, :2], *peers[1:]]},
        {**inputs, "peers_logits": [peers[0][:2], *peers[1:]]},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def convex(networks, label):
    """Weights of least cross-entropy by bisection within bisection: each network's slope against the best of those after it."""
    above = [[v - z[label] for v in z] for z in networks]

    def slopes(weights):
        p = softmax([sum(w * z[k] for w, z in zip(weights, above)) for k in range(len(above[0]))])
        return [sum(a * b for a, b in zip(p, z)) for z in above]

    def completed(weights):
        left = 1 - sum(weights)
        if len(weights) == len(networks) - 1:
            return [*weights, left]
        low, high, k = 0.0, left, len(weights)
        for _ in range(55):
            middle = (low + high) / 2
            slope = slopes(completed([*weights, middle]))
            low, high = (low, middle) if slope[k] > min(slope[k + 1 :]) else (middle, high)
        return completed([*weights, (low + high) / 2])

    return completed([])


def aim(networks, label, weights, target):
    classes = range(len(networks[0]))
    if target == "naive":
        return max(networks, key=lambda z: softmax(z)[label])
    if target == "minlogit":
        return [min(z[k] - z[label] for z in networks) for k in classes]
    if target == "linear":
        weights = convex(networks, label)
    return [sum(w * z[k] for w, z in zip(weights, networks)) for k in classes]


def reference(student_logits, peers_logits, labels, network_weights, target="minlogit", temperature=2.0):
    values = []
    for n, label in enumerate(labels):
        networks = [[float(v) for v in z[n]] for z in (student_logits, *peers_logits)]
        p = softmax([v / temperature for v in aim(networks, label, network_weights, target)])
        q = softmax([v / temperature for v in networks[0]])
        values.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q)))
    return np.array(values)


def closed_forms():
    even, leaning = np.zeros((2, 2)), np.array([[math.log(3.0), 0.0]] * 2)
    given = {"student_logits": even, "peers_logits": [leaning], "labels": np.array([0, 1]), "network_weights": np.full(2, 0.5)}
    nats = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    cases = [(given, {"target": target, "temperature": 1.0}, [nats, 0.0]) for target in ("naive", "minlogit", "linear")]
    p = math.sqrt(3.0) / (1 + math.sqrt(3.0))
    mixed = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    first = {"student_logits": np.zeros((1, 3)), "labels": np.array([0]), "network_weights": np.full(3, 1 / 3)}
    first["peers_logits"] = [np.array([[0.0, 0.0, -math.log(2.0)]]), np.array([[0.0, -math.log(2.0), 0.0]])]
    halves = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)  # each network lowers another class
    return [*cases, (given, {"target": "general", "temperature": 1.0}, [mixed] * 2), (first, {"temperature": 1.0}, [halves])]


def trace(
    students, states, batches, *, signals, sampler=None, lr, weight=1.0, ce_weight=1.0, target="minlogit", temperature=2.0
):
    count, epoch = len(students), 0
    weights = [state["network_weights"].tolist() for state in states]
    errors, seen = [torch.zeros(count, count, dtype=torch.float64) for _ in students], 0
    for batch in batches:
        labels, logits = batch["labels"], [signals(student, batch["images"])["logits"] for student in students]
        if batch["epoch"] != epoch:
            for own in range(count):
                if seen:
                    found = torch.linalg.solve(errors[own] / seen, torch.ones(count, dtype=torch.float64)).clamp(min=0)
                    weights[own] = (found / found.sum()).tolist()
                errors[own] = torch.zeros(count, count, dtype=torch.float64)
            seen, epoch = 0, batch["epoch"]
        updates = []
        for own, student in enumerate(students):
            order = [own, *(i for i in range(count) if i != own)]
            loss = ce_weight * F.cross_entropy(logits[own], labels)
            for n, label in enumerate(labels.tolist()):
                networks = [logits[i][n].tolist() for i in order]
                aimed = torch.tensor(aim(networks, label, weights[own], target), dtype=torch.float64)
                p, q = torch.softmax(aimed / temperature, 0), torch.softmax(logits[own][n] / temperature, 0)
                loss = loss + weight * temperature**2 * (p * torch.log(p / q)).sum() / len(labels)
                wrongs = [torch.softmax(logits[i][n].detach(), 0) - F.one_hot(labels[n], logits[i].shape[1]) for i in order]
                if target == "general":
                    errors[own] += torch.stack([torch.stack([(a * b).sum() for b in wrongs]) for a in wrongs])
            parameters = list(student.parameters())
            updates += list(zip(parameters, torch.autograd.grad(loss, parameters)))
        seen += len(labels) if target == "general" else 0
        with torch.no_grad():
            for parameter, gradient in updates:
                parameter -= lr * gradient
    final = {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
    for i in range(count):
        final[f"{i}.module.network_weights"] = torch.tensor(weights[i], dtype=torch.float64)
        final |= {f"{i}.module.errors": errors[i], f"{i}.module.seen": torch.tensor(seen)}
    return final
