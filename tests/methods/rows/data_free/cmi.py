import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

OPTIONS = [{"temperature": 2.5}]
IMAGES_OPTIONS = [{"bn": 2.0, "oh": 0.5, "adv": 1.0, "cr": 2.0, "contrast_temperature": 0.5}]
SMALL = {"options": {"width": 4, "init": "normal"}, "latent": 5, "jitter": 2, "steps": 3}
BATCHES = [
    {"synthesis": SMALL, "options": {"memory": 32, "negatives": 32, "head": 3}},
    {
        "synthesis": SMALL | {"keep": "last", "flip": False, "latents_lr": 0.0},
        "options": {"memory": 9, "negatives": 32, "head": 4, "cr": 2.0, "contrast_temperature": 0.5, "adv": 2.0},
    },
]


def inputs(seed, shape=(4, 3)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def images_inputs(seed, samples=4, classes=3, widths=(3, 2), width=3, earlier=2):
    """Logits in which both see the same class in two images or more."""
    rng = np.random.default_rng(seed)
    teacher, student = rng.normal(size=(samples, classes)) * 3, rng.normal(size=(samples, classes)) * 3
    for i in range(2):
        j = int(student[i].argmax())
        teacher[i, j] = teacher[i].max() + 1
    norms = [np.concatenate([rng.normal(size=(3, w)), rng.uniform(0.5, 2, size=(1, w))]) for w in widths]
    return {
        "student_logits": student,
        "teacher_logits": teacher,
        "teacher_norms": norms,
        "labels": rng.integers(classes, size=samples),
        "parts": rng.normal(size=(samples, width)),
        "wholes": rng.normal(size=(samples, width)),
        "parts_bank": rng.normal(size=(earlier, width)),
        "wholes_bank": rng.normal(size=(earlier, width)),
    }


def images_variants(seed):
    return [images_inputs(seed, 2, 7, (1, 4, 2), 2, 5)]


def images_wrong(inputs):
    return [{**inputs, "teacher_norms": [norm[:2] for norm in inputs["teacher_norms"]]}]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def divergence(s, t):
    p, q = softmax(t), softmax(s)
    return sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p)))


def reference(student_logits, teacher_logits, temperature=20.0):
    rows = zip(student_logits / temperature, teacher_logits / temperature)
    return np.array([temperature**2 * divergence(s, t) for s, t in rows])


ODDS = {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[math.log(3.0), 0.0]])}
NATS = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def closed_forms():
    return [(ODDS, {"temperature": 1.0}, [NATS])]


def length(values):
    return math.sqrt(sum(v * v for v in values))


def images_reference(
    student_logits,
    teacher_logits,
    teacher_norms,
    labels,
    parts,
    wholes,
    parts_bank,
    wholes_bank,
    bn=1.0,
    oh=1.0,
    adv=0.5,
    cr=0.8,
    contrast_temperature=0.1,
):
    known, gaps, heard = [], 0.0, []
    for s, t, y in zip(student_logits, teacher_logits, labels):
        known.append(-oh * math.log(softmax(t)[y]))
        same = max(range(len(s)), key=lambda j, s=s: s[j]) == max(range(len(t)), key=lambda j, t=t: t[j])
        heard.append(-adv * divergence(s, t) if same else 0.0)
    for mean, variance, running_mean, running_variance in teacher_norms:
        gaps += length(mean - running_mean) + length(variance - running_variance)
    anchors, others = [*parts, *parts_bank], [*wholes, *wholes_bank]
    values = []
    for i, a in enumerate(anchors):
        cosines = [sum(x * y for x, y in zip(a, o)) / length(a) / length(o) / contrast_temperature for o in others]
        values.append(-math.log(softmax(cosines)[i]))
    now, earlier = values[: len(parts)], values[len(parts) :]
    contrast = sum(now) / len(now) + (sum(earlier) / len(earlier) if earlier else 0.0)
    return {"oh": np.array(known), "bn": bn * gaps, "adv": np.array(heard), "cr": cr * contrast}


def images_closed_forms():
    norm = np.array([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [1.0, 3.0]])
    none, one = np.zeros((0, 2)), np.array([[2.0, 0.0]])
    given = ODDS | {"teacher_norms": [norm], "labels": np.array([0]), "parts": one, "wholes": one}
    alone = given | {"parts_bank": none, "wholes_bank": none}
    both = given | {"parts_bank": np.array([[0.0, 3.0]]), "wholes_bank": np.array([[0.0, 1.0]])}
    sure, apart = -math.log(0.75), math.log(1 + math.exp(-1.0))
    return [
        (alone, {}, {"oh": [sure], "bn": 7.0, "adv": [-NATS / 2], "cr": 0.0}),
        (both, {"cr": 1.0, "contrast_temperature": 1.0}, {"oh": [sure], "bn": 7.0, "adv": [-NATS / 2], "cr": 2 * apart}),
    ]


def batches(student, teacher, generator, states, made, *, signals, images_lr, latents_lr, betas, steps, meta, keep, **options):
    adv, cr, tau = options.get("adv", 0.5), options.get("cr", 0.8), options.get("contrast_temperature", 0.1)
    width = states["head.0.weight"].shape[1]
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, options["head"])).double()
    head.load_state_dict({name.removeprefix("head."): v for name, v in states.items() if name.startswith("head.")})
    memory, size = [], options["memory"]  # (features of a part, of the whole), the newest last
    said, losses = [], []

    def pooled(found):
        return torch.cat([entering.mean((2, 3)) for entering in found["entering"]], 1)

    def unit(x):
        x = head(x)
        return x / x.norm(dim=1, keepdim=True)

    for batch in made:
        generator.load_state_dict(batch["fresh"])
        z, count = batch["latents"].clone().requires_grad_(True), len(batch["labels"])
        groups = [{"params": [*generator.parameters(), *head.parameters()]}, {"params": [z], "lr": latents_lr}]
        inner = torch.optim.Adam(groups, lr=images_lr, betas=betas)
        best, lowest = None, math.inf
        memory = memory[-(size - count) :]
        for step in batch["steps"]:
            images = generator(z, batch["labels"])
            found, heard = signals(teacher, step["see"](images)), signals(student, step["see"](images))["logits"]
            gaps = 0.0
            for entering, mean, variance in zip(found["entering"], found["means"], found["variances"]):
                gaps = gaps + (entering.mean((0, 2, 3)) - mean).norm()
                gaps = gaps + (entering.var((0, 2, 3), unbiased=False) - variance).norm()
            same = (heard.argmax(1) == found["logits"].argmax(1)).double()
            p, q = found["logits"].softmax(1), heard.softmax(1)
            loss = gaps + F.cross_entropy(found["logits"], batch["labels"])
            loss = loss - adv * ((p * torch.log(p / q)).sum(1) * same).mean()
            part, whole = pooled(signals(teacher, step["part"](images))), pooled(found)
            every = [torch.stack([m[i] for m in memory]) if memory else whole.new_zeros(0, width) for i in (0, 1)]
            anchors = torch.cat([unit(part), unit(every[0])])
            others = torch.cat([unit(whole), unit(every[1])]).detach()
            apart = F.cross_entropy(anchors @ others.T / tau, torch.arange(len(anchors)), reduction="none")
            loss = loss + cr * (apart[:count].mean() + (apart[count:].mean() if memory else 0.0))
            if loss.item() < lowest:
                best, lowest = images.detach(), loss.item()
                remembered = list(zip(part.detach(), whole.detach()))
            inner.zero_grad()
            loss.backward()
            inner.step()
        with torch.no_grad():
            said.append(best if keep == "best" else generator(z, batch["labels"]))
        losses.append(lowest if keep == "best" else loss.item())
        memory = memory + remembered
    return {"images": said, "losses": losses, "generator": dict(generator.named_parameters())}
