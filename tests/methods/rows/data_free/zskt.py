import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"mode": "paper"}, {"attention": 3.0}]
IMAGES_OPTIONS = [{"mode": "paper"}]
SMALL = {"options": {"width": 4, "last": "norm"}, "latent": 5, "scheduler": "constant", "student_steps": 2}
ROUNDS = [
    {"synthesis": SMALL},
    {"synthesis": SMALL | {"generator_steps": 2}, "options": {"mode": "paper", "attention": 2.0}},
]


def inputs(seed, student_sizes=((4, 3), (2, 2)), teacher_sizes=((4, 3), (2, 2)), shape=(3, 4)):
    rng = np.random.default_rng(seed)
    return {
        "student_logits": rng.normal(size=shape) * 3,
        "student_attentions": [rng.uniform(0.1, 2.0, size=(shape[0], *size)) for size in student_sizes],
        "teacher_logits": rng.normal(size=shape) * 3,
        "teacher_attentions": [rng.uniform(0.1, 2.0, size=(shape[0], *size)) for size in teacher_sizes],
    }


def variants(seed):
    return [inputs(seed, ((4, 4), (2, 2)), ((2, 2), (6, 4)))]


def wrong(inputs):
    return [{**inputs, "student_attentions": inputs["student_attentions"][:1]}]


def images_inputs(seed, shape=(3, 4)):
    found = inputs(seed, shape=shape)
    return {name: found[name] for name in ("student_logits", "teacher_logits")}


def images_variants(seed):
    return [images_inputs(seed, (2, 7))]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def divergence(s, t, mode):
    p, q = softmax(t), softmax(s)
    return sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p))) / (len(p) if mode == "code" else 1)


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


def reference(student_logits, student_attentions, teacher_logits, teacher_attentions, attention=250.0, mode="code"):
    beliefs, maps = [], []
    for i in range(len(student_logits)):
        beliefs.append(divergence(student_logits[i], teacher_logits[i], mode))
        value = 0.0
        for student, teacher in zip(student_attentions, teacher_attentions):
            size = min(student.shape[1], teacher.shape[1]), min(student.shape[2], teacher.shape[2])
            s, t = unit(pooled(student[i], *size)), unit(pooled(teacher[i], *size))
            squares = [(a - b) ** 2 for a, b in zip(s, t)]
            value += sum(squares) / len(squares) if mode == "code" else math.sqrt(sum(squares))
        maps.append(attention * value)
    return {"kl": np.array(beliefs), "attention": np.array(maps)}


def images_reference(student_logits, teacher_logits, mode="code"):
    return -np.array([divergence(s, t, mode) for s, t in zip(student_logits, teacher_logits)])


ODDS = {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[math.log(3.0), 0.0]])}
NATS = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def closed_forms():
    apart = {"student_attentions": [np.array([[[1.0, 0.0]]])], "teacher_attentions": [np.array([[[0.0, 9.0]]])]}
    scaled = {"student_attentions": [np.array([[[3.0, 4.0]]])], "teacher_attentions": [np.array([[[6.0, 8.0]]])]}
    return [
        (ODDS | apart, {}, {"kl": [NATS / 2], "attention": [250.0]}),
        (ODDS | apart, {"mode": "paper", "attention": 2.0}, {"kl": [NATS], "attention": [2 * math.sqrt(2)]}),
        (ODDS | scaled, {}, {"kl": [NATS / 2], "attention": [0.0]}),
    ]


def images_closed_forms():
    return [(ODDS, {}, [-NATS / 2]), (ODDS, {"mode": "paper"}, [-NATS])]


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
    attention=250.0,
    mode="code",
):
    def beliefs(said, wanted):
        p, q = wanted["logits"].softmax(1), said["logits"].softmax(1)
        found = p * torch.log(p / q)
        return found.mean() if mode == "code" else found.sum(1).mean()

    def looks(stage):
        found = stage.pow(2).mean(1).flatten(1)
        return found / found.norm(dim=1, keepdim=True)

    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam(generator.parameters(), lr=images_lr)
    for turn in made:
        batch = turn["student"][0]  # of the round
        for _ in turn["images"]:
            images = generator(batch["latents"], batch["labels"])
            making.zero_grad()
            (-beliefs(signals(student, images), signals(teacher, images))).backward()
            making.step()
        for _ in turn["student"]:
            images = generator(batch["latents"], batch["labels"]).detach()
            said, wanted = signals(student, images), signals(teacher, images)
            loss = beliefs(said, wanted)
            for own, theirs in zip(said["stages"], wanted["stages"]):
                apart = looks(own) - looks(theirs)
                loss = loss + attention * (apart.square().mean() if mode == "code" else apart.norm(dim=1).mean())
            learning.zero_grad()
            (weight * loss + ce_weight * F.cross_entropy(said["logits"], batch["labels"])).backward()
            learning.step()
    return {"student": student.state_dict(), "generator": generator.state_dict()}
