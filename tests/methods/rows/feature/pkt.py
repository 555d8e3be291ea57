import math

import numpy as np

OPTIONS = []


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {"student_embedding": rng.normal(size=(5, 3)), "teacher_embedding": rng.normal(size=(5, 4))}


def probabilities(v):
    rows = []
    for i in range(len(v)):
        cosines = [np.dot(v[i], v[j]) / math.sqrt(np.dot(v[i], v[i]) * np.dot(v[j], v[j])) for j in range(len(v))]
        close = [(c + 1) / 2 for c in cosines]
        rows.append([c / sum(close) for c in close])
    return rows


def reference(student_embedding, teacher_embedding):
    student, teacher = probabilities(student_embedding), probabilities(teacher_embedding)
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            total += teacher[i][j] * math.log((teacher[i][j] + 1e-7) / (student[i][j] + 1e-7))
    return total / len(student) ** 2


def closed_forms():
    rows = {"student_embedding": np.eye(2), "teacher_embedding": np.ones((2, 3))}  # student 2/3, 1/3; teacher 1/2, 1/2
    near, far = math.log(0.5000001 / (2 / 3 + 1e-7)), math.log(0.5000001 / (1 / 3 + 1e-7))
    return [(rows, {}, 0.25 * (near + far))]
