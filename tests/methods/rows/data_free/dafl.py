import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 2.5}]
IMAGES_OPTIONS = [{"mode": "paper"}, {"one_hot": 0.05, "entropy": 20.0, "activation": 0.01}]
ROUNDS = [
    {"synthesis": {"options": {"width": 4, "last": "tanh_norm"}, "latent": 5}},
    {
        "synthesis": {"options": {"width": 4}, "latent": 5, "generator_steps": 2, "student_steps": 2},
        "options": {"temperature": 2.0, "mode": "paper", "entropy": 1.0},
    },
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def images_inputs(seed, samples=5, classes=4, width=3):
    rng = np.random.default_rng(seed)
    return {
        "teacher_logits": rng.normal(size=(samples, classes)) * 3,
        "teacher_embedding": rng.uniform(0.1, 2.0, size=(samples, width)) * rng.choice([-1, 1], size=(samples, width)),
    }


def images_variants(seed):
    return [images_inputs(seed, samples=2, classes=6, width=1)]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, teacher_logits, temperature=1.0):
    values = []
    for s, t in zip(student_logits, teacher_logits):
        p, q = softmax(t / temperature), softmax(s / temperature)
        values.append(temperature**2 * sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p))))
    return np.array(values)


def closed_forms():
    odds = {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[math.log(3.0), 0.0]])}
    return [(odds, {}, [0.75 * math.log(1.5) + 0.25 * math.log(0.5)])]


def images_reference(teacher_logits, teacher_embedding, one_hot=1.0, entropy=5.0, activation=0.1, mode="code"):
    known = [softmax(z) for z in teacher_logits]
    samples, classes, width = *teacher_logits.shape, teacher_embedding.shape[1]
    sure, excited = [], []
    for i in range(samples):
        label = max(range(classes), key=lambda j, i=i: teacher_logits[i][j])
        sure.append(-one_hot * math.log(known[i][label]))
        size = sum(abs(v) for v in teacher_embedding[i])
        excited.append(-activation * (size / width if mode == "code" else size))
    mean = [sum(known[i][j] for i in range(samples)) / samples for j in range(classes)]
    if mode == "code":
        spread = sum(m * math.log10(m) for m in mean)
    else:
        spread = -(-sum(m * math.log(m) for m in mean) / classes)
    return {"one_hot": np.array(sure), "activation": np.array(excited), "entropy": entropy * spread}


def images_closed_forms():
    """Two images, each of a class of its own, of which the teacher is certain; and two of which it knows nothing."""
    sure = {"teacher_logits": np.array([[800.0, 0.0], [0.0, 800.0]]), "teacher_embedding": np.array([[1.0, -3.0], [0.0, 0.0]])}
    same = {"teacher_logits": np.array([[800.0, 0.0], [800.0, 0.0]]), "teacher_embedding": np.zeros((2, 2))}
    unsure = {"teacher_logits": np.zeros((2, 2)), "teacher_embedding": np.ones((2, 2))}
    nothing = [0.0, 0.0]
    return [
        (sure, {}, {"one_hot": nothing, "activation": [-0.2, 0.0], "entropy": 5 * math.log10(0.5)}),
        (sure, {"mode": "paper"}, {"one_hot": nothing, "activation": [-0.4, 0.0], "entropy": 5 * math.log(0.5) / 2}),
        (same, {}, {"one_hot": nothing, "activation": nothing, "entropy": 0.0}),
        (unsure, {}, {"one_hot": [math.log(2)] * 2, "activation": [-0.1] * 2, "entropy": 5 * math.log10(0.5)}),
    ]


def rounds(
    student,
    teacher,
    generator,
    states,
    made,
    *,
    signals,
    lr,
    images_lr,
    weight,
    ce_weight,
    temperature=1.0,
    one_hot=1.0,
    entropy=5.0,
    activation=0.1,
    mode="code",
):
    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam(generator.parameters(), lr=images_lr)
    for turn in made:
        for batch in turn["images"]:
            said = signals(teacher, generator(batch["latents"], batch["labels"]))
            sure = F.cross_entropy(said["logits"], said["logits"].argmax(1))
            mean = said["logits"].softmax(1).mean(0)
            if mode == "code":
                spread, excited = (mean * mean.log10()).sum(), said["embedding"].abs().mean()
            else:
                spread, excited = (mean * mean.log()).sum() / len(mean), said["embedding"].abs().sum(1).mean()
            making.zero_grad()
            (one_hot * sure + entropy * spread - activation * excited).backward()
            making.step()
        for batch in turn["student"]:
            with torch.no_grad():
                images = generator(batch["latents"], batch["labels"])
                wanted = (signals(teacher, images)["logits"] / temperature).softmax(1)
            said = signals(student, images)["logits"]
            apart = F.kl_div((said / temperature).log_softmax(1), wanted, reduction="batchmean")
            learning.zero_grad()
            (weight * temperature**2 * apart + ce_weight * F.cross_entropy(said, batch["labels"])).backward()
            learning.step()
    return {"student": student.state_dict(), "generator": generator.state_dict()}
