import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [
    {"tau": 0.5, "temperature": 1.0},
    {"counterpart": "included"},
    {"logit_distill": True, "alpha": 0.7, "beta": 0.3, "gamma": 0.2, "lam": 0.4},
]
LABELLED = {"vcl"}
HEADS = {"kind": "heads", "outputs": 4}
TRACES = [
    {"peers": 2, "branching": HEADS},
    {"peers": 3, "branching": HEADS, "options": {"logit_distill": True, "tau": 0.5}},
    {"peers": 2, "branching": HEADS, "options": {"counterpart": "included", "lam": 0.3, "temperature": 1.0}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)

    def network():
        return [rng.normal(size=(6, 3)) * 3, rng.normal(size=(6, 4))]

    return {"student_logits_branches": network(), "peer_logits_branches": network(), "labels": np.array([0, 1, 0, 2, 1, 0])}


def variants(seed):
    return [{**inputs(seed), "labels": np.arange(6) % 3 * 0 + 1}, {**inputs(seed), "labels": np.arange(6) % 3}]


def wrong(inputs):
    own, theirs = inputs["student_logits_branches"], inputs["peer_logits_branches"]
    return [
        {**inputs, "student_logits_branches": own[:1]},
        {**inputs, "peer_logits_branches": theirs[:1]},
        {**inputs, "peer_logits_branches": [theirs[0], theirs[1][:, :2]]},
        {**inputs, "peer_logits_branches": [theirs[0], theirs[1][:3]]},
        {**inputs, "peer_logits_branches": [theirs[0][:, :2], theirs[1]]},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def unit(rows):
    return [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in rows]


def scores(anchors, contrasts, tau):
    return [[sum(a * c for a, c in zip(anchor, contrast)) / tau for contrast in contrasts] for anchor in anchors]


def contrast(table, labels, counterpart=False):
    values = []
    for i, row in enumerate(table):
        candidates = [j for j in range(len(row)) if counterpart or j != i]
        positives = [j for j in candidates if labels[j] == labels[i]]
        if positives:
            whole = sum(math.exp(row[j]) for j in candidates)
            values.append(sum(math.log(whole) - row[j] for j in positives) / len(positives))
    return sum(values) / len(values) if values else 0.0


def rows_apart(target, table, temperature):
    pairs = [(softmax([v / temperature for v in r]), softmax([v / temperature for v in s])) for r, s in zip(target, table)]
    return temperature**2 * sum(divergence(p, q) for p, q in pairs) / len(pairs)


def reference(
    student_logits_branches,
    peer_logits_branches,
    labels,
    alpha=0.1,
    gamma=1.0,
    beta=0.1,
    lam=1.0,
    tau=0.1,
    temperature=3.0,
    counterpart="excluded",
    logit_distill=False,
):
    a, p = unit(student_logits_branches[1]), unit(peer_logits_branches[1])
    aa, ap, pa, pp = scores(a, a, tau), scores(a, p, tau), scores(p, a, tau), scores(p, p, tau)
    whole = counterpart == "included"
    found = {
        "vcl": alpha * contrast(aa, labels),
        "soft_vcl": gamma * rows_apart(pp, aa, temperature),
        "icl": beta * (contrast(ap, labels, whole) + contrast(pa, labels, whole)),
        "soft_icl": lam * (rows_apart(pa, ap, temperature) + rows_apart(ap, pa, temperature)),
    }
    if logit_distill:
        found["kd"] = []
        for own, theirs in zip(student_logits_branches[0], peer_logits_branches[0]):
            mean = softmax((own + theirs) / (2 * temperature))
            found["kd"].append(temperature**2 * divergence(mean, softmax(own / temperature)))
    return found


def closed_forms():
    corners = np.eye(3)[[0, 0, 1]] * 5.0  # the length does not matter
    network = [np.zeros((3, 2)), corners]
    given = {"student_logits_branches": network, "peer_logits_branches": network, "labels": np.array([0, 0, 1])}
    gap = math.log(math.e + 1) - 1  # the positive at 1, the negative at 0; the third anchor has no positive
    with_own = (2 * (math.log(2 * math.e + 1) - 1) + math.log(2 + math.e) - 1) / 3
    same = {"vcl": 0.1 * gap, "soft_vcl": 0.0, "icl": 0.2 * gap, "soft_icl": 0.0}
    apart = {**given, "labels": np.array([0, 1, 2])}
    return [
        (given, {"tau": 1.0}, same),
        (given, {"tau": 1.0, "counterpart": "included"}, {**same, "icl": 0.2 * with_own}),
        (apart, {"tau": 1.0}, {"vcl": 0.0, "soft_vcl": 0.0, "icl": 0.0, "soft_icl": 0.0}),
    ]


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
    alpha=0.1,
    gamma=1.0,
    beta=0.1,
    lam=1.0,
    tau=0.1,
    temperature=3.0,
    counterpart="excluded",
    logit_distill=False,
):
    def contrasts(table, labels, whole):
        values = []
        for i in range(len(labels)):
            candidates = torch.tensor([j for j in range(len(labels)) if whole or j != i])
            positives = [j for j in candidates if labels[j] == labels[i]]
            if positives:
                log_p = table[i] - torch.logsumexp(table[i, candidates], 0)
                values.append(-sum(log_p[j] for j in positives) / len(positives))
        return sum(values) / len(values) if values else torch.zeros((), dtype=torch.float64)

    def kl(target, table):
        p, q = torch.softmax(target.detach() / temperature, 1), torch.softmax(table / temperature, 1)
        return temperature**2 * (p * torch.log(p / q)).sum() / len(p)

    for batch in batches:
        labels, heads = batch["labels"], [signals(student, batch["images"])["logits"] for student in students]
        embeddings = [head[1] / head[1].norm(dim=1, keepdim=True) for head in heads]
        updates = []
        for own, student in enumerate(students):
            loss, a = ce_weight * F.cross_entropy(heads[own][0], labels), embeddings[own]
            for other in range(len(students)):
                if other == own:
                    continue
                p = embeddings[other].detach()
                aa, ap, pa, pp = a @ a.T / tau, a @ p.T / tau, p @ a.T / tau, p @ p.T / tau
                whole = counterpart == "included"
                found = alpha * contrasts(aa, labels, False) + gamma * kl(pp, aa)
                found = found + beta * (contrasts(ap, labels, whole) + contrasts(pa, labels, whole))
                found = found + lam * (kl(pa, ap) + kl(ap, pa))
                if logit_distill:
                    found = found + kl((heads[own][0] + heads[other][0]) / 2, heads[own][0])
                loss = loss + weight * found / (len(students) - 1)
            parameters = list(student.parameters())
            updates += list(zip(parameters, torch.autograd.grad(loss, parameters)))
        with torch.no_grad():
            for parameter, gradient in updates:
                parameter -= lr * gradient
    return {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
