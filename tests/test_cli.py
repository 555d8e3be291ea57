import json
import subprocess
import sys
import time

import pytest

from raykd.cli import main
from raykd.cli.parser import KINDS
from raykd.report import catalogues
from tests.report.folders import make, result

JOB = """
from raykd import Data, Job, Launch, Loss, Student, Training
from raykd.config import Peer


def job(width: int = 2, epochs: int = 1) -> Job:
    print("a job file may print")
    return Job(
        name="tiny",
        data=Data(kind="digits", limit=128, eval_limit=64),
        student=Student(model="digits_cnn", options={"width": width}),
        training=Training(epochs=epochs, batch_size=32, lr=0.05),
        launch=Launch(backend="local"),
    )


def mutual() -> Job:
    peers = {name: Peer(model="digits_cnn", options={"width": width}) for name, width in {"a": 2, "b": 3}.items()}
    return job().replace(name="mutual", student=Student(), peers=peers, losses={"dml": Loss("dml")})


def stopped() -> Job:
    return job(epochs=20).replace(**{"losses.stop": Loss("tiny_losses:stop_loss")})
"""
LOSSES = """
import os
import signal


def stop_loss(student_logits, step, *, weight: float = 1.0, at: int = 2):
    if step == at:
        os.kill(os.getpid(), signal.SIGINT)
    return 0 * student_logits.sum(-1)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A user's folder: jobs/tiny.py and a module of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "tiny.py").write_text(JOB)
    (tmp_path / "tiny_losses.py").write_text(LOSSES)
    return tmp_path


def test_list_is_there_at_once_and_imports_no_torch():
    code = "import sys; from raykd.cli import main; main(['list']); print({'torch', 'ray', 'pydantic'} & set(sys.modules))"
    started = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 5  # 0.2 s on an idle machine; the bound leaves room for a busy one
    assert found.stdout.splitlines()[-1] == "set()"
    assert "kd-mse" in found.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_every_list_as_text_and_json(kind, capsys):
    assert main(["list", kind]) == 0
    assert capsys.readouterr().out
    assert main(["list", kind, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[kind]


def test_the_parser_knows_the_catalogues():
    assert KINDS == catalogues.KINDS


@pytest.mark.parametrize("section", ["feature", "1.2", "1.2."])
def test_list_of_a_section(section, capsys):
    assert main(["list", "--section", section, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert {m["folder"] for m in found} == {"feature"}


def test_show_a_method(capsys):
    assert main(["show", "kd_mse"]) == 0
    assert "arXiv:2105.08919" in capsys.readouterr().out
    assert main(["show", "kd", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["options"]["temperature"] == {"type": "float", "required": False, "default": 4.0}
    assert page["signals"] == ["student_logits", "teacher_logits"]


def test_show_a_run(tmp_path, capsys):
    folder = make(tmp_path / "run", found=result(test=0.7))
    assert main(["show", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "student distilled" in text
    assert "commit: abc1234" in text
    assert main(["show", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["finished"], found["curves"]["steps"]) == (True, 60)


def test_show_a_run_that_is_not_finished(tmp_path, capsys):
    assert main(["show", str(make(tmp_path / "run"))]) == 0
    text = capsys.readouterr().out
    assert "not finished" in text
    assert "raykd run --resume" in text


def test_run_show_and_check(place, capfd):
    assert main(["run", "jobs/tiny.py", "--arg", "width=3", "--set", "training.lr=0.1", "--json"]) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out)
    assert found["student"]["last"]["count"] == 64
    assert "a job file may print" in captured.err
    folder = place / "runs" / "tiny-001"
    settings = json.loads((folder / "job.json").read_text())
    assert (settings["student"]["options"], settings["training"]["lr"]) == ({"width": 3}, 0.1)
    assert (folder / "report.html").is_file()
    assert main(["run", str(folder), "--quiet"]) == 0  # once more, from its job.json
    assert "student" in capfd.readouterr().out
    again = json.loads((place / "runs" / "tiny-002" / "result.json").read_text())
    assert again["student"]["last"] == found["student"]["last"]


def test_seeds(place, capfd):
    assert main(["run", "jobs/tiny.py", "--seeds", "2", "--quiet", "--set", "seed=5"]) == 0
    assert "over seeds 5, 6" in capfd.readouterr().out
    base = place / "runs" / "tiny-seeds-001"
    summary = json.loads((base / "seeds.json").read_text())
    top1 = [json.loads((base / f"seed-{s}" / "result.json").read_text())["student"]["last"]["top1"] for s in (5, 6)]
    assert summary["student"]["last"]["values"] == top1
    assert main(["run", "jobs/tiny.py", "--seeds", "2", "--set", "seed=5", "--resume", "--json"]) == 0  # nothing runs again
    assert json.loads(capfd.readouterr().out) == summary
    assert main(["show", str(base)]) == 0
    assert "over seeds 5, 6" in capfd.readouterr().out


@pytest.mark.parametrize("newest", [True, False])
def test_a_stopped_run_says_how_to_go_on(place, capfd, newest):
    assert main(["run", "jobs/tiny.py:stopped"]) == 130
    text = capfd.readouterr().err
    folder = place / "runs" / "tiny-001"
    command = f"raykd run jobs/tiny.py:stopped --resume {folder}"
    assert f"Go on with: {command}" in text
    assert "Traceback" not in text
    assert not (folder / "result.json").exists()
    resume = ["run", "jobs/tiny.py:stopped", "--resume"] if newest else command.split()[1:]
    assert main([*resume, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["folder"], found["student"]["steps"]) == (str(folder), 80)


def test_check_prints_models_and_needs(place, capsys):
    assert main(["check", "jobs/tiny.py"]) == 0
    text = capsys.readouterr().out
    assert "digits_cnn" in text
    assert "Needs 1 CPU and 0 GPU in all" in text
    assert "No faults." in text


def test_check_shows_who_teaches_whom(place, capsys):
    graph = ["--set", "exchange.graph=leader:a", "--set", "exchange.every=2"]
    assert main(["check", "jobs/tiny.py:mutual", *graph]) == 0
    text = capsys.readouterr().out
    assert "a > b" in text
    assert "b > a" not in text
    assert "Exchange: signals of the same step, every 2 steps; losses that hear peers count at these steps alone." in text
    assert main(["check", "jobs/tiny.py:mutual", "--set", 'exchange.edges={"a>b":{"weight":2}}', "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["role"]) for r in found["roles"]] == [("a", "peer"), ("b", "peer")]
    assert found["edges"] == [{"from": "a", "to": "b", "weight": 1.0, "losses": ["dml"], "bytes_a_step": 1280.0}]
    weights = ["--set", "exchange.what=weights", "--set", "exchange.every=4"]
    assert main(["check", "jobs/tiny.py:mutual", *weights, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {r["name"]: r["parameters"] for r in found["roles"]}
    assert [(e["from"], e["bytes_a_step"]) for e in found["edges"]] == [("b", float(sizes["b"])), ("a", float(sizes["a"]))]
    assert main(["check", "jobs/tiny.py:mutual", "--set", "exchange.graph=stra:a", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["edges"] == []


def test_check_shows_branches(place, capsys):
    assert main(["check", "jobs/tiny.py", "--set", "losses.one={}"]) == 0
    assert "digits_cnn, split in 3" in capsys.readouterr().out


def test_peers_run_and_are_shown(place, capfd):
    assert main(["run", "jobs/tiny.py:mutual", "--json", "--set", "baseline=true"]) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out)
    assert set(found["peers"]) == set(found["baseline"]) == {"a", "b"}
    assert "mutual: epoch 1/1, eval top-1 a " in captured.err
    assert "peers alone: finished, eval top-1 a " in captured.err
    assert main(["show", found["folder"]]) == 0
    text = capfd.readouterr().out
    for wanted in (
        "peer b alone",
        "peer b together",
        "ensemble of 2 peers",
        "a > b",
        "Waiting for peers",
        "peer a trained: 4 steps",
    ):
        assert wanted in text, wanted
    assert main(["show", found["folder"], "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["peers"]["a"]["steps"] == 4
    assert shown["events"] == []
    assert main(["show", f"{found['folder']}/baseline"]) == 0


def test_online_methods_say_whom_they_hear_and_their_branches(capsys):
    assert main(["list", "--section", "online", "--json"]) == 0
    methods = {m["slug"]: m for m in json.loads(capsys.readouterr().out)["methods"]}
    assert methods["dml"]["roles"] == ["student", "peer"]
    assert methods["one"]["branching"] == {"kind": "split", "count": 3}
    assert main(["list", "--section", "online"]) == 0
    assert "online, split" in capsys.readouterr().out
    assert main(["show", "hssakd"]) == 0
    text = capsys.readouterr().out
    assert "learns from: each neighbouring peer in turn" in text
    assert "branches: exits after all stages of 4 outputs a class" in text
    assert main(["show", "one"]) == 0
    assert "learns from: the branches of its own model" in capsys.readouterr().out


def test_check_finds_all_faults_at_once(place, capsys):
    wrong = ["--set", "training.batch_size=33", "--set", "launch.workers=2"]
    assert main(["check", "jobs/tiny.py", *wrong]) == 1
    assert "2 faults:" in capsys.readouterr().out
    assert main(["check", "jobs/tiny.py", *wrong, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 2


def test_faults_in_settings_are_faults_of_the_job(place, capsys):
    wrong = ["--set", "traning.lr=1", "--set", "training.epochs.x=1"]
    assert main(["check", "jobs/tiny.py", *wrong, "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["faults"]
    assert "Did you mean 'training'?" in first
    assert "training.epochs" in second
    assert main(["run", "jobs/tiny.py", *wrong, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "JobFaults"


@pytest.mark.parametrize(
    "command, words",
    [
        ("run jobs/tny.py", "Job file jobs/tny.py: no such file. Did you mean 'tiny.py'?"),
        ("run nowhere/x.py", "There is no folder nowhere either."),
        ("run jobs", "expected a run folder with a job.json"),
        ("run jobs/tiny.py:jb", "no function 'jb'. Did you mean 'job'?"),
        ("run jobs/tiny.py --arg wdth=3", "has no such argument. Did you mean 'width'?"),
        ("run jobs/tiny.py --arg width=wide", "expected int like the default 2, got 'wide'"),
        ("run jobs/tiny.py --arg width", "--arg width: expected name=value"),
        ("run jobs/tiny.py --set training", "--set training: expected path=value"),
        ("run jobs/tiny.py --resume", "no run of 'tiny'"),
        ("run", "expected a job file or a run folder, got none"),
        ("run --resume a --folder b", "--resume names another folder"),
        ("run jobs/syntax.py", "jobs/syntax.py:2: "),
        ("run jobs/raises.py", "jobs/raises.py:2: ZeroDivisionError: division by zero."),
        ("run jobs/nothing.py", "no function that returns a job"),
        ("run jobs/several.py", "several functions may return the job: a, b. Name one: jobs/several.py:a"),
        ("run jobs/several.py:a", "expected a raykd.Job, got int"),
        ("run jobs/several.py:b", "unexpected keyword argument 'nme'. Did you mean 'name'?"),
        ("run jobs/several.py:needs", "needs width. Give --arg width=<value>."),
        ("run jobs/broken.json", "Job file jobs/broken.json: cannot be read"),
        ("run jobs/broken.json --arg a=1", "functions and --arg go with Python files"),
        ("show kdd", "no such method. Did you mean 'kd'"),
        ("show runs/x", "runs/x: no such folder"),
        ("show jobs", "expected a run folder"),
        ("list --section featur", "Did you mean 'feature'?"),
        ("list models --section feature", "only methods have sections"),
    ],
)
def test_mistakes_are_one_clear_line(place, capsys, command, words):
    files = {
        "syntax.py": "x = 1\ndef job(:\n    pass\n",
        "raises.py": "def job():\n    return 1 / 0\n",
        "nothing.py": "x = 1\n",
        "several.py": "from raykd import Job\ndef a() -> Job:\n    return 3\ndef b() -> Job:\n    return Job(nme='x')\n"
        "def needs(width):\n    return width\n",
        "broken.json": "{",
    }
    for name, text in files.items():
        (place / "jobs" / name).write_text(text)
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") <= 2
    assert main([*command.split(), "--json"]) == 2
    assert words in json.loads(capsys.readouterr().out)["error"]["message"]


def test_arguments_take_the_type_of_their_default(place, capsys):
    (place / "jobs" / "types.py").write_text(
        "from raykd import Job\n"
        "def job(name: str = 'a', lr: float = 0.1, layers: tuple = (), flag: bool = False, **more) -> Job:\n"
        "    raise ValueError(repr((name, lr, layers, flag, more)))\n"
    )
    given = ["name=1", "lr=1", "layers=[1,2]", "flag=true", "other=none"]
    assert main(["run", "jobs/types.py", *(word for pair in given for word in ("--arg", pair))]) == 2
    assert "ValueError: ('1', 1.0, (1, 2), True, {'other': None})." in capsys.readouterr().err


def test_a_single_function_of_another_name_is_the_job(place, capsys):
    (place / "jobs" / "one.py").write_text(
        "from raykd import Job\ndef helper():\n    return 'x'\ndef make() -> Job:\n    return Job()\n"
    )
    assert main(["check", "jobs/one.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job"]["name"] == "job"


def test_unexpected_errors_keep_their_traceback(tmp_path, capsys):
    folder = make(tmp_path / "run", found=result())
    (folder / "result.json").write_text('{"student": 3}')
    assert main(["show", str(folder), "--json"]) == 0
    capsys.readouterr()
    assert main(["show", str(folder)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_are_an_object_with_json(place, monkeypatch, capsys):
    (place / "seeds").mkdir()
    (place / "seeds" / "seeds.json").write_text("{")
    assert main(["show", "seeds", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["type"] == "JSONDecodeError"
    assert "Traceback" in captured.err


@pytest.mark.parametrize("words", [[], ["rnu"], ["run", "--seeds", "0", "x.py"], ["list", "modls"]])
def test_usage_errors(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    if "modls" in words:
        assert "Did you mean 'models'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "check", "list", "show"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"  raykd {command} " in capsys.readouterr().out
