import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = []
IMAGES_OPTIONS = [{"form": "log"}]
SMALL = {"options": {"width": 4, "last": "tanh_norm"}, "latent": 5, "scheduler": "constant"}
ROUNDS = [
    {"synthesis": SMALL},
    {"synthesis": SMALL | {"generator_steps": 2, "student_steps": 1}, "options": {"form": "log"}},
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def images_inputs(seed):
    return inputs(seed)


def images_variants(seed):
    return [inputs(seed, (2, 7))]


def discrepancies(student_logits, teacher_logits):
    return [sum(abs(a - b) for a, b in zip(s, t)) / len(t) for s, t in zip(student_logits, teacher_logits)]


def reference(student_logits, teacher_logits):
    return np.array(discrepancies(student_logits, teacher_logits))


def images_reference(student_logits, teacher_logits, form="l1"):
    found = discrepancies(student_logits, teacher_logits)
    return -np.array(found) if form == "l1" else -math.log(1 + sum(found) / len(found))


DIFFERING = {"student_logits": np.array([[0.0, 0.0], [1.0, 2.0]]), "teacher_logits": np.array([[1.0, -3.0], [1.0, 2.0]])}


def closed_forms():
    return [(DIFFERING, {}, [2.0, 0.0])]


def images_closed_forms():
    return [(DIFFERING, {}, [-2.0, 0.0]), (DIFFERING, {"form": "log"}, -math.log(2.0))]


def rounds(student, teacher, generator, states, made, *, signals, lr, images_lr, weight, ce_weight, form="l1"):
    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam(generator.parameters(), lr=images_lr)
    for turn in made:
        for batch in turn["images"]:
            images = generator(batch["latents"], batch["labels"])
            apart = F.l1_loss(signals(student, images)["logits"], signals(teacher, images)["logits"])
            making.zero_grad()
            (-apart if form == "l1" else -torch.log(apart + 1)).backward()
            making.step()
        for batch in turn["student"]:
            images = generator(batch["latents"], batch["labels"]).detach()
            said = signals(student, images)["logits"]
            apart = F.l1_loss(said, signals(teacher, images)["logits"].detach())
            learning.zero_grad()
            (weight * apart + ce_weight * F.cross_entropy(said, batch["labels"])).backward()
            learning.step()
    return {"student": student.state_dict(), "generator": generator.state_dict()}
