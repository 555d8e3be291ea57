import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"gan": "non_saturating", "logits_weight": 2.0}, {"gan": "least_squares"}]
UNHEARD = {"adversarial"}
TRACES = [
    {"options": {"critic_lr": 0.01}},
    {"options": {"critic_lr": 0.003, "dropout": 0.0, "gan": "non_saturating", "regulariser": "l2", "regulariser_weight": 0.1}},
    {"options": {"critic_lr": 0.003, "dropout": 0.25, "regulariser": "l1", "regulariser_weight": 0.01, "logits_weight": 1.0}},
    {"options": {"critic_lr": 0.01, "gan": "least_squares", "regulariser": "none", "dropout": 0.0}},
    {"options": {"critic_lr": 0.01, "gan": "least_squares"}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {
        "student_logits": rng.normal(size=(6, 5)) * 3,
        "teacher_logits": rng.normal(size=(6, 5)) * 3,
        "student_score": rng.normal(size=6),
    }


def reference(student_logits, teacher_logits, student_score, gan="saturating", logits_weight=0.1):
    logits, adversarial = [], []
    for own, theirs, score in zip(student_logits, teacher_logits, student_score):
        logits.append(logits_weight * sum((a - b) ** 2 for a, b in zip(own, theirs)))
        real = 1 / (1 + math.exp(-score))
        value = {"saturating": math.log(1 - real), "non_saturating": -math.log(real), "least_squares": (1 - score) ** 2}[gan]
        adversarial.append(value)
    return {"logits": np.array(logits), "adversarial": np.array(adversarial)}


def closed_forms():
    given = {
        "student_logits": np.array([[3.0, 1.0]]),
        "teacher_logits": np.array([[1.0, 0.0]]),
        "student_score": np.array([math.log(3.0)]),
    }
    return [
        (given, {"logits_weight": 1.0}, {"logits": [5.0], "adversarial": [-math.log(4.0)]}),
        (given, {"gan": "non_saturating"}, {"logits": [0.5], "adversarial": [math.log(4.0 / 3.0)]}),
        (given, {"gan": "least_squares"}, {"logits": [0.5], "adversarial": [(1 - math.log(3.0)) ** 2]}),
    ]


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
    gan="saturating",
    logits_weight=0.1,
    dropout=0.5,
    critic_lr=1e-4,
    regulariser="adversarial",
    regulariser_weight=1e-3,
):
    draws = int(state["draws"])
    state = {name: value.clone().requires_grad_() for name, value in state.items() if name != "draws"}
    critic = {name: value for name, value in state.items() if name.startswith("critic")}
    memory = {}

    def score(x):
        """Three hidden layers."""
        for layer in (0, 2, 4):
            x = torch.relu(x @ critic[f"critic.layers.{layer}.weight"].T + critic[f"critic.layers.{layer}.bias"])
        return (x @ critic["critic.layers.6.weight"].T + critic["critic.layers.6.bias"])[:, 0]

    def shown(x, generator):
        """After dropout and the adapter."""
        if dropout:
            kept = torch.rand(x.shape, generator=generator, dtype=torch.float64) >= dropout
            x = torch.where(kept, x / (1 - dropout), torch.zeros_like(x))
        return x @ state["adapter.weight"].T + state["adapter.bias"]

    def for_real(s):
        return (1 - s) ** 2 if gan == "least_squares" else -torch.log(torch.sigmoid(s))

    def for_fake(s):
        return s**2 if gan == "least_squares" else -torch.log(1 - torch.sigmoid(s))

    for batch in batches:
        own, theirs = signals(student, batch["images"]), signals(teacher, batch["images"])
        fake = score(shown(own["embedding"], torch.Generator().manual_seed(draws)).detach())
        draws += 1
        judged = (for_real(score(theirs["embedding"].detach())) + for_fake(fake)).mean()
        if regulariser == "adversarial":
            judged = judged + for_real(fake).mean()
        elif regulariser == "l2":
            judged = judged + regulariser_weight * sum((p**2).sum() for p in critic.values())
        elif regulariser == "l1":
            judged = judged + regulariser_weight * sum(p.abs().sum() for p in critic.values())
        weights = list(critic.values())
        adam(weights, torch.autograd.grad(judged, weights), memory, critic_lr)

        fooled = score(shown(own["embedding"], batch["generator"]))
        adversarial = (-for_fake(fooled) if gan == "saturating" else for_real(fooled)).mean()
        apart = ((own["logits"] - theirs["logits"].detach()) ** 2).sum() / len(fooled)
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        loss = loss + weight * (logits_weight * apart + adversarial)
        parameters = [*student.parameters(), state["adapter.weight"], state["adapter.bias"]]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    final["module.draws"] = torch.tensor(draws)
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
