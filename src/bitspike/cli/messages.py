"""What is said on the terminal: text as it is, wide tables, and errors and warnings, one line each on stderr."""
from __future__ import annotations

from rich.console import Console, RenderableType
from rich.text import Text


def console(stderr: bool = False) -> Console:
    """A console that breaks no lines and colours no numbers: what it prints may be read by a program."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def print_wide(item: RenderableType, least: int = 120) -> None:
    """Print a table at that many columns or more: one whose names are cut is of no use in a pipe."""
    Console(highlight=False, width=max(console().width, least)).print(item)


def _say(word: str, colour: str, text: str) -> None:
    console(stderr=True).print(
        Text.assemble((f"{word}: ", f"bold {colour}"), (" ".join(text.splitlines()), colour)))


def complain(text: str) -> None:
    """Print an error."""
    _say("error", "red", text)


def warn(text: str) -> None:
    """Print a warning."""
    _say("warning", "yellow", text)
