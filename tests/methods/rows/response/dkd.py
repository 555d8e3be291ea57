import math

import numpy as np

OPTIONS = [{"temperature": 1.0}, {"temperature": 2.0, "alpha": 0.5, "beta": 2.0}]


def inputs(seed):
    rng = np.random.default_rng(seed)
    logits = {"student_logits": rng.normal(size=(6, 4)) * 3, "teacher_logits": rng.normal(size=(6, 4)) * 3}
    return {**logits, "labels": np.array([0, 1, 2, 3, 1, 3])}


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def reference(student_logits, teacher_logits, labels, temperature=4.0, alpha=1.0, beta=8.0):
    tckd, nckd = [], []
    for student, teacher, y in zip(student_logits, teacher_logits, labels):
        parts = []
        for z in (teacher, student):
            power = [math.exp(v / temperature) for v in z]
            target = power[y] / sum(power)
            rest = [v for j, v in enumerate(power) if j != y]
            parts.append(([target, 1 - target], [v / sum(rest) for v in rest]))
        (teacher_pair, teacher_rest), (student_pair, student_rest) = parts
        tckd.append(alpha * temperature**2 * divergence(teacher_pair, student_pair))
        nckd.append(beta * temperature**2 * divergence(teacher_rest, student_rest))
    return {"tckd": np.array(tckd), "nckd": np.array(nckd)}


def closed_forms():
    plain = {"temperature": 1.0, "beta": 1.0}
    target = {"student_logits": np.zeros((1, 3)), "teacher_logits": np.array([[0.0, math.log(2.0), 0.0]])}
    rest = {"student_logits": np.zeros((1, 3)), "teacher_logits": np.array([[math.log(2.0), math.log(3.0), 0.0]])}
    return [
        (
            {**target, "labels": np.array([1])},
            plain,
            {"tckd": [0.5 * math.log(1.5) + 0.5 * math.log(0.75)], "nckd": [0.0]},
        ),
        (
            {**rest, "labels": np.array([0])},
            plain,
            {"tckd": [0.0], "nckd": [0.75 * math.log(1.5) + 0.25 * math.log(0.5)]},  # both give the target 1/3
        ),
    ]
