import math

import numpy as np

OPTIONS = [
    {"temperature": 2.5, "teacher_weights": (3.0, 1.0, 0.5)},
    {"mode": "switch"},
    {"mode": "switch", "teacher_weights": (0.0, 1.0, 2.0)},
    {"mode": "augment", "temperature": 2.0},
    {"mode": "augment", "teacher_weights": (1.0, 0.0, 4.0)},
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=shape) * 3 for _ in range(4)]
    return {"student_logits": logits[0], "teachers_logits": logits[1:], "generator": seed + 7}


def variants(seed):
    return [inputs(seed, (2, 3, 2, 4))]


def wrong(inputs):
    first, *others = inputs["teachers_logits"]
    return [{**inputs, "teachers_logits": [*others, first[:, :1]]}, {**inputs, "teachers_logits": [*others, first[:1]]}]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def soft_cross_entropy(student, teacher, temperature):
    if student.ndim > 1:
        return sum(soft_cross_entropy(s, t, temperature) for s, t in zip(student, teacher)) / len(student)
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return -(temperature**2) * sum(a * math.log(b) for a, b in zip(p, q))


def reference(student_logits, teachers_logits, generator, mode="weighted", teacher_weights=(), temperature=1.0):
    count = len(student_logits)
    weights = teacher_weights or [1.0] * len(teachers_logits)
    weights = [w / sum(weights) for w in weights]
    values = []
    if mode == "weighted":
        chances = [weights] * count
    else:
        drawn = generator.choice(weights, 1 if mode == "switch" else count)
        drawn = [drawn[0]] * count if mode == "switch" else drawn
        assert all(weights[m] > 0 for m in drawn)
        chances = [[float(m == chosen) for m in range(len(weights))] for chosen in drawn]
    for i in range(count):
        each = [soft_cross_entropy(student_logits[i], teacher[i], temperature) for teacher in teachers_logits]
        values.append(sum(w * value for w, value in zip(chances[i], each)))
    return np.array(values)


def closed_forms():
    even, odds = np.zeros((1, 2)), np.array([[math.log(3.0), 0.0]])
    one = {"student_logits": odds, "teachers_logits": [even, odds], "generator": 0}
    log_three, log_one = math.log(4 / 3), math.log(4)  # -log of the student's two probabilities
    mixed = (0.5 + 0.75) / 2 * log_three + (0.5 + 0.25) / 2 * log_one
    first = 0.5 * log_three + 0.5 * log_one
    return [(one, {}, [mixed]), (one, {"teacher_weights": (1.0, 0.0), "mode": "switch"}, [first])]
