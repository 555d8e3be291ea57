"""Commands, options and help of `raykd`."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from raykd import __version__
from raykd.errors import near

NEWEST = ""  # --resume without a folder
KINDS = ("methods", "models", "recipes", "signals")  # as report.catalogues.KINDS

ABOUT = """\
Multi-model knowledge distillation on Ray: teachers answer for batches from wherever they live, a student learns.

  raykd list                                    methods, with their signals, options and papers
  raykd check jobs/digits_demo.py               models, traffic, needs and all faults, before anything starts
  raykd run jobs/digits_demo.py                 run it, with live progress; leaves a run folder with report.html
  raykd run jobs/digits_demo.py --resume        go on with the newest run of this job
  raykd show runs/digits-demo-001               its table again
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
  raykd show dkd                    a method: formula, signals, options, paper, file
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
