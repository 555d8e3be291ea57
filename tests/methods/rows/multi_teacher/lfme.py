import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0, "curriculum_epochs": 5}, {"curriculum_epochs": 0}]
TRACES = [
    {"teachers": 2, "label_maps": [(2, 0), (1, 2)], "steps_per_epoch": 1, "options": {"curriculum_epochs": 4}},
    {"teachers": 3, "label_maps": [(0, 1), (1,), (1, 2)], "steps_per_epoch": 2, "options": {"threshold": 0.9}},
    {"teachers": 2, "steps_per_epoch": 1, "options": {"threshold": 0.0, "temperature": 1.0, "curriculum_epochs": 1}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    classes = [np.array([4, 0, 2]), np.array([2, 1])]  # 2 has two experts, 3 none
    return {
        "student_logits": rng.normal(size=(6, 5)) * 3,
        "teachers_logits": [rng.normal(size=(6, len(c))) * 3 for c in classes],
        "teachers_classes": classes,
        "labels": np.array([2, 3, 0, 1, 4, 2]),
        "expert_weights": rng.uniform(0.1, 1.0, size=2),
        "epoch": 2,
    }


def variants(seed):
    return [{**inputs(seed), "epoch": 0}]


def wrong(inputs):
    logits, classes = inputs["teachers_logits"], inputs["teachers_classes"]
    return [
        {**inputs, "teachers_logits": logits[::-1]},
        {**inputs, "teachers_classes": [classes[0], classes[1][:1]]},
        {**inputs, "teachers_logits": [logits[0], logits[1][:1]]},
        {**inputs, "teachers_classes": classes[:1]},
        {**inputs, "expert_weights": np.ones(3)},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(
    student_logits,
    teachers_logits,
    teachers_classes,
    labels,
    expert_weights,
    epoch,
    temperature=2.0,
    curriculum_epochs=45,
):
    ce, kd = [], []
    for i, label in enumerate(labels):
        given = []
        for logits, classes in zip(teachers_logits, teachers_classes):
            given += [p for c, p in zip(classes, softmax(logits[i])) if c == label]
        first = sum(given) / len(given) if given else 1.0
        share = 1.0 if epoch >= curriculum_epochs else epoch / curriculum_epochs
        ce.append(-((1 - share) * first + share) * math.log(softmax(student_logits[i])[label]))
        value = 0.0
        for w, logits, classes in zip(expert_weights, teachers_logits, teachers_classes):
            p = softmax(logits[i] / temperature)
            q = softmax([student_logits[i][c] / temperature for c in classes])
            value += w * temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
        kd.append(value)
    return {"ce": np.array(ce), "kd": np.array(kd)}


def closed_forms():
    student = np.array([[0.0, math.log(3.0), 0.0, 50.0]])
    given = {"student_logits": student, "teachers_logits": [np.zeros((1, 2))], "teachers_classes": [np.array([1, 0])]}
    given |= {"labels": np.array([1]), "expert_weights": np.array([0.5]), "epoch": 10}
    cross_entropy = math.log(5 + math.exp(50.0)) - math.log(3.0)
    nats = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    half = {"temperature": 1.0, "curriculum_epochs": 20}
    return [
        (given, half, {"ce": [0.75 * cross_entropy], "kd": [0.5 * nats]}),
        (given, {"temperature": 1.0, "curriculum_epochs": 10}, {"ce": [cross_entropy], "kd": [0.5 * nats]}),
    ]


def trace(
    student,
    teachers,
    state,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=0.0,
    temperature=2.0,
    curriculum_epochs=45,
    threshold=0.3,
):
    weights, tallies, before = [1.0] * len(teachers), [[0, 0, 0] for _ in teachers], 0
    for batch in batches:
        if batch["epoch"] != before:
            for m, (right, expert_right, seen) in enumerate(tallies):
                if seen:
                    own, expert = right / seen, expert_right / seen
                    gap = (expert - own) / (expert * (1 - threshold)) if expert else 0.0
                    weights[m] = 1.0 if own < threshold * expert else min(max(gap, 0.0), 1.0)
            tallies, before = [[0, 0, 0] for _ in teachers], batch["epoch"]
        z, labels, loss = signals(student, batch["images"])["logits"], batch["labels"], 0.0
        share = min(batch["epoch"] / curriculum_epochs, 1.0)
        for i in range(len(labels)):
            known = []
            for m, (teacher, classes) in enumerate(zip(teachers, batch["teachers_classes"])):
                expert = signals(teacher, batch["images"])["logits"][i].detach()
                p, q = torch.softmax(expert / temperature, 0), torch.softmax(z[i, classes] / temperature, 0)
                loss = loss + weight * weights[m] * temperature**2 * (p * torch.log(p / q)).sum() / len(labels)
                if labels[i] in classes:
                    place = classes.tolist().index(int(labels[i]))
                    known.append(torch.softmax(expert, 0)[place])
                    tallies[m][0] += int(z[i].argmax() == labels[i])
                    tallies[m][1] += int(expert.argmax() == place)
                    tallies[m][2] += 1
            first = sum(known) / len(known) if known else 1.0
            plain = F.cross_entropy(z[i], labels[i])
            loss = loss + (weight * ((1 - share) * first + share) + ce_weight) * plain / len(labels)
        parameters = list(student.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    tallies = torch.tensor(tallies)
    weights = torch.tensor(weights, dtype=torch.float64)
    return final | {"module.expert_weights": weights, "module.right": tallies[:, :2].T, "module.seen": tallies[:, 2]}
