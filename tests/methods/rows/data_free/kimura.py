import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = IMAGES_OPTIONS = [{"temperature": 3.0}]
ROUNDS = [
    {"synthesis": {"latent": 1, "student_steps": 2}},
    {"synthesis": {"latent": 1, "student_steps": 1, "generator_steps": 2}, "options": {"temperature": 2.0}},
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


images_inputs = inputs


def variants(seed):
    return [inputs(seed, (2, 7))]


images_variants = variants


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, teacher_logits, temperature=1.0):
    values = []
    for s, t in zip(student_logits, teacher_logits):
        p, q = softmax(t / temperature), softmax(s / temperature)
        values.append(temperature**2 * sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p))))
    return np.array(values)


def images_reference(student_logits, teacher_logits, temperature=1.0):
    return -reference(student_logits, teacher_logits, temperature)


NATS = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def odds(temperature):
    return {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[temperature * math.log(3.0), 0.0]])}


def closed_forms():
    return [(odds(1.0), {}, [NATS]), (odds(2.0), {"temperature": 2.0}, [4 * NATS])]


def images_closed_forms():
    return [(given, options, [-value]) for given, options, (value,) in closed_forms()]


def rounds(student, teacher, generator, states, made, *, signals, lr, images_lr, weight, ce_weight, temperature=1.0):
    def apart(images):
        said, wanted = (signals(model, images)["logits"] / temperature for model in (student, teacher))
        return temperature**2 * F.kl_div(said.log_softmax(1), wanted.softmax(1), reduction="batchmean")

    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam([generator.pixels], lr=images_lr)
    for turn in made:
        for batch in turn["images"]:
            making.zero_grad()
            (-apart(generator(batch["latents"], batch["labels"]))).backward()
            making.step()
        for batch in turn["student"]:
            images = generator(batch["latents"], batch["labels"]).detach()
            wrong = F.cross_entropy(signals(student, images)["logits"], batch["labels"])
            learning.zero_grad()
            (weight * apart(images) + ce_weight * wrong).backward()
            learning.step()
    return {"student": student.state_dict(), "generator": generator.state_dict()}
