"""Three optimizer steps, once by raykd and once by a row's plain PyTorch loop.

A row's loop:

    trace(student, teacher, state, batches, *, signals, sampler, lr, weight, ce_weight, **options) -> dict[str, Tensor]

    student, teacher  plain float64 `nn.Module`s; the loop trains `student` in place. Pass copies. Where the setting has
                      `teachers`, the second is a list of them.
    state             the initial `state_dict()` of the method's Module, after `prepare`, in float64; not changed.
    batches           one dict a step: `images` [b 3 h w] float64 as the models take them, `labels` [b], `sample_index` [b],
                      `epoch` and `step`, `generator`: fresh for each step and seeded as the one raykd gets;
                      `teachers_classes` where the setting has `teachers`.
    signals           `signals(model, images, changes={}) -> {"logits", "embedding", "stages": [one feature a stage]}`, with
                      gradient; `changes` maps a stage's number from 0 to a function that replaces its output.
    sampler           `sampler(labels, generator) -> [b r]` indices, for methods that draw negatives: the Module's own
                      `sample_negatives`, whose distribution has a test of its own.
    lr                of plain SGD: no momentum, no weight decay, student and connectors alike.
    weight, ce_weight the step's loss is `ce_weight * cross_entropy + weight * loss`, means over the batch.
    options           every other keyword of the method; defaults as in the paper.

It returns all final parameters and buffers: `student.<name>` of the student, `module.<name>` of the Module. A row's
`TRACES` lists settings, all optional: `student_strides`, `teacher_strides` of the nets below, `options`, `teachers` (how many;
none: one, not in a list), `label_maps` (one a teacher: the student's class of each of its classes), `steps_per_epoch`
(all: one epoch; `on_epoch` runs before each), and `still`: names of the Module's parameters that three steps leave alone.

`drive` is the other side: the Module under torch.optim.SGD, wired by hand, its hooks called as the scheme calls them. The
learner's tests put the Learner in its place.
"""

import copy
import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

SAMPLES, CLASSES, BATCH, STEPS, SIZE = 12, 3, 4, 3, 8
DATASET_LABELS = torch.arange(SAMPLES) % CLASSES
STUDENT_WIDTHS, TEACHER_WIDTHS = (4, 5, 6), ((6, 7, 8), (5, 8, 7), (7, 6, 9))


class TinyNet(nn.Module):
    """Three stages, a pooled embedding, a linear classifier."""

    def __init__(self, widths=STUDENT_WIDTHS, strides=(1, 2, 2), classes=CLASSES):
        super().__init__()
        pairs = list(zip((3, *widths), widths, strides))
        self.stage1, self.stage2, self.stage3 = (nn.Conv2d(i, o, 3, stride=s, padding=1) for i, o, s in pairs)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, images):
        return signals(self, images)["logits"]


def signals(net, images, changes=None):
    """What a tap would see: every stage after its ReLU, and after what replaces it."""
    stages = []
    for number, stage in enumerate((net.stage1, net.stage2, net.stage3)):
        images = torch.relu(stage(images))
        images = (changes or {}).get(number, lambda x: x)(images)
        stages.append(images)
    embedding = images.mean((2, 3))
    return {"logits": net.classifier(embedding), "embedding": embedding, "stages": stages}


def label_maps(setting):
    """The student's class of each class of each teacher; all of them where the setting names none."""
    return setting.get("label_maps", [tuple(range(CLASSES))] * setting.get("teachers", 1))


def teacher_specs(setting):
    """(widths, strides, number of classes) of each teacher."""
    strides = setting.get("teacher_strides", (1, 2, 2))
    return [(TEACHER_WIDTHS[i], strides, len(classes)) for i, classes in enumerate(label_maps(setting))]


def nets(setting, seed=0):
    """Student and teacher of a setting, float64; a list of teachers where it has `teachers`."""
    torch.manual_seed(seed)
    student = TinyNet(STUDENT_WIDTHS, setting.get("student_strides", (1, 2, 2))).double()
    teachers = [TinyNet(*spec).double().eval().requires_grad_(False) for spec in teacher_specs(setting)]
    return student, teachers if "teachers" in setting else teachers[0]


def classes_of(setting):
    """`teachers_classes` as a loss gets it."""
    return {"teachers_classes": [torch.tensor(c) for c in label_maps(setting)]} if "teachers" in setting else {}


def batches(seed=0, setting=None):
    """STEPS batches of an epoch over the data set; the generators are fresh at each call."""
    setting = setting or {}
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(SAMPLES, generator=rng)
    found = []
    for step in range(STEPS):
        index = order[step * BATCH : (step + 1) * BATCH]
        images = torch.rand(BATCH, 3, SIZE, SIZE, generator=rng, dtype=torch.float64)
        batch = {"images": images, "labels": DATASET_LABELS[index], "sample_index": index}
        time = {"epoch": step // setting.get("steps_per_epoch", STEPS), "step": step}
        found.append({**batch, **time, **classes_of(setting), "generator": torch.Generator().manual_seed(1000 + step)})
    return found


def heard(teacher, images):
    """Signals of the teacher, or of each teacher in a list, without gradient."""
    with torch.no_grad():
        return [signals(one, images) for one in teacher] if isinstance(teacher, list) else signals(teacher, images)


def derive(kind, feature):
    """A derived signal, written out again."""
    if kind == "attention":
        return (feature**2).mean(1)
    rows = feature.flatten(1)
    if kind == "similarity":
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def pick(found, name, layers):
    """The signal or signals a parameter name asks for; of several models a list of what it asks of each."""
    if isinstance(found, list):
        return [pick(one, name, layers) for one in found]
    kind = name.split("_", 1)[1]
    if kind == "similarity":
        return derive(kind, found["embedding"])
    if kind.rstrip("s") in ("feature", "gram", "attention"):
        at = range(len(found["stages"])) if layers == "stages" else [stage_number(layer) for layer in layers]
        chosen = [found["stages"][i] for i in at]
        chosen = chosen if kind.startswith("feature") else [derive(kind.rstrip("s"), feature) for feature in chosen]
        return chosen if kind.endswith("s") else chosen[0]
    return found[kind]


def stage_number(layer):
    number = int(layer.removeprefix("stage"))
    return number - 1 if number > 0 else number


def shapes(value):
    """Shapes without the batch axis, nested as the value."""
    return [shapes(entry) for entry in value] if isinstance(value, list) else tuple(value.shape[1:])


def build(method, student, teacher, setting, seed=1):
    """The method's Module in float64, prepared; each part gets the options it declares."""
    images, options = batches()[0]["images"], defaults_of(method) | setting.get("options", {})
    own, theirs = signals(student, images), heard(teacher, images)
    facts = {"num_samples": SAMPLES, "num_classes": CLASSES, "dataset_labels": DATASET_LABELS, **classes_of(setting)}
    layers = getattr(method, "LAYERS", None)
    given = {}
    for name, parameter in inspect.signature(method.Module.__init__).parameters.items():
        if name in facts:
            given[name] = facts[name]
        elif name.startswith(("student_", "teacher_", "teachers_")):
            given[name] = shapes(pick(own if name.startswith("student") else theirs, name, layers))
        elif parameter.kind is parameter.KEYWORD_ONLY and name in options:
            given[name] = options[name]
    torch.manual_seed(seed)
    module = method.Module(**given).double()
    if hasattr(method, "prepare"):
        method.prepare(module, **{k: facts[k] for k in list(inspect.signature(method.prepare).parameters)[1:]})
    return module


def defaults_of(method):
    """Defaults of the loss's options."""
    loss = getattr(method, method.__name__.rpartition(".")[2] + "_loss")
    return {n: p.default for n, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY}


def call(method, module, own, theirs, batch, options):
    """Module.forward by its signature; the loss's defaults stand for options that are not set."""
    layers, given = getattr(method, "LAYERS", None), {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            given[name] = {**defaults_of(method), **options}[name]
        elif name in batch:
            given[name] = batch[name]
        else:
            given[name] = pick(own if name.startswith("student") else theirs, name, layers)
    return module(**given)


@dataclass
class Hand:
    """What a method's `step` sees of a learner."""

    student: nn.Module
    method: Any
    weight: float
    ce_weight: float
    optimizer: torch.optim.Optimizer
    parameters: list
    losses: dict = field(default_factory=dict)
    rank: int = 0

    def tapped(self, images):
        return keyed(self.method, signals(self.student, images), "student_")


def keyed(method, found, role):
    """One model's signals by key, those that Module.forward asks of a role, and the logits."""
    layers, answer = getattr(method, "LAYERS", None), {"logits": found["logits"]}
    for name in inspect.signature(method.Module.forward).parameters:
        if name.startswith(role) and name != "teachers_classes":
            kind, value = name.split("_", 1)[1], pick(found, name, layers)
            if isinstance(value, list):
                at = ["stage1", "stage2", "stage3"] if layers == "stages" else layers
                answer |= {f"{kind.rstrip('s')}@{layer}": tensor for layer, tensor in zip(at, value)}
            else:
                layered = kind in ("feature", "gram", "attention")
                answer[f"{kind}@{layers[0]}" if layered else kind] = value
    return answer


def run_step(method, module, hand, batch, theirs):
    """The method's `step`, as the learner calls it."""
    lists = isinstance(theirs, list)
    answers = [keyed(method, one, "teachers_" if lists else "teacher_") for one in (theirs if lists else [theirs])]
    method.step(module, hand, batch, {"teachers": answers} if lists else {"teacher": answers[0]})


def changed(method, module, theirs):
    """Stage number -> what replaces its output, as the method's `before_forward` asks for."""
    layers = getattr(method, "LAYERS", None)
    at = range(3) if layers == "stages" else [stage_number(layer) % 3 for layer in layers]
    found = {}
    names = [n for n in inspect.signature(module.forward).parameters if n.startswith("teacher") and n != "teachers_classes"]
    given = {name: pick(theirs, name, layers) for name in names}
    method.before_forward(module, lambda i, fn: found.update({at[i]: fn}), **given)
    return found


def drive(method, module, student, teacher, steps, *, lr, weight, ce_weight, setting):
    """Trains student and Module in place with torch.optim.SGD; returns what a row's trace returns."""
    parameters = [*student.parameters(), *module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    bound = SimpleNamespace(module=module, weight=weight)
    hand = Hand(student, method, weight, ce_weight, optimizer, parameters, {"": bound})
    for batch in steps:
        if hasattr(method, "on_epoch") and batch["step"] % setting.get("steps_per_epoch", STEPS) == 0:
            method.on_epoch(module, batch["epoch"])
        theirs = heard(teacher, batch["images"])
        if hasattr(method, "step"):
            run_step(method, module, hand, batch, theirs)
        changes = changed(method, module, theirs) if hasattr(method, "before_forward") else {}
        own = signals(student, batch["images"], changes)
        value = call(method, module, own, theirs, batch, setting.get("options", {}))
        terms = value if isinstance(value, dict) else {"": value}
        loss = ce_weight * F.cross_entropy(own["logits"], batch["labels"])
        loss = loss + weight * sum(term.mean() for term in terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    final = {f"student.{name}": value for name, value in student.state_dict().items()}
    return final | {f"module.{name}": value for name, value in module.state_dict().items()}


def both(method, row, setting, *, lr=0.05, weight=0.5, ce_weight=1.0):
    """(raykd's result, the row's result) of one setting from one start."""
    options = setting.get("options", {})
    student, teacher = nets(setting)
    module = build(method, student, teacher, setting)
    state = copy.deepcopy(module.state_dict())
    sampler = getattr(copy.deepcopy(module), "sample_negatives", None)
    common = {"lr": lr, "weight": weight, "ce_weight": ce_weight}
    given = (copy.deepcopy(student), teacher, state, batches(setting=setting))
    theirs = row.trace(*given, signals=signals, sampler=sampler, **common, **options)
    return drive(method, module, student, teacher, batches(setting=setting), **common, setting=setting), theirs
