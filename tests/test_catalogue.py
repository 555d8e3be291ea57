"""The catalogue reads files: names, signals and options without torch."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from raykd import catalogue
from raykd.errors import ConfigError

BUILT_IN = ["kd", "kd-mse", "dkd", "dist", "fitnet", "at", "pkt", "vid", "crd", "rkd", "sp"]

READ_ALL = """
import json, sys, time
import raykd.catalogue
found, seconds = None, []
for _ in range(3):
    for cached in (raykd.catalogue._read, raykd.catalogue.derived, raykd.catalogue._derived_nodes):
        cached.cache_clear()
    start = time.perf_counter()
    found = raykd.catalogue.methods()
    seconds.append(time.perf_counter() - start)
heavy = [m for m in ("torch", "numpy", "pydantic", "ray") if m in sys.modules]
print(json.dumps({"slugs": list(found), "heavy": heavy, "seconds": min(seconds)}))
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes `mine/losses.py`, importable as `mine.losses`."""

    def write(text):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "__init__.py").write_text("")
        (tmp_path / "mine" / "losses.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return tmp_path / "mine" / "losses.py"

    yield write
    for name in [n for n in sys.modules if n == "mine" or n.startswith("mine.")]:
        del sys.modules[name]


def test_all_methods_are_read_at_once_and_without_torch():
    out = subprocess.run([sys.executable, "-c", READ_ALL], capture_output=True, text=True, check=True).stdout
    found = json.loads(out)
    assert found["heavy"] == []
    assert found["seconds"] < 0.5
    assert set(BUILT_IN) <= set(found["slugs"])


def test_methods_come_in_the_order_of_the_survey():
    keys = [(m.section, m.slug) for m in catalogue.methods().values()]
    assert keys == sorted(keys)


def test_what_a_file_declares():
    crd = catalogue.method("crd")
    assert crd.parameters == ("student_embedding", "teacher_embedding", "labels", "sample_index", "generator")
    assert crd.build_parameters == ("student_embedding", "teacher_embedding", "num_samples", "num_classes")
    assert (crd.trains, crd.hooks, crd.section, crd.scheme, crd.sparse) == (True, ("prepare",), "1.3", "offline", False)
    assert crd.defaults() == {
        "embed_dim": 128,
        "num_negatives": 16384,
        "momentum": 0.5,
        "temperature": 0.07,
        "weight": 0.8,
        "ce_weight": 1.0,
    }
    assert (crd.options["num_negatives"].annotation, crd.options["momentum"].annotation) == ("int", "float")
    assert set(crd.accepts["forward"]) == {"temperature"}
    at = catalogue.method("at")
    assert at.layers == ("stages",)
    assert at.defaults()["power"] == 2.0  # an option of the derived signal it listens to
    assert catalogue.method("fitnet").layers == ("stage2",)
    assert catalogue.method("kd").sparse


@pytest.mark.parametrize("slug", ["kd-mse", "kd_mse"])
def test_both_spellings(slug):
    assert catalogue.method(slug).slug == "kd-mse"


@pytest.mark.parametrize("slug", BUILT_IN)
def test_a_method_is_called_as_declared(slug):
    found = catalogue.method(slug)
    target = found.call()
    assert isinstance(target, type) == found.trains
    assert target.__module__ == found.module


def test_derived_signals():
    found = catalogue.derived()
    assert (found["attention"].parent, found["attention"].options, found["attention"].per_batch) == (
        "feature",
        ("power",),
        False,
    )
    assert found["gram"].per_batch
    assert found["similarity"].parent == "embedding"
    assert "per_batch" not in found
    assert "derived_signals" not in found


@pytest.mark.parametrize("name, hint", [("kdd", "'kd'"), ("fitnets", "'fitnet'"), ("zzzz", "Known: ")])
def test_a_misspelt_method(name, hint):
    with pytest.raises(ConfigError, match=f"Method '{name}': no such method") as caught:
        catalogue.method(name)
    assert hint in str(caught.value)


def test_a_users_function(package):
    path = package(
        "LAYERS: tuple[str, ...] = ('stage1', 'stage3')\n"
        "SPARSE = True\n"
        "def prepare(loss, num_samples): ...\n"
        "def my_loss(student_logits, teacher_attentions, labels, *, margin: float = 0.5, kind: str, weight: float = 3.0): ...\n"
        "def other(student_logits, teacher_logits): ...\n"
    )
    assert catalogue.method("mine.losses:other").layers == ()
    found = catalogue.method("mine.losses:my_loss")
    assert found.path == path
    assert "mine.losses" not in sys.modules, "reading a loss does not run it"
    assert found.parameters == ("student_logits", "teacher_attentions", "labels")
    assert found.layers == ("stage1", "stage3")
    assert found.sparse
    assert found.hooks == ("prepare",)
    assert found.options["kind"].default is catalogue.REQUIRED
    assert found.defaults() == {"margin": 0.5, "weight": 3.0, "power": 2.0}
    assert found.call().__name__ == "my_loss"


def test_a_users_class(package):
    package(
        "class Module: ...\n"
        "class Connector:\n"
        "    def __init__(self, student_feature, teacher_feature, num_classes, *, width: int = 8): ...\n"
        "    def forward(self, student_feature, teacher_feature, *, power: float = 2.0, weight: float = 7.0): ...\n"
    )
    found = catalogue.method("mine.losses:Connector")
    assert found.trains
    assert found.build_parameters == ("student_feature", "teacher_feature", "num_classes")
    assert found.defaults() == {"width": 8, "power": 2.0, "weight": 7.0}
    assert found.call().__name__ == "Connector"


def test_a_users_file_with_a_module_and_a_function(package):
    package("class Module: ...\ndef my_loss(student_logits): ...\n")
    found = catalogue.method("mine.losses:my_loss")
    assert not found.trains
    assert found.call().__name__ == "my_loss"


@pytest.mark.parametrize(
    "name, message",
    [
        ("mine.losses:my_los", "has no 'my_los'. Did you mean 'my_loss'"),
        ("mine.loses:my_loss", "no Python module 'mine.loses'"),
        ("nothing.there:my_loss", "cannot import 'nothing.there'"),
        ("mine.losses:Empty", "has no forward"),
        ("mine.losses:computed", "option 'rate': expected a literal default, got 2 \\* 3"),
        ("itertools:count", "cannot be read"),
    ],
)
def test_faults_of_a_users_loss(package, name, message):
    package("def my_loss(student_logits): ...\nclass Empty: ...\ndef computed(student_logits, *, rate: int = 2 * 3): ...\n")
    with pytest.raises(ConfigError, match=message):
        catalogue.method(name)


@pytest.mark.parametrize("text", [b"def my_loss(:\n", b"x = '\xff\xfe'\n"])
def test_a_file_that_does_not_parse(package, text):
    path: Path = package("")
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        catalogue.method("mine.losses:my_loss")
