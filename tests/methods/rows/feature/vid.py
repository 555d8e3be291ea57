import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = []
TRACES = [
    {"student_strides": (1, 2, 2), "teacher_strides": (1, 2, 2)},
    {"student_strides": (1, 2, 2), "teacher_strides": (2, 1, 2)},  # maps of other sizes are pooled
    {"student_strides": (2, 2, 1), "teacher_strides": (1, 2, 2), "options": {"initial_variance": 2.0}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    shapes = ((3, 2, 4, 2), (3, 3, 2, 2))
    return {
        "student_means": [rng.normal(size=shape) for shape in shapes],
        "teacher_features": [rng.normal(size=shape) for shape in shapes],
        "variances": [rng.uniform(0.2, 5.0, size=shape[1]) for shape in shapes],
    }


def wrong(inputs):
    first, *others = inputs["student_means"]
    cuts = [first[:, :1], first[:, :, :1], first[..., :1], first[:1]]
    return [{**inputs, "student_means": [cut, *others]} for cut in cuts] + [
        {**inputs, "student_means": [first]},
        {**inputs, "variances": [v[:1] for v in inputs["variances"]]},
    ]


def reference(student_means, teacher_features, variances):
    values = []
    for i in range(len(student_means[0])):
        value = 0.0
        for mean, feature, variance in zip(student_means, teacher_features, variances):
            terms = []
            for c in range(mean.shape[1]):
                for m, f in zip(mean[i, c].reshape(-1), feature[i, c].reshape(-1)):
                    terms.append(0.5 * ((f - m) ** 2 / variance[c] + math.log(variance[c])))
            value += sum(terms) / len(terms)
        values.append(value)
    return np.array(values)


def closed_forms():
    zeros, threes = np.zeros((1, 2, 1, 1)), np.full((1, 2, 1, 1), 3.0)
    exact = {"student_means": [threes], "teacher_features": [threes], "variances": [np.array([1.0, math.e])]}
    apart = {"student_means": [zeros], "teacher_features": [threes], "variances": [np.ones(2)]}
    return [(exact, {}, [0.25]), (apart, {}, [4.5])]


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
    ce_weight=1.0,
    initial_variance=5.0,
    minimum_variance=1e-5,
):
    state = {name: value.clone().requires_grad_(True) for name, value in state.items()}
    for name, value in state.items():  # every variance starts where the paper's code starts it
        if name.startswith("scales"):
            torch.testing.assert_close(torch.log1p(value.exp()) + minimum_variance, torch.full_like(value, initial_variance))
    for batch in batches:
        own, theirs = signals(student, batch["images"]), signals(teacher, batch["images"])
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        for i, (x, target) in enumerate(zip(own["stages"], theirs["stages"])):
            target = target.detach()
            if x.shape[2] > target.shape[2]:
                x = F.avg_pool2d(x, x.shape[2] // target.shape[2])
            elif x.shape[2] < target.shape[2]:
                target = F.avg_pool2d(target, target.shape[2] // x.shape[2])
            for j in (0, 2, 4):
                x = torch.einsum("oc,bchw->bohw", state[f"regressors.{i}.{j}.weight"][:, :, 0, 0], x)
                x = torch.relu(x) if j < 4 else x
            variance = (torch.log1p(state[f"scales.{i}"].exp()) + minimum_variance)[None, :, None, None]
            loss = loss + weight * 0.5 * ((target - x) ** 2 / variance + torch.log(variance)).mean()
        parameters = [*student.parameters(), *state.values()]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
