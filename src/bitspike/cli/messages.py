"""Errors and warnings, one line each on stderr."""
from __future__ import annotations

from rich.console import Console
from rich.text import Text


def _say(word: str, colour: str, text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        Text.assemble((f"{word}: ", f"bold {colour}"), (" ".join(text.splitlines()), colour)))


def complain(text: str) -> None:
    """Print an error."""
    _say("error", "red", text)


def warn(text: str) -> None:
    """Print a warning."""
    _say("warning", "yellow", text)
