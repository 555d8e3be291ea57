"""Commands, options and help of `raykd`."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from raykd import __version__
from raykd.errors import near

NEWEST = ""  # --resume without a folder
KINDS = ("methods", "models", "recipes", "signals", "aggregators")  # as report.catalogues.KINDS

ABOUT = """\
Multi-model knowledge distillation on Ray: teachers answer for batches from wherever they live, a student learns.

  raykd list                                    methods, with their signals, options and papers
  raykd check jobs/digits_demo.py               models, traffic, needs and all faults, before anything starts
  raykd run jobs/digits_demo.py                 run it, with live progress; leaves a run folder with report.html
  raykd run jobs/digits_demo.py --resume        go on with the newest run of this job
  raykd show runs/digits-demo-001               its table again
  raykd store build jobs/cifar10_from_store.py  keep what teachers say, for later runs
  raykd sweep jobs/digits_demo.py tune_spaces/kd_temperature_weight.py     many trials, teachers paid for once
"""
RUN_EXAMPLES = """\
examples:
  raykd run jobs/digits_demo.py
  raykd run jobs/digits_demo.py --set losses.kd.temperature=2 --set training.epochs=4
  raykd run jobs/cifar100_crd.py --arg method=dkd --arg pair=resnet56-resnet20
  raykd run jobs/two.py:with_assistant          another function of the file
  raykd run jobs/digits_demo.py --seeds 5       five seeds; mean, standard deviation and n
  raykd run runs/digits-demo-001                the same job once more, from its job.json
  raykd run jobs/digits_demo.py --resume        go on with the newest run of this job
  raykd run --resume runs/digits-demo-001       go on with this one
  raykd run jobs/digits_demo.py --json          stdout: one JSON object, the content of result.json
"""
CHECK_EXAMPLES = """\
examples:
  raykd check jobs/digits_demo.py
  raykd check jobs/digits_demo.py --set teachers.wide.codec=fp16    what travels then
  raykd check runs/digits-demo-001 --json

Exit code 1 if there are faults; all of them are printed at once.
"""
LIST_EXAMPLES = """\
examples:
  raykd list                        methods
  raykd list --section feature      of one section, by name or number (1.2)
  raykd list models
  raykd list recipes --json
"""
SHOW_EXAMPLES = """\
examples:
  raykd show runs/digits-demo-001   accuracies, traffic, curves, where the numbers come from
  raykd show runs/digits-demo-sweep-001   the trials of a sweep, its winner
  raykd show dkd                    a method: formula, signals, options, paper, file
"""
STORE_EXAMPLES = """\
examples:
  raykd store build jobs/cifar10_from_store.py --epochs 4 --dry-run     bytes, nothing written
  raykd store build jobs/cifar10_from_store.py --epochs 4               again: only what is missing or damaged is built
  raykd run jobs/cifar10_from_store.py                                  trains from it
  raykd store info stores/cifar10
  raykd store verify stores/cifar10                                     every checksum
  raykd store export stores/cifar10 --out parquet/cifar10
"""
SWEEP_EXAMPLES = """\
examples:
  raykd sweep jobs/digits_demo.py tune_spaces/kd_temperature_weight.py --samples 12
  raykd sweep jobs/digits_demo.py tune_spaces/methods.py --search grid --scheduler none
  raykd sweep jobs/digits_demo.py tune_spaces/pbt_learning_rate.py --scheduler pbt --samples 8
  raykd sweep --resume runs/digits-demo-sweep-001       the same trials; finished ones are not run again
  raykd run runs/digits-demo-sweep-001/best_job.json    the winner once more

Trials are judged on a held-out part of the training images; eval and test belong to the winner, re-run with several seeds.
"""


class _Parser(argparse.ArgumentParser):
    """argparse with near names for misspelt commands and choices."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        known = [word.strip(" '") for word in found[2].split(",")] if found else []
        super().error(f"{message}. {near(found[1], known)}" if found else message)


def make_parser() -> argparse.ArgumentParser:
    """The parser; a parsed command names itself in `command`."""
    parser = _Parser(prog="raykd", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"raykd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    check = _command(commands, "check", "look a job over without starting anything", CHECK_EXAMPLES)
    _add_job(check)
    listing = _command(commands, "list", "methods, models, recipes or signals", LIST_EXAMPLES)
    listing.add_argument("kind", nargs="?", choices=KINDS, default="methods", help="what to list (default: methods)")
    listing.add_argument("--section", metavar="S", help="methods of one section only: its number (1.2) or folder (feature)")
    show = _command(commands, "show", "a run's table and curves, or a method", SHOW_EXAMPLES)
    show.add_argument("what", metavar="RUN_FOLDER|METHOD", help="a run folder, a method's slug or package.module:my_loss")
    _add_store(commands)
    _add_sweep(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = _command(commands, "run", "run a job to its end, or go on with one", RUN_EXAMPLES)
    _add_job(run, optional=True)
    run.add_argument("--seeds", type=_count, metavar="N", help="run seeds job.seed to job.seed + N - 1; report mean and spread")
    run.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="RUN_FOLDER",
        help="go on from the last checkpoint of this run; without a folder: of the newest run of this job",
    )
    run.add_argument("--folder", metavar="DIR", help="run folder (default: <job.runs>/<job.name>-<number>)")
    run.add_argument("--quiet", action="store_true", help="no progress: warnings and the closing table only")


def _add_store(commands: Any) -> None:
    about = "what teachers say, kept in files that later runs train from"
    shown = argparse.RawDescriptionHelpFormatter
    store = commands.add_parser("store", help=about, description=about, epilog=STORE_EXAMPLES, formatter_class=shown)
    actions = store.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = _action(actions, "build", "run the job's teachers once and keep what its losses need; goes on where it stopped")
    _add_job(build)
    build.add_argument("--out", metavar="DIR", help="folder of the store (default: what the job's teachers name as `store`)")
    build.add_argument("--epochs", type=_count, metavar="E", help="epochs whose views are kept; a longer training repeats them")
    build.add_argument("--rows", type=_count, metavar="N", help="samples a shard (default: 4096, or as many as suits the data)")
    build.add_argument("--dry-run", action="store_true", help="print the bytes, write nothing")
    build.add_argument("--anew", action="store_true", help="build every shard, those that are whole too")
    build.add_argument("--quiet", action="store_true", help="no progress: warnings and the result only")
    info = _action(actions, "info", "what a store holds")
    verify = _action(actions, "verify", "compare every file with its checksum")
    verify.add_argument("--recompute", action="store_true", help="also ask the live teachers for some batches and compare")
    export = _action(actions, "export", "write the signals as Parquet, decoded")
    export.add_argument("--out", metavar="DIR", required=True, help="folder for the Parquet files")
    for action in (info, verify, export):
        action.add_argument("folder", metavar="DIR", help="folder of the store")


def _add_sweep(commands: Any) -> None:
    sweep = _command(
        commands, "sweep", "run many trials of a job with other settings, then the best one with several seeds", SWEEP_EXAMPLES
    )
    sweep.add_argument("job", metavar="JOB[:function]", nargs="?", help="as the FILE of `raykd run`")
    sweep.add_argument(
        "space", metavar="SPACE[:function]", nargs="?", help="a Python file with a function that returns {path: distribution}"
    )
    sweep.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a setting of all trials")
    sweep.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="a keyword argument of JOB's function")
    sweep.add_argument("--search", choices=("random", "grid", "optuna"), help="how trials are chosen (default: random)")
    sweep.add_argument(
        "--scheduler",
        choices=("none", "asha", "hyperband", "median", "pbt"),
        help="who stops trials early (default: asha); pbt copies good trials over bad ones",
    )
    sweep.add_argument("--samples", type=_count, metavar="N", help="trials to draw (default: 16)")
    sweep.add_argument(
        "--seeds", type=_count, metavar="N", help="seeds of the winner's runs on all training images (default: 3)"
    )
    sweep.add_argument(
        "--share",
        choices=("store", "pool", "none"),
        help="teachers of all trials: outputs kept once (default), live replicas, or each trial its own",
    )
    sweep.add_argument(
        "--holdout", type=float, metavar="SHARE", help="of the training images, to judge trials on (default: 0.1)"
    )
    sweep.add_argument("--grace", type=_count, metavar="E", help="epochs before a trial may be stopped (default: a ninth)")
    sweep.add_argument("--reduction", type=_count, metavar="N", help="one of N trials goes on at each rung (default: 3)")
    sweep.add_argument("--perturb-every", type=_count, metavar="E", help="epochs between pbt's exploits (default: a fifth)")
    sweep.add_argument("--max-concurrent", type=_count, metavar="N", help="trials at a time (default: as many as fit)")
    sweep.add_argument("--resume", metavar="FOLDER", help="go on with the sweep of this folder")
    sweep.add_argument("--folder", metavar="DIR", help="folder of the sweep (default: <job.runs>/<job.name>-sweep-<number>)")
    sweep.add_argument("--quiet", action="store_true", help="no progress: warnings and the closing table only")


def _action(actions: Any, name: str, about: str) -> argparse.ArgumentParser:
    parser = _command(actions, name, about, "")
    parser.set_defaults(command="store", action=name)
    return parser


def _add_job(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument(
        "file",
        metavar="FILE[:function]",
        nargs="?" if optional else None,
        help="a Python file with a function that returns a raykd.Job (`job`, or its only one), a job.json or a run folder",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change a setting: --set losses.kd.temperature=2"
    )
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="a keyword argument of the file's function"
    )


def _command(commands: Any, name: str, about: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="stdout holds one JSON object; all else goes to stderr")
    parser.set_defaults(command=name)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
