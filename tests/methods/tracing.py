"""Three optimizer steps, once by raykd and once by a row's plain PyTorch loop.

A row's loop, by whom the method listens to; each returns a dict of tensors:

    teachers  trace(student, teacher, state, batches, *, signals, sampler, lr, weight, ce_weight, **options)
    peers     trace(students, states, batches, *, ...): each student listens to all others
    nobody    trace(student, state, batches, *, ...): branches of the student, its averaged copy

    student, teacher  plain float64 `nn.Module`s; the loop trains `student`, or all `students`, in place. Pass copies. Where the
                      setting has `teachers`, the second is a list of them.
    state             the initial `state_dict()` of the method's Module, after `prepare`, in float64; not changed. Of peers
                      `states`, a list. A `peer_` loss has one Module a neighbour: with more than two peers `states[i]` is a
                      dict, number of the neighbour -> its state. Empty where the method has no Module. What an optimizer of
                      the Module's own remembers is not there: it begins anew.
    batches           one dict a step: `images` [b 3 h w] float64 as the models take them, `labels` [b], `sample_index` [b],
                      `epoch` and `step`, `generator`: fresh for each step and seeded as the one raykd gets;
                      `teachers_classes` where the setting has `teachers`; `views`, a list of what each branch sees, `images`
                      first, where each sees its own.
    signals           `signals(model, images, changes={}) -> {"logits", "embedding", "stages": [one feature a stage]}`, with
                      gradient; `changes` maps a stage's number from 0 to a function that replaces its output. Of a model with
                      branches a list of each, one entry a branch: `["logits"][i]`, `["stages"][i][j]`; `images` may be a list
                      of what each branch sees. Its parameters are named as in `branch_nets.py`: `plain.stage1.weight`.
    sampler           `sampler(labels, generator) -> [b r]` indices, for methods that draw negatives: the Module's own
                      `sample_negatives`, whose distribution has a test of its own.
    lr                of plain SGD: no momentum, no weight decay, student and connectors alike.
    weight, ce_weight the step's loss is `ce_weight * cross_entropy + weight * loss`, means over the batch; the loss of a
                      `peer_` method is its mean over the neighbours; with branches cross_entropy is of branch 0.
    options           every other keyword of the method; defaults as in the paper.

Peers learn at once: all forwards first, then every update; what one hears of another carries no gradient. A loop keeps averaged
copies itself: they begin as copies, and after each step become decay * copy + (1 - decay) * student. `rescale` of a branching
is the loop's as well: its `signals` have none.

It returns all final parameters and buffers: `student.<name>` of the student, `module.<name>` of the Module; of peers
`<i>.student.<name>` and `<i>.module.<name>`, with several Modules a peer `<i>.module.<j>.<name>`, j the neighbour's number.

A row's `TRACES` lists settings, all optional: `student_strides`, `teacher_strides` of the nets below, `options`, `teachers`
(how many; none: one, not in a list), `norms` (teachers have batch norms), `label_maps` (one a teacher: the student's class of
each of its classes), `steps_per_epoch` (all: one epoch; `on_epoch` runs before each), `peers` (how many), `branching` (see
branch_nets.py), `ema` (decay of the averaged copies), and `still`: names of the Module's parameters that three steps leave
alone.

`drive` is the other side: Modules under torch.optim.SGD, wired by hand, hooks called as the scheme calls them. The learner's
tests put the Learner in its place.
"""

import copy
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from branch_nets import TinyBranches
from torch import nn
from torch.nn import functional as F

from raykd.parts.grafts import Block

SAMPLES, CLASSES, BATCH, STEPS, SIZE = 12, 3, 4, 3, 8
DATASET_LABELS = torch.arange(SAMPLES) % CLASSES
STUDENT_WIDTHS, TEACHER_WIDTHS = (4, 5, 6), ((6, 7, 8), (5, 8, 7), (7, 6, 9))
PEER_WIDTHS = (STUDENT_WIDTHS, *TEACHER_WIDTHS)
ROLES = ("student", "teacher", "teachers", "peer", "peers", "ema")
LAYERED = ("feature", "gram", "attention")


class TinyNet(nn.Module):
    """Three stages, a pooled embedding, a linear classifier; with `norms` a batch norm in each stage, before its ReLU."""

    def __init__(self, widths=STUDENT_WIDTHS, strides=(1, 2, 2), classes=CLASSES, norms=False):
        super().__init__()
        pairs = list(zip((3, *widths), widths, strides))
        self.stage1, self.stage2, self.stage3 = (nn.Conv2d(i, o, 3, stride=s, padding=1) for i, o, s in pairs)
        self.classifier = nn.Linear(widths[-1], classes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths if norms)
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, images):
        return signals(self, images)["logits"]


def signals(net, images, changes=None):
    """What a tap would see: every stage after its ReLU, and after what replaces it."""
    if isinstance(net, TinyBranches):
        found = net.answers(images)
        return {key: [one[key] for one in found] for key in found[0]}
    stages, norms = [], []
    for number, stage in enumerate((net.stage1, net.stage2, net.stage3)):
        images = stage(images)
        if net.norms:
            kept = net.norms[number]
            mean, variance = images.mean((0, 2, 3)), images.var((0, 2, 3), correction=0)
            norms.append((mean, variance, kept.running_mean, kept.running_var))
            images = kept(images)
        images = torch.relu(images)
        images = (changes or {}).get(number, lambda x: x)(images)
        stages.append(images)
    embedding = images.mean((2, 3))
    found = {"logits": net.classifier(embedding), "embedding": embedding, "stages": stages}
    return found | ({"norms": norms} if norms else {})


def label_maps(setting):
    """The student's class of each class of each teacher; all of them where the setting names none."""
    return setting.get("label_maps", [tuple(range(CLASSES))] * setting.get("teachers", 1))


def teacher_specs(setting):
    """(widths, strides, number of classes, whether it has batch norms) of each teacher."""
    strides, norms = setting.get("teacher_strides", (1, 2, 2)), setting.get("norms", False)
    return [(TEACHER_WIDTHS[i], strides, len(classes), norms) for i, classes in enumerate(label_maps(setting))]


def learner_net(setting, number=0):
    """A net that learns, plain or with branches, in float32."""
    strides = setting.get("student_strides", (1, 2, 2))

    def make():
        return TinyNet(PEER_WIDTHS[number], strides)

    if "branching" not in setting:
        return make()
    sides = [SIZE // strides[0], SIZE // (strides[0] * strides[1]), SIZE // (strides[0] * strides[1] * strides[2])]
    return TinyBranches(make, sides, **setting["branching"])


def nets(setting, seed=0):
    """Students and teacher of a setting, float64; a list of teachers where it has `teachers`."""
    torch.manual_seed(seed)
    students = [learner_net(setting, number).double() for number in range(setting.get("peers", 1))]
    teachers = [TinyNet(*spec).double().eval().requires_grad_(False) for spec in teacher_specs(setting)]
    return students, teachers if "teachers" in setting else teachers[0]


def unscaled(student):
    """A copy for the row's loop, which rescales gradients itself."""
    student = copy.deepcopy(student)
    if isinstance(student, TinyBranches):
        student.rescale = False
    return student


def classes_of(setting):
    """`teachers_classes` as a loss gets it."""
    return {"teachers_classes": [torch.tensor(c) for c in label_maps(setting)]} if "teachers" in setting else {}


def views(setting):
    """How many images a sample has: one a branch, where each branch sees its own."""
    return learner_net(setting).count if setting.get("branching", {}).get("views") == "own" else 1


def batches(seed=0, setting=None):
    """STEPS batches of an epoch over the data set; the generators are fresh at each call."""
    setting = setting or {}
    rng = torch.Generator().manual_seed(seed)
    order, count = torch.randperm(SAMPLES, generator=rng), views(setting)
    found = []
    for step in range(STEPS):
        index = order[step * BATCH : (step + 1) * BATCH]
        images = [torch.rand(BATCH, 3, SIZE, SIZE, generator=rng, dtype=torch.float64) for _ in range(count)]
        batch = {"images": images[0], "labels": DATASET_LABELS[index], "sample_index": index}
        batch |= {"views": images} if count > 1 else {}
        time = {"epoch": step // setting.get("steps_per_epoch", STEPS), "step": step}
        found.append({**batch, **time, **classes_of(setting), "generator": torch.Generator().manual_seed(1000 + step)})
    return found


def derive(kind, feature):
    """A derived signal, written out again."""
    if kind == "attention":
        return (feature**2).mean(1)
    rows = feature.flatten(1)
    if kind == "similarity":
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


@dataclass
class Name:
    """A parameter's name taken apart: `peer_features_branches_ema`."""

    role: str
    kind: str
    plural: bool
    branches: bool
    views: tuple

    def __init__(self, name):
        self.role, rest = name.split("_", 1)
        kind, tail = re.fullmatch(r"(\w+?)((?:_branches|_rotations|_ema)*)", rest).groups()
        found = tail.strip("_").split("_") if tail else []
        self.plural = kind.endswith("s") and kind[:-1] in LAYERED
        self.kind = kind[:-1] if self.plural else kind
        self.branches, self.views = "branches" in found, tuple(view for view in found if view != "branches")


def is_signal(name):
    return name.split("_", 1)[0] in ROLES and name not in ("teachers_classes", "student_blocks", "teacher_tails")


class Rest(nn.Module):
    """What a TinyNet does after a stage, in its own number format."""

    def __init__(self, net, number):
        super().__init__()
        self.net, self.number = net, number

    def forward(self, feature):
        like = next(self.net.parameters())
        images = like.new_zeros(len(feature), 3, SIZE, SIZE)
        return signals(self.net, images, {self.number: lambda _: feature.to(like)})["logits"]


def pieces(student, teacher):
    """The parts of the nets at their stages that a Module may be built with."""
    found = [student.stage1, student.stage2, student.stage3, student.classifier]
    blocks = [Block((module,), (module,) if number else ()) for number, module in enumerate(found)]
    rest = [Rest(teacher, number) for number in range(3)] if isinstance(teacher, TinyNet) else []
    return {"student_blocks": blocks, "teacher_tails": rest}


class Answers:
    """What one model says of a batch, by parameter name; made when it is asked for, once.

    `averaged` answers for `_ema`.
    """

    def __init__(self, net, batch, averaged=None, changes=None, gradient=False):
        self.net, self.batch, self.averaged, self.changes, self.gradient = net, batch, averaged, changes, gradient
        self.seen = {}

    def branches(self, views):
        """Signals of each branch; one of a plain model."""
        if views not in self.seen:
            with torch.set_grad_enabled(self.gradient and "ema" not in views):
                self.seen[views] = self._branches(self.averaged if "ema" in views else self.net, "rotations" in views)
        return self.seen[views]

    def _branches(self, net, rotations):
        if not rotations:
            return self._forward(net, self.batch.get("views", self.batch["images"]))
        four = [self._forward(net, torch.rot90(self.batch["images"], quarter, (2, 3))) for quarter in range(4)]
        joined = []
        for turned in zip(*four):
            stages = [torch.stack(entries, 1) for entries in zip(*(one["stages"] for one in turned))]
            joined.append({key: torch.stack([one[key] for one in turned], 1) for key in ("logits", "embedding")})
            joined[-1]["stages"] = stages
        return joined

    def _forward(self, net, images):
        return net.answers(images) if isinstance(net, TinyBranches) else [signals(net, images, self.changes)]

    def pick(self, name, layers):
        """The signal or signals a parameter name asks for."""
        asked = Name(name)
        found = [self._of(one, asked, layers) for one in self.branches(asked.views)]
        return found if asked.branches else found[0]

    def _of(self, found, asked, layers):
        if asked.kind == "similarity":
            return derive(asked.kind, found["embedding"])
        if asked.kind not in LAYERED:
            return found[asked.kind]
        at = range(len(found["stages"])) if layers == "stages" else [stage_number(layer) for layer in layers]
        chosen = [found["stages"][i] for i in at]
        chosen = chosen if asked.kind == "feature" else [derive(asked.kind, feature) for feature in chosen]
        return chosen if asked.plural else chosen[0]


def stage_number(layer):
    number = int(layer.removeprefix("stage"))
    return number - 1 if number > 0 else number


def shapes(value):
    """Shapes without the batch axis, nested as the value."""
    return [shapes(entry) for entry in value] if isinstance(value, list) else tuple(value.shape[1:])


def loss_of(method):
    """The pure loss of a method's file."""
    return getattr(method, method.__name__.rpartition(".")[2] + "_loss")


def defaults_of(method):
    """Defaults of the loss's options."""
    return {n: p.default for n, p in inspect.signature(loss_of(method)).parameters.items() if p.kind is p.KEYWORD_ONLY}


def called(method):
    """What the signals go to: Module.forward, or the loss."""
    return method.Module.forward if hasattr(method, "Module") else loss_of(method)


def names_of(method):
    """The signals that a method asks for."""
    return [name for name in inspect.signature(called(method)).parameters if is_signal(name)]


def hears(method):
    """Whom it listens to: teacher, teachers, peer, peers, or None."""
    found = {Name(name).role for name in names_of(method)} & {"teacher", "teachers", "peer", "peers"}
    assert len(found) <= 1
    return found.pop() if found else None


def layers_of(method):
    return getattr(method, "LAYERS", None)


def others_heard(other, batch, copies):
    """What those whom a loss listens to say: of one, of each in a list, or nothing."""
    if other is None or isinstance(other, list):
        return [Answers(one, batch, copies.get(one, one)) for one in other or []]
    return Answers(other, batch, copies.get(other, other))


def gather(method, own, others, names=None):
    """The signals of a method by parameter name."""
    layers, found = layers_of(method), {}
    for name in names_of(method) if names is None else names:
        role = name.split("_", 1)[0]
        if role in ("student", "ema"):
            found[name] = own.pick(name if role == "student" else f"{name}_ema", layers)
        else:
            found[name] = [one.pick(name, layers) for one in others] if role.endswith("s") else others.pick(name, layers)
    return found


FACTS = {"num_samples": SAMPLES, "num_classes": CLASSES, "dataset_labels": DATASET_LABELS}


def build(method, student, other, setting, seed=1):
    """The method's Module in float64, prepared; each part gets the options it declares. None where it has none."""
    if not hasattr(method, "Module"):
        return None
    batch, options = batches(setting=setting)[0], defaults_of(method) | setting.get("options", {})
    own, others = Answers(student, batch, student), others_heard(other, batch, {})
    facts, given = FACTS | classes_of(setting), {}
    facts |= pieces(student, other) if isinstance(student, TinyNet) else {}
    for name, parameter in inspect.signature(method.Module.__init__).parameters.items():
        if name in facts:
            given[name] = facts[name]
        elif is_signal(name):
            given[name] = shapes(gather(method, own, others, [name])[name])
        elif parameter.kind is parameter.KEYWORD_ONLY and name in options:
            given[name] = options[name]
    torch.manual_seed(seed)
    module = method.Module(**given).double()
    if hasattr(method, "prepare"):
        method.prepare(module, **{k: facts[k] for k in list(inspect.signature(method.prepare).parameters)[1:]})
    return module


def call(method, module, given, batch, setting):
    """Module.forward, or the loss, by its signature; the loss's defaults stand for options that are not set."""
    facts, options = FACTS | batch, defaults_of(method) | setting.get("options", {})
    values = {}
    for name, parameter in inspect.signature(called(method)).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            values[name] = options[name]
        elif name in facts:
            values[name] = facts[name]
        elif name != "self":
            values[name] = given[name]
    return (module or loss_of(method))(**values)


@dataclass
class Lesson:
    """One call of a method's loss: of one student, whom it listens to, with a Module of its own."""

    module: Any
    other: Any = None
    share: float = 1.0
    place: str = "module."
    weight: float = 1.0
    given: dict = field(default_factory=dict)

    def values(self, signals):  # noqa: ARG002
        """This step's signals by parameter name, as BoundLoss gives them to a hook."""
        return self.given


@dataclass
class Pupil:
    """A student and its lessons."""

    student: nn.Module
    lessons: list
    prefix: str = ""

    def parameters(self):
        """What the learner's optimizer moves."""
        return [*self.student.parameters(), *(p for lesson in self.lessons for p in trained(lesson.module))]

    def named(self):
        """Parameters by name."""
        parts = [("student.", self.student), *((lesson.place, lesson.module) for lesson in self.lessons if lesson.module)]
        return {f"{self.prefix}{place}{name}": p for place, part in parts for name, p in part.named_parameters()}

    def final(self):
        """All parameters and buffers by name, but for what an optimizer remembers."""
        found = {f"{self.prefix}student.{name}": value for name, value in self.student.state_dict().items()}
        for lesson in self.lessons:
            found |= {f"{self.prefix}{lesson.place}{name}": value for name, value in plain_state(lesson.module).items()}
        return found


def plain_state(module):
    """A Module's state without the extra state of those in it."""
    state = module.state_dict() if module is not None else {}
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def trained(module):
    """A Module's parameters but for those of parts that update themselves."""
    parts = list(module.modules()) if module is not None else []
    apart = {p for part in parts if getattr(part, "own_update", False) for p in part.parameters()}
    return [p for p in (module.parameters() if module is not None else []) if p not in apart]


def pupils(method, setting, seed=1):
    """Everybody who learns in a setting, with Modules of a seed."""
    students, teacher = nets(setting)
    role, found = hears(method), []
    for i, student in enumerate(students):
        rest = [(j, other) for j, other in enumerate(students) if j != i]
        if role == "peer":
            several, share = len(rest) > 1, 1 / len(rest)
            chosen = [(other, share, f"module.{j}." if several else "module.") for j, other in rest]
        elif role == "peers":
            chosen = [([other for _, other in rest], 1.0, "module.")]
        else:
            chosen = [(teacher if role else None, 1.0, "module.")]
        lessons = [Lesson(build(method, student, other, setting, seed + i), other, *more) for other, *more in chosen]
        found.append(Pupil(student, lessons, f"{i}." if "peers" in setting else ""))
    return found


def states(found):
    """The initial states of pupils' Modules as a row's loop gets them."""
    every = []
    for pupil in found:
        own = {lesson.place: copy.deepcopy(plain_state(lesson.module)) for lesson in pupil.lessons}
        if len(own) > 1:
            every.append({int(place.split(".")[1]): state for place, state in own.items()})
        else:
            every.append(next(iter(own.values()), {}))
    return every


def arguments(method, setting, students, teacher, own_states, steps):
    """Positional arguments of a row's loop."""
    students = [unscaled(student) for student in students]
    if "peers" in setting:
        return students, own_states, steps
    return (students[0], *([teacher] if hears(method) else []), own_states[0], steps)


@dataclass
class Hand:
    """What a method's `step` and `after_forward` see of a learner."""

    student: nn.Module
    method: Any
    optimizer: torch.optim.Optimizer
    parameters: list
    ce_weight: float
    losses: dict
    rank: int = 0
    step_count: int = 0
    total_steps: int = STEPS

    def tapped(self, images):
        own = Answers(self.student, {"images": images}, gradient=True)
        names = [name for name in names_of(self.method) if name.startswith("student_")]
        return keyed(self.method, gather(self.method, own, None, names), "student", own)


def keyed(method, given, role, answers=None):
    """One role's signals by key as a hook sees them, and the logits; of several models a list."""
    if isinstance(answers, list):
        places = range(len(answers))
        return [keyed(method, {n: given[n][i] for n in given if Name(n).role == role}, role, answers[i]) for i in places]
    found = {"logits": answers.pick("student_logits", None)} if answers is not None else {}
    layers = layers_of(method)
    at = ["stage1", "stage2", "stage3"] if layers == "stages" else layers
    for name, value in given.items():
        asked = Name(name)
        if asked.role != role:
            continue
        for number, own in enumerate(value if asked.branches else [value]):
            tail = ("|" + "_".join(asked.views) if asked.views else "") + (f"#{number}" if number else "")
            if asked.kind in LAYERED:
                for layer, tensor in zip(at, own if asked.plural else [own]):
                    found[f"{asked.kind}@{layer}{tail}"] = tensor
            else:
                found[f"{asked.kind}{tail}"] = own
    return found


def run_hook(name, method, lesson, hand, batch, others, own=None):
    """The method's `step`, before the student's forward, or `after_forward`, as the learner calls them."""
    role, found = hears(method), {}
    if own is not None:
        found = {"student": keyed(method, lesson.given, "student", own), "ema": keyed(method, lesson.given, "ema")}
    if role:
        found[role] = keyed(method, lesson.given, role, others)
    getattr(method, name)(lesson.module, hand, batch, found)


def changed(method, module, others):
    """Stage number -> what replaces its output, as the method's `before_forward` asks for."""
    layers = layers_of(method)
    at = range(3) if layers == "stages" else [stage_number(layer) % 3 for layer in layers]
    found = {}
    given = gather(method, None, others, [name for name in names_of(method) if not name.startswith("student_")])
    method.before_forward(module, lambda i, fn: found.update({at[i]: fn}), **given)
    return found


def again(batch):
    """A batch with a generator that nothing was drawn from."""
    return batch | {"generator": torch.Generator().manual_seed(batch["generator"].initial_seed())}


def listen(method, pupil, lesson, hand, batch, copies):
    """The first half of a step: forwards, and what the student hears, before anybody learns; returns the student's answers."""
    others = others_heard(lesson.other, batch, copies)
    heard = [name for name in names_of(method) if Name(name).role == hears(method)]
    lesson.given = gather(method, None, others, heard)
    if hasattr(method, "step"):
        run_hook("step", method, lesson, hand, batch, others)
    changes = changed(method, lesson.module, others) if hasattr(method, "before_forward") else {}
    own = Answers(pupil.student, batch, copies.get(pupil.student), changes, gradient=True)
    lesson.given |= gather(method, own, None, [name for name in names_of(method) if name not in heard])
    own.branches(())
    for one in others if isinstance(others, list) else [others]:
        one.branches(())
    return own, others


def learn(method, pupil, hand, batch, told, setting):
    """The second half: the method's own updates, the loss, the optimizer's step."""
    if hasattr(method, "after_forward"):
        for lesson, (own, others) in zip(pupil.lessons, told):
            run_hook("after_forward", method, lesson, hand, batch, others, own)
    loss = hand.ce_weight * F.cross_entropy(told[0][0].pick("student_logits", None), batch["labels"])
    for lesson in pupil.lessons:
        value = call(method, lesson.module, lesson.given, again(batch), setting)
        terms = value if isinstance(value, dict) else {"": value}
        loss = loss + lesson.weight * sum(term.mean() for term in terms.values())
    hand.optimizer.zero_grad()
    loss.backward()
    hand.optimizer.step()


def average(copies, decay):
    """Moves averaged copies towards their students."""
    with torch.no_grad():
        for student, averaged in copies.items():
            now = student.state_dict()
            for name, value in averaged.state_dict().items():
                if value.is_floating_point():
                    value.mul_(decay).add_((1 - decay) * now[name])


def drive(method, found, steps, *, lr, weight, ce_weight, setting):
    """Trains pupils in place with torch.optim.SGD; returns what a row's trace returns."""
    hands = []
    for pupil in found:
        for lesson in pupil.lessons:
            lesson.weight = weight * lesson.share
        parameters = pupil.parameters()
        losses = {str(number): lesson for number, lesson in enumerate(pupil.lessons)}
        optimizer, total = torch.optim.SGD(parameters, lr=lr), setting.get("steps_per_epoch", STEPS)
        hands.append(Hand(pupil.student, method, optimizer, parameters, ce_weight, losses, total_steps=total))
    copies = {p.student: copy.deepcopy(p.student).requires_grad_(False) for p in found} if "ema" in setting else {}
    for batch in steps:
        for hand in hands:
            hand.step_count = batch["step"]
        if hasattr(method, "on_epoch") and batch["step"] % setting.get("steps_per_epoch", STEPS) == 0:
            for lesson in (lesson for pupil in found for lesson in pupil.lessons):
                method.on_epoch(lesson.module, batch["epoch"])
        told = [[listen(method, p, lesson, hand, batch, copies) for lesson in p.lessons] for p, hand in zip(found, hands)]
        for pupil, hand, own in zip(found, hands, told):
            learn(method, pupil, hand, batch, own, setting)
        average(copies, setting.get("ema"))
    return {name: value for pupil in found for name, value in pupil.final().items()}


def both(method, row, setting, *, lr=0.05, weight=0.5, ce_weight=1.0):
    """(raykd's result, the row's result, where raykd started) of one setting from one start."""
    found, (_, teacher) = pupils(method, setting), nets(setting)
    sampler = getattr(copy.deepcopy(found[0].lessons[0].module), "sample_negatives", None)
    common = {"lr": lr, "weight": weight, "ce_weight": ce_weight}
    given = arguments(method, setting, [p.student for p in found], teacher, states(found), batches(setting=setting))
    theirs = row.trace(*given, signals=signals, sampler=sampler, **common, **setting.get("options", {}))
    start = copy.deepcopy({name: value for pupil in found for name, value in pupil.final().items()})
    return drive(method, found, batches(setting=setting), **common, setting=setting), theirs, start
