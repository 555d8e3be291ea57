import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [
    {"gan": "cross_entropy", "temperature": 1.0},
    {"adversarial_weight": 0.5, "alignment_weight": 3.0, "temperature": 2.0},
]
UNHEARD = {"adversarial"}
TRACES = [
    {"peers": 2},
    {"peers": 2, "options": {"gan": "cross_entropy", "critic_lr": 0.01, "alignment_weight": 0.5, "temperature": 1.0}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {
        "student_logits": rng.normal(size=(6, 5)) * 3,
        "peer_logits": rng.normal(size=(6, 5)) * 3,
        "student_scores": [rng.normal(size=6) for _ in range(3)],
        "student_aligned": [rng.normal(size=(6, 4, 3, 2)) for _ in range(2)],
        "peer_final": rng.normal(size=(6, 4, 3, 2)),
    }


def wrong(inputs):
    scores, aligned = inputs["student_scores"], inputs["student_aligned"]
    return [
        {**inputs, "student_scores": scores[:2]},
        {**inputs, "student_scores": scores[:1], "student_aligned": []},
        {**inputs, "student_aligned": [aligned[0], aligned[1][:, :1]]},
        {**inputs, "student_scores": [*scores[:2], scores[2][:1]]},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(
    student_logits,
    peer_logits,
    student_scores,
    student_aligned,
    peer_final,
    temperature=3.0,
    gan="least_squares",
    adversarial_weight=1.0,
    alignment_weight=1.0,
):
    found = {name: np.zeros(len(student_logits)) for name in ("kl", "adversarial", "alignment")}
    for n in range(len(student_logits)):
        p, q = softmax(peer_logits[n] / temperature), softmax(student_logits[n] / temperature)
        found["kl"][n] = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
        for score in student_scores:
            term = (1 - score[n]) ** 2 if gan == "least_squares" else math.log(1 + math.exp(-score[n]))
            found["adversarial"][n] += adversarial_weight * term
        for feature in student_aligned:
            places = list(np.ndindex(peer_final.shape[1:]))
            squares = sum((feature[n][at] - peer_final[n][at]) ** 2 for at in places)
            found["alignment"][n] += alignment_weight * squares / len(places)
    return found


def closed_forms():
    leaning = np.array([[math.log(3.0), 0.0]])
    given = {"student_logits": leaning, "peer_logits": np.zeros((1, 2)), "peer_final": np.zeros((1, 2, 1, 1))}
    given |= {"student_scores": [np.array([0.0]), np.array([3.0])], "student_aligned": [np.array([[[[3.0]], [[1.0]]]])]}
    nats = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    crossed = math.log(2.0) + math.log1p(math.exp(-3.0))
    return [
        (given, {"temperature": 1.0}, {"kl": [nats], "adversarial": [5.0], "alignment": [5.0]}),
        (given, {"temperature": 1.0, "gan": "cross_entropy"}, {"kl": [nats], "adversarial": [crossed], "alignment": [5.0]}),
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


def convolved(state, prefix, feature, **options):
    return F.conv2d(feature, state[prefix + "weight"], state[prefix + "bias"], **options)


def aligned(state, block, feature):
    """From 8x8 (first block) or 4x4 (second) to 2x2."""
    if block == 0:
        feature = torch.relu(convolved(state, "aligners.0.0.", feature, stride=2, padding=1))
        feature = torch.relu(convolved(state, "aligners.0.2.", feature, stride=2, padding=1))
        return convolved(state, "aligners.0.4.", feature)
    feature = torch.relu(convolved(state, "aligners.1.0.", feature, stride=2, padding=1))
    return convolved(state, "aligners.1.2.", feature)


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
    gan="least_squares",
    adversarial_weight=1.0,
    alignment_weight=1.0,
    critic_lr=2e-5,
):
    def miss(score, wanted):
        if gan == "least_squares":
            return (score - wanted) ** 2
        return -torch.log(torch.sigmoid(score) if wanted else 1 - torch.sigmoid(score))

    states = [{n: v.clone().requires_grad_() for n, v in s.items() if "extra" not in n} for s in states]
    memories = [[{} for _ in range(3)] for _ in students]
    for batch in batches:
        found, updates = [signals(student, batch["images"]) for student in students], []
        for own, (student, state) in enumerate(zip(students, states)):
            theirs, mine = found[1 - own], found[own]
            z, final = mine["logits"], theirs["stages"][-1].detach()
            p, q = torch.softmax(theirs["logits"].detach() / temperature, 1), torch.softmax(z / temperature, 1)
            loss = ce_weight * F.cross_entropy(z, batch["labels"])
            loss = loss + weight * temperature**2 * (p * torch.log(p / q)).sum() / len(z)
            for block in range(3):
                name, feature, other = f"critics.{block}.", mine["stages"][block], theirs["stages"][block].detach()
                adapted = convolved(state, f"adapters.{block}.", feature) if f"adapters.{block}.weight" in state else feature
                critic = [v for n, v in state.items() if n.startswith(name)]
                judged = miss(score(state, name, other), 1) + miss(score(state, name, adapted.detach()), 0)
                adam(critic, torch.autograd.grad(judged.mean(), critic), memories[own][block], critic_lr)
                loss = loss + weight * adversarial_weight * miss(score(state, name, adapted), 1).mean()
                if block < 2:
                    apart = (aligned(state, block, feature) - final) ** 2
                    loss = loss + weight * alignment_weight * apart.mean()
            parameters = [*student.parameters(), *(v for n, v in state.items() if not n.startswith("critics"))]
            updates += list(zip(parameters, torch.autograd.grad(loss, parameters)))
        with torch.no_grad():
            for parameter, gradient in updates:
                parameter -= lr * gradient
    final = {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
    return final | {f"{i}.module.{name}": value.detach() for i, state in enumerate(states) for name, value in state.items()}
