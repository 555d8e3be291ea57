"""Three optimizer steps, once by raykd and once by a row's plain PyTorch loop.

A row's loop:

    trace(student, teacher, state, batches, *, signals, sampler, lr, weight, ce_weight, **options) -> dict[str, Tensor]

    student, teacher  plain float64 `nn.Module`s; the loop trains `student` in place. Pass copies.
    state             the initial `state_dict()` of the method's Module, after `prepare`, in float64; not changed.
    batches           one dict a step: `images` [b 3 h w] float64 as the models take them, `labels` [b], `sample_index` [b],
                      `generator`: fresh for each step and seeded as the one raykd gets.
    signals           `signals(model, images) -> {"logits", "embedding", "stages": [one feature a stage]}`, with gradient.
    sampler           `sampler(labels, generator) -> [b r]` indices, for methods that draw negatives: the Module's own
                      `sample_negatives`, whose distribution has a test of its own.
    lr                of plain SGD: no momentum, no weight decay, student and connectors alike.
    weight, ce_weight the step's loss is `ce_weight * cross_entropy + weight * loss`, means over the batch.
    options           every other keyword of the method; defaults as in the paper.

It returns all final parameters and buffers: `student.<name>` of the student, `module.<name>` of the Module. A row's
`TRACES` lists settings: `student_strides`, `teacher_strides` of the nets below, and `options`.

`drive` is the other side: the Module under torch.optim.SGD, wired by hand. The learner's tests put the Learner in its place.
"""

import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F

SAMPLES, CLASSES, BATCH, STEPS, SIZE = 12, 3, 4, 3, 8
DATASET_LABELS = torch.arange(SAMPLES) % CLASSES


class TinyNet(nn.Module):
    """Three stages, a pooled embedding, a linear classifier."""

    def __init__(self, widths=(4, 5, 6), strides=(1, 2, 2)):
        super().__init__()
        pairs = list(zip((3, *widths), widths, strides))
        self.stage1, self.stage2, self.stage3 = (nn.Conv2d(i, o, 3, stride=s, padding=1) for i, o, s in pairs)
        self.classifier = nn.Linear(widths[-1], CLASSES)

    def forward(self, images):
        return signals(self, images)["logits"]


def signals(net, images):
    """What a tap would see: every stage after its ReLU."""
    stages = []
    for stage in (net.stage1, net.stage2, net.stage3):
        images = torch.relu(stage(images))
        stages.append(images)
    embedding = images.mean((2, 3))
    return {"logits": net.classifier(embedding), "embedding": embedding, "stages": stages}


def nets(setting, seed=0):
    """Student and teacher of a setting, float64."""
    torch.manual_seed(seed)
    student = TinyNet((4, 5, 6), setting.get("student_strides", (1, 2, 2))).double()
    teacher = TinyNet((6, 7, 8), setting.get("teacher_strides", (1, 2, 2))).double()
    return student, teacher.eval().requires_grad_(False)


def batches(seed=0):
    """STEPS batches of an epoch over the data set; the generators are fresh at each call."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(SAMPLES, generator=rng)
    found = []
    for step in range(STEPS):
        index = order[step * BATCH : (step + 1) * BATCH]
        images = torch.rand(BATCH, 3, SIZE, SIZE, generator=rng, dtype=torch.float64)
        batch = {"images": images, "labels": DATASET_LABELS[index], "sample_index": index}
        found.append({**batch, "generator": torch.Generator().manual_seed(1000 + step)})
    return found


def pick(found, name, layers):
    """The signal or signals a parameter name asks for."""
    kind = name.split("_", 1)[1]
    if kind in ("feature", "features"):
        at = range(len(found["stages"])) if layers == "stages" else [stage_number(layer) for layer in layers]
        chosen = [found["stages"][i] for i in at]
        return chosen if kind == "features" else chosen[0]
    return found[kind]


def stage_number(layer):
    number = int(layer.removeprefix("stage"))
    return number - 1 if number > 0 else number


def build(method, student, teacher, options, seed=1):
    """The method's Module in float64, prepared; each part gets the options it declares."""
    own, theirs = signals(student, batches()[0]["images"]), signals(teacher, batches()[0]["images"])
    facts = {"num_samples": SAMPLES, "num_classes": CLASSES, "dataset_labels": DATASET_LABELS}
    layers = getattr(method, "LAYERS", None)
    given = {}
    for name, parameter in inspect.signature(method.Module.__init__).parameters.items():
        if name in facts:
            given[name] = facts[name]
        elif name.startswith(("student_", "teacher_")):
            chosen = pick(own if name.startswith("student") else theirs, name, layers)
            given[name] = [s.shape[1:] for s in chosen] if isinstance(chosen, list) else chosen.shape[1:]
        elif parameter.kind is parameter.KEYWORD_ONLY and name in options:
            given[name] = options[name]
    torch.manual_seed(seed)
    module = method.Module(**given).double()
    if hasattr(method, "prepare"):
        method.prepare(module, **{k: facts[k] for k in list(inspect.signature(method.prepare).parameters)[1:]})
    return module


def call(method, module, own, theirs, batch, options):
    """Module.forward by its signature; the loss's defaults stand for options that are not set."""
    loss = next(fn for name, fn in vars(method).items() if name.endswith("_loss"))
    defaults = {n: p.default for n, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    layers, given = getattr(method, "LAYERS", None), {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            given[name] = {**defaults, **options}[name]
        elif name in batch:
            given[name] = batch[name]
        else:
            given[name] = pick(own if name.startswith("student") else theirs, name, layers)
    return module(**given)


def drive(method, module, student, teacher, steps, *, lr, weight, ce_weight, options):
    """Trains student and Module in place with torch.optim.SGD; returns what a row's trace returns."""
    optimizer = torch.optim.SGD([*student.parameters(), *module.parameters()], lr=lr)
    for batch in steps:
        own = signals(student, batch["images"])
        with torch.no_grad():
            theirs = signals(teacher, batch["images"])
        value = call(method, module, own, theirs, batch, options)
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
    module = build(method, student, teacher, options)
    state = copy.deepcopy(module.state_dict())
    sampler = getattr(copy.deepcopy(module), "sample_negatives", None)
    common = {"lr": lr, "weight": weight, "ce_weight": ce_weight}
    theirs = row.trace(copy.deepcopy(student), teacher, state, batches(), signals=signals, sampler=sampler, **common, **options)
    return drive(method, module, student, teacher, batches(), **common, options=options), theirs
