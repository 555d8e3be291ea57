import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0}, {"temperature": 5.0}]
LABELLED = {"ce", "joint_ce"}
BRANCHING = {"kind": "exits", "at": "stages", "classes": 4}
TRACES = [{"peers": 2, "branching": BRANCHING}, {"peers": 2, "branching": BRANCHING, "options": {"temperature": 1.0}}]


def inputs(seed):
    rng = np.random.default_rng(seed)

    def heads():
        return [rng.normal(size=(5, 4, outputs)) * 3 for outputs in (3, 12, 12)]

    return {
        "student_logits_branches_rotations": heads(),
        "peer_logits_branches_rotations": heads(),
        "labels": rng.integers(3, size=5),
    }


def wrong(inputs):
    own, theirs = inputs["student_logits_branches_rotations"], inputs["peer_logits_branches_rotations"]
    both = ("student_logits_branches_rotations", "peer_logits_branches_rotations")
    return [
        {**inputs, both[0]: own[:2]},
        {**inputs, both[0]: own[:1], both[1]: theirs[:1]},
        {**inputs, both[0]: [z[:, :3] for z in own], both[1]: [z[:, :3] for z in theirs]},
        {**inputs, both[0]: [own[0], own[0]], both[1]: [theirs[0], theirs[0]]},
    ]


def log_softmax(z):
    top = max(z)
    total = math.log(sum(math.exp(v - top) for v in z))
    return [v - top - total for v in z]


def divergence(theirs, own, temperature):
    p, q = log_softmax(theirs / temperature), log_softmax(own / temperature)
    return temperature**2 * sum(math.exp(a) * (a - b) for a, b in zip(p, q))


def reference(student_logits_branches_rotations, peer_logits_branches_rotations, labels, temperature=3.0):
    own, theirs = student_logits_branches_rotations, peer_logits_branches_rotations
    found = {name: np.zeros(len(labels)) for name in ("ce", "joint_ce", "kl", "joint_kl")}
    for n, label in enumerate(labels):
        found["ce"][n] = -log_softmax(own[0][n, 0])[label]
        for j in range(4):
            found["kl"][n] += divergence(theirs[0][n, j], own[0][n, j], temperature) / 4
            for head in range(1, len(own)):
                found["joint_ce"][n] -= log_softmax(own[head][n, j])[4 * label + j] / 4
                found["joint_kl"][n] += divergence(theirs[head][n, j], own[head][n, j], temperature) / 4
    return found


def closed_forms():
    flat, joint = np.zeros((1, 4, 2)), np.zeros((1, 4, 8))
    leaning, right = flat.copy(), joint.copy()
    leaning[0, 2] = [math.log(3.0), 0.0]  # one of four rotations
    for j in range(4):
        right[0, j, 4 + j] = math.log(7.0)  # class 1 at rotation j: half of the probability
    given = {"student_logits_branches_rotations": [leaning, right, joint], "labels": np.array([1])}
    given["peer_logits_branches_rotations"] = [flat, right, right]
    nats = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    half = 0.5 * math.log(0.5 * 8) + 0.5 * math.log(8 / 14)
    values = {"ce": [math.log(2.0)], "joint_ce": [math.log(2.0) + math.log(8.0)], "kl": [nats / 4], "joint_kl": [half]}
    return [(given, {"temperature": 1.0}, values)]


def trace(students, states, batches, *, signals, sampler=None, lr, weight=1.0, ce_weight=0.0, temperature=3.0):
    for batch in batches:
        labels, count, heads = batch["labels"], len(batch["labels"]), []
        for student in students:
            turned = [signals(student, torch.rot90(batch["images"], j, (2, 3)))["logits"] for j in range(4)]
            heads.append(list(zip(*turned)))  # a head: its logits at each rotation
        updates = []
        for own, student in enumerate(students):
            (peer,) = [n for n in range(len(students)) if n != own]
            loss = (weight + ce_weight) * F.cross_entropy(heads[own][0][0], labels)
            for number, (z, target) in enumerate(zip(heads[own], heads[peer])):
                for j in range(4):
                    if number:
                        loss = loss + weight * F.cross_entropy(z[j], 4 * labels + j) / 4
                    p, q = (torch.softmax(v / temperature, 1) for v in (target[j].detach(), z[j]))
                    loss = loss + weight * temperature**2 * (p * torch.log(p / q)).sum() / (4 * count)
            parameters = list(student.parameters())
            updates += list(zip(parameters, torch.autograd.grad(loss, parameters)))
        with torch.no_grad():
            for parameter, gradient in updates:
                parameter -= lr * gradient
    return {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
