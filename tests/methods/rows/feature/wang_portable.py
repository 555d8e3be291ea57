import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [
    {"gan": "non_saturating", "adversarial_weight": 0.5, "logits_weight": 2.0, "feature_weight": 3.0},
    {"gan": "least_squares", "logits_weight": 0.0},
    {"feature_weight": 0.0},
]
UNHEARD = {"adversarial"}
TRACES = [
    {"options": {"critic_lr": 0.01}},
    {"teacher_strides": (1, 1, 1), "options": {"critic_lr": 0.003, "gan": "non_saturating", "logits_weight": 0.0}},
    {"student_strides": (1, 1, 2), "options": {"gan": "least_squares", "adversarial_weight": 0.3, "feature_weight": 0.0}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {
        "student_logits": rng.normal(size=(6, 5)) * 3,
        "teacher_logits": rng.normal(size=(6, 5)) * 3,
        "student_feature": rng.normal(size=(6, 3, 4, 2)),
        "teacher_feature": rng.normal(size=(6, 3, 4, 2)),
        "student_score": rng.normal(size=6),
    }


def mean_square(one, other):
    squares = [(a - b) ** 2 for a, b in zip(one.reshape(-1), other.reshape(-1))]
    return sum(squares) / len(squares)


def reference(
    student_logits,
    teacher_logits,
    student_feature,
    teacher_feature,
    student_score,
    gan="saturating",
    adversarial_weight=1.0,
    logits_weight=0.1,
    feature_weight=0.1,
):
    terms = {"adversarial": []}
    for score in student_score:
        real = 1 / (1 + math.exp(-score))
        value = {"saturating": math.log(1 - real), "non_saturating": -math.log(real), "least_squares": (1 - score) ** 2}[gan]
        terms["adversarial"].append(adversarial_weight * value)
    if logits_weight != 0:
        terms["logits"] = [logits_weight * mean_square(a, b) for a, b in zip(student_logits, teacher_logits)]
    if feature_weight != 0:
        terms["feature"] = [feature_weight * mean_square(a, b) for a, b in zip(student_feature, teacher_feature)]
    return {name: np.array(values) for name, values in terms.items()}


def closed_forms():
    given = {
        "student_logits": np.array([[3.0, 1.0]]),
        "teacher_logits": np.array([[1.0, 1.0]]),
        "student_feature": np.full((1, 2, 1, 2), 4.0),
        "teacher_feature": np.full((1, 2, 1, 2), 1.0),
        "student_score": np.array([math.log(3.0)]),
    }
    alone = {"logits_weight": 0.0, "feature_weight": 0.0}
    return [
        (given, {}, {"adversarial": [-math.log(4.0)], "logits": [0.2], "feature": [0.9]}),
        (given, {"gan": "non_saturating", **alone}, {"adversarial": [math.log(4.0 / 3.0)]}),
    ]


def score(state, prefix, feature):
    """A critic of two convolutions."""
    for layer in (0, 2):
        weight, bias = (state[f"{prefix}layers.{layer}.{name}"] for name in ("weight", "bias"))
        feature = F.leaky_relu(F.conv2d(feature, weight, bias, stride=2, padding=1), 0.2)
    linear, bias = (state[f"{prefix}layers.6.{name}"] for name in ("weight", "bias"))
    return (feature.mean((2, 3)) @ linear.T + bias)[:, 0]


def adam(parameters, gradients, memory, lr):
    """One step of Adam; `memory` holds its moments, empty before the first."""
    memory.setdefault("moments", [[torch.zeros_like(p), torch.zeros_like(p)] for p in parameters])
    count = memory["count"] = memory.get("count", 0) + 1
    with torch.no_grad():
        for parameter, gradient, moments in zip(parameters, gradients, memory["moments"]):
            moments[0] = 0.9 * moments[0] + 0.1 * gradient
            moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
            mean, square = moments[0] / (1 - 0.9**count), moments[1] / (1 - 0.999**count)
            parameter -= lr * mean / (square.sqrt() + 1e-8)


def smaller(one, other):
    """The larger of two square maps, average pooled."""
    if one.shape[2] > other.shape[2]:
        return F.avg_pool2d(one, one.shape[2] // other.shape[2]), other
    return one, F.avg_pool2d(other, other.shape[2] // one.shape[2])


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
    gan="saturating",
    adversarial_weight=1.0,
    logits_weight=0.1,
    feature_weight=0.1,
    critic_lr=1e-4,
):
    state = {name: value.clone().requires_grad_() for name, value in state.items()}
    assistant = [value for name, value in state.items() if name.startswith("critic")]
    adapter = [state["adapter.weight"], state["adapter.bias"]]
    memory = {}

    def for_real(s):
        return (1 - s) ** 2 if gan == "least_squares" else -torch.log(torch.sigmoid(s))

    def for_fake(s):
        return s**2 if gan == "least_squares" else -torch.log(1 - torch.sigmoid(s))

    for batch in batches:
        own, theirs = signals(student, batch["images"]), signals(teacher, batch["images"])
        feature, target = smaller(own["stages"][-1], theirs["stages"][-1].detach())
        feature = torch.einsum("oc,bchw->bohw", adapter[0][:, :, 0, 0], feature) + adapter[1][:, None, None]
        judged = for_real(score(state, "critic.", target)) + for_fake(score(state, "critic.", feature.detach()))
        adam(assistant, torch.autograd.grad(judged.mean(), assistant), memory, critic_lr)

        fooled = score(state, "critic.", feature)
        passed = (-for_fake(fooled) if gan == "saturating" else for_real(fooled)).mean()
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        loss = loss + weight * adversarial_weight * passed
        loss = loss + weight * logits_weight * ((own["logits"] - theirs["logits"].detach()) ** 2).mean()
        loss = loss + weight * feature_weight * ((feature - target) ** 2).mean()
        parameters = [*student.parameters(), *adapter]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
