import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 2.5}]
IMAGES_OPTIONS = [{"temperature": 2.5}]
PIXELS = {"generator": "pixels", "mode": "lockstep", "latent": 1}
ROUNDS = [
    {"synthesis": PIXELS, "still": ("concentration",)},
    {
        "synthesis": PIXELS | {"generator_steps": 2, "student_steps": 2},
        "options": {"temperature": 4.0, "betas": (0.5, 2.0, 1.0)},
        "still": ("concentration",),
    },
]
BATCHES = [{"synthesis": {"latent": 1, "steps": 4}, "options": {"temperature": 3.0}}]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def images_inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"teacher_logits": rng.normal(size=shape) * 3, "targets": rng.dirichlet(np.ones(shape[1]), size=shape[0])}


def images_variants(seed):
    return [images_inputs(seed, (2, 7))]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, teacher_logits, temperature=20.0):
    values = []
    for s, t in zip(student_logits, teacher_logits):
        p, q = softmax(t / temperature), softmax(s / temperature)
        values.append(temperature**2 * sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p))))
    return np.array(values)


def images_reference(teacher_logits, targets, temperature=20.0):
    values = []
    for z, wanted in zip(teacher_logits, targets):
        known = softmax(z / temperature)
        values.append(-sum(wanted[j] * math.log(known[j]) for j in range(len(known))))
    return np.array(values)


def closed_forms():
    odds = {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[20 * math.log(3.0), 0.0]])}
    return [(odds, {}, [400 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))])]


def images_closed_forms():
    odds = {"teacher_logits": np.array([[20 * math.log(3.0), 0.0]]), "targets": np.array([[0.75, 0.25]])}
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    sure = {"teacher_logits": np.array([[2 * math.log(3.0), 0.0]]), "targets": np.array([[0.0, 1.0]])}
    return [(odds, {}, [entropy]), (sure, {"temperature": 2.0}, [math.log(4.0)])]


def concentration(weights):
    """Cosines of the classes' weights, each row stretched to 0..1."""
    w = weights.detach().numpy()
    alike = np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in w] for a in w])
    for row in alike:
        row[:] = (row - min(row)) / (max(row) - min(row))
    return alike


def distributions(weights, labels, betas, generator):
    """One a sample; the factors in turn."""
    alike = concentration(weights)
    alpha = np.array([betas[i % len(betas)] * alike[label] + 1e-4 for i, label in enumerate(labels.tolist())])
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn = np.random.default_rng(seed).standard_gamma(alpha)
    return torch.from_numpy(np.array([row / sum(row) for row in drawn]))


def images_total(teacher, logits, batch, *, temperature=20.0, betas=(1.0, 0.1)):
    wanted = distributions(teacher.classifier.weight, batch["labels"], betas, batch["draws"]())
    return F.cross_entropy(logits / temperature, wanted)


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
    temperature=20.0,
    **options,
):
    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam(generator.parameters(), lr=images_lr)
    own = {"temperature": temperature} | options
    for turn in made:
        for batch in turn["images"]:
            images = generator(batch["latents"], batch["labels"])
            making.zero_grad()
            images_total(teacher, signals(teacher, images)["logits"], batch, **own).backward()
            making.step()
        for batch in turn["student"]:
            images = generator(batch["latents"], batch["labels"]).detach()
            wanted = (signals(teacher, images)["logits"] / temperature).softmax(1)
            said = signals(student, images)["logits"]
            apart = F.kl_div((said / temperature).log_softmax(1), wanted, reduction="batchmean")
            learning.zero_grad()
            (weight * temperature**2 * apart + ce_weight * F.cross_entropy(said, batch["labels"])).backward()
            learning.step()
    kept = {"concentration": torch.from_numpy(concentration(teacher.classifier.weight))}
    return {"student": student.state_dict(), "generator": generator.state_dict(), "images": kept}


def batches(
    student, teacher, generator, states, made, *, signals, normalise, images_lr, latents_lr, betas, steps, meta, keep, **options
):
    said, losses = [], []
    for batch in made:
        generator.load_state_dict(batch["fresh"])
        making = torch.optim.Adam(generator.parameters(), lr=images_lr, betas=betas)
        for step in batch["steps"]:
            images = generator(batch["latents"], batch["labels"])
            loss = images_total(teacher, signals(teacher, step["see"](images))["logits"], batch, **options)
            making.zero_grad()
            loss.backward()
            making.step()
            with torch.no_grad():
                generator.pixels.copy_(generator.pixels.clamp(normalise(torch.zeros(())), normalise(torch.ones(()))))
        losses.append(loss.item())
        said.append(generator(batch["latents"], batch["labels"]).detach())
    return {"images": said, "losses": losses, "generator": dict(generator.named_parameters())}
