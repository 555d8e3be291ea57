import math

import numpy as np
import torch
from torch.nn import functional as F

OPTIONS = [{"normalise": False}]
GRAFTED_LATER = {"inward.1.weight", "inward.2.weight", "outward.1.weight", "outward.2.weight"}
TRACES = [
    {"steps_per_epoch": 7, "still": {*GRAFTED_LATER, "inward.0.weight"}},  # the first three blocks, each alone
    {  # the chain of two, of three, of all
        "options": {"block_share": 0.0, "normalise": False},
        "still": {*GRAFTED_LATER - {"outward.1.weight", "outward.2.weight"}, "inward.0.weight", "outward.0.weight"},
    },
]


def inputs(seed, shape=(5, 4)):
    rng = np.random.default_rng(seed)
    return {"student_logits": rng.normal(size=shape) * 3, "teacher_logits": rng.normal(size=shape) * 3}


def variants(seed):
    return [inputs(seed, (2, 7))]


def reference(student_logits, teacher_logits, normalise=True):
    values = []
    for s, t in zip(student_logits, teacher_logits):
        own = math.sqrt(sum(v * v for v in s)) if normalise else 1.0
        theirs = math.sqrt(sum(v * v for v in t)) if normalise else 1.0
        total = sum((a / own - b / theirs) ** 2 for a, b in zip(s, t))
        values.append(total if normalise else total / len(s))
    return np.array(values)


def closed_forms():
    given = {"student_logits": np.array([[3.0, 4.0], [0.0, 2.0]]), "teacher_logits": np.array([[6.0, 8.0], [-5.0, 0.0]])}
    opposite = {"student_logits": np.array([[1.0, -1.0]]), "teacher_logits": np.array([[-2.0, 2.0]])}
    return [(given, {}, [0.0, 2.0]), (given, {"normalise": False}, [12.5, 14.5]), (opposite, {}, [4.0])]


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
    normalise=True,
    block_share=0.5,
):
    """The grafts of TRACES; the last two of a chain need the adapters between it in the block that joins."""
    state = {name: value.clone() for name, value in state.items()}
    names = [name for name in state if name != "started"]
    for name in names:
        state[name].requires_grad_(True)
    entries = (student.stage2, student.stage3, student.classifier)

    def through(name, maps):
        return torch.einsum("oi,bihw->bohw", state[name][:, :, 0, 0], maps)

    for batch in batches:
        images, step = batch["images"], batch["step"]
        if block_share == 0.0:
            first, last, state["started"] = 0, step + 1, torch.tensor(step)
            with torch.no_grad():
                between = state[f"inward.{step}.weight"][:, :, 0, 0] @ state[f"outward.{step}.weight"][:, :, 0, 0]
                weights = entries[step].weight
                joined = torch.zeros_like(weights)
                for o in range(weights.shape[0]):
                    for j in range(weights.shape[1]):
                        joined[o, j] = sum(weights[o, i] * between[i, j] for i in range(weights.shape[1]))
                weights.copy_(joined)
        else:
            first, last, state["started"] = step, step, torch.tensor(step)
        theirs = signals(teacher, images)
        changes = {}
        if first:
            read = through(f"inward.{first - 1}.weight", theirs["stages"][first - 1].detach())
            changes[first - 1] = lambda own, read=read: read
        own = signals(student, images, changes)
        logits = own["logits"]
        if last < 3:
            graft = through(f"outward.{last}.weight", own["stages"][last])
            logits = signals(teacher, images, {last: lambda own, graft=graft: graft})["logits"]
        if normalise:
            a = logits / logits.norm(dim=1, keepdim=True)
            b = theirs["logits"] / theirs["logits"].norm(dim=1, keepdim=True)
            apart = ((a - b) ** 2).sum(1).mean()
        else:
            apart = ((logits - theirs["logits"]) ** 2).mean()
        loss = weight * apart + ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        parameters = [*student.parameters(), *(state[name] for name in names)]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter -= lr * (torch.zeros_like(parameter) if gradient is None else gradient)
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value.detach() for name, value in state.items()}
