"""One battery of checks, run on every method; methods and rows are found by their files."""

import ast
import doctest
import inspect
import io
import re
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import tracing
from beartype import beartype
from jaxtyping import jaxtyped
from method_rows import (
    IMAGES,
    METHODS,
    REPOSITORY,
    ROWS,
    axes_of,
    each,
    for_reference,
    fresh,
    leaves_of,
    load_method,
    load_row,
    loss_of,
    take,
    terms,
    to_torch,
    total,
    with_leaves,
)

from raykd.errors import SignalError

SLUGS = sorted(set(METHODS) & set(ROWS))
MEMBERS = {"NAME", "PAPER", "SECTION", "SCHEME", "LAYERS", "SPARSE", "BRANCHING", "Module"}
MEMBERS |= {"images_loss", "Images", "SYNTHESIS", "targets", "critics"}
MEMBERS |= {"prepare", "before_forward", "after_forward", "step", "on_epoch", "views", "stages"}
RESERVED = {"weight", "ce_weight", "schedule"}

MAKING = [slug for slug in SLUGS if hasattr(load_method(slug), "images_loss")]
PURE = SLUGS + [slug + IMAGES for slug in MAKING]  # every pure function

every = pytest.mark.parametrize("slug", SLUGS)
pure = pytest.mark.parametrize("slug", PURE)
making = pytest.mark.parametrize("slug", MAKING)


def samples(row, seed=0):
    return [row.inputs(seed), *(row.variants(seed) if hasattr(row, "variants") else [])]


def settings(row):
    return [{}, *row.OPTIONS]


OTHERS = ("teacher", "teachers", "peer", "peers", "ema")


def role_of(name):
    return name.split("_", 1)[0]


def students(inputs):
    """Floating-point signals that carry gradient: the student's side, and what a Module makes of its branches."""
    own = {name: value for name, value in inputs.items() if name.startswith("student_") and not name.endswith(("_bank", "_z"))}
    return own | (made(inputs) if mixed(inputs) else {})


def made(inputs):
    """Floating-point signals of no role."""
    return {name: v for name, v in inputs.items() if role_of(name) not in ("student", *OTHERS) and is_floating(v)}


def is_floating(value):
    return any(hasattr(leaf, "dtype") and "float" in str(leaf.dtype) for leaf in leaves_of(value))


def mixed(inputs):
    """Whether branches of a student hear each other, and no teacher or peer."""
    roles = {role_of(name) for name in inputs}
    return any(n.startswith("student_") and "_branches" in n for n in inputs) and not roles & (set(OTHERS) - {"ema"})


def others(inputs):
    """Signals of those whom the student listens to."""
    return {name: value for name, value in inputs.items() if role_of(name) in OTHERS and name != "teachers_classes"}


def batch_size(inputs):
    return len(leaves_of(next(iter(inputs.values())))[0])


def trained_by(loss, inputs):
    """Floating-point signals to which a loss sends gradient; of what images minimise all of them, as all lead to the images."""
    makes = getattr(loss, "__name__", "") == "images_loss"
    return {name: value for name, value in inputs.items() if is_floating(value)} if makes else students(inputs)


def with_gradient(inputs, loss=None):
    """The inputs, with leaves that require gradient where the loss sends one, and the leaves."""
    inputs, leaves = dict(inputs), []
    for name, value in trained_by(loss, inputs).items():
        inputs[name] = each(lambda t: t.clone().requires_grad_(True), value)
        leaves += leaves_of(inputs[name])
    return inputs, leaves


def gradient(loss, inputs, **options):
    inputs, leaves = with_gradient(fresh(inputs), loss)
    return torch.autograd.grad(total(loss(**inputs, **options)), leaves, allow_unused=True)


def each_named(fn, inputs):
    return {name: each(fn, value) for name, value in inputs.items()}


def as_type(inputs, dtype):
    return each_named(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def close(actual, expected, tolerance=1e-10):
    actual, expected = terms(actual), terms(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        wanted = torch.as_tensor(np.asarray(value), dtype=torch.float64)
        torch.testing.assert_close(
            actual[name].detach(), wanted, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_every_method_has_a_row_and_every_row_a_method():
    assert set(METHODS) == set(ROWS)
    assert {s: METHODS[s].parent.name for s in SLUGS} == {s: ROWS[s].parent.name for s in SLUGS}


def test_every_method_is_documented():
    text = (REPOSITORY / "docs" / "methods.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \|(.*)$", text, re.MULTILINE))
    assert set(rows) == set(METHODS)
    for slug, row in rows.items():
        assert METHODS[slug].relative_to(REPOSITORY).as_posix() in row, slug
        assert f"| {load_method(slug).SCHEME} |" in row, slug


@every
def test_members(slug):
    method = load_method(slug)
    own = {n for n, v in vars(method).items() if getattr(v, "__module__", None) == method.__name__}
    constants = {
        t.id: n.value for n in ast.parse(METHODS[slug].read_text()).body if isinstance(n, ast.Assign) for t in n.targets
    }
    public = {n for n in own if not n.startswith("_")} - {f"{slug.replace('-', '_')}_loss"}
    assert public <= MEMBERS
    assert ("images_loss" in own) == ("SYNTHESIS" in constants) == (method.SCHEME == "data_free")
    assert "Images" not in own or "images_loss" in own
    assert "critics" not in own or "Images" in own
    for name in ("NAME", "PAPER", "SECTION", "SCHEME"):
        assert isinstance(ast.literal_eval(constants[name]), str)
    assert method.SCHEME in ("offline", "online", "self", "data_free")
    takes_layers = any(re.search(r"_(feature|attention|gram)s?(_branches|_rotations|_ema)*$", n) for n in wiring(slug))
    assert takes_layers == ("LAYERS" in constants)
    assert any("_branches" in n for n in wiring(slug)) == ("BRANCHING" in constants)
    if "BRANCHING" in constants:
        assert ast.literal_eval(constants["BRANCHING"])["kind"] in ("split", "exits", "widths", "heads")


def wiring(slug):
    """Names before `*` that are wired."""
    method = load_method(slug)
    called = [method.Module.forward if hasattr(method, "Module") else loss_of(slug)]
    if hasattr(method, "images_loss"):
        called.append(method.Images.forward if hasattr(method, "Images") else method.images_loss)
    found = [n for fn in called for n, p in inspect.signature(fn).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    return [n for n in found if n != "self"]


@making
def test_options_of_what_makes_images(slug):
    """All are set in the job's loss: each has a default, one that the student's loss has too the same, and none is reserved."""
    method = load_method(slug)
    own, student = (_options(fn) for fn in (method.images_loss, loss_of(slug)))
    assert not set(own) & RESERVED
    assert all(p.default is not p.empty for p in own.values())
    assert all(student[name].default == p.default for name, p in own.items() if name in student)
    if hasattr(method, "Images"):
        of_class = _options(method.Images.__init__) | _options(method.Images.forward)
        assert all((p.default is p.empty) == (name in own) for name, p in of_class.items())


def _options(fn):
    return {n: p for n, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}


@every
def test_defaults_are_written_once(slug):
    method, loss = load_method(slug), loss_of(slug)
    options = {n: p for n, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert {"weight", "ce_weight"} <= set(options)
    assert all(p.default is not p.empty for p in options.values())
    if hasattr(method, "Module"):
        seen = set()
        for fn in (method.Module.__init__, method.Module.forward):
            for name, p in inspect.signature(fn).parameters.items():
                if p.kind is p.KEYWORD_ONLY:
                    assert name not in RESERVED
                    assert (p.default is p.empty) == (name in options or name in seen), name
                    seen.add(name)


@pure
def test_docstring(slug):
    method, loss = load_method(slug), loss_of(slug)
    text = inspect.getdoc(loss)
    for part in ("Args:", "Returns:", "Raises:", "Example:", "References:"):
        assert part in text, part
    for name in inspect.signature(loss).parameters:
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name
    row = load_row(slug)
    found = [terms(loss(**to_torch(row.inputs(0)), **options)) for options in settings(row)]
    scalar = any(value.ndim == 0 for own in found for value in own.values())
    assert scalar == bool(re.search(r"couples?\s+the\s+batch", text))
    result = doctest.testmod(method)
    assert result.failed == 0
    assert result.attempted > 0


@pure
def test_value(slug):
    row, loss = load_row(slug), loss_of(slug)
    for seed in (0, 1):
        for inputs in samples(row, seed):
            for options in settings(row):
                close(loss(**to_torch(inputs), **options), row.reference(**for_reference(inputs), **options))


@pure
def test_closed_forms(slug):
    row, loss = load_row(slug), loss_of(slug)
    assert row.closed_forms()
    for inputs, options, expected in row.closed_forms():
        close(loss(**to_torch(inputs), **options), expected)


@pure
def test_shapes(slug):
    row, loss = load_row(slug), loss_of(slug)
    checked = jaxtyped(typechecker=beartype)(loss)
    for inputs in samples(row):
        inputs = to_torch(inputs)
        batch = batch_size(inputs)
        assert all(v.shape in ((batch,), ()) for v in terms(checked(**inputs)).values())


@contextmanager
def still(kept):
    """Inside, the k-th `detach` returns what it returned the first time: what a loss takes as given does not move."""
    place = iter(list(kept) if kept else ())
    first, detach = not kept, torch.Tensor.detach

    def detached(tensor):
        if not first:
            return next(place)
        kept.append(detach(tensor).clone())
        return kept[-1]

    with mock.patch.object(torch.Tensor, "detach", detached):
        yield


@pure
def test_gradient(slug):
    """By finite differences; of what a loss detaches, none."""
    row, loss = load_row(slug), loss_of(slug)
    for options in settings(row):
        inputs, leaves = with_gradient(to_torch(row.inputs(2)), loss)
        names, kept = list(trained_by(loss, inputs)), []

        def value(*leaves, inputs=inputs, names=names, options=options, kept=kept):
            given, left = fresh(dict(inputs)), list(leaves)
            for name in names:
                given[name] = with_leaves(inputs[name], left)
            with still(kept):
                return tuple(terms(loss(**given, **options)).values())

        value(*leaves)
        assert torch.autograd.gradcheck(value, leaves)


@pure
def test_wrong_shapes_are_refused(slug):
    row, loss = load_row(slug), loss_of(slug)
    axes = axes_of(loss)
    for inputs in samples(row):
        given = to_torch(inputs)
        letters = [letter for name in axes for letter in axes[name]]
        bad = [to_torch(w) for w in (row.wrong(inputs) if hasattr(row, "wrong") else [])]
        for name, value in given.items():
            if not axes[name]:
                continue
            bad.append({**given, name: each(lambda t: t[..., None], value)})
            bad.append({**given, name: each(lambda t: t[None], value)})
            for letter in {a for a in axes[name] if letters.count(a) > 1 and not a.startswith(("*", "_"))}:
                bad.append({**given, name: take(value, axes[name], letter, torch.tensor([0]))})
            if "*p" in axes[name]:
                bad.append({**given, name: each(lambda t: t[:, None], value)})
            if name.endswith("_branches"):  # one branch unlike the others
                for letter in {a for a in axes[name] if not a.startswith("_")}:
                    bad.append({**given, name: [*value[:-1], take(value[-1], axes[name], letter, torch.tensor([0]))]})
        assert len(bad) > 2
        for case in bad:
            with pytest.raises(SignalError, match=rf"\({slug.removesuffix(IMAGES)}\)"):
                loss(**fresh(case))


@pure
def test_batch_permutation(slug):
    row, loss = load_row(slug), loss_of(slug)
    axes = axes_of(loss)
    for inputs in map(to_torch, samples(row)):
        before = terms(loss(**fresh(inputs)))
        order = torch.arange(batch_size(inputs)).roll(1)
        after = terms(loss(**fresh({n: take(v, axes[n], "b", order) for n, v in inputs.items()})))
        for name, value in before.items():
            torch.testing.assert_close(after[name], value[order] if value.ndim else value, rtol=1e-10, atol=1e-10)


@pure
def test_a_sample_alone_makes_its_value(slug):
    row, loss = load_row(slug), loss_of(slug)
    inputs, axes = to_torch(row.inputs(0)), axes_of(loss_of(slug))
    whole = {n: v for n, v in terms(loss(**fresh(inputs))).items() if v.ndim}
    if whole:
        first = torch.tensor([0])
        alone = terms(loss(**fresh({n: take(v, axes[n], "b", first) for n, v in inputs.items()})))
        for name, value in whole.items():
            torch.testing.assert_close(alone[name], value[:1], rtol=1e-10, atol=1e-10)


@pure
def test_large_and_half_precision(slug):
    row, loss = load_row(slug), loss_of(slug)
    for inputs in map(to_torch, samples(row)):
        large = {
            n: each(lambda t: t * (1e4 / t.abs().max()) if t.is_floating_point() and t.ndim else t, v)
            for n, v in inputs.items()
        }
        for given in (inputs, large):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                half = as_type(given, dtype)
                value = terms(loss(**fresh(half)))
                assert all(v.isfinite().all() and v.dtype is torch.float32 for v in value.values()), dtype
                full = gradient(loss, as_type(half, torch.float32))
                fits = [g is None or g.to(dtype).isfinite().all() for g in full]
                assert all(g is None or g.isfinite().all() for g, fit in zip(gradient(loss, half), fits) if fit), dtype
                assert all(fits) or dtype is torch.float16
                if dtype is not torch.float32:  # computed in full precision
                    for name, wide in terms(loss(**fresh(as_type(half, torch.float32)))).items():
                        assert torch.equal(value[name], wide)


@pure
def test_signals_on_another_device(slug):
    """A loss keeps no tensor on the CPU beside signals that live elsewhere; no device is needed to see that."""
    row, loss = load_row(slug), loss_of(slug)
    for options in settings(row):
        value = loss(**each_named(lambda t: t.to("meta"), to_torch(row.inputs(0))), **options)
        assert all(term.device.type == "meta" for term in terms(value).values())


@pure
def test_inputs_stay_as_they_are(slug):
    row, loss = load_row(slug), loss_of(slug)
    inputs, kept = to_torch(row.inputs(0)), to_torch(row.inputs(0))
    gradient(loss, inputs)
    for name in axes_of(loss):
        for value, before in zip(leaves_of(inputs[name]), leaves_of(kept[name])):
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, before, rtol=0, atol=0)


def rolled(signal):
    """The signal of another sample (in a bank: another row); labels and single numbers stay."""
    return signal.roll(1, 0) if signal.is_floating_point() and signal.ndim else signal


def negated(signal):
    """Another signal of the same size; labels stay."""
    return -signal if signal.is_floating_point() else signal


def each_other(fn, inputs, names):
    return {name: each(fn, value) if name in names else value for name, value in inputs.items()}


def of_term(loss, name, inputs):
    """The gradient of one term at the student's leaves, in order; None where it does not feel one."""
    return gradient(lambda **i: terms(loss(**i))[name], inputs)


def differ(a, b):
    return a is not None and b is not None and not torch.allclose(a, b, rtol=1e-3)


@every
def test_the_teacher_is_live(slug):
    """Each term's gradient at the student is there, and another if the teachers' or peers' signals are shuffled over the batch.

    Terms in a row's APART train connectors alone and never touch the student; terms in UNORDERED compare distributions, so that
    it takes other signals, not another order of them; terms in LABELLED hear labels alone, terms in UNHEARD a critic.
    """
    row, loss = load_row(slug), loss_of(slug)
    inputs = to_torch(row.inputs(0))
    heard = others(inputs)
    felt, apart, unordered = [], getattr(row, "APART", set()), getattr(row, "UNORDERED", set())
    deaf = getattr(row, "LABELLED", set()) | getattr(row, "UNHEARD", set())
    given, leaves = with_gradient(fresh(inputs))
    seen = terms(loss(**given))
    assert apart | unordered | deaf <= set(seen)
    own = [
        leaf for name, value in given.items() if role_of(name) == "student" for leaf in leaves_of(value) if leaf.requires_grad
    ]
    for name in apart:
        untouched = [None] * len(own)
        if seen[name].requires_grad:
            untouched = torch.autograd.grad(seen[name].sum(), own, allow_unused=True, retain_graph=True)
        assert all(g is None for g in untouched), name
    for name in seen.keys() - apart:
        before = of_term(loss, name, inputs)
        after = of_term(loss, name, each_other(negated if name in unordered else rolled, inputs, heard))
        felt.append([g is not None for g in before])
        assert any(felt[-1])
        assert all(g.abs().max() > 0 for g in before if g is not None)
        if name in deaf:
            assert not any(differ(a, b) for a, b in zip(before, after)), name
        elif mixed(inputs):
            continue
        else:
            assert all(differ(a, b) for a, b in zip(before, after) if a is not None), name
    first = [leaf for n, v in given.items() if n.endswith("_branches") for leaf in leaves_of(v[0])]  # cross-entropy trains it
    unfelt = [leaf for leaf, by in zip(leaves, zip(*felt)) if not any(by) and not any(leaf is other for other in first)]
    assert mixed(inputs) or not unfelt, "a signal of the student that no term feels"


@making
def test_images_hear_all_that_is_read(slug):
    """Each signal that images are made by has a gradient, by which they learn; each term has one too."""
    row, loss = load_row(slug + IMAGES), loss_of(slug + IMAGES)
    inputs, leaves = with_gradient(to_torch(row.inputs(0)), loss)
    felt = []
    for value in terms(loss(**inputs, **getattr(row, "lively", {}))).values():
        found = torch.autograd.grad(value.sum(), leaves, allow_unused=True, retain_graph=True)
        felt.append([g is not None and bool(g.abs().max() > 0) for g in found])
        assert any(felt[-1])
    assert all(any(by) for by in zip(*felt))


ADVERSARIAL = [s for s in MAKING if any(role_of(name) == "student" for name in load_row(s + IMAGES).inputs(0))]


@pytest.mark.parametrize("slug", ADVERSARIAL)
def test_images_raise_what_the_student_lowers(slug):
    """A small step of the student's logits that lowers its loss raises that of the images, on the same signals."""
    row, made = load_row(slug).inputs(0), load_row(slug + IMAGES).inputs(0)
    shared = to_torch({name: made[name] for name in made if name in row} | {name: row[name] for name in row if name in made})
    logits = shared["student_logits"].requires_grad_(True)
    loss, images_loss = loss_of(slug), loss_of(slug + IMAGES)
    (down,) = torch.autograd.grad(total(loss(**to_torch(row) | shared)), logits)
    lively = getattr(load_row(slug + IMAGES), "lively", {})
    (up,) = torch.autograd.grad(total(images_loss(**to_torch(made) | shared, **lively)), logits)
    assert (down * up).sum() < 0


MIXED = [slug for slug in SLUGS if mixed(load_row(slug).inputs(0))]


@pytest.mark.parametrize("slug", MIXED)
def test_branches_hear_each_other(slug):
    """Whatever a term trains has another gradient if something else that it hears is shuffled over the batch: another branch,
    what a Module makes of the branches, an averaged copy. Each of these is trained or heard.
    """
    row, loss = load_row(slug), loss_of(slug)
    inputs, deaf = to_torch(row.inputs(0)), getattr(row, "LABELLED", set())
    branches = {name: value for name, value in students(inputs).items() if name.startswith("student_")}
    owner = [(name, i) for name, value in branches.items() for i, entry in enumerate(value) for _ in leaves_of(entry)]
    owner += [(name, None) for name, value in made(inputs).items() for _ in leaves_of(value)]
    shuffled = {
        (n, i): {**inputs, n: [*v[:i], each(rolled, v[i]), *v[i + 1 :]]} for n, v in branches.items() for i in range(len(v))
    }
    shuffled |= {(name, None): {**inputs, name: each(rolled, v)} for name, v in (made(inputs) | others(inputs)).items()}
    there = set()
    for term in terms(loss(**fresh(inputs))):
        before = of_term(loss, term, inputs)
        there |= {who for who, found in zip(owner, before) if found is not None}
        after = {source: of_term(loss, term, case) for source, case in shuffled.items()} if term not in deaf else {}
        for place, (who, found) in enumerate(zip(owner, before)):
            apart = {s for s in after if (s[1] != who[1] if s[1] is not None else s != who)}
            heard = {s for s in apart if differ(found, after[s][place])}
            assert heard or found is None or term in deaf, f"{term}: {who} hears nobody"
            there |= heard
    assert there == set(shuffled)


@pure
def test_compiles_as_one_graph(slug):
    row, loss = load_row(slug), loss_of(slug)
    inputs = to_torch(row.inputs(0))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for name, value in terms(compiled(**fresh(inputs))).items():
        torch.testing.assert_close(value, terms(loss(**fresh(inputs)))[name])


@every
def test_a_method_with_a_module_has_traces(slug):
    method = load_method(slug)
    trains = hasattr(method, "Module") or method.SCHEME == "online"
    made = method.SCHEME == "data_free"  # in turn: test_trace_images.py, or for a bank: test_trace_bank.py
    assert (trains and not made) == bool(getattr(load_row(slug), "TRACES", []))
    assert made == any(getattr(load_row(slug), traces, []) for traces in ("ROUNDS", "BATCHES"))


TRACES = [(s, i) for s in SLUGS for i in range(len(getattr(load_row(s), "TRACES", [])))]


@pytest.mark.parametrize("slug, number", TRACES)
def test_trace(slug, number):
    row, method = load_row(slug), load_method(slug)
    setting = row.TRACES[number]
    ours, theirs, start = tracing.both(method, row, setting)
    assert ours.keys() == theirs.keys()
    parameters = {name for pupil in tracing.pupils(method, setting) for name in pupil.named()}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for name in parameters:  # a loss whose gradient a norm layer cancels leaves its bias alone
        own = name.partition("module.")[2]
        quiet = own and (own.endswith("conv.bias") or own in setting.get("still", ()))
        assert torch.equal(ours[name], start[name]) <= bool(quiet), name


MODULES = sorted({slug for slug, _ in TRACES if hasattr(load_method(slug), "Module")})


@pytest.mark.parametrize("slug", MODULES)
def test_module(slug):
    """Axes of Module.forward, a checkpoint that goes round, signals in half precision."""
    method, setting = load_method(slug), load_row(slug).TRACES[0]
    made, other = (tracing.pupils(method, setting, seed)[0] for seed in (1, 100))
    lesson = made.lessons[0]
    models = [made.student, *(lesson.other if isinstance(lesson.other, list) else [lesson.other] if lesson.other else [])]

    def value(module, batch):
        copies = {model: model for model in models}
        others = tracing.others_heard(lesson.other, batch, copies)
        changes = tracing.changed(method, module, others) if hasattr(method, "before_forward") else {}
        own = tracing.Answers(made.student, batch, made.student, changes, gradient=True)
        return tracing.call(method, module, tracing.gather(method, own, others), batch, setting)

    module, second = lesson.module, other.lessons[0].module
    value(module, tracing.batches(setting=setting)[0])
    second.load_state_dict(module.state_dict())
    first, again = (terms(value(m, tracing.batches(setting=setting)[1])) for m in (module, second))
    assert first.keys() == again.keys()
    for name, found in first.items():
        torch.testing.assert_close(found, again[name], rtol=0, atol=0)
        assert found.shape in ((tracing.BATCH,), ())

    half = each_named(lambda t: t.bfloat16() if t.is_floating_point() else t, tracing.batches(setting=setting)[2])
    module.float()
    for model in models:
        model.bfloat16()
    result = terms(value(module, half))
    total(result).backward()
    assert all(term.dtype is torch.float32 and term.isfinite().all() for term in result.values())
    moved = [p for name, p in module.named_parameters() if name not in setting.get("still", ())]
    moved = [p for p in tracing.trained(module) if any(p is q for q in moved)]
    assert all(p.grad.isfinite().all() for p in [*moved, *list(made.student.parameters())[:2]])

    checked = jaxtyped(typechecker=beartype)(method.Module.forward)
    bound = type(module)
    original, bound.forward = bound.forward, checked
    try:
        for model in models:
            model.double()
        value(module.double(), tracing.batches(setting=setting)[0])
    finally:
        bound.forward = original


RESUMED = [slug for slug in MODULES if "ema" not in load_row(slug).TRACES[0]]


@pytest.mark.parametrize("slug", RESUMED)
def test_a_checkpoint_goes_on(slug):
    """Two steps, a file, the third step: as three in a row, with all that a Module's own optimizers remember."""
    method, setting = load_method(slug), load_row(slug).TRACES[0]
    steps, rates = tracing.batches(setting=setting), {"lr": 0.05, "weight": 0.5, "ce_weight": 1.0, "setting": setting}
    whole, first, second = (tracing.pupils(method, setting, seed) for seed in (1, 1, 100))
    wanted = tracing.drive(method, whole, steps, **rates)
    steps = tracing.batches(setting=setting)
    tracing.drive(method, first, steps[:2], **rates)
    for old, new in zip(first, second):
        parts = [(old.student, new.student), *((a.module, b.module) for a, b in zip(old.lessons, new.lessons))]
        for before, after in parts:
            file = io.BytesIO()
            torch.save(before.state_dict(), file)
            file.seek(0)
            after.load_state_dict(torch.load(file, weights_only=True))
    for name, value in tracing.drive(method, second, steps[2:], **rates).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
