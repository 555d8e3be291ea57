import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F

OPTIONS = [{"temperature": 2.5}]
IMAGES_OPTIONS = [{"relu": False}]
PIXELS = {"generator": "pixels", "mode": "lockstep", "latent": 1}


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def images_inputs(seed, samples=5, shapes=((3, 2, 2), (4,))):
    rng = np.random.default_rng(seed)
    return {
        "teacher_features": [rng.normal(size=(samples, *shape)) * 3 for shape in shapes],
        "targets": rng.normal(size=(samples, sum(shape[0] for shape in shapes))) * 3,
    }


def images_variants(seed):
    return [images_inputs(seed, 2, ((6,),)), images_inputs(seed, 3, ((2, 1, 3), (1,), (3, 2, 1)))]


def images_wrong(inputs):
    return [{**inputs, "teacher_features": []}, {**inputs, "targets": inputs["targets"][:, 1:]}]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, teacher_logits, temperature=8.0):
    values = []
    for s, t in zip(student_logits, teacher_logits):
        p, q = softmax(t / temperature), softmax(s / temperature)
        values.append(temperature**2 * sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p))))
    return np.array(values)


def images_reference(teacher_features, targets, relu=True):
    def seen(value):
        return max(value, 0.0) if relu else value

    values = []
    for i, wanted in enumerate(targets):
        value, place = 0.0, 0
        for feature in teacher_features:
            size = feature.shape[1]
            means = [np.mean(feature[i][j]) for j in range(size)]
            apart = sum((seen(wanted[place + j]) - seen(means[j])) ** 2 for j in range(size)) / size
            value += apart if len(teacher_features) == 1 else apart / size
            place += size
        values.append(value)
    return np.array(values)


def closed_forms():
    odds = {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[8 * math.log(3.0), 0.0]])}
    return [(odds, {}, [64 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))])]


def images_closed_forms():
    top = {"teacher_features": [np.array([[1.0, -5.0]])], "targets": np.array([[3.0, -2.0]])}
    both = {"teacher_features": [np.array([[[[1.0, 3.0]]]]), np.array([[1.0, 1.0]])], "targets": np.array([[5.0, 1.0, 3.0]])}
    return [(top, {}, [2.0]), (top, {"relu": False}, [6.5]), (both, {}, [9.0 + 4.0 / 2 / 2])]


def record(classes, size, seed):
    """A file of records, of all images or of each class; one activation never varies."""
    rng = np.random.default_rng(seed)
    lead = (classes,) if classes else ()
    factors = rng.normal(size=(*lead, size, size))
    factors[..., 0, :] = 0.0
    covariance = factors @ np.swapaxes(factors, -1, -2)
    path = Path(tempfile.gettempdir()) / f"raykd-records-{classes}-{size}-{seed}.safetensors"
    part = path.with_suffix(f".{os.getpid()}")  # several processes of a test run make the same file
    save_file({"mean": rng.normal(size=(*lead, size)), "covariance": covariance}, str(part))
    os.replace(part, path)
    return str(path)


ROUNDS = [
    {"synthesis": PIXELS, "options": {"records": record(3, 3, 0)}, "still": ("mean", "root")},
    {
        "synthesis": PIXELS | {"generator_steps": 2, "student_steps": 2},
        "options": {"records": record(0, 3, 1), "relu": False, "temperature": 2.0},
        "still": ("mean", "root"),
    },
]
BATCHES = [{"synthesis": {"latent": 1, "steps": 4}, "options": {"records": record(3, 3, 0)}}]


def images_total(found, batch, state, *, records, relu=True):
    """Its targets are drawn by the state of the Module, whose records have a test of their own."""
    mean, root, labels = state["mean"], state["root"], batch["labels"]
    noise = torch.randn(len(labels), mean.shape[-1], generator=batch["draws"](), dtype=torch.float64)
    rows = [mean[y] + root[y] @ e if mean.ndim == 2 else mean + root @ e for y, e in zip(labels, noise)]
    wanted = torch.stack(rows)
    return F.mse_loss(found.clamp(min=0), wanted.clamp(min=0)) if relu else F.mse_loss(found, wanted)


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
    temperature=8.0,
    **options,
):
    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam(generator.parameters(), lr=images_lr)
    for turn in made:
        for batch in turn["images"]:
            images = generator(batch["latents"], batch["labels"])
            making.zero_grad()
            images_total(signals(teacher, images)["logits"], batch, states[1], **options).backward()
            making.step()
        for batch in turn["student"]:
            images = generator(batch["latents"], batch["labels"]).detach()
            wanted = (signals(teacher, images)["logits"] / temperature).softmax(1)
            said = signals(student, images)["logits"]
            apart = F.kl_div((said / temperature).log_softmax(1), wanted, reduction="batchmean")
            learning.zero_grad()
            (weight * temperature**2 * apart + ce_weight * F.cross_entropy(said, batch["labels"])).backward()
            learning.step()
    return {"student": student.state_dict(), "generator": generator.state_dict(), "images": states[1]}


def batches(
    student, teacher, generator, states, made, *, signals, normalise, images_lr, latents_lr, betas, steps, meta, keep, **options
):
    said, losses = [], []
    for batch in made:
        generator.load_state_dict(batch["fresh"])
        making = torch.optim.Adam(generator.parameters(), lr=images_lr, betas=betas)
        for step in batch["steps"]:
            images = generator(batch["latents"], batch["labels"])
            loss = images_total(signals(teacher, step["see"](images))["logits"], batch, states, **options)
            making.zero_grad()
            loss.backward()
            making.step()
            with torch.no_grad():
                generator.pixels.copy_(generator.pixels.clamp(normalise(torch.zeros(())), normalise(torch.ones(()))))
        losses.append(loss.item())
        said.append(generator(batch["latents"], batch["labels"]).detach())
    return {"images": said, "losses": losses, "generator": dict(generator.named_parameters())}
