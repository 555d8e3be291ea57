import copy
import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 2.5}]
IMAGES_OPTIONS = [{"bn": 1.0, "oh": 0.4, "adv": 1.33}]
SMALL = {"options": {"width": 4}, "latent": 5, "jitter": 2, "steps": 3}
LOCKSTEP = {"mode": "lockstep", "options": {"width": 4}, "latent": 5}
STILL = ("averages",)  # in lock-step there is no second batch
ROUNDS = [
    {"synthesis": LOCKSTEP, "norms": True, "options": {"warmup": 1}, "still": STILL},
    {
        "synthesis": LOCKSTEP | {"generator_steps": 2, "student_steps": 2},
        "norms": True,
        "options": {"warmup": 1, "bn": 2.0, "oh": 1.0, "adv": 3.0, "temperature": 2.0},
        "still": STILL,
    },
]
BATCHES = [
    {"synthesis": SMALL, "options": {"warmup": 2}},
    {
        "synthesis": SMALL | {"meta": "reptile", "keep": "last"},
        "options": {"warmup": 1, "momentum": 0.5, "oh": 1.0, "adv": 2.0},
    },
    {"synthesis": SMALL | {"steps": 1}, "options": {"warmup": 3, "momentum": 0.0, "bn": 1.0}},
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def images_inputs(seed, samples=5, classes=4, widths=(3, 2)):
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
    }


def images_variants(seed):
    return [images_inputs(seed, 2, 7, (1, 4, 2))]


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
    twenty = {"student_logits": np.zeros((1, 2)), "teacher_logits": np.array([[20 * math.log(3.0), 0.0]])}
    return [(ODDS, {"temperature": 1.0}, [NATS]), (twenty, {}, [400 * NATS])]


def length(values):
    return math.sqrt(sum(v * v for v in values))


def images_reference(student_logits, teacher_logits, teacher_norms, labels, bn=10.0, oh=0.5, adv=1.0):
    known, gaps, heard = [], 0.0, []
    for s, t, y in zip(student_logits, teacher_logits, labels):
        known.append(-oh * math.log(softmax(t)[y]))
        same = max(range(len(s)), key=lambda j, s=s: s[j]) == max(range(len(t)), key=lambda j, t=t: t[j])
        heard.append(-adv * divergence(s, t) if same else 0.0)
    for mean, variance, running_mean, running_variance in teacher_norms:
        gaps += length(mean - running_mean) + length(variance - running_variance)
    return {"oh": np.array(known), "bn": bn * gaps, "adv": np.array(heard)}


def images_closed_forms():
    norm = np.array([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [1.0, 3.0]])
    given = ODDS | {"teacher_norms": [norm, norm], "labels": np.array([0])}
    other = given | {"student_logits": np.array([[-9.0, 0.0]])}
    sure = -math.log(0.75)
    return [
        (given, {}, {"oh": [sure / 2], "bn": 140.0, "adv": [-NATS]}),
        (other, {"oh": 1.0, "bn": 1.0}, {"oh": [sure], "bn": 14.0, "adv": [0.0]}),
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
    temperature=20.0,
    bn=10.0,
    oh=0.5,
    adv=1.0,
    warmup=20,
):
    assert warmup == 1
    learning = torch.optim.SGD(student.parameters(), lr=lr)
    making = torch.optim.Adam(generator.parameters(), lr=images_lr, betas=(0.5, 0.999))
    for turn in made:
        for batch in turn["images"]:
            images = generator(batch["latents"], batch["labels"])
            found, heard = signals(teacher, images), signals(student, images)["logits"]
            gaps = 0.0
            for mean, variance, running_mean, running_variance in found["norms"]:
                gaps = gaps + (mean - running_mean).norm() + (variance - running_variance).norm()
            same = (heard.argmax(1) == found["logits"].argmax(1)).double()
            p, q = found["logits"].softmax(1), heard.softmax(1)
            apart = ((p * torch.log(p / q)).sum(1) * same).mean()
            making.zero_grad()
            (bn * gaps + oh * F.cross_entropy(found["logits"], batch["labels"]) - adv * apart).backward()
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
    latest = [torch.cat([v.detach() for v in pair]) for pair in zip(*[norm[:2] for norm in found["norms"]])]
    kept = {"averages": torch.zeros_like(states[1]["averages"]), "latest": torch.stack(latest), "batches": torch.tensor(1)}
    return {"student": student.state_dict(), "generator": generator.state_dict(), "images": kept}


def batches(student, teacher, generator, states, made, *, signals, images_lr, latents_lr, betas, steps, meta, keep, **options):
    bn, oh, adv = options.get("bn", 10.0), options.get("oh", 0.5), options.get("adv", 1.0)
    rate, warmup = options.get("momentum", 0.9), options["warmup"]
    outer = torch.optim.Adam(generator.parameters(), lr=images_lr * steps, betas=betas)
    ema, said, losses = None, [], []
    for number, batch in enumerate(made, 1):
        copied, z = copy.deepcopy(generator), batch["latents"].clone().requires_grad_(True)
        groups = [{"params": copied.parameters()}, {"params": [z], "lr": latents_lr}]
        inner = torch.optim.Adam(groups, lr=images_lr, betas=betas)
        grads = [torch.zeros_like(p) for p in generator.parameters()]
        best, lowest = None, math.inf
        for step in batch["steps"]:
            images = copied(z, batch["labels"])
            found = signals(teacher, step["see"](images))
            heard = signals(student, step["see"](images))["logits"]
            gaps, seen = 0.0, []
            for i, (entering, mean, variance) in enumerate(zip(found["entering"], found["means"], found["variances"])):
                now = entering.mean((0, 2, 3)), entering.var((0, 2, 3), unbiased=False)
                seen.append(tuple(v.detach() for v in now))
                if ema is not None:
                    now = tuple(rate * old + (1 - rate) * new for old, new in zip(ema[i], now))
                gaps = gaps + (now[0] - mean).norm() + (now[1] - variance).norm()
            loss = bn * gaps + oh * F.cross_entropy(found["logits"], batch["labels"])
            if number >= warmup:
                same = (heard.argmax(1) == found["logits"].argmax(1)).double()
                p, q = found["logits"].softmax(1), heard.softmax(1)
                loss = loss - adv * ((p * torch.log(p / q)).sum(1) * same).mean()
            if loss.item() < lowest:
                best, lowest = images.detach(), loss.item()
            inner.zero_grad()
            loss.backward()
            for total, p in zip(grads, copied.parameters()):
                total += p.grad
            inner.step()
        with torch.no_grad():
            said.append(best if keep == "best" else copied(z, batch["labels"]))
        losses.append(lowest if keep == "best" else loss.item())
        if ema is None:
            ema = seen
        else:
            ema = [tuple(rate * old + (1 - rate) * new for old, new in zip(*pair)) for pair in zip(ema, seen)]
        outer.zero_grad()
        for p, q, total in zip(generator.parameters(), copied.parameters(), grads):
            p.grad = total if meta == "fomaml" else (p - q).detach()
        outer.step()
    return {"images": said, "losses": losses, "generator": dict(generator.named_parameters())}
