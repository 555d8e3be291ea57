"""The grammar of signal names, and the wiring of a loss's parameters."""

import itertools

import pytest

from raykd import catalogue
from raykd.errors import SignalError
from raykd.signals import PLAIN_NAMES, Derived, Parameter, Signal, parse, takes_layer, wires

DERIVED = {
    "attention": Derived("feature", ("power",)),
    "gram": Derived("feature", (), True),
    "mean_gram": Derived("gram"),
    "similarity": Derived("embedding", (), True),
    "feature_norm": Derived("feature"),
}
ROLES = ["student", "teacher", "teachers", "peer", "peers", "ema", "previous"]
KINDS = ["logits", "feature", "embedding", "input_grad", "attention", "gram", "mean_gram", "similarity", "feature_norm"]


@pytest.mark.parametrize("role, kind", itertools.product(ROLES, KINDS))
def test_every_role_and_kind(role, kind):
    assert parse(f"{role}_{kind}", DERIVED) == Parameter(f"{role}_{kind}", role, kind)
    for tail, view, branches in (
        ("rotations", "rotations", False),
        ("branches", None, True),
        ("branches_rotations_ema", "rotations_ema", True),
    ):
        found = parse(f"{role}_{kind}_{tail}", DERIVED)
        assert (found.role, found.kind, found.plural, found.view, found.branches) == (role, kind, False, view, branches)
    if kind != "logits":
        found = parse(f"{role}_{kind}s", DERIVED)
        assert (found.kind, found.plural, found.view) == (kind, True, None)
        found = parse(f"{role}_{kind}s_ema", DERIVED)
        assert (found.kind, found.plural, found.view) == (kind, True, "ema")


@pytest.mark.parametrize("tail, hint", [("rotation", "'rotations'"), ("ema_branches", "in this order"), ("", "logits")])
def test_a_misspelt_view_gets_near_names(tail, hint):
    with pytest.raises(SignalError, match=r"of parameter|Parameter") as caught:
        parse(f"student_logits_{tail}", DERIVED)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", [*PLAIN_NAMES, "temperature", "student", "students_logits", "studentlogits"])
def test_other_names_are_no_signals(name):
    assert parse(name, DERIVED) is None


@pytest.mark.parametrize(
    "name, hint",
    [
        ("student_logit", "'logits'"),
        ("teacher_featurs", "'feature'"),
        ("teachers_atention", "'attention'"),
        ("student_input_gradient", "'input_grad'"),
        ("student_logitss", "'logits'"),
        ("student_logits_", "'logits'"),
        ("ema_", "one of logits, feature, embedding, input_grad, norm, attention"),
    ],
)
def test_a_misspelt_signal_gets_near_names(name, hint):
    with pytest.raises(SignalError, match=f"of parameter '{name}': expected") as caught:
        parse(name, DERIVED)
    assert hint in str(caught.value)


def test_a_derived_signal_is_unknown_without_its_declaration():
    with pytest.raises(SignalError, match="attention"):
        parse("student_attention")


def test_keys_tell_signals_apart():
    signals = [
        Signal("logits"),
        Signal("logits", view="rotations"),
        Signal("logits", branch=1),
        Signal("logits", view="rotations", branch=1),
        Signal("feature", "stage1"),
        Signal("feature", "stage2"),
        Signal("attention", "stage1", (("power", 2.0),)),
        Signal("attention", "stage1", (("power", 4.0),)),
        Signal("attention", "stage1", (("power", 2.0),), "rotations"),
    ]
    assert len({s.key for s in signals}) == len(signals)
    assert Signal("attention", "stage1", (("power", 2.0),)).key == "attention@stage1(power=2.0)"
    assert Signal("logits").key == "logits"


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_comes_from_features_takes_a_layer(kind):
    assert takes_layer(kind, DERIVED) == (kind in ("feature", "attention", "gram", "mean_gram", "feature_norm"))


def test_wires_of_a_whole_signature():
    parameters = ["student_logits", "teacher_features", "labels", "generator", "student_attentions", "teacher_similarity"]
    layers = {"student": ("s1", "s2"), "teacher": ("t1", "t2")}
    found = wires(parameters, layers, {"power": 4.0, "temperature": 2.0}, DERIVED)
    assert [w.parameter.name for w in found] == [
        "student_logits",
        "teacher_features",
        "student_attentions",
        "teacher_similarity",
    ]
    assert [s.key for w in found for s in w.signals] == [
        "logits",
        "feature@t1",
        "feature@t2",
        "attention@s1(power=4.0)",
        "attention@s2(power=4.0)",
        "similarity",
    ]


def test_a_wire_picks_a_tensor_or_a_list():
    layers = {"student": ("late", "early")}
    plural, single = wires(["student_features", "student_logits"], layers, {}, {})
    signals = {"feature@early": "E", "feature@late": "L", "logits": "Z"}
    assert plural.pick(signals) == ["L", "E"]
    assert single.pick(signals) == "Z"


def test_a_list_of_teachers_reads_each_ones_own_layers():
    layers = {"teachers": (("t1", "t2"), ("u1", "u2")), "student": ("s1",)}
    (wire,) = wires(["teachers_features"], layers, {}, {})
    assert [[s.layer for s in wire.of(place)] for place in (0, 1)] == [["t1", "t2"], ["u1", "u2"]]
    answers = [{"feature@t1": 1, "feature@t2": 2}, {"feature@u1": 3, "feature@u2": 4}]
    assert wire.pick(answers) == [[1, 2], [3, 4]]
    assert wire.pick(answers[1:], of=(1,)) == [[3, 4]], "the first teacher has gone"


def test_branches_are_a_list_of_each_model():
    counts = {"student": 3, "peers": (2, 1)}
    layers = {"student": ("s1", "s2"), "peers": ((), ())}
    names = ["student_logits_branches", "student_features_branches", "peers_logits_branches"]
    logits, features, peers = wires(names, layers, {}, {}, branches=counts)
    own = {"logits": "Z0", "logits#1": "Z1", "logits#2": "Z2"}
    own |= {f"feature@s{i}" + (f"#{b}" if b else ""): f"F{b}{i}" for i in (1, 2) for b in range(3)}
    assert logits.pick(own) == ["Z0", "Z1", "Z2"]
    assert features.pick(own) == [["F01", "F02"], ["F11", "F12"], ["F21", "F22"]]
    assert peers.pick([{"logits": 1, "logits#1": 2}, {"logits": 3}]) == [[1, 2], [3]]
    assert peers.pick([{"logits": 3}], of=(1,)) == [[3]], "the first peer has gone"


@pytest.mark.parametrize("layers", [(), ("stage1", "stage2")])
def test_a_singular_signal_needs_one_layer(layers):
    with pytest.raises(SignalError, match="student_feature: expected exactly one layer of the student") as caught:
        wires(["student_feature"], {"student": layers}, {}, {})
    assert str(list(layers)) in str(caught.value)


def test_a_plural_signal_needs_a_layer():
    with pytest.raises(SignalError, match="teacher_features: expected at least one layer of the teacher"):
        wires(["teacher_features"], {"student": ("stage1",)}, {}, {})


@pytest.mark.parametrize(
    "name, hint", [("label", "'labels'"), ("temperature", "Hyper-parameters stand after"), ("logits", "student")]
)
def test_an_unknown_parameter_is_refused(name, hint):
    with pytest.raises(SignalError, match=f"Parameter '{name}': expected <role>_<signal>") as caught:
        wires([name], {}, {}, DERIVED)
    assert hint in str(caught.value)


def test_a_derived_option_is_bound_only_where_the_loss_has_it():
    layers = {"student": ("stage1",)}
    (bound,) = wires(["student_attention"], layers, {"power": 3.0}, catalogue.derived())
    (free,) = wires(["student_attention"], layers, {"weight": 3.0}, catalogue.derived())
    assert bound.signals[0].options == (("power", 3.0),)
    assert free.signals[0].options == ()
