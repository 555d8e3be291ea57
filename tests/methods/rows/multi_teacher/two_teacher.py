import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0, "feature_weight": 2.0}]
TRACES = [
    {"teachers": 2, "options": {"feature_weight": 1.0}},
    {"teachers": 2, "student_strides": (1, 2, 1), "options": {"regressor": "conv", "temperature": 2.0, "feature_weight": 0.5}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=(3, 4)) * 3 for _ in range(3)]
    student, second = (rng.normal(size=(3, 2, 4, 2)) for _ in range(2))
    features = {"student_feature": student, "teachers_feature": [rng.normal(size=(3, 5, 2, 2)), second]}
    return {"student_logits": logits[0], "teachers_logits": logits[1:], **features}


def wrong(inputs):
    logits, features = inputs["teachers_logits"], inputs["teachers_feature"]
    return [
        {**inputs, "teachers_logits": [logits[0][:, :1], logits[1]]},
        {**inputs, "teachers_feature": features[::-1]},
        {**inputs, "teachers_feature": [features[0], features[1][:, :1]]},
        {**inputs, "teachers_logits": logits[:1]},
        {**inputs, "teachers_logits": logits[:1], "teachers_feature": features[1:]},
        {**inputs, "teachers_logits": [*logits, logits[0]], "teachers_feature": [*features, features[1]]},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, teachers_logits, student_feature, teachers_feature, temperature=4.0, feature_weight=100.0):
    response, feature = [], []
    for i in range(len(student_logits)):
        p, q = softmax(teachers_logits[0][i] / temperature), softmax(student_logits[i] / temperature)
        response.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q)))
        squares = [(s - t) ** 2 for s, t in zip(student_feature[i].reshape(-1), teachers_feature[1][i].reshape(-1))]
        feature.append(feature_weight * sum(squares) / len(squares))
    return {"response": np.array(response), "feature": np.array(feature)}


def closed_forms():
    odds, even = np.array([[math.log(3.0), 0.0]]), np.zeros((1, 2))
    far, one = np.full((1, 2, 1, 1), 3.0), np.ones((1, 2, 1, 1))
    nats = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    given = {"student_logits": even, "teachers_logits": [odds, 7 * odds], "student_feature": far}
    return [
        ({**given, "teachers_feature": [9 * one, one]}, {"temperature": 1.0}, {"response": [nats], "feature": [400.0]}),
        ({**given, "teachers_logits": [even, odds], "teachers_feature": [one, far]}, {}, {"response": [0.0], "feature": [0.0]}),
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
    ce_weight=1.0,
    temperature=4.0,
    feature_weight=100.0,
    regressor="conv_bn_relu",
):
    names = ["conv.weight", "conv.bias", *(["norm.weight", "norm.bias"] if regressor == "conv_bn_relu" else [])]
    state = {name.removeprefix("regressor."): value.clone() for name, value in state.items()}
    for name in names:
        state[name].requires_grad_(True)
    for batch in batches:
        own = signals(student, batch["images"])
        first, second = (signals(teacher, batch["images"]) for teacher in teachers)
        x, target = own["stages"][-1], second["stages"][-1].detach()
        stride = 2 if x.shape[2] == 2 * target.shape[2] else 1
        x = F.conv2d(x, state["conv.weight"], state["conv.bias"], stride=stride, padding=stride - 1)
        if regressor == "conv_bn_relu":
            mean, count = x.mean((0, 2, 3)), x.numel() / x.shape[1]
            variance = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
            state["norm.running_mean"] = 0.9 * state["norm.running_mean"] + 0.1 * mean.detach()
            state["norm.running_var"] = 0.9 * state["norm.running_var"] + 0.1 * variance.detach() * count / (count - 1)
            state["norm.num_batches_tracked"] = state["norm.num_batches_tracked"] + 1
            x = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
            x = torch.relu(state["norm.weight"][:, None, None] * x + state["norm.bias"][:, None, None])
        p = torch.softmax(first["logits"].detach() / temperature, 1)
        q = torch.softmax(own["logits"] / temperature, 1)
        response = temperature**2 * (p * torch.log(p / q)).sum(1).mean()
        feature = feature_weight * ((x - target) ** 2).mean()
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"]) + weight * (response + feature)
        parameters = [*student.parameters(), *(state[name] for name in names)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.regressor.{name}": value.detach() for name, value in state.items()}
