import math

import numpy as np

OPTIONS = [{"temperature": 1.0}, {"temperature": 2.0, "beta": 2.0, "gamma": 0.5}]


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=(5, 4)) * 3, "teacher_logits": rng.normal(size=(5, 4)) * 3}


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def correlation(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def reference(student_logits, teacher_logits, temperature=4.0, beta=1.0, gamma=1.0):
    student = [softmax(z / temperature) for z in student_logits]
    teacher = [softmax(z / temperature) for z in teacher_logits]
    inter = [beta * temperature**2 * (1 - correlation(s, t)) for s, t in zip(student, teacher)]
    intra = [gamma * temperature**2 * (1 - correlation(s, t)) for s, t in zip(zip(*student), zip(*teacher))]
    return {"inter": np.array(inter), "intra": sum(intra) / len(intra)}


def closed_forms():
    teacher = np.array([[1.0, -1.0], [-2.0, 2.0]])
    against = {"student_logits": -teacher, "teacher_logits": teacher}
    shifted = {"student_logits": teacher + 5, "teacher_logits": teacher}
    return [
        (against, {"temperature": 2.0}, {"inter": [8.0, 8.0], "intra": 8.0}),
        (shifted, {}, {"inter": [0.0, 0.0], "intra": 0.0}),
    ]
