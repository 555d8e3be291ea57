import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 0.5}]
TRACES = [
    {"options": {"embed_dim": 4, "num_negatives": 5}},
    {"options": {"embed_dim": 3, "num_negatives": 2, "momentum": 0.9, "temperature": 0.2}},
]


def inputs(seed, b=5, n=8, k=4, d=3):
    rng = np.random.default_rng(seed)

    def unit(rows):
        v = rng.normal(size=(rows, d))
        return v / np.linalg.norm(v, axis=1, keepdims=True)

    embeddings = {"student_embedding": unit(b), "teacher_embedding": unit(b)}
    banks = {"student_bank": unit(n), "teacher_bank": unit(n)}
    z = {"student_z": np.array(7.0), "teacher_z": np.array(11.0)}
    return {**embeddings, **banks, "candidates": rng.integers(0, n, size=(b, k)), **z}


def variants(seed):
    return [inputs(seed, b=2, n=30, k=3)]  # a bank larger than its candidates


def reference(
    student_embedding, teacher_embedding, student_bank, teacher_bank, candidates, student_z, teacher_z, temperature=0.07
):
    negatives, values = candidates.shape[1] - 1, []
    noise = negatives / len(student_bank)
    for i in range(len(candidates)):
        value = 0.0
        for anchor, bank, z in (
            (student_embedding[i], teacher_bank, student_z),
            (teacher_embedding[i], student_bank, teacher_z),
        ):
            for j, row in enumerate(candidates[i]):
                h = math.exp(sum(a * b for a, b in zip(anchor, bank[row])) / temperature) / float(z)
                value -= math.log(h / (h + noise)) if j == 0 else math.log(noise / (h + noise))
        values.append(value)
    return np.array(values)


def closed_forms():
    one, bank = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0], [-1.0, 0.0]])  # all scores 0: h = 1 / z, noise 1 / 2
    sides = {"student_embedding": one, "teacher_embedding": one, "student_bank": bank, "teacher_bank": bank}
    given = {**sides, "candidates": np.array([[0, 1]]), "student_z": np.array(1.0), "teacher_z": np.array(2.0)}
    return [(given, {}, [-math.log(2 / 3) - math.log(1 / 3) + 2 * math.log(2)])]


def trace(
    student,
    teacher,
    state,
    batches,
    *,
    signals,
    sampler,
    lr,
    weight=0.8,
    ce_weight=1.0,
    embed_dim=128,
    num_negatives=16384,
    momentum=0.5,
    temperature=0.07,
):
    state = {name: value.clone() for name, value in state.items()}
    trained = [name for name in state if "_embed." in name]
    for name in trained:
        state[name].requires_grad_(True)
    n = len(state["student_bank"])
    for batch in batches:
        own, theirs = signals(student, batch["images"]), signals(teacher, batch["images"])
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        unit = {}
        for role, signal in (("student", own), ("teacher", theirs)):
            x = signal["embedding"] @ state[f"{role}_embed.linear.weight"].T + state[f"{role}_embed.linear.bias"]
            unit[role] = x / torch.sqrt((x * x).sum(1, keepdim=True))
        negatives = sampler(batch["labels"], batch["generator"])
        assert negatives.shape == (len(batch["labels"]), num_negatives)
        candidates = torch.cat([batch["sample_index"][:, None], negatives], dim=1)
        for role, other in (("student", "teacher"), ("teacher", "student")):
            rows = state[f"{other}_bank"][candidates]  # [b k d], a copy
            h = torch.exp((unit[role][:, None, :] * rows).sum(2) / temperature)
            if state[f"{role}_z"] == 0:
                state[f"{role}_z"] = h.detach().mean() * n
            h, noise = h / state[f"{role}_z"], num_negatives / n
            terms = torch.cat([h[:, :1] / (h[:, :1] + noise), noise / (h[:, 1:] + noise)], dim=1)
            loss = loss - weight * torch.log(terms).sum() / len(h)
        parameters = [*student.parameters(), *(state[name] for name in trained)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
        for role in ("student", "teacher"):
            for i, row in enumerate(batch["sample_index"]):
                new = momentum * state[f"{role}_bank"][row] + (1 - momentum) * unit[role][i].detach()
                state[f"{role}_bank"][row] = new / torch.sqrt((new * new).sum())
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
