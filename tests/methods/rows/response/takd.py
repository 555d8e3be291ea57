import math

import numpy as np

OPTIONS = [{"temperature": 1.0}, {"temperature": 10.0, "assistants": ("crd_resnet32",)}]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def variants(seed):
    return [inputs(seed, (3, 2, 4))]


def link(student, teacher, t):
    if student.ndim > 1:
        return sum(link(s, z, t) for s, z in zip(student, teacher)) / len(student)
    mass_t, mass_s = sum(math.exp(v / t) for v in teacher), sum(math.exp(v / t) for v in student)
    value = 0.0
    for z_t, z_s in zip(teacher, student):
        p, q = math.exp(z_t / t) / mass_t, math.exp(z_s / t) / mass_s
        value += p * math.log(p / q)
    return t * t * value


def reference(student_logits, teacher_logits, temperature=4.0, assistants=()):
    return np.array([link(s, z, temperature) for s, z in zip(student_logits, teacher_logits)])


def closed_forms():
    even = np.zeros((1, 2))
    odds = {"student_logits": even, "teacher_logits": np.array([[4 * math.log(3.0), 0.0]])}
    nats = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    return [(odds, {}, [16 * nats]), ({"student_logits": even + 1, "teacher_logits": even}, {}, [0.0])]
