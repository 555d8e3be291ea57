import math

import numpy as np

OPTIONS = [{"mode": "paper"}]


def inputs(seed, student_sizes=((4, 3), (2, 2)), teacher_sizes=((4, 3), (2, 2))):
    rng = np.random.default_rng(seed)
    return {
        "student_attentions": [rng.uniform(0.1, 2.0, size=(3, *size)) for size in student_sizes],
        "teacher_attentions": [rng.uniform(0.1, 2.0, size=(3, *size)) for size in teacher_sizes],
    }


def variants(seed):
    return [inputs(seed, ((4, 4), (2, 2)), ((2, 2), (6, 4)))]


def wrong(inputs):
    return [{**inputs, "student_attentions": inputs["student_attentions"][:1]}]


def pooled(attention, height, width):
    rows, columns = attention.shape[0] // height, attention.shape[1] // width
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            out[i, j] = attention[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].mean()
    return out


def unit(attention):
    flat = [v for row in attention for v in row]
    norm = math.sqrt(sum(v * v for v in flat))
    return [v / norm for v in flat]


def reference(student_attentions, teacher_attentions, mode="code"):
    values = []
    for i in range(len(student_attentions[0])):
        value = 0.0
        for student, teacher in zip(student_attentions, teacher_attentions):
            size = min(student.shape[1], teacher.shape[1]), min(student.shape[2], teacher.shape[2])
            s, t = unit(pooled(student[i], *size)), unit(pooled(teacher[i], *size))
            squares = [(a - b) ** 2 for a, b in zip(s, t)]
            value += sum(squares) / len(squares) if mode == "code" else math.sqrt(sum(squares)) / 2
        values.append(value)
    return np.array(values)


def closed_forms():
    apart = {"student_attentions": [np.array([[[1.0, 0.0]]])], "teacher_attentions": [np.array([[[0.0, 9.0]]])]}
    scaled = {"student_attentions": [np.array([[[3.0, 4.0]]])], "teacher_attentions": [np.array([[[6.0, 8.0]]])]}
    return [(apart, {}, [1.0]), (apart, {"mode": "paper"}, [math.sqrt(2) / 2]), (scaled, {}, [0.0])]
