import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 1.0}]
ADAPTIVE = {"adi": 10.0}
IMAGES_OPTIONS = [
    ADAPTIVE | {"tv_l1": 0.3},
    ADAPTIVE | {"mode": "paper", "adi_temperature": 1.5},
    {"norms": 0.0, "tv_l2": 0.0, "l2": 0.0},
    {"first_norm": 1.0, "norms": 0.01, "l2": 0.5, "tv_l2": 0.5},
]
IMAGES_LIVELY = ADAPTIVE  # every signal takes part
PIXELS = {"generator": "pixels", "mode": "lockstep", "latent": 1}
ROUNDS = [
    {"synthesis": PIXELS, "norms": True, "options": {"l2": 0.1, "tv_l2": 0.2, "tv_l1": 0.3}},
    {
        "synthesis": PIXELS | {"generator_steps": 2, "student_steps": 2},
        "norms": True,
        "options": ADAPTIVE | {"temperature": 2.0, "norms": 0.5, "first_norm": 3.0, "mode": "paper"},
    },
]
FREE = {"generator": "pixels", "latent": 1}
BATCHES = [
    {
        "synthesis": FREE | {"steps": 4, "jitter": 2, "flip": True, "clip": False, "keep": "last"},
        "options": ADAPTIVE | {"l2": 0.1, "tv_l2": 0.2},
    },
    {"synthesis": FREE | {"steps": 5, "jitter": 0, "clip": False, "keep": "best"}},
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def images_inputs(seed, samples=5, classes=4, widths=(3, 2), size=(2, 4, 3)):
    rng = np.random.default_rng(seed)
    return inputs(seed, (samples, classes)) | {
        "teacher_norms": [rng.uniform(0.2, 2.0, size=(4, width)) for width in widths],
        "normalised_images": rng.normal(size=(samples, *size)),
        "labels": rng.integers(0, classes, size=samples),
    }


def images_variants(seed):
    return [images_inputs(seed, samples=2, classes=7, widths=(1,), size=(1, 2, 2))]


def images_wrong(inputs):
    rows = [{**inputs, "teacher_norms": [norm[:3] for norm in inputs["teacher_norms"]]}]
    return [*rows, {**inputs, "teacher_norms": []}]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, teacher_logits, temperature=3.0):
    values = []
    for s, t in zip(student_logits, teacher_logits):
        p, q = softmax(t / temperature), softmax(s / temperature)
        values.append(temperature**2 * sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p))))
    return np.array(values)


def closed_forms():
    odds = {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[3 * math.log(3.0), 0.0]])}
    return [(odds, {}, [9 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))])]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def jensen_shannon(t, s, temperature, mode):
    p, q = softmax(t / temperature), softmax(s / temperature)
    mean = [(a + b) / 2 for a, b in zip(p, q)]
    if mode == "paper":
        return (kl(p, mean) + kl(q, mean)) / 2
    p, q, mean = ([min(max(v, 0.01), 0.99) for v in values] for values in (p, q, mean))
    return min(max((kl(mean, p) + kl(mean, q)) / 2, 0.0), 1.0)


def neighbours(image):
    """Each place's difference from one neighbour, direction by direction: across, down, and both diagonals."""
    channels, height, width = image.shape
    found = []
    for down, across in ((0, 1), (1, 0), (1, -1), (1, 1)):
        places = [(c, i, j) for c in range(channels) for i in range(height - down) for j in range(width)]
        found.append([image[c, i + down, j + across] - image[c, i, j] for c, i, j in places if 0 <= j + across < width])
    return found


def images_reference(
    student_logits,
    teacher_logits,
    teacher_norms,
    normalised_images,
    labels,
    norms=10.0,
    first_norm=10.0,
    tv_l1=0.0,
    tv_l2=2.5e-5,
    l2=3e-8,
    adi=0.0,
    adi_temperature=3.0,
    mode="code",
):
    found = {"cross_entropy": np.array([-math.log(softmax(z)[y]) for z, y in zip(teacher_logits, labels)])}
    if norms:
        value = 0.0
        for i, (mean, variance, kept_mean, kept_variance) in enumerate(teacher_norms):
            apart = math.sqrt(sum((a - b) ** 2 for a, b in zip(mean, kept_mean)))
            apart += math.sqrt(sum((a - b) ** 2 for a, b in zip(variance, kept_variance)))
            value += apart * (first_norm if i == 0 else 1.0)
        found["norms"] = norms * value
    steps = [neighbours(image) for image in normalised_images]
    if tv_l1:
        found["tv_l1"] = tv_l1 * np.array([sum(sum(map(abs, d)) / len(d) for d in own) for own in steps])
    if tv_l2:
        found["tv_l2"] = tv_l2 * sum(math.sqrt(sum(v * v for own in steps for v in own[k])) for k in range(4))
    if l2:
        found["l2"] = l2 * np.array([math.sqrt(sum(v * v for v in image.flatten())) for image in normalised_images])
    if adi:
        pairs = zip(teacher_logits, student_logits)
        found["adaptive"] = adi * np.array([1 - jensen_shannon(t, s, adi_temperature, mode) for t, s in pairs])
    return found


def images_closed_forms():
    """A plane that rises by 1 a column; opposite and equal beliefs."""
    sure, plane = np.array([[900.0, 0.0]]), np.array([[[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]]])
    given = {
        "student_logits": sure[:, ::-1].copy(),
        "teacher_logits": sure,
        "teacher_norms": [np.array([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]), np.array([[0.0], [2.0], [0.0], [5.0]])],
        "normalised_images": plane,
        "labels": np.array([0]),
    }
    plain = {
        "cross_entropy": [0.0],
        "norms": 10 * (10 * 5 + 3),
        "tv_l2": 2.5e-5 * (2 + 2 * math.sqrt(2)),
        "l2": [3e-8 * math.sqrt(10)],
    }
    factors = {"norms": 0.0, "tv_l1": 2.0, "tv_l2": 0.0, "l2": 0.0, "adi": 3.0, "mode": "paper"}
    apart = {"cross_entropy": [0.0], "tv_l1": [2.0 * 3], "adaptive": [3.0 * (1 - math.log(2))]}
    agreed = given | {"student_logits": sure}
    half = 0.5 * math.log(0.5 / 0.01) + 0.5 * math.log(0.5 / 0.99)
    turned = {"cross_entropy": [0.0], "tv_l1": [6.0], "adaptive": [3.0 * (1 - min(half, 1.0))]}
    return [
        (given, {}, plain),
        (given, factors, apart),
        (agreed, factors, apart | {"adaptive": [3.0]}),
        (given, factors | {"mode": "code"}, turned),
    ]


def total(said, own, x, labels, *, norms, first_norm, tv_l1, tv_l2, l2, adi, adi_temperature, mode):
    """The loss of the images, by torch."""
    value = F.cross_entropy(said["logits"], labels)
    for i, (mean, variance, kept_mean, kept_variance) in enumerate(said["norms"]):
        value = value + norms * (first_norm if i == 0 else 1) * ((mean - kept_mean).norm() + (variance - kept_variance).norm())
    across, down = x.diff(dim=3), x.diff(dim=2)
    falling, rising = x[:, :, 1:, 1:] - x[:, :, :-1, :-1], x[:, :, 1:, :-1] - x[:, :, :-1, 1:]
    for steps in (across, down, falling, rising):
        value = value + tv_l1 * steps.abs().mean() + tv_l2 * steps.pow(2).sum().sqrt()
    value = value + l2 * x.flatten(1).pow(2).sum(1).sqrt().mean()
    if adi:
        p, q = ((s["logits"] / adi_temperature).softmax(1) for s in (said, own))
        m = (p + q) / 2
        if mode == "paper":
            apart = (F.kl_div(m.log(), p, reduction="none") + F.kl_div(m.log(), q, reduction="none")).sum(1) / 2
        else:
            p, q, m = (v.clamp(0.01, 0.99) for v in (p, q, m))
            apart = ((F.kl_div(p.log(), m, reduction="none") + F.kl_div(q.log(), m, reduction="none")).sum(1) / 2).clamp(0, 1)
        value = value + adi * (1 - apart.mean())
    return value


FACTORS = {
    "norms": 10.0,
    "first_norm": 10.0,
    "tv_l1": 0.0,
    "tv_l2": 2.5e-5,
    "l2": 3e-8,
    "adi": 0.0,
    "adi_temperature": 3.0,
    "mode": "code",
}


def factors(options):
    return {name: options.get(name, value) for name, value in FACTORS.items()}


def rounds(
    student,
    teacher,
    generator,
    states,
    made,
    *,
    signals,
    normalise,
    lr,
    images_lr,
    weight,
    ce_weight,
    temperature=3.0,
    **options,
):
    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam(generator.parameters(), lr=images_lr)
    for turn in made:
        for batch in turn["images"]:
            images = generator(batch["latents"], batch["labels"])
            making.zero_grad()
            said = (signals(model, images) for model in (teacher, student))
            total(*said, normalise(images), batch["labels"], **factors(options)).backward()
            making.step()
        for batch in turn["student"]:
            images = generator(batch["latents"], batch["labels"]).detach()
            wanted = (signals(teacher, images)["logits"] / temperature).softmax(1)
            said = signals(student, images)["logits"]
            apart = F.kl_div((said / temperature).log_softmax(1), wanted, reduction="batchmean")
            learning.zero_grad()
            (weight * temperature**2 * apart + ce_weight * F.cross_entropy(said, batch["labels"])).backward()
            learning.step()
    return {"student": student.state_dict(), "generator": generator.state_dict()}


def batches(
    student, teacher, generator, states, made, *, signals, normalise, images_lr, latents_lr, betas, steps, meta, keep, **options
):
    said, losses = [], []
    for batch in made:
        generator.load_state_dict(batch["fresh"])
        making = torch.optim.Adam(generator.parameters(), lr=images_lr, betas=betas)
        found = []
        for step in batch["steps"]:
            images = generator(batch["latents"], batch["labels"])
            seen, heard = signals(teacher, step["see"](images)), signals(student, step["see"](images))
            places = [x.transpose(0, 1).flatten(1) for x in seen["entering"]]
            moments = [(x.mean(1), x.var(1, unbiased=False)) for x in places]
            seen["norms"] = [(*own, *kept) for own, *kept in zip(moments, seen["means"], seen["variances"])]
            loss = total(seen, heard, normalise(images), batch["labels"], **factors(options))
            found.append((loss.item(), images.detach()))
            making.zero_grad()
            loss.backward()
            making.step()
        best = min(found, key=lambda pair: pair[0])
        losses.append(best[0] if keep == "best" else found[-1][0])
        said.append(best[1] if keep == "best" else generator(batch["latents"], batch["labels"]).detach())
    return {"images": said, "losses": losses, "generator": dict(generator.named_parameters())}
