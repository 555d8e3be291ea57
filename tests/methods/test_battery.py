"""One battery of checks, run on every method; methods and rows are found by their files."""

import ast
import doctest
import inspect
import re

import numpy as np
import pytest
import torch
import tracing
from beartype import beartype
from jaxtyping import jaxtyped
from method_rows import (
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
MEMBERS = {"NAME", "PAPER", "SECTION", "SCHEME", "LAYERS", "SPARSE", "Module"}
MEMBERS |= {"prepare", "before_forward", "step", "on_epoch", "views", "stages"}
RESERVED = {"weight", "ce_weight", "schedule"}

every = pytest.mark.parametrize("slug", SLUGS)


def samples(row, seed=0):
    return [row.inputs(seed), *(row.variants(seed) if hasattr(row, "variants") else [])]


def settings(row):
    return [{}, *row.OPTIONS]


def students(inputs):
    """Floating-point signals that carry gradient: the student's side."""
    return {name: value for name, value in inputs.items() if name.startswith("student_") and not name.endswith(("_bank", "_z"))}


def batch_size(inputs):
    return len(leaves_of(next(iter(inputs.values())))[0])


def with_gradient(inputs):
    """The inputs, with leaves that require gradient on the student's side, and the leaves."""
    inputs, leaves = dict(inputs), []
    for name, value in students(inputs).items():
        inputs[name] = each(lambda t: t.clone().requires_grad_(True), value)
        leaves += leaves_of(inputs[name])
    return inputs, leaves


def gradient(loss, inputs, **options):
    inputs, leaves = with_gradient(fresh(inputs))
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
    for name in ("NAME", "PAPER", "SECTION", "SCHEME"):
        assert isinstance(ast.literal_eval(constants[name]), str)
    assert method.SCHEME in ("offline", "online", "self", "data_free")
    takes_layers = any(re.search(r"_(feature|attention|gram)s?$", n) for n in wiring(slug))
    assert takes_layers == ("LAYERS" in constants)


def wiring(slug):
    """Names before `*` that are wired."""
    method = load_method(slug)
    fn = method.Module.forward if hasattr(method, "Module") else loss_of(slug)
    return [n for n, p in inspect.signature(fn).parameters.items() if p.kind is not p.KEYWORD_ONLY and n != "self"]


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


@every
def test_docstring(slug):
    method, loss = load_method(slug), loss_of(slug)
    text = inspect.getdoc(loss)
    for part in ("Args:", "Returns:", "Raises:", "Example:", "References:"):
        assert part in text, part
    for name in inspect.signature(loss).parameters:
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name
    scalar = any(t.ndim == 0 for t in terms(loss(**to_torch(load_row(slug).inputs(0)))).values())
    assert scalar == bool(re.search(r"couples?\s+the\s+batch", text))
    result = doctest.testmod(method)
    assert result.failed == 0
    assert result.attempted > 0


@every
def test_value(slug):
    row, loss = load_row(slug), loss_of(slug)
    for seed in (0, 1):
        for inputs in samples(row, seed):
            for options in settings(row):
                close(loss(**to_torch(inputs), **options), row.reference(**for_reference(inputs), **options))


@every
def test_closed_forms(slug):
    row, loss = load_row(slug), loss_of(slug)
    assert row.closed_forms()
    for inputs, options, expected in row.closed_forms():
        close(loss(**to_torch(inputs), **options), expected)


@every
def test_shapes(slug):
    row, loss = load_row(slug), loss_of(slug)
    checked = jaxtyped(typechecker=beartype)(loss)
    for inputs in samples(row):
        inputs = to_torch(inputs)
        batch = batch_size(inputs)
        assert all(v.shape in ((batch,), ()) for v in terms(checked(**inputs)).values())


@every
def test_gradient(slug):
    row, loss = load_row(slug), loss_of(slug)
    for options in settings(row):
        inputs, leaves = with_gradient(to_torch(row.inputs(2)))
        names = list(students(inputs))

        def value(*leaves, inputs=inputs, names=names, options=options):
            given, left = fresh(dict(inputs)), list(leaves)
            for name in names:
                given[name] = with_leaves(inputs[name], left)
            return tuple(terms(loss(**given, **options)).values())

        assert torch.autograd.gradcheck(value, leaves)


@every
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
        assert len(bad) > 2
        for case in bad:
            with pytest.raises(SignalError, match=rf"\({slug}\)"):
                loss(**fresh(case))


@every
def test_batch_permutation(slug):
    row, loss = load_row(slug), loss_of(slug)
    axes = axes_of(loss)
    for inputs in map(to_torch, samples(row)):
        before = terms(loss(**fresh(inputs)))
        order = torch.arange(batch_size(inputs)).roll(1)
        after = terms(loss(**fresh({n: take(v, axes[n], "b", order) for n, v in inputs.items()})))
        for name, value in before.items():
            torch.testing.assert_close(after[name], value[order] if value.ndim else value, rtol=1e-10, atol=1e-10)


@every
def test_a_sample_alone_makes_its_value(slug):
    row, loss = load_row(slug), loss_of(slug)
    inputs, axes = to_torch(row.inputs(0)), axes_of(loss_of(slug))
    whole = {n: v for n, v in terms(loss(**fresh(inputs))).items() if v.ndim}
    if whole:
        first = torch.tensor([0])
        alone = terms(loss(**fresh({n: take(v, axes[n], "b", first) for n, v in inputs.items()})))
        for name, value in whole.items():
            torch.testing.assert_close(alone[name], value[:1], rtol=1e-10, atol=1e-10)


@every
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
                fits = [g.to(dtype).isfinite().all() for g in gradient(loss, as_type(half, torch.float32))]
                assert all(g.isfinite().all() for g, fit in zip(gradient(loss, half), fits) if fit), dtype
                assert all(fits) or dtype is torch.float16
                if dtype is not torch.float32:  # computed in full precision
                    for name, wide in terms(loss(**fresh(as_type(half, torch.float32)))).items():
                        assert torch.equal(value[name], wide)


@every
def test_signals_on_another_device(slug):
    """A loss keeps no tensor on the CPU beside signals that live elsewhere; no device is needed to see that."""
    row, loss = load_row(slug), loss_of(slug)
    for options in settings(row):
        value = loss(**each_named(lambda t: t.to("meta"), to_torch(row.inputs(0))), **options)
        assert all(term.device.type == "meta" for term in terms(value).values())


@every
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


@every
def test_the_teacher_is_live(slug):
    """Each term's gradient at the student is there, and another if the teacher's signals are shuffled over the batch.

    Terms in a row's APART train connectors alone and never touch the student; terms in UNORDERED compare distributions, so that
    it takes other signals, not another order of them.
    """
    row, loss = load_row(slug), loss_of(slug)
    inputs = to_torch(row.inputs(0))
    shuffled = {n: each(rolled, v) if n.startswith("teacher") else v for n, v in inputs.items()}
    others = {n: each(negated, v) if n.startswith("teacher") else v for n, v in inputs.items()}
    felt, apart, unordered = [], getattr(row, "APART", set()), getattr(row, "UNORDERED", set())
    given, leaves = with_gradient(fresh(inputs))
    seen = terms(loss(**given))
    assert apart | unordered <= set(seen)
    for name in apart:
        untouched = [None] * len(leaves)
        if seen[name].requires_grad:
            untouched = torch.autograd.grad(seen[name].sum(), leaves, allow_unused=True, retain_graph=True)
        assert all(g is None for g in untouched), name
    for name in seen.keys() - apart:
        changed = others if name in unordered else shuffled
        before, after = (gradient(lambda name=name, **i: terms(loss(**i))[name], i) for i in (inputs, changed))
        felt.append([g is not None for g in before])
        assert any(felt[-1])
        assert all(g.abs().max() > 0 for g in before if g is not None)
        assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(before, after) if a is not None)
    assert all(map(any, zip(*felt))), "a signal of the student that no term feels"


@every
def test_compiles_as_one_graph(slug):
    row, loss = load_row(slug), loss_of(slug)
    inputs = to_torch(row.inputs(0))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for name, value in terms(compiled(**fresh(inputs))).items():
        torch.testing.assert_close(value, terms(loss(**fresh(inputs)))[name])


@every
def test_a_method_with_a_module_has_traces(slug):
    assert hasattr(load_method(slug), "Module") == bool(getattr(load_row(slug), "TRACES", []))


TRACES = [(s, i) for s in SLUGS for i in range(len(getattr(load_row(s), "TRACES", [])))]


@pytest.mark.parametrize("slug, number", TRACES)
def test_trace(slug, number):
    row, method = load_row(slug), load_method(slug)
    setting = row.TRACES[number]
    ours, theirs = tracing.both(method, row, setting)
    assert ours.keys() == theirs.keys()
    student, teacher = tracing.nets(setting)
    start = {f"module.{n}": p for n, p in tracing.build(method, student, teacher, setting).named_parameters()}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for name, parameter in start.items():  # a loss whose gradient a norm layer cancels leaves its bias alone
        still = name.endswith("conv.bias") or name.removeprefix("module.") in setting.get("still", ())
        assert torch.equal(ours[name], parameter) <= still, name


@pytest.mark.parametrize("slug", sorted({slug for slug, _ in TRACES}))
def test_module(slug):
    """Axes of Module.forward, a checkpoint that goes round, signals in half precision."""
    method, setting = load_method(slug), load_row(slug).TRACES[0]
    options = setting.get("options", {})
    student, teacher = tracing.nets(setting)
    module = tracing.build(method, student, teacher, setting)
    other = tracing.build(method, student, teacher, setting, seed=2)
    batch = tracing.batches(setting=setting)[0]

    def value(module, student, teacher, batch):
        theirs = tracing.heard(teacher, batch["images"])
        changes = tracing.changed(method, module, theirs) if hasattr(method, "before_forward") else {}
        return tracing.call(method, module, tracing.signals(student, batch["images"], changes), theirs, batch, options)

    value(module, student, teacher, batch)
    other.load_state_dict(module.state_dict())
    first, again = (terms(value(m, student, teacher, tracing.batches(setting=setting)[1])) for m in (module, other))
    assert first.keys() == again.keys()
    for name, found in first.items():
        torch.testing.assert_close(found, again[name], rtol=0, atol=0)
        assert found.shape in ((tracing.BATCH,), ())

    half = {**tracing.batches(setting=setting)[2], "images": batch["images"].bfloat16()}
    module, student = module.float(), student.bfloat16()
    for one in teacher if isinstance(teacher, list) else [teacher]:
        one.bfloat16()
    result = terms(value(module, student, teacher, half))
    total(result).backward()
    assert all(term.dtype is torch.float32 and term.isfinite().all() for term in result.values())
    trained = [p for name, p in module.named_parameters() if name not in setting.get("still", ())]
    assert all(p.grad.isfinite().all() for p in [*trained, *list(student.parameters())[:2]])

    checked = jaxtyped(typechecker=beartype)(method.Module.forward)
    bound = type(module)
    original, bound.forward = bound.forward, checked
    try:
        for one in teacher if isinstance(teacher, list) else [teacher]:
            one.double()
        value(module.double(), student.double(), teacher, tracing.batches(setting=setting)[0])
    finally:
        bound.forward = original
