import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

OPTIONS = [{"temperature": 2.5}]
IMAGES_OPTIONS = [{"mode": "norm"}, {"reconstruction": 3.0, "diversity": 0.5}]
SMALL = {"options": {"width": 4, "join": "onehot", "last": "tanh_each"}, "latent": 5}
ROUNDS = [
    {"synthesis": SMALL | {"before": 0, "generator_steps": 1}, "options": {"units": 6}},
    {
        "synthesis": SMALL | {"before": 0, "generator_steps": 2, "student_steps": 2},
        "options": {"units": 3, "decoder_layers": 2, "mode": "norm", "diversity": 2.0, "temperature": 2.0},
    },
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def images_inputs(seed, samples=4, classes=3, latent=5, shape=(2, 3, 4)):
    rng = np.random.default_rng(seed)
    return {
        "teacher_logits": rng.normal(size=(samples, classes)) * 3,
        "images": rng.uniform(size=(samples, *shape)),
        "latents": rng.normal(size=(samples, latent)),
        "decoded": rng.normal(size=(samples, latent)),
        "labels": rng.integers(classes, size=samples),
    }


def images_variants(seed):
    return [images_inputs(seed, 2, 7, 2, (1, 4, 2))]


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


def flat(image):
    values = []
    for channel in image:
        own = [v for row in channel for v in row]
        mean = sum(own) / len(own)
        variance = sum((v - mean) ** 2 for v in own) / len(own)
        values += [(v - mean) / math.sqrt(variance + 1e-5) for v in own]
    return values


def images_reference(teacher_logits, images, latents, decoded, labels, reconstruction=1.0, diversity=1.0, mode="code"):
    count, axes = latents.shape
    known = [-math.log(softmax(z)[y]) for z, y in zip(teacher_logits, labels)]
    missed = [sum((a - b) ** 2 for a, b in zip(d, z)) / axes for d, z in zip(decoded, latents)]
    made, pairs = [flat(image) for image in images], []
    for i in range(count):
        for j in range(count):
            squares = sum((a - b) ** 2 for a, b in zip(latents[i], latents[j]))
            gaps = [a - b for a, b in zip(made[i], made[j])]
            if mode == "code":
                pairs.append(squares / axes * sum(map(abs, gaps)) / len(gaps))
            else:
                pairs.append(math.sqrt(squares) * math.sqrt(sum(g * g for g in gaps)))
    return {
        "classes": np.array(known),
        "reconstruction": reconstruction * np.array(missed),
        "diversity": diversity * math.exp(-sum(pairs) / len(pairs)),
    }


def images_closed_forms():
    """Two images, one the negative of the other, of two pixels: each 1 and -1 away from its mean."""
    sign = 1 / math.sqrt(1 + 1e-5 / 0.25)
    given = {
        "teacher_logits": np.array([[800.0, 0.0], [0.0, 0.0]]),
        "images": np.array([[[[0.0, 1.0]]], [[[1.0, 0.0]]]]),
        "latents": np.array([[0.0, 0.0], [1.0, 0.0]]),
        "decoded": np.array([[0.0, 2.0], [1.0, 0.0]]),
        "labels": np.array([0, 1]),
    }
    both = {"classes": [0.0, math.log(2.0)], "reconstruction": [2.0, 0.0]}
    return [
        (given, {}, both | {"diversity": math.exp(-2 * 0.5 * 2 * sign / 4)}),
        (given, {"mode": "norm", "diversity": 10.0}, both | {"diversity": 10 * math.exp(-2 * math.sqrt(8) * sign / 4)}),
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
    reconstruction=1.0,
    diversity=1.0,
    mode="code",
    units=120,
    decoder_layers=1,
):
    pixels, latent = 3 * 8 * 8, 5
    layers = [nn.Linear(pixels, units), nn.ELU(), nn.BatchNorm1d(units)]
    for _ in range(decoder_layers):
        layers += [nn.Linear(units, units), nn.ELU(), nn.BatchNorm1d(units)]
    decoder = nn.ModuleDict({"decoder": nn.Sequential(*layers, nn.Linear(units, latent))}).double()
    decoder.load_state_dict(states[1])
    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam([*generator.parameters(), *decoder.parameters()], lr=images_lr)
    for turn in made:
        for batch in turn["images"]:
            images, noise = generator(batch["latents"], batch["labels"]), batch["latents"]
            x = F.instance_norm(images, eps=1e-5).flatten(1)
            loss = F.cross_entropy(signals(teacher, images)["logits"], batch["labels"])
            loss = loss + reconstruction * F.mse_loss(decoder["decoder"](x), noise)
            pairs = []
            for i in range(len(x)):
                for j in range(len(x)):
                    if i == j:
                        continue
                    if mode == "code":
                        pairs.append((noise[i] - noise[j]).pow(2).mean() * (x[i] - x[j]).abs().mean())
                    else:
                        pairs.append((noise[i] - noise[j]).norm() * (x[i] - x[j]).norm())
            loss = loss + diversity * torch.exp(-torch.stack(pairs).sum() / len(x) ** 2)
            making.zero_grad()
            loss.backward()
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
    return {"student": student.state_dict(), "generator": generator.state_dict(), "images": decoder.state_dict()}
