"""Consoles and tables: how everything that raykd prints looks."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def make_console(stderr: bool = False) -> Console:
    """A console on stdout or stderr; wide where nobody's window sets a width."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)


def print_table(console: Console, head: Sequence[str], body: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Prints a plain table: numbers to the right, text to the left."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(head):
        column = [row[place] for row in body]
        numeric = bool(column) and all(not cell or cell[0].isdigit() or cell in ("-", "none") for cell in column)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        table.add_row(*(Text(cell) for cell in row))
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
