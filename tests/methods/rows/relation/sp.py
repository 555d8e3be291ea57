import math

import numpy as np

OPTIONS = []


def inputs(seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(5, 7)), rng.normal(size=(5, 9))
    return {"student_gram": student @ student.T, "teacher_gram": teacher @ teacher.T}


def reference(student_gram, teacher_gram):
    b, total = len(student_gram), 0.0
    for i in range(b):
        student_norm = math.sqrt(sum(v * v for v in student_gram[i]))
        teacher_norm = math.sqrt(sum(v * v for v in teacher_gram[i]))
        for j in range(b):
            total += (student_gram[i, j] / student_norm - teacher_gram[i, j] / teacher_norm) ** 2
    return total / b**2


def closed_forms():
    return [({"student_gram": np.eye(2), "teacher_gram": np.array([[3.0, 4.0], [4.0, 3.0]])}, {}, 0.4)]
