"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape


def console() -> Console:
    """The terminal, or what stands for it: Rich assumes 80 columns in a log file, which would fold the tables."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=140)


def say(out: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is, however long."""
    out.print(escape(line), soft_wrap=True, highlight=False, style=style)
