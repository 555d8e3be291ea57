"""The job: plain data and back, paths, types, recipes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from raykd.config import Data, Job, Launch, Loss, Student, Teacher, Training
from raykd.errors import ConfigError, JobFaults
from raykd.resolve import (
    RECIPES,
    each_job,
    from_dict,
    parse_settings,
    read,
    resolve,
    resolve_training,
    set_paths,
    to_dict,
    validate,
    write,
)

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.py"))


def jobs_of(path):
    """Every job a file's functions return without arguments."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = [f for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == path.stem]
    made = []
    for function in functions:
        try:
            made.append(function())
        except TypeError:
            continue  # a function with arguments of its own
    return made


def base():
    return Job(
        student=Student(model="digits_cnn", options={"width": 4}),
        teachers={"strong": Teacher(model="digits_cnn", options={"width": 8}, weights="w.safetensors")},
        losses={"kd": Loss("kd", temperature=2.0), "hint": Loss("fitnet", layers={"student": "stage1", "teacher": "stage2"})},
        ce_weight=0.5,
        training=Training(clip_norm=1.0),
        stages={"pre": Job(name="pre", losses={"at": Loss("at")}, teachers={"t": Teacher(weights="x")})},
    )


@pytest.mark.parametrize("path", JOBS, ids=[p.stem for p in JOBS])
def test_every_job_goes_round(path):
    made = jobs_of(path)
    assert made
    for job in made:
        plain = json.loads(json.dumps(to_dict(job)))
        assert from_dict(plain) == validate(job)
        assert to_dict(from_dict(plain)) == plain
        resolved = resolve(job)
        assert from_dict(json.loads(json.dumps(to_dict(resolved)))) == resolved
        assert resolve(resolved) == resolved


def test_every_field_goes_round(tmp_path):
    job = base().replace(
        **{
            "data.normalise": [[0.5, 0.25, 0.75], [1.0, 2.0, 3.0]],
            "data.augmentation.randaugment": [2, 9],
            "data.train": ["a", "b"],
            "training.milestones": [1.5, 2],
            "launch.resources.tpu": 0.5,
        }
    )
    assert job.data.normalise == ((0.5, 0.25, 0.75), (1.0, 2.0, 3.0))
    assert job.data.augmentation.randaugment == (2, 9)
    assert job.data.train == ("a", "b")
    assert job.training.milestones == (1.5, 2.0)
    assert job.losses["hint"].layers == {"student": ("stage1",), "teacher": ("stage2",)}
    write(job, tmp_path / "job.json")
    assert read(tmp_path / "job.json") == job


@pytest.mark.parametrize("text", [None, "{", ""])
def test_a_job_file_that_cannot_be_read(tmp_path, text):
    path = tmp_path / "job.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"job\.json: cannot be read"):
        read(path)


def test_short_forms():
    job = from_dict(
        {"losses": {"kd": {}, "mine": {"method": "at", "layers": "stage1"}}, "stages": {"s": {"losses": {"sp": {}}}}}
    )
    assert job.losses["kd"] == Loss("kd")
    assert job.losses["mine"] == Loss("at", layers=("stage1",))
    assert job.stages["s"].losses["sp"].method == "sp"


@pytest.mark.parametrize(
    "path, value, look",
    [
        ("seed", "7", lambda j: j.seed == 7),
        ("name", "x", lambda j: j.name == "x"),
        ("training.lr", "1e-3", lambda j: j.training.lr == 1e-3),
        ("training.milestones", "[1, 2.5]", lambda j: j.training.milestones == (1.0, 2.5)),
        ("training.nesterov", "true", lambda j: j.training.nesterov is True),
        ("training.drop_last", "False", lambda j: j.training.drop_last is False),
        ("training.clip_norm", "none", lambda j: j.training.clip_norm is None),
        ("training.optimizer_options.eps", "1e-6", lambda j: j.training.optimizer_options == {"eps": 1e-6}),
        ("losses.kd.temperature", "8", lambda j: j.losses["kd"].options["temperature"] == 8),
        ("losses.kd.schedule", "linear(20)", lambda j: j.losses["kd"].options["schedule"] == "linear(20)"),
        ("losses.kd.teachers", '["strong"]', lambda j: j.losses["kd"].teachers == ("strong",)),
        ("losses.hint.layers.student", '["stage3"]', lambda j: j.losses["hint"].layers["student"] == ("stage3",)),
        ("losses.more", '{"method": "sp"}', lambda j: j.losses["more"].method == "sp"),
        ("losses.rkd", "{}", lambda j: j.losses["rkd"].method == "rkd"),
        ("teachers.strong.replicas", "3", lambda j: j.teachers["strong"].replicas == 3),
        ("teachers.strong.options.width", "16", lambda j: j.teachers["strong"].options["width"] == 16),
        ("teachers.other", '{"model": "wrn_16_2"}', lambda j: j.teachers["other"].model == "wrn_16_2"),
        ("student.options.depth", "2", lambda j: j.student.options == {"width": 4, "depth": 2}),
        ("stages.pre.training.epochs", "3", lambda j: j.stages["pre"].training.epochs == 3),
        ("stages.pre.losses.at.power", "4.0", lambda j: j.stages["pre"].losses["at"].options["power"] == 4.0),
        ("data.root", "/a=b", lambda j: j.data.root == "/a=b"),
    ],
)
def test_a_setting_by_path(path, value, look):
    before = base()
    changed = set_paths(before, parse_settings([f"{path}={value}"]))
    assert look(changed)
    assert changed != before
    assert before == base(), "the job itself does not change"


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("sed", 1, r"--set sed: no such setting\. Did you mean 'seed'"),
        ("training.lrr", 1, r"--set training\.lrr: no such setting\. Did you mean 'lr'"),
        ("trainin.lr", 1, r"no setting 'trainin'\. Did you mean 'training'"),
        ("teachers.stron.replicas", 1, r"no setting 'teachers\.stron'\. Did you mean 'strong'"),
        ("teachers.strong.replica", 1, r"no such setting\. Did you mean 'replicas'"),
        ("losses.kdd.temperature", 1, r"no setting 'losses\.kdd'\. Did you mean 'kd'"),
        ("losses.kd.temprature", 1, r"losses\.kd\.temprature: kd has no such option\. Did you mean 'temperature'"),
        ("stages.pre.losses.at.powr", 1, r"stages\.pre\.losses\.at\.powr: at has no such option\. Did you mean 'power'"),
        ("seed.x", 1, r"'seed' is a single value, it holds no settings"),
        ("seed.x.y", 1, r"no setting 'seed\.x'"),
        ("training.lr", "fast", r"training\.lr: .*number.*got 'fast'"),
        ("training.lr", -1, r"training\.lr: .*greater than 0, got -1"),
        ("training.epochs", 1.5, r"training\.epochs: .*integer.*got 1\.5"),
        ("training.epochs", 0, r"training\.epochs: .*greater than or equal to 1, got 0"),
        ("training.ema", 1.5, r"training\.ema: .*less than or equal to 1"),
        ("teachers.strong.replicas", 0, r"1\. teachers\.strong\.replicas: .*greater than or equal to 1, got 0"),
        ("teachers.strong.placement", "far", r"teachers\.strong\.placement: .*'pool'.*'inline'"),
        ("teachers.weak", {"modle": "x"}, r"teachers\.weak\.modle: no such setting\. Did you mean 'model'"),
        ("launch.backend", "slurm", r"launch\.backend: .*'ray' or 'local'"),
        ("data.normalise", [[0.1], "x"], r"data\.normalise"),
        ("data.augmentation", {"corp": 4}, r"data\.augmentation\.corp: no such setting\. Did you mean 'crop'"),
        ("losses.kd.temperature", "warm", r"losses\.kd\.temperature: expected float, got 'warm'"),
        ("losses.kd.temperature", True, r"losses\.kd\.temperature: expected float, got True"),
        ("losses.kd.temperature", "NaN", r"losses\.kd\.temperature: expected float, got nan"),
        ("losses.kd.temperature", None, r"losses\.kd\.temperature: expected float, got None"),
        ("losses.kd.weight", "x", r"losses\.kd\.weight: expected float, got 'x'"),
        ("losses.kd.schedule", 3, r"losses\.kd\.schedule: expected str, got 3"),
        ("losses.more", {"method": "crd", "num_negatives": 1.5}, r"losses\.more\.num_negatives: expected int, got 1\.5"),
        ("losses.kd.method", "kdd", r"losses\.kd: Method 'kdd': no such method\. Did you mean 'kd'"),
        ("losses.kd.teachers", ["weak"], r"losses\.kd\.teachers: no teacher 'weak' in this job\. Known: strong"),
        ("losses.more", 3, r"losses\.more: .*mapping"),
        ("training.recipe", "imagnet", r"training\.recipe: no recipe 'imagnet'\. Did you mean 'imagenet'"),
        ("stages.pre.training.lr", "x", r"stages\.pre\.training\.lr"),
    ],
)
def test_a_bad_setting(path, value, message):
    with pytest.raises(JobFaults, match=message):
        base().replace(**{path: value})


def test_all_faults_at_once():
    with pytest.raises(JobFaults) as caught:
        base().replace(**{"sed": 1, "training.lrr": 2, "seed": 4})
    assert "2 faults" in str(caught.value)
    with pytest.raises(JobFaults) as caught:
        validate(dataclasses.replace(base(), training=Training(epochs=0, lr=-1.0)))
    assert "training.epochs" in str(caught.value)
    assert "training.lr" in str(caught.value)


def test_a_dataclass_with_the_wrong_types_is_found():
    with pytest.raises(JobFaults, match=r"training\.batch_size: .*got 'many'"):
        validate(Job(training=Training(batch_size="many")))
    with pytest.raises(ConfigError, match=r"expected a raykd\.Job, got dict"):
        validate({})


@pytest.mark.parametrize("pair", ["training.lr", "lr 3"])
def test_a_setting_without_a_value(pair):
    with pytest.raises(JobFaults, match=f"--set {pair}: expected path=value"):
        parse_settings([pair, "seed=1"])


def test_the_crd_recipe_is_the_protocol():
    found = resolve_training(Training())
    assert (found.epochs, found.batch_size, found.lr, found.momentum, found.weight_decay) == (240, 64, 0.05, 0.9, 5e-4)
    assert found.milestones == (150, 180, 210)
    assert (found.optimizer, found.scheduler, found.gamma, found.nesterov) == ("sgd", "multistep", 0.1, False)


def test_milestones_are_scaled_to_other_epochs():
    assert resolve_training(Training(epochs=24)).milestones == (15.0, 18.0, 21.0)
    assert resolve_training(Training(recipe="imagenet", epochs=50)).milestones == (15.0, 30.0, 45.0)
    assert resolve_training(Training(epochs=24, milestones=(3.0,))).milestones == (3.0,)
    assert resolve_training(Training(epochs=7)).milestones == (4.375, 5.25, 6.125)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_leaves_nothing_open_and_a_job_comes_first(recipe):
    open_fields = [
        f.name for f in dataclasses.fields(Training) if getattr(resolve_training(Training(recipe=recipe)), f.name) is None
    ]
    assert set(open_fields) == {"clip_norm", "ema", "max_steps"}
    mine = resolve_training(Training(recipe=recipe, lr=3.0, momentum=0.0, nesterov=True, warmup_epochs=2.0))
    assert (mine.lr, mine.momentum, mine.nesterov, mine.warmup_epochs) == (3.0, 0.0, True, 2.0)


def test_resolved_losses_say_everything():
    job = resolve(Job(losses={"kd": Loss("kd"), "dkd": Loss("dkd", weight=2.0)}, ce_weight=1.0))
    assert job.losses["kd"].options == {"temperature": 4.0, "weight": 0.9, "ce_weight": 0.1, "schedule": "constant"}
    assert (job.losses["dkd"].options["weight"], job.losses["dkd"].options["schedule"]) == (2.0, "linear(20)")
    assert resolve(Job(losses={"fitnet": Loss("fitnet")})).losses["fitnet"].layers == ("stage2",)


def test_the_weight_of_cross_entropy():
    assert resolve(Job()).ce_weight == 1.0
    assert resolve(Job(losses={"kd": Loss("kd")})).ce_weight == 0.1
    assert resolve(Job(losses={"kd": Loss("kd"), "kd-mse": Loss("kd-mse")})).ce_weight == 0.1
    assert resolve(Job(losses={"kd": Loss("kd")}, ce_weight=0.0)).ce_weight == 0.0
    with pytest.raises(JobFaults, match=r"ce_weight: .*kd 0\.1.*at 1\.0.*Set ce_weight"):
        resolve(Job(losses={"kd": Loss("kd"), "at": Loss("at")}))
    assert resolve(Job(losses={"kd": Loss("kd"), "at": Loss("at")}, ce_weight=0.3)).ce_weight == 0.3


def test_data_and_weights_are_resolved():
    job = resolve(
        Job(
            data=Data(kind="digits", root="/d", in_channels=3, num_classes=7),
            teachers={"t": Teacher(weights="{data.root}/t.pth"), "u": Teacher(weights="pretrained")},
            student=Student(weights="{data.root}/s.pth"),
        )
    )
    assert (job.data.in_channels, job.data.num_classes, job.data.normalise) == (1, 10, "digits")
    assert (job.teachers["t"].weights, job.teachers["u"].weights) == ("/d/t.pth", "pretrained")
    assert job.student.weights == "/d/s.pth"
    assert resolve(Job(data=Data(kind="folder"))).data.normalise == "imagenet"
    assert resolve(Job(data=Data(kind="folder", in_channels=1))).data.normalise == "mnist"
    assert resolve(Job(data=Data(kind="folder", normalise="cifar10"))).data.normalise == "cifar10"


def test_stages_are_resolved_and_visited_depth_first():
    inner = Job(name="inner", training=Training(epochs=24))
    job = resolve(Job(name="outer", stages={"b": Job(name="middle", stages={"a": inner})}, launch=Launch(backend="local")))
    assert each_job(job, lambda path, one: (path, one.name)) == [
        ("stages.b.stages.a.", "inner"),
        ("stages.b.", "middle"),
        ("", "outer"),
    ]
    assert job.stages["b"].stages["a"].training.milestones == (15.0, 18.0, 21.0)


def test_options_of_a_users_loss_are_typed(tmp_path, monkeypatch):
    (tmp_path / "typed_losses.py").write_text(
        "def my_loss(student_logits, *, mode: Literal['a', 'b'] = 'a', margin: float | None = None, count: int, free=3): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fine = {"mode": "b", "margin": None, "count": 2, "free": "anything"}
    assert resolve(Job(losses={"mine": Loss("typed_losses:my_loss", **fine)})).losses["mine"].options["mode"] == "b"
    for option, bad in {"mode": "c", "margin": "x", "count": 2.5}.items():
        with pytest.raises(JobFaults, match=rf"losses\.mine\.{option}: expected"):
            resolve(Job(losses={"mine": Loss("typed_losses:my_loss", **fine | {option: bad})}))
    with pytest.raises(JobFaults, match=r"losses\.mine\.count: .*needs this option"):
        resolve(Job(losses={"mine": Loss("typed_losses:my_loss")}))
