import copy
import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"soft_ce_share": 0.2, "soft_triplet_share": 0.3}, {"label_smoothing": 0.1}]
LABELLED = {"ce", "triplet"}
DECAY = 0.8
TRACES = [
    {"peers": 2, "ema": DECAY},
    {"peers": 3, "ema": DECAY, "options": {"label_smoothing": 0.1, "soft_ce_share": 0.3, "soft_triplet_share": 0.5}},
    {"peers": 2, "ema": DECAY, "steps_per_epoch": 1, "options": {"pseudo_labels": True}},
    {"peers": 3, "ema": DECAY, "steps_per_epoch": 1, "options": {"pseudo_labels": True, "clusters": 2}},
]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {
        "student_logits": rng.normal(size=(7, 4)) * 3,
        "student_embedding": rng.normal(size=(7, 3)),
        "peers_logits_ema": [rng.normal(size=(7, 4)) * 3 for _ in range(2)],
        "peers_embedding_ema": [rng.normal(size=(7, width)) for width in (3, 5)],
        "labels": np.array([0, 1, 0, 2, 1, 0, 3]),
    }


def variants(seed):
    return [{**inputs(seed), "labels": labels} for labels in (np.array([0, -1, 0, 2, -1, 2, 1]), np.full(7, 2))]


def wrong(inputs):
    logits, embeddings = inputs["peers_logits_ema"], inputs["peers_embedding_ema"]
    return [
        {**inputs, "peers_logits_ema": logits[:1]},
        {**inputs, "peers_logits_ema": [], "peers_embedding_ema": []},
        {**inputs, "peers_logits_ema": [logits[0], logits[1][:, :2]]},
        {**inputs, "peers_embedding_ema": [embeddings[0], embeddings[1][:3]]},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def distance(x, y):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y)))


def near(to_positive, to_negative):
    return 1 / (1 + math.exp(to_positive - to_negative))


def reference(
    student_logits,
    student_embedding,
    peers_logits_ema,
    peers_embedding_ema,
    labels,
    soft_ce_share=0.5,
    soft_triplet_share=0.8,
    label_smoothing=0.0,
):
    count, classes, f = len(labels), student_logits.shape[1], student_embedding
    ce, soft_ce, hard, soft = np.zeros(count), np.zeros(count), [], []
    for i, label in enumerate(labels):
        log_p = [math.log(p) for p in softmax(student_logits[i])]
        if label >= 0:
            target = [label_smoothing / classes + (1 - label_smoothing) * (k == label) for k in range(classes)]
            ce[i] = -(1 - soft_ce_share) * sum(t * v for t, v in zip(target, log_p))
        for logits in peers_logits_ema:
            entropy = -sum(q * v for q, v in zip(softmax(logits[i]), log_p))
            soft_ce[i] += soft_ce_share * entropy / len(peers_logits_ema)
        same = [j for j in range(count) if labels[j] == label]
        others = [j for j in range(count) if labels[j] != label and labels[j] >= 0]
        if label >= 0 and others:
            p, n = max(same, key=lambda j: distance(f[i], f[j])), min(others, key=lambda j: distance(f[i], f[j]))
            t = near(distance(f[i], f[p]), distance(f[i], f[n]))
            hard.append(-math.log(t))
            us = [near(distance(e[i], e[p]), distance(e[i], e[n])) for e in peers_embedding_ema]
            soft.append(sum(-u * math.log(t) - (1 - u) * math.log(1 - t) for u in us) / len(us))
    anchors = max(len(hard), 1)
    triplets = (1 - soft_triplet_share) * sum(hard) / anchors, soft_triplet_share * sum(soft) / anchors
    return {"ce": ce, "soft_ce": soft_ce, "triplet": triplets[0], "soft_triplet": triplets[1]}


def closed_forms():
    logits, line = np.zeros((3, 2)), np.array([[0.0], [math.log(3.0)], [math.log(3.0)]])
    given = {"student_logits": logits, "student_embedding": line, "labels": np.array([0, 0, 1])}
    given |= {"peers_logits_ema": [logits], "peers_embedding_ema": [line]}
    two, wide, close = math.log(2.0), math.log(4.0), math.log(4 / 3)
    entropy = 0.25 * wide + 0.75 * close  # of the second anchor, whose positive is farther by log 3
    soft = {"soft_ce": [two / 2] * 3, "soft_triplet": 0.8 * (2 * two + entropy) / 3}
    nobody = {**given, "labels": np.full(3, -1)}
    return [
        (given, {}, {"ce": [two / 2] * 3, "triplet": 0.2 * (2 * two + wide) / 3} | soft),
        (nobody, {}, {"ce": [0.0] * 3, "soft_ce": [two / 2] * 3, "triplet": 0.0, "soft_triplet": 0.0}),
    ]


def kmeans(rows, centres):
    nearest = None
    for _ in range(100):
        found = [min(range(len(centres)), key=lambda k: float((row - centres[k]).square().sum())) for row in rows]
        if found == nearest:
            break
        nearest = found
        groups = [[row for row, k in zip(rows, nearest) if k == n] for n in range(len(centres))]
        centres = [sum(group) / len(group) if group else centre for group, centre in zip(groups, centres)]
    return nearest, centres


def recluster(memory, centres, pseudo, clusters):
    """New pseudo labels and centres out of what was seen: sample -> row."""
    if len(memory) < clusters:
        return centres
    seen = sorted(memory)
    rows = [memory[n] for n in seen]
    centres = centres or [rows[k * len(rows) // clusters] for k in range(clusters)]
    nearest, centres = kmeans(rows, centres)
    pseudo.update(zip(seen, nearest))
    return centres


def trace(
    students,
    states,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=0.0,
    soft_ce_share=0.5,
    soft_triplet_share=0.8,
    label_smoothing=0.0,
    pseudo_labels=False,
    clusters=None,
):
    peers, classes = len(students), students[0].classifier.out_features
    clusters = clusters or classes
    copies = [copy.deepcopy(student) for student in students]
    memory, pseudo, centres, epoch = [{} for _ in students], [{} for _ in students], [None] * peers, 0
    for batch in batches:
        images, index = batch["images"], batch["sample_index"].tolist()
        if pseudo_labels and batch["epoch"] != epoch:
            epoch = batch["epoch"]
            for i in range(peers):
                centres[i] = recluster(memory[i], centres[i], pseudo[i], clusters)
        own = [signals(student, images) for student in students]
        with torch.no_grad():
            averaged = [signals(one, images) for one in copies]
        updates = []
        for i, student in enumerate(students):
            labels = [pseudo[i].get(n, -1) for n in index] if pseudo_labels else batch["labels"].tolist()
            others, f = [averaged[j] for j in range(peers) if j != i], own[i]["embedding"]
            loss, hard, soft = ce_weight * F.cross_entropy(own[i]["logits"], batch["labels"]), [], []
            for n, label in enumerate(labels):
                log_p = torch.log_softmax(own[i]["logits"][n], 0)
                if label >= 0:
                    target = torch.full((classes,), label_smoothing / classes, dtype=torch.float64)
                    target[label] += 1 - label_smoothing
                    loss = loss - weight * (1 - soft_ce_share) * (target * log_p).sum() / len(labels)
                for other in others:
                    q = torch.softmax(other["logits"][n], 0)
                    loss = loss - weight * soft_ce_share * (q * log_p).sum() / (len(labels) * len(others))
                same = [m for m, v in enumerate(labels) if v == label and m != n]
                rest = [m for m, v in enumerate(labels) if v != label and v >= 0]
                if label >= 0 and rest:
                    far = [(f[n] - f[m]).norm() for m in same] or [torch.zeros((), dtype=torch.float64)]
                    p, d_p = (same or [n])[int(torch.stack(far).argmax())], torch.stack(far).max()
                    close = [(f[n] - f[m]).norm() for m in rest]
                    q, d_n = rest[int(torch.stack(close).argmin())], torch.stack(close).min()
                    t = torch.exp(d_n) / (torch.exp(d_p) + torch.exp(d_n))
                    hard.append(-torch.log(t))
                    for other in others:
                        e = other["embedding"]
                        u = torch.softmax(torch.stack([(e[n] - e[p]).norm(), (e[n] - e[q]).norm()]), 0)[1]
                        soft.append(-(u * torch.log(t) + (1 - u) * torch.log(1 - t)))
            if hard:
                loss = loss + weight * (1 - soft_triplet_share) * sum(hard) / len(hard)
                loss = loss + weight * soft_triplet_share * sum(soft) / len(soft)
            if pseudo_labels:
                for n, sample in enumerate(index):
                    heard = [averaged[i], *others]
                    memory[i][sample] = torch.cat([one["embedding"][n] / one["embedding"][n].norm() for one in heard])
            parameters = list(student.parameters())
            updates += list(zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)))
        with torch.no_grad():
            for parameter, gradient in updates:
                if gradient is not None:
                    parameter -= lr * gradient
            for one, student in zip(copies, students):
                for kept, now in zip(one.parameters(), student.parameters()):
                    kept.copy_(DECAY * kept + (1 - DECAY) * now)
    final = {f"{i}.student.{name}": value for i, student in enumerate(students) for name, value in student.state_dict().items()}
    for i, state in enumerate(states):
        bank, made, labels = (torch.zeros_like(state[name]) for name in ("bank", "centres", "pseudo"))
        labels -= 1
        for sample, row in memory[i].items():
            bank[sample] = row
        for sample, label in pseudo[i].items():
            labels[sample] = label
        for k, centre in enumerate(centres[i] or []):
            made[k] = centre
        final |= {f"{i}.module.bank": bank, f"{i}.module.centres": made, f"{i}.module.pseudo": labels}
    return final
