import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"temperature": 2.5}, {"matching": 0.5, "dependence": 2.0}]
APART = {"dependence"}  # between the student and itself: no signal of either enters
TRACES = [
    {"teachers": 2},
    {
        "teachers": 2,
        "teacher_strides": (2, 1, 2),
        "label_maps": [(2, 0), (1, 0, 2)],
        "steps_per_epoch": 1,
        "options": {"matching_epochs": 2.0, "dependence_epochs": 2.0, "independent_after": 2.0, "temperature": 2.0},
    },
]


def inputs(seed, b=5, c=4):
    rng = np.random.default_rng(seed)
    classes = [np.array([3, 1]), np.array([0, 1, 2, 3])]
    return {
        "student_logits": rng.normal(size=(b, c)) * 2,
        "teachers_logits": [rng.normal(size=(b, len(own))) * 2 for own in classes],
        "teachers_classes": classes,
        "own_log_shares": -rng.uniform(0.1, 2.0, size=3),
    }


def wrong(inputs):
    one, other = inputs["teachers_logits"]
    return [
        {**inputs, "teachers_logits": [one]},
        {**inputs, "teachers_logits": [other, one]},
        {**inputs, "teachers_classes": [inputs["teachers_classes"][0][:1], inputs["teachers_classes"][1]]},
    ]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def reference(student_logits, teachers_logits, teachers_classes, own_log_shares, matching=1.0, dependence=0.1, temperature=1.0):
    matched = []
    for i, student in enumerate(student_logits):
        value = 0.0
        for logits, classes in zip(teachers_logits, teachers_classes):
            p = softmax([z / temperature for z in logits[i]])
            q = softmax([student[k] / temperature for k in classes])
            value += sum(a * math.log(a / b) for a, b in zip(p, q)) / len(teachers_logits)
        matched.append(matching * temperature**2 * value)
    apart = [-dependence * sum(own_log_shares)] * len(student_logits)
    return {"matching": np.array(matched), "dependence": np.array(apart)}


def closed_forms():
    logits, classes = np.array([[math.log(3.0), 0.0, 5.0]]), [np.array([1, 0])]
    apart = {"student_logits": logits, "teachers_logits": [np.zeros((1, 2))], "teachers_classes": classes}
    nats = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    shares = np.log(np.array([0.5, 0.25]))
    return [({**apart, "own_log_shares": shares}, {"dependence": 1.0}, {"matching": [nats], "dependence": [math.log(8.0)]})]


def trace(
    student,
    teacher,
    state,
    batches,
    *,
    signals,
    sampler=None,
    lr,
    weight=1.0,
    ce_weight=1.0,
    matching=1.0,
    dependence=0.1,
    temperature=1.0,
    matching_epochs=20.0,
    dependence_epochs=0.0,
    independent_after=0.0,
):
    state = {name: value.clone() for name, value in state.items()}
    trained = [name for name in state if name != "epoch"]
    for name in trained:
        state[name].requires_grad_(True)
    for batch in batches:
        epoch = batch["epoch"]
        state["epoch"] = torch.full_like(state["epoch"], epoch)
        theirs = [signals(one, batch["images"]) for one in teacher]
        powers = state["scores"].exp()
        shares = powers / powers.sum(1, keepdim=True)
        flow = max(1 - epoch / independent_after, 0) if independent_after else 1

        def mix(place, own, theirs=theirs, shares=shares, flow=flow):
            found = own * (1 - flow * shares[place, 1:].sum())
            for m, one in enumerate(theirs):
                feature, size = one["stages"][place].detach(), own.shape[2]
                if feature.shape[2] > size:
                    feature = F.avg_pool2d(feature, feature.shape[2] // size)
                if feature.shape[2] < size:
                    feature = feature.repeat_interleave(size // feature.shape[2], 2).repeat_interleave(
                        size // feature.shape[3], 3
                    )
                q = state[f"transforms.{m}.{place}.weight"][:, :, 0, 0]
                found = found + flow * shares[place, 1 + m] * torch.einsum("oc,bchw->bohw", q, feature)
            return found

        changes = {place: lambda own, place=place, mix=mix: mix(place, own) for place in range(3)}
        own = signals(student, batch["images"], changes)
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        decay = max(1 - epoch / matching_epochs, 0) if matching_epochs else 1
        rise = min(epoch / dependence_epochs, 1) if dependence_epochs else 1
        for one, classes in zip(theirs, batch["teachers_classes"]):
            p = torch.softmax(one["logits"].detach() / temperature, 1)
            q = torch.softmax(own["logits"][:, classes] / temperature, 1)
            matched = temperature**2 * (p * (p / q).log()).sum(1).mean() / len(teacher)
            loss = loss + weight * matching * decay * matched
        loss = loss - weight * dependence * rise * shares[:, 0].log().sum()
        parameters = [*student.parameters(), *(state[name] for name in trained)]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter -= lr * (torch.zeros_like(parameter) if gradient is None else gradient)
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
