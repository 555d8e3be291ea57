import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [
    {"gan": "non_saturating", "temperature": 1.0, "adversarial_weight": 0.5, "kd_weight": 2.0, "feature_weight": 3.0},
    {"gan": "least_squares"},
]
UNHEARD = {"adversarial"}
TRACES = [
    {"options": {"critic_lr": 0.01}},
    {"options": {"critic_lr": 0.003, "shared_by": "student", "gan": "non_saturating", "temperature": 1.0, "kd_weight": 0.5}},
    {"teacher_strides": (1, 1, 1), "options": {"gan": "least_squares", "adversarial_weight": 1.0, "feature_weight": 0.5}},
    {"student_strides": (1, 1, 2), "options": {"critic_lr": 0.01, "shared_by": "student"}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {
        "student_logits": rng.normal(size=(6, 5)) * 3,
        "teacher_logits": rng.normal(size=(6, 5)) * 3,
        "student_feature": rng.normal(size=(6, 3, 4, 2)),
        "teacher_shared": rng.normal(size=(6, 3, 4, 2)),
        "student_score": rng.normal(size=6),
    }


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(
    student_logits,
    teacher_logits,
    student_feature,
    teacher_shared,
    student_score,
    gan="saturating",
    temperature=4.0,
    feature_weight=1.0,
    adversarial_weight=0.1,
    kd_weight=1.0,
):
    terms = {"feature": [], "adversarial": [], "kd": []}
    for i, score in enumerate(student_score):
        squares = [(a - b) ** 2 for a, b in zip(student_feature[i].reshape(-1), teacher_shared[i].reshape(-1))]
        terms["feature"].append(feature_weight * sum(squares) / len(squares))
        real = 1 / (1 + math.exp(-score))
        value = {"saturating": math.log(1 - real), "non_saturating": -math.log(real), "least_squares": (1 - score) ** 2}[gan]
        terms["adversarial"].append(adversarial_weight * value)
        p, q = softmax(teacher_logits[i] / temperature), softmax(student_logits[i] / temperature)
        terms["kd"].append(kd_weight * temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q)))
    return {name: np.array(values) for name, values in terms.items()}


def closed_forms():
    given = {
        "student_logits": np.array([[math.log(3.0), 0.0]]),
        "teacher_logits": np.zeros((1, 2)),
        "student_feature": np.full((1, 2, 1, 2), 4.0),
        "teacher_shared": np.full((1, 2, 1, 2), 1.0),
        "student_score": np.array([math.log(3.0)]),
    }
    nats = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    ones = {"temperature": 1.0, "adversarial_weight": 1.0}
    return [
        (given, ones, {"feature": [9.0], "adversarial": [-math.log(4.0)], "kd": [nats]}),
        (given, {**ones, "gan": "non_saturating"}, {"feature": [9.0], "adversarial": [math.log(4.0 / 3.0)], "kd": [nats]}),
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
    temperature=4.0,
    feature_weight=1.0,
    adversarial_weight=0.1,
    kd_weight=1.0,
    shared_by="labels",
    critic_lr=1e-4,
):
    state = {name: value.clone().requires_grad_() for name, value in state.items()}
    critic = [value for name, value in state.items() if name.startswith("critic")]
    connectors = [value for name, value in state.items() if not name.startswith("critic")]
    memory = {}

    def for_real(s):
        return (1 - s) ** 2 if gan == "least_squares" else -torch.log(torch.sigmoid(s))

    def for_fake(s):
        return s**2 if gan == "least_squares" else -torch.log(1 - torch.sigmoid(s))

    for batch in batches:
        own, theirs = signals(student, batch["images"]), signals(teacher, batch["images"])
        feature, hint = smaller(own["stages"][-1], theirs["stages"][-1].detach())
        shared = torch.relu(F.conv2d(hint, state["layer.weight"], state["layer.bias"], padding=1))
        judged = for_real(score(state, "critic.", shared.detach())) + for_fake(score(state, "critic.", feature.detach()))
        adam(critic, torch.autograd.grad(judged.mean(), critic), memory, critic_lr)

        fooled = score(state, "critic.", feature)
        passed = (-for_fake(fooled) if gan == "saturating" else for_real(fooled)).mean()
        z, target = own["logits"], shared if shared_by == "student" else shared.detach()
        p, q = torch.softmax(theirs["logits"].detach() / temperature, 1), torch.softmax(z / temperature, 1)
        taught = feature_weight * ((target - feature) ** 2).mean() + adversarial_weight * passed
        taught = taught + kd_weight * temperature**2 * (p * torch.log(p / q)).sum() / len(z)
        if shared_by == "labels":
            guessed = shared.mean((2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]
            taught = taught + F.cross_entropy(guessed, batch["labels"])
        loss = ce_weight * F.cross_entropy(z, batch["labels"]) + weight * taught
        parameters = [*student.parameters(), *connectors]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
