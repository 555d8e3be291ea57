import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"targets": "l2", "lam": 0.5}, {"temperature": 2.5}]
RIVALS = [(2, 0), (0, 2), (1, 2)]  # the first two compete for all, the third for class 2
ADAPTERS = [f"teacher_adapters.{m}.{layer}.0.weight" for m in range(3) for layer in range(3)]
TRACES = [
    {"teachers": 2, "label_maps": [(1, 0), (2, 1)], "options": {"common_channels": 4}},  # each knows a class alone
    {"teachers": 3, "label_maps": RIVALS, "options": {"common_channels": 4}, "still": ADAPTERS},  # a loser may learn nothing
    {
        "teachers": 2,
        "label_maps": [(0, 2), (1, 2)],
        "student_strides": (2, 2, 1),
        "options": {"common_channels": 3, "targets": "l2", "lam": 2.0},
    },
    {
        "teachers": 2,
        "teacher_strides": (2, 1, 1),
        "options": {"common_channels": 3, "trained_adapters": "student", "known": ((2, 1), ()), "temperature": 2.0},
        "still": ADAPTERS,
    },
]


def inputs(seed, b=6):
    rng = np.random.default_rng(seed)
    classes = [np.array([3, 1]), np.array([0, 1, 2]), np.array([1, 3])]
    shapes = [(2, 2, 1), (3, 1, 2)]
    return {
        "student_logits": rng.normal(size=(b, 4)),
        "student_commons": [rng.normal(size=(b, *shape)) for shape in shapes],
        "teachers_logits": [rng.normal(size=(b, len(own))) * 2 for own in classes],
        "teachers_classes": classes,
        "teachers_commons": [[rng.normal(size=(b, *shape)) for shape in shapes] for _ in classes],
    }


def wrong(inputs):
    logits, commons = inputs["teachers_logits"], inputs["teachers_commons"]
    return [
        {**inputs, "teachers_logits": logits[:2]},
        {**inputs, "teachers_logits": [logits[1], logits[0], logits[2]]},
        {**inputs, "teachers_commons": commons[:1]},
        {**inputs, "teachers_commons": [one[:1] for one in commons]},
        {**inputs, "teachers_commons": [one[::-1] for one in commons]},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def doubt(z):
    return -sum(p * math.log(p) for p in softmax(z)) / math.log(len(z))


def reference(
    student_logits,
    student_commons,
    teachers_logits,
    teachers_classes,
    teachers_commons,
    lam=1.0,
    targets="soft",
    temperature=1.0,
):
    count, outputs, features = len(teachers_logits), [], []
    for i, z in enumerate(student_logits):
        doubts = [doubt(logits[i]) for logits in teachers_logits]
        output = feature = 0.0
        for m, classes in enumerate(teachers_classes):
            led = 0
            for k in classes:
                rivals = [n for n in range(count) if k in teachers_classes[n]]
                led += min(rivals, key=lambda n: doubts[n]) == m
            share, scores = led / len(classes), teachers_logits[m][i]
            if targets == "l2":
                output += share * sum((z[k] - s) ** 2 for k, s in zip(classes, scores)) / len(classes)
            else:
                p, q = softmax(scores / temperature), softmax(z[classes] / temperature)
                output += share * temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
            for own, theirs in zip(student_commons, teachers_commons[m]):
                squares = [(a - b) ** 2 for a, b in zip(own[i].reshape(-1), theirs[i].reshape(-1))]
                feature += share * lam * sum(squares) / len(squares)
        outputs.append(output)
        features.append(feature)
    return {"output": np.array(outputs), "feature": np.array(features)}


def closed_forms():
    space = np.ones((1, 1, 1, 2))
    sure, unsure = np.array([[0.0, 8.0]]), np.array([[0.0, math.log(3.0)]])
    rivals = {
        "student_logits": np.array([[0.0, 0.0, 0.0]]),
        "student_commons": [space],
        "teachers_logits": [unsure, sure, unsure],
        "teachers_classes": [np.array([0, 1]), np.array([1, 0]), np.array([1, 2])],
        "teachers_commons": [[7 * space], [space], [3 * space]],
    }  # the second leads at classes 0 and 1, the third at 2: shares 0, 1, 1/2
    expected = {"output": [64 / 2 + math.log(3.0) ** 2 / 4], "feature": [0.5 * 4.0]}
    return [(rivals, {"targets": "l2"}, expected)]


def trace(
    student,
    teacher,
    state,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=0.0,
    common_channels=128,
    trained_adapters="both",
    known=(),
    lam=1.0,
    targets="soft",
    temperature=1.0,
):
    state = {name: value.clone() for name, value in state.items()}
    trained = [name for name in state if name.startswith("student") or trained_adapters == "both"]
    for name in trained:
        state[name].requires_grad_(True)
    for batch in batches:
        own, theirs = signals(student, batch["images"]), [signals(one, batch["images"]) for one in teacher]
        classes = [c.tolist() for c in batch["teachers_classes"]]
        scores = [one["logits"].detach() for one in theirs]
        for m, asked in enumerate(known):
            if asked:
                places = [j for j, k in enumerate(classes[m]) if k in asked]
                scores[m], classes[m] = scores[m][:, places], [classes[m][j] for j in places]
        p = [torch.softmax(z, 1) for z in scores]
        doubts = torch.stack([-(q * q.log()).sum(1) / math.log(q.shape[1]) for q in p])
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        for m, one in enumerate(theirs):
            for i in range(len(batch["labels"])):
                led = [all(doubts[m, i] <= doubts[n, i] for n in range(len(theirs)) if k in classes[n]) for k in classes[m]]
                share = sum(led) / len(led)
                z_s, z_t = own["logits"][i, classes[m]], scores[m][i]
                if targets == "l2":
                    value = ((z_s - z_t) ** 2).mean()
                else:
                    a, b = torch.softmax(z_t / temperature, 0), torch.softmax(z_s / temperature, 0)
                    value = temperature**2 * (a * (a / b).log()).sum()
                for layer in range(3):
                    maps = [own["stages"][layer], *(other["stages"][layer] for other in theirs)]
                    size = min(x.shape[2] for x in maps)
                    x, y = own["stages"][layer][i], one["stages"][layer][i].detach()
                    x, y = F.avg_pool2d(x, x.shape[1] // size), F.avg_pool2d(y, y.shape[1] // size)
                    assert state[f"student_adapters.{layer}.0.weight"].shape[0] == common_channels
                    x = torch.einsum("oc,chw->ohw", state[f"student_adapters.{layer}.0.weight"][:, :, 0, 0], x)
                    y = torch.einsum("oc,chw->ohw", state[f"teacher_adapters.{m}.{layer}.0.weight"][:, :, 0, 0], y)
                    value = value + lam * ((x - y) ** 2).mean()
                loss = loss + weight * share * value / len(batch["labels"])
        parameters = [*student.parameters(), *(state[name] for name in trained)]
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
