import math
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.5}, {"form": "logits"}]
IMAGES_OPTIONS = [{"gan": "saturating"}, {"gan": "least_squares"}]
SMALL = {
    "options": {"width": 4, "join": "onehot", "upsample": "transposed", "last": "tanh", "init": "normal"},
    "latent": 5,
    "before": 0,
}
ROUNDS = [
    {
        "synthesis": SMALL | {"generator_steps": 2, "student_steps": 2, "real": 0.5},
        "options": {"width": 2, "dropout": 0.0, "critic_lr": 0.02},
    },
    {
        "synthesis": SMALL | {"generator_steps": 1, "student_steps": 1, "real": 0.0},
        "options": {"width": 1, "dropout": 0.0, "critic_lr": 0.01, "gan": "saturating", "form": "logits"},
    },
    {
        "synthesis": SMALL | {"generator_steps": 1, "student_steps": 3, "real": 0.25},
        "options": {"width": 1, "dropout": 0.0, "critic_lr": 0.05, "gan": "least_squares", "temperature": 2.0},
    },
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def variants(seed):
    return [inputs(seed, (2, 7))]


def images_inputs(seed, samples=5, classes=4):
    rng = np.random.default_rng(seed)
    return {
        "score": rng.normal(size=samples) * 3,
        "class_scores": rng.normal(size=(samples, classes)) * 3,
        "labels": rng.integers(classes, size=samples),
    }


def images_variants(seed):
    return [images_inputs(seed, 2, 7)]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, teacher_logits, form="kl", temperature=4.0):
    values = []
    for s, t in zip(student_logits, teacher_logits):
        if form == "logits":
            values.append(sum((a - b) ** 2 for a, b in zip(t, s)) / 2)
            continue
        p, q = softmax(t / temperature), softmax(s / temperature)
        values.append(temperature**2 * sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p))))
    return np.array(values)


def closed_forms():
    def odds(temperature):
        return {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[temperature * math.log(3.0), 0.0]])}

    nats = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    apart = {"student_logits": np.array([[1.0, 0.0]]), "teacher_logits": np.array([[4.0, 4.0]])}
    return [(odds(4.0), {}, [16 * nats]), (odds(1.0), {"temperature": 1.0}, [nats]), (apart, {"form": "logits"}, [12.5])]


def images_reference(score, class_scores, labels, gan="non_saturating"):
    source, classes = [], []
    for s, z, y in zip(score, class_scores, labels):
        real = 1 / (1 + math.exp(-s))
        source.append({"non_saturating": -math.log(real), "saturating": math.log(1 - real), "least_squares": (1 - s) ** 2}[gan])
        classes.append(-math.log(softmax(z)[y]))
    return {"source": np.array(source), "classes": np.array(classes)}


def images_closed_forms():
    """A critic that gives a third to an image's being real, and sees its class with 1 / 4."""
    given = {
        "score": np.array([-math.log(2.0)]),
        "class_scores": np.array([[0.0, math.log(3.0)]]),
        "labels": np.array([0]),
    }
    classes = [math.log(4.0)]
    return [
        (given, {}, {"source": [math.log(3.0)], "classes": classes}),
        (given, {"gan": "saturating"}, {"source": [math.log(2 / 3)], "classes": classes}),
        (given | {"score": np.array([3.0])}, {"gan": "least_squares"}, {"source": [4.0], "classes": classes}),
    ]


def game(gan, real, fake):
    """(what the critic minimises, what the generator minimises) by the source alone."""
    if gan == "least_squares":
        return ((1 - real) ** 2 + fake**2).mean(), ((1 - fake) ** 2).mean()
    told = -(torch.sigmoid(real).log() + (1 - torch.sigmoid(fake)).log()).mean()
    return told, (1 - torch.sigmoid(fake)).log().mean() if gan == "saturating" else -torch.sigmoid(fake).log().mean()


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
    form="kl",
    temperature=4.0,
    gan="non_saturating",
    width=16,
    dropout=0.5,
    critic_lr=2e-4,
):
    assert not dropout
    layers = []
    for i, (before, after) in enumerate(pairwise([3, width, 2 * width, 4 * width, 8 * width, 16 * width, 32 * width])):
        layers += [nn.Conv2d(before, after, 3, 2 if i in (0, 2, 4) else 1, 1), nn.LeakyReLU(0.2), nn.Identity()]
    layers += [nn.Flatten(), nn.Linear(32 * width, 1 + 3)]  # 8 px halved three times
    critic = nn.ModuleDict({"critic": nn.ModuleDict({"layers": nn.Sequential(*layers)})}).double()
    critic.load_state_dict(states[1])

    def judge(images):
        scores = layers_of(2 * images - 1)
        return scores[:, 0], scores[:, 1:]

    layers_of = critic["critic"]["layers"]
    judging = torch.optim.Adam(critic.parameters(), lr=critic_lr, betas=(0.5, 0.999))
    making = torch.optim.Adam(generator.parameters(), lr=images_lr, betas=(0.5, 0.999))
    learning = torch.optim.SGD(student.parameters(), lr=lr)
    for turn in made:
        for batch in turn["images"]:
            images = generator(batch["latents"], batch["labels"])
            (real, real_classes), (fake, fake_classes) = judge(batch["real_images"]), judge(images.detach())
            told, _ = game(gan, real, fake)
            classes = F.cross_entropy(real_classes, batch["real_labels"]) + F.cross_entropy(fake_classes, batch["labels"])
            judging.zero_grad()
            (told + classes).backward()
            judging.step()
            fake, fake_classes = judge(images)
            _, fooled = game(gan, real.detach(), fake)
            making.zero_grad()
            (fooled + F.cross_entropy(fake_classes, batch["labels"])).backward()
            making.step()
        for batch in turn["student"]:
            with torch.no_grad():
                images, labels = generator(batch["latents"], batch["labels"])[batch["rows"]], batch["labels"][batch["rows"]]
            if "real_images" in batch:
                images = torch.cat([batch["real_images"], images])
                labels = torch.cat([batch["real_labels"], labels])
            said, wanted = signals(student, images)["logits"], signals(teacher, images)["logits"]
            if form == "logits":
                apart = ((wanted - said) ** 2).sum(1).mean() / 2
            else:
                logs = (said / temperature).log_softmax(1)
                apart = temperature**2 * F.kl_div(logs, (wanted / temperature).softmax(1), reduction="batchmean")
            learning.zero_grad()
            (weight * apart + ce_weight * F.cross_entropy(said, labels)).backward()
            learning.step()
    return {"student": student.state_dict(), "generator": generator.state_dict(), "images": critic.state_dict()}
