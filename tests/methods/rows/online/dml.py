import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 3.0}, {"symmetric": True}, {"symmetric": True, "temperature": 0.5}]
TRACES = [{"peers": 2}, {"peers": 3, "options": {"temperature": 3.0}}, {"peers": 2, "options": {"symmetric": True}}]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "peer_logits": rng.normal(size=shape) * 3}


def variants(seed):
    return [inputs(seed, (3, 2, 4)), inputs(seed, (2, 3, 2, 4))]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def divergence(student, peer, temperature, symmetric):
    if student.ndim > 1:
        return sum(divergence(s, p, temperature, symmetric) for s, p in zip(student, peer)) / len(student)
    p, q = softmax(peer / temperature), softmax(student / temperature)
    value = sum(a * math.log(a / b) for a, b in zip(p, q))
    if symmetric:
        value = (value + sum(b * math.log(b / a) for a, b in zip(p, q))) / 2
    return temperature**2 * value


def reference(student_logits, peer_logits, temperature=1.0, symmetric=False):
    return np.array([divergence(s, p, temperature, symmetric) for s, p in zip(student_logits, peer_logits)])


def closed_forms():
    odds = {"student_logits": np.zeros((1, 2)), "peer_logits": np.array([[math.log(3.0), 0.0]])}
    there = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    back = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    hot = {"student_logits": np.zeros((1, 2)), "peer_logits": np.array([[2 * math.log(3.0), 0.0]])}
    return [(odds, {}, [there]), (odds, {"symmetric": True}, [(there + back) / 2]), (hot, {"temperature": 2.0}, [4 * there])]


def trace(students, states, batches, *, signals, sampler=None, lr, weight=1.0, ce_weight=1.0, temperature=1.0, symmetric=False):
    for batch in batches:
        labels, logits = batch["labels"], [signals(student, batch["images"])["logits"] for student in students]
        updates = []
        for own, student in enumerate(students):
            loss = ce_weight * F.cross_entropy(logits[own], labels)
            for other in range(len(students)):
                if other == own:
                    continue
                p = torch.softmax(logits[other].detach() / temperature, 1)
                q = torch.softmax(logits[own] / temperature, 1)
                apart = p * torch.log(p / q)
                if symmetric:
                    apart = (apart + q * torch.log(q / p)) / 2
                loss = loss + weight / (len(students) - 1) * temperature**2 * apart.sum() / len(labels)
            parameters = list(student.parameters())
            updates += list(zip(parameters, torch.autograd.grad(loss, parameters)))
        with torch.no_grad():
            for parameter, gradient in updates:
                parameter -= lr * gradient
    return {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
