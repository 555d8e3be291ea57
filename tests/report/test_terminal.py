import contextlib
import io

import pytest
from rich.console import Console

from raykd.report.terminal import Terminal
from tests.report.folders import accuracy, evaluation, job, lines, result, step


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, highlight=False, color_system=None)


def append(folder, *records):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(lines(records))


def follow(folder, screen, clock, **options):
    terminal = Terminal(screen, clock=clock, **options)
    terminal.begin("", job(), folder, 60)
    terminal.teacher("", "big", "eval", accuracy(0.9))
    for number in range(1, 31):
        append(folder, step(number))
        clock.now += 1.0
        terminal.poll()
    append(folder, evaluation(0, 0.5))
    terminal.end("", folder, result(0.6, 0.65))
    return screen.file.getvalue()


def test_plain_lines_come_every_ten_seconds_and_epoch(tmp_path, clock):
    text = follow(tmp_path, console(), clock)
    said = [line.split(" · ")[2] for line in text.splitlines() if " · step " in line]
    assert said == ["step 10/60", "step 20/60", "step 21/60"]
    assert "teacher big, eval split, measured here: top-1 90.00 %, top-5 99.00 % (360 images)" in text
    assert "small: epoch 1/3, eval top-1 50.00 %" in text
    assert "student distilled" in text
    assert "below the student alone" in text
    assert "\x1b" not in text


def test_a_terminal_gets_one_live_line_and_it_ends(tmp_path, clock):
    text = follow(tmp_path, console(terminal=True), clock)
    assert "step 30/60" in text
    assert text.count("\x1b[?25l") == 1  # cursor hidden once ...
    assert text.count("\x1b[?25h") == 1  # ... and shown again


def test_an_error_ends_the_live_line(tmp_path, clock):
    screen = console(terminal=True)
    with contextlib.suppress(RuntimeError), Terminal(screen, clock=clock) as terminal:
        terminal.begin("", job(), tmp_path, 60)
        raise RuntimeError
    assert "\x1b[?25h" in screen.file.getvalue()


def test_quiet_prints_warnings_and_the_table(tmp_path, clock):
    screen, out = console(), console()
    terminal = Terminal(screen, out=out, quiet=True, clock=clock)
    terminal.begin("", job(), tmp_path, 60)
    terminal.warn("a teacher is slow")
    append(tmp_path, step(1, grad_norms={"ce": 1.0, "kd": 0.0}), step(21))
    terminal.poll()
    terminal.end("", tmp_path, result())
    assert screen.file.getvalue().splitlines()[0] == "warning: a teacher is slow"
    assert "the term is dead" in screen.file.getvalue()
    assert len(screen.file.getvalue().splitlines()) == 2
    assert "student distilled" in out.file.getvalue()


def test_stages_and_baseline_in_turn(tmp_path, clock):
    screen = console()
    terminal = Terminal(screen, clock=clock)
    terminal.skip("stages.big", tmp_path, result())
    terminal.begin("baseline", job(), tmp_path, 60)
    terminal.end("baseline", tmp_path, result())
    text = screen.file.getvalue()
    assert "stage big: finished earlier, not run again" in text
    assert "student alone: finished, eval top-1 70.00 %" in text
    assert "Gain" not in text


def test_a_run_that_was_finished_already_shows_its_table(tmp_path, clock):
    screen = console()
    Terminal(screen, clock=clock).skip("", tmp_path, result())
    assert "student distilled" in screen.file.getvalue()
