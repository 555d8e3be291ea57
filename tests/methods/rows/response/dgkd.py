import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0}, {"temperature": 2.5}]
TRACES = [
    {"teachers": 3},  # one of three guides is dropped each step
    {"teachers": 3, "options": {"drop_num": 5, "temperature": 2.0}},  # one is always kept
    {"teachers": 2, "options": {"drop_num": 0}},
    {"teachers": 3, "options": {"drop_probability": 0.7}},
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=shape) * 3 for _ in range(4)]
    return {"student_logits": logits[0], "teachers_logits": logits[1:], "kept": np.array([1.0, 0.0, 1.0])}


def variants(seed):
    return [inputs(seed, (3, 2, 4))]


def wrong(inputs):
    first, *others = inputs["teachers_logits"]
    return [
        {**inputs, "kept": np.ones(2)},
        {**inputs, "teachers_logits": []},
        {**inputs, "teachers_logits": [*others, first[..., :1]]},
    ]


def divergence(student, teacher, t):
    if student.ndim > 1:
        return sum(divergence(s, z, t) for s, z in zip(student, teacher)) / len(student)
    mass_t, mass_s = sum(math.exp(v / t) for v in teacher), sum(math.exp(v / t) for v in student)
    pairs = [(math.exp(z / t) / mass_t, math.exp(s / t) / mass_s) for z, s in zip(teacher, student)]
    return sum(p * math.log(p / q) for p, q in pairs)


def reference(student_logits, teachers_logits, kept, temperature=5.0):
    values = []
    for i, student in enumerate(student_logits):
        guides = [divergence(student, teacher[i], temperature) for teacher, keep in zip(teachers_logits, kept) if keep]
        values.append(temperature**2 * sum(guides))
    return np.array(values)


def closed_forms():
    even, odds = np.zeros((1, 2)), np.array([[math.log(3.0), 0.0]])
    nats = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    guides = {"student_logits": even, "teachers_logits": [odds, even, -odds]}
    return [
        ({**guides, "kept": np.ones(3)}, {"temperature": 1.0}, [2 * nats]),
        ({**guides, "kept": np.array([1.0, 1.0, 0.0])}, {"temperature": 1.0}, [nats]),
        ({**guides, "kept": np.array([0.0, 1.0, 0.0])}, {"temperature": 1.0}, [0.0]),
    ]


def trace(
    student,
    teacher,
    state,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=0.9,
    ce_weight=0.1,
    temperature=5.0,
    drop_num=1,
    drop_probability=None,
):
    assert state == {}
    for batch in batches:
        numbers = torch.rand(len(teacher), generator=batch["generator"], dtype=torch.float64).tolist()
        *others, _ = sorted(range(len(teacher)), key=lambda i: numbers[i])  # who draws most always stays
        gone = others[:drop_num] if drop_probability is None else [i for i in others if numbers[i] < drop_probability]
        own = signals(student, batch["images"])
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        for i in set(range(len(teacher))) - set(gone):
            p = torch.softmax(signals(teacher[i], batch["images"])["logits"].detach() / temperature, dim=1)
            q = torch.softmax(own["logits"] / temperature, dim=1)
            loss = loss + weight * temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
        parameters = list(student.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter -= lr * gradient
    return {f"student.{name}": value for name, value in student.state_dict().items()}
