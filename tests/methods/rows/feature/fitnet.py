import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = []
TRACES = [
    {"student_strides": (1, 2, 2), "teacher_strides": (1, 2, 2)},  # equal maps
    {"student_strides": (1, 2, 2), "teacher_strides": (2, 2, 1)},  # student twice as large
    {"student_strides": (2, 2, 1), "teacher_strides": (1, 2, 2)},  # student half as large
    {"student_strides": (1, 2, 2), "teacher_strides": (1, 2, 2), "options": {"regressor": "conv"}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {"student_feature": rng.normal(size=(3, 2, 4, 2)), "teacher_feature": rng.normal(size=(3, 2, 4, 2))}


def reference(student_feature, teacher_feature):
    values = []
    for student, teacher in zip(student_feature, teacher_feature):
        squares = [(s - t) ** 2 for s, t in zip(student.reshape(-1), teacher.reshape(-1))]
        values.append(sum(squares) / len(squares))
    return np.array(values)


def closed_forms():
    features = {"student_feature": np.full((2, 2, 1, 1), 3.0), "teacher_feature": np.ones((2, 2, 1, 1))}
    return [(features, {}, [4.0, 4.0])]


def trace(
    student, teacher, state, batches, *, signals, sampler=None, lr, weight=100.0, ce_weight=1.0, regressor="conv_bn_relu"
):
    names = ["conv.weight", "conv.bias", *(["norm.weight", "norm.bias"] if regressor == "conv_bn_relu" else [])]
    state = {name.removeprefix("regressor."): value.clone() for name, value in state.items()}
    for name in names:
        state[name].requires_grad_(True)
    for batch in batches:
        own, theirs = signals(student, batch["images"]), signals(teacher, batch["images"])
        x, target = own["stages"][1], theirs["stages"][1].detach()
        if x.shape[2] == 2 * target.shape[2]:
            x = F.conv2d(x, state["conv.weight"], state["conv.bias"], stride=2, padding=1)
        elif 2 * x.shape[2] == target.shape[2]:
            x = F.conv_transpose2d(x, state["conv.weight"], state["conv.bias"], stride=2, padding=1)
        else:
            x = F.conv2d(x, state["conv.weight"], state["conv.bias"])
        if regressor == "conv_bn_relu":
            mean, count = x.mean((0, 2, 3)), x.numel() / x.shape[1]
            variance = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
            state["norm.running_mean"] = 0.9 * state["norm.running_mean"] + 0.1 * mean.detach()
            state["norm.running_var"] = 0.9 * state["norm.running_var"] + 0.1 * variance.detach() * count / (count - 1)
            state["norm.num_batches_tracked"] = state["norm.num_batches_tracked"] + 1
            x = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
            x = torch.relu(state["norm.weight"][:, None, None] * x + state["norm.bias"][:, None, None])
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"]) + weight * ((x - target) ** 2).mean()
        parameters = [*student.parameters(), *(state[name] for name in names)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.regressor.{name}": value.detach() for name, value in state.items()}
