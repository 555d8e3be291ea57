import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"reduction": "sum"}]
TRACES = [
    {"teachers": 2},
    {"teachers": 3, "student_strides": (2, 2, 2), "options": {"reduction": "sum"}},  # the teachers' maps are pooled
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    shapes = ((3, 2, 4, 2), (3, 3, 2, 2))
    return {
        "student_features": [rng.normal(size=shape) for shape in shapes],
        "teachers_feature": [rng.normal(size=shape) for shape in shapes],
    }


def wrong(inputs):
    first, *others = inputs["student_features"]
    cuts = [first[:, :1], first[:, :, :1], first[..., :1], first[:1]]
    short = [{**inputs, "student_features": [cut, *others]} for cut in cuts]
    last = {name: [values[0], values[1][:1]] for name, values in inputs.items()}
    return [*short, {**inputs, "student_features": [first]}, last]


def unit(feature):
    values = [float(v) for v in feature.reshape(-1)]
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


def reference(student_features, teachers_feature, reduction="mean"):
    values = []
    for i in range(len(student_features[0])):
        value = 0.0
        for student, teacher in zip(student_features, teachers_feature):
            apart = [abs(s - t) for s, t in zip(unit(student[i]), unit(teacher[i]))]
            value += sum(apart) / (len(apart) if reduction == "mean" else 1)
        values.append(value)
    return np.array(values)


def closed_forms():
    student, teacher = np.array([3.0, 4.0]).reshape(1, 2, 1, 1), np.array([5.0, 0.0]).reshape(1, 2, 1, 1)
    given = {"student_features": [student, 2 * teacher], "teachers_feature": [teacher, teacher]}
    return [(given, {}, [0.6]), (given, {"reduction": "sum"}, [1.2])]


def trace(student, teachers, state, batches, *, signals, sampler=None, lr, weight=200.0, ce_weight=1.0, reduction="mean"):
    state = {name: value.clone() for name, value in state.items()}
    names = [name for name in state if name.endswith(("weight", "bias"))]
    for name in names:
        state[name].requires_grad_(True)
    for batch in batches:
        own = signals(student, batch["images"])
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        for m, teacher in enumerate(teachers):
            x, target = own["stages"][-1], signals(teacher, batch["images"])["stages"][-1].detach()
            if target.shape[2] > x.shape[2]:
                target = F.avg_pool2d(target, target.shape[2] // x.shape[2])
            for layer in (0, 3, 6):
                x = F.conv2d(x, state[f"translators.{m}.{layer}.weight"], padding=1)
                norm = f"translators.{m}.{layer + 1}"
                mean, count = x.mean((0, 2, 3)), x.numel() / x.shape[1]
                variance = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
                state[f"{norm}.running_mean"] = 0.9 * state[f"{norm}.running_mean"] + 0.1 * mean.detach()
                unbiased = variance.detach() * count / (count - 1)
                state[f"{norm}.running_var"] = 0.9 * state[f"{norm}.running_var"] + 0.1 * unbiased
                state[f"{norm}.num_batches_tracked"] = state[f"{norm}.num_batches_tracked"] + 1
                x = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
                x = state[f"{norm}.weight"][:, None, None] * x + state[f"{norm}.bias"][:, None, None]
                x = torch.where(x > 0, x, 0.1 * x)
            x, target = x.reshape(len(x), -1), target.reshape(len(x), -1)
            apart = x / torch.sqrt((x * x).sum(1, keepdim=True)) - target / torch.sqrt((target * target).sum(1, keepdim=True))
            each = apart.abs().mean(1) if reduction == "mean" else apart.abs().sum(1)
            loss = loss + weight * each.mean()
        parameters = [*student.parameters(), *(state[name] for name in names)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
