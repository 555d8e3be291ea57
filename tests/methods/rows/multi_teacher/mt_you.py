import math

import numpy as np

OPTIONS = [
    {"temperature": 1.0, "margin": 0.5, "vote": "distance", "teacher_weights": (3.0, 1.0, 0.5)},
    {"distance": "euclidean", "teacher_weights": (1.0, 1.0, 2.0)},  # two against one is a tie
    {"num_triplets": 40, "kd_weight": 2.0, "triplet_weight": 0.5},
]


def inputs(seed, b=6):
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=(b, 4)) * 3 for _ in range(4)]
    grams = [v @ v.T for v in (rng.normal(size=(b, d)) for d in (3, 4, 5, 3))]
    given = {"student_logits": logits[0], "teachers_logits": logits[1:]}
    return {**given, "student_gram": grams[0], "teachers_gram": grams[1:], "generator": seed + 3}


def variants(seed):
    return [inputs(seed, 18)]  # more than one chunk of anchors


def wrong(inputs):
    first, *others = inputs["teachers_logits"]
    return [
        {**inputs, "teachers_logits": others},
        {**inputs, "teachers_logits": [*others, first[:, :1]]},
        {**inputs, "teachers_gram": [*inputs["teachers_gram"][:2], np.eye(2)]},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def apart(gram, i, j, distance):
    if distance == "unit":
        return 2 - 2 * gram[i, j] / math.sqrt(gram[i, i] * gram[j, j])
    return math.sqrt(gram[i, i] + gram[j, j] - 2 * gram[i, j])


def triplets_of(b, num_triplets, generator):
    if num_triplets is None:
        return [(i, j, k) for i in range(b) for j in range(b) for k in range(j + 1, b) if i not in (j, k)]
    anchors, ones, others = (generator.integers(b - i, (num_triplets,)) for i in range(3))
    found = []
    for i, one, other in zip(anchors, ones, others):
        ring = [(i + 1 + step) % b for step in range(b - 1)]
        j = ring[one]
        k = ring[-1] if other == one else ring[other]
        assert len({i, j, k}) == 3
        found.append((i, j, k))
    return found


def reference(
    student_logits,
    teachers_logits,
    student_gram,
    teachers_gram,
    generator,
    temperature=4.0,
    margin=0.2,
    vote="order",
    distance="unit",
    num_triplets=None,
    teacher_weights=(),
    kd_weight=1.0,
    triplet_weight=1.0,
):
    weights = teacher_weights or [1.0] * len(teachers_logits)
    weights = [w / sum(weights) for w in weights]
    kd = []
    for i, z in enumerate(student_logits):
        each = [softmax(teacher[i] / temperature) for teacher in teachers_logits]
        mean = [sum(w * p[c] for w, p in zip(weights, each)) for c in range(len(z))]
        own = softmax(z / temperature)
        kd.append(-kd_weight * temperature**2 * sum(p * math.log(q) for p, q in zip(mean, own)))
    hinges = []
    for i, j, k in triplets_of(len(student_gram), num_triplets, generator):
        ballots = [apart(g, i, k, distance) - apart(g, i, j, distance) for g in teachers_gram]
        ballots = [math.copysign(1, b) for b in ballots] if vote == "order" else ballots
        voted = sum(w * b for w, b in zip(weights, ballots))
        if abs(voted) > 1e-9:
            near, far = (j, k) if voted > 0 else (k, j)
            hinges.append(max(0.0, margin + apart(student_gram, i, near, distance) - apart(student_gram, i, far, distance)))
    return {"kd": np.array(kd), "triplet": triplet_weight * sum(hinges) / max(len(hinges), 1)}


def closed_forms():
    even = np.zeros((3, 2))
    on_a_line = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 3.0], [0.0, 3.0, 9.0]])  # gram of points at 0, 1, 3
    turned = np.array([[9.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])  # at 3, 1, 0
    agreed = {"student_logits": even, "teachers_logits": [even, even], "student_gram": on_a_line, "generator": 0}
    plain = {"distance": "euclidean", "temperature": 1.0}
    kd = [math.log(2)] * 3
    # distances 1, 3, 2: the two others of each anchor are 2, 1 and 1 apart; turned, the middle one sees them the other way
    return [
        ({**agreed, "teachers_gram": [on_a_line] * 2}, {**plain, "margin": 1.5}, {"kd": kd, "triplet": (0 + 0.5 + 0.5) / 3}),
        ({**agreed, "teachers_gram": [turned] * 2}, {**plain, "margin": 0.5}, {"kd": kd, "triplet": (0 + 1.5 + 0) / 3}),
        ({**agreed, "teachers_gram": [on_a_line, turned]}, {**plain, "margin": 1.5}, {"kd": kd, "triplet": (0 + 0.5) / 2}),
    ]
