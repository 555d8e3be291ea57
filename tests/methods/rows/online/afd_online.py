import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0}]
UNHEARD = {"adversarial"}
TRACES = [
    {"peers": 2, "options": {"adversarial_lr": 0.01}},
    {"peers": 2, "options": {"separate_optimizer": False, "temperature": 1.0, "adversarial_lr": 0.003}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {
        "student_logits": rng.normal(size=(6, 5)) * 3,
        "peer_logits": rng.normal(size=(6, 5)) * 3,
        "student_score": rng.normal(size=6),
    }


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, peer_logits, student_score, temperature=3.0):
    kl, adversarial = [], []
    for own, theirs, score in zip(student_logits, peer_logits, student_score):
        p, q = softmax(theirs / temperature), softmax(own / temperature)
        kl.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q)))
        adversarial.append((1 - score) ** 2)
    return {"kl": np.array(kl), "adversarial": np.array(adversarial)}


def closed_forms():
    given = {
        "student_logits": np.array([[math.log(3.0), 0.0]]),
        "peer_logits": np.zeros((1, 2)),
        "student_score": np.array([-1.0]),
    }
    nats = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    return [(given, {"temperature": 1.0}, {"kl": [nats], "adversarial": [4.0]})]


def score(state, prefix, feature):
    """A critic of two convolutions."""
    for layer in (0, 2):
        weight, bias = (state[f"{prefix}layers.{layer}.{name}"] for name in ("weight", "bias"))
        feature = F.leaky_relu(F.conv2d(feature, weight, bias, stride=2, padding=1), 0.2)
    linear, bias = (state[f"{prefix}layers.6.{name}"] for name in ("weight", "bias"))
    return (feature.mean((2, 3)) @ linear.T + bias)[:, 0]


def adam(parameters, gradients, memory, lr, decay):
    """One step of Adam; `memory` holds its moments, empty before the first."""
    memory.setdefault("moments", [[torch.zeros_like(p), torch.zeros_like(p)] for p in parameters])
    count = memory["count"] = memory.get("count", 0) + 1
    with torch.no_grad():
        for parameter, gradient, moments in zip(parameters, gradients, memory["moments"]):
            gradient = gradient + decay * parameter
            moments[0] = 0.9 * moments[0] + 0.1 * gradient
            moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
            mean, square = moments[0] / (1 - 0.9**count), moments[1] / (1 - 0.999**count)
            parameter -= lr * mean / (square.sqrt() + 1e-8)


def trace(
    students,
    states,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=1.0,
    temperature=3.0,
    separate_optimizer=True,
    adversarial_lr=2e-5,
    adversarial_decay=0.1,
):
    states = [{n: v.clone().requires_grad_() for n, v in s.items() if "extra" not in n} for s in states]
    critics, extractors = [{} for _ in students], [{} for _ in students]
    for batch in batches:
        found = [signals(student, batch["images"]) for student in students]
        updates = []
        for own, (student, state) in enumerate(zip(students, states)):
            theirs, feature = found[1 - own], found[own]["stages"][-1]
            if "adapter.convolution.weight" in state:
                feature = F.conv2d(feature, state["adapter.convolution.weight"], state["adapter.convolution.bias"])
            adapter = [v for n, v in state.items() if n.startswith("adapter")]
            critic = [v for n, v in state.items() if n.startswith("critic")]
            judged = (1 - score(state, "critic.", theirs["stages"][-1].detach())) ** 2
            judged = judged + score(state, "critic.", feature.detach()) ** 2
            adam(critic, torch.autograd.grad(judged.mean(), critic), critics[own], adversarial_lr, adversarial_decay)

            z, adversarial = found[own]["logits"], ((1 - score(state, "critic.", feature)) ** 2).mean()
            p, q = torch.softmax(theirs["logits"].detach() / temperature, 1), torch.softmax(z / temperature, 1)
            loss = ce_weight * F.cross_entropy(z, batch["labels"])
            loss = loss + weight * temperature**2 * (p * torch.log(p / q)).sum() / len(z)
            every = list(student.parameters())
            if separate_optimizer:
                below = [v for n, v in student.named_parameters() if not n.startswith("classifier")] + adapter
                updates.append((every, torch.autograd.grad(loss, every, retain_graph=True), None, None))
                updates.append((below, torch.autograd.grad(adversarial, below), extractors[own], adversarial_decay))
            else:
                every = every + adapter
                updates.append((every, torch.autograd.grad(loss + weight * adversarial, every), None, None))
        for parameters, gradients, memory, decay in updates:
            if memory is not None:
                adam(parameters, gradients, memory, adversarial_lr, decay)
                continue
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients):
                    parameter -= lr * gradient
    final = {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
    return final | {f"{i}.module.{name}": value.detach() for i, state in enumerate(states) for name, value in state.items()}
