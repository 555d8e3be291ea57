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
    load_method,
    load_row,
    loss_of,
    take,
    terms,
    to_torch,
    total,
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
    first = next(iter(inputs.values()))
    return len(first[0] if isinstance(first, list) else first)


def with_gradient(inputs):
    """The inputs, with leaves that require gradient on the student's side, and the leaves."""
    inputs, leaves = dict(inputs), []
    for name, value in students(inputs).items():
        inputs[name] = each(lambda t: t.clone().requires_grad_(True), value)
        leaves += inputs[name] if isinstance(value, list) else [inputs[name]]
    return inputs, leaves


def gradient(loss, inputs, **options):
    inputs, leaves = with_gradient(inputs)
    return torch.autograd.grad(total(loss(**inputs, **options)), leaves)


def as_type(inputs, dtype):
    return {n: each(lambda t: t.to(dtype) if t.is_floating_point() else t, v) for n, v in inputs.items()}


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
                close(loss(**to_torch(inputs), **options), row.reference(**inputs, **options))


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
            given, left = dict(inputs), list(leaves)
            for name in names:
                many = isinstance(inputs[name], list)
                given[name] = [left.pop(0) for _ in inputs[name]] if many else left.pop(0)
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
            bad.append({**given, name: each(lambda t: t[..., None], value)})
            bad.append({**given, name: each(lambda t: t[None], value)})
            for letter in {a for a in axes[name] if letters.count(a) > 1 and not a.startswith(("*", "_"))}:
                bad.append({**given, name: take(value, axes[name], letter, torch.tensor([0]))})
            if "*p" in axes[name]:
                bad.append({**given, name: each(lambda t: t[:, None], value)})
        assert len(bad) > 2
        for case in bad:
            with pytest.raises(SignalError, match=rf"\({slug}\)"):
                loss(**case)


@every
def test_batch_permutation(slug):
    row, loss = load_row(slug), loss_of(slug)
    axes = axes_of(loss)
    for inputs in map(to_torch, samples(row)):
        before = terms(loss(**inputs))
        order = torch.arange(batch_size(inputs)).roll(1)
        after = terms(loss(**{n: take(v, axes[n], "b", order) for n, v in inputs.items()}))
        for name, value in before.items():
            torch.testing.assert_close(after[name], value[order] if value.ndim else value, rtol=1e-10, atol=1e-10)


@every
def test_a_sample_alone_makes_its_value(slug):
    row, loss = load_row(slug), loss_of(slug)
    inputs, axes = to_torch(row.inputs(0)), axes_of(loss_of(slug))
    whole = {n: v for n, v in terms(loss(**inputs)).items() if v.ndim}
    if whole:
        first = torch.tensor([0])
        alone = terms(loss(**{n: take(v, axes[n], "b", first) for n, v in inputs.items()}))
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
                value = terms(loss(**half))
                assert all(v.isfinite().all() and v.dtype is torch.float32 for v in value.values()), dtype
                fits = [g.to(dtype).isfinite().all() for g in gradient(loss, as_type(half, torch.float32))]
                assert all(g.isfinite().all() for g, fit in zip(gradient(loss, half), fits) if fit), dtype
                assert all(fits) or dtype is torch.float16
                if dtype is not torch.float32:  # computed in full precision
                    for name, wide in terms(loss(**as_type(half, torch.float32))).items():
                        assert torch.equal(value[name], wide)


@every
def test_inputs_stay_as_they_are(slug):
    row, loss = load_row(slug), loss_of(slug)
    inputs, kept = to_torch(row.inputs(0)), to_torch(row.inputs(0))
    gradient(loss, inputs)
    for name, value in inputs.items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)


@every
def test_the_teacher_is_live(slug):
    """Each term's gradient at the student is there, and another if the teacher's signals are shuffled over the batch."""
    row, loss = load_row(slug), loss_of(slug)
    inputs = to_torch(row.inputs(0))
    shuffled = {
        n: each(lambda t: t.roll(1, 0), v) if n.startswith("teacher") and n[-2:] != "_z" else v for n, v in inputs.items()
    }
    for name in terms(loss(**inputs)):
        before, after = (gradient(lambda name=name, **i: terms(loss(**i))[name], i) for i in (inputs, shuffled))
        assert all(g.abs().max() > 0 for g in before)
        assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(before, after))


@every
def test_compiles_as_one_graph(slug):
    row, loss = load_row(slug), loss_of(slug)
    inputs = to_torch(row.inputs(0))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for name, value in terms(compiled(**inputs)).items():
        torch.testing.assert_close(value, terms(loss(**inputs))[name])


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
    start = {
        f"module.{n}": p for n, p in tracing.build(method, student, teacher, setting.get("options", {})).named_parameters()
    }
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for name, parameter in start.items():  # a loss whose gradient a norm layer cancels leaves its bias alone
        assert not torch.equal(ours[name], parameter) or name.endswith("conv.bias"), name


@pytest.mark.parametrize("slug", sorted({slug for slug, _ in TRACES}))
def test_module(slug):
    """Axes of Module.forward, a checkpoint that goes round, signals in half precision."""
    method, setting = load_method(slug), load_row(slug).TRACES[0]
    options = setting.get("options", {})
    student, teacher = tracing.nets(setting)
    module = tracing.build(method, student, teacher, options)
    other = tracing.build(method, student, teacher, options, seed=2)
    batch = tracing.batches()[0]

    def value(module, student, teacher, batch):
        own, theirs = tracing.signals(student, batch["images"]), tracing.signals(teacher, batch["images"])
        return tracing.call(method, module, own, theirs, batch, options)

    value(module, student, teacher, batch)
    other.load_state_dict(module.state_dict())
    again = [value(m, student, teacher, tracing.batches()[1]) for m in (module, other)]
    torch.testing.assert_close(*again, rtol=0, atol=0)
    assert again[0].shape in ((tracing.BATCH,), ())

    half = {**tracing.batches()[2], "images": batch["images"].bfloat16()}
    module, student, teacher = module.float(), student.bfloat16(), teacher.bfloat16()
    result = value(module, student, teacher, half)
    result.mean().backward()
    assert result.dtype is torch.float32
    assert result.isfinite().all()
    assert all(p.grad.isfinite().all() for p in [*module.parameters(), *list(student.parameters())[:2]])

    checked = jaxtyped(typechecker=beartype)(method.Module.forward)
    bound = type(module)
    original, bound.forward = bound.forward, checked
    try:
        value(module.double(), student.double(), teacher.double(), tracing.batches()[0])
    finally:
        bound.forward = original
