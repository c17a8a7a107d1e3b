"""What a person sees while training: a bar in a terminal, a line every so often in a log."""
from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def duration(seconds: float) -> str:
    """
    >>> duration(3725)
    '1:02:05'
    """
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


_Item = TypeVar("_Item")


def counted(items: Iterable[_Item], total: int, what: str, done: int = 0, every_seconds: float = 15.0) -> Iterator[_Item]:
    """The items, while a bar (in a terminal) or a line now and then (in a log) tells how many have passed.

    Nothing is shown if it takes less than a second in all. what: "making frames of recordings", for example.

    >>> list(counted("ab", 2, "letters"))
    ['a', 'b']
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    tty = sys.stderr.isatty()
    start = last = time.monotonic()
    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                  console=console, disable=not tty, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done, visible=False)
        for number, item in enumerate(items, done + 1):
            yield item
            now = time.monotonic()
            if tty and now - last > 0.1 and now - start > 1:
                bar.update(task, completed=number, visible=True)
                last = now
            elif not tty and now - last > every_seconds:
                console.print(f"{what}: {number}/{total}", markup=False)
                last = now


class Reporter:
    """Progress of a run; silent unless `active` (only the main process speaks)."""

    def __init__(self, steps: int, done: int, batch_size: int, active: bool = True, every_seconds: float = 30.0) -> None:
        self.steps, self.batch_size, self.active, self.every = steps, batch_size, active, every_seconds
        self.tty = active and sys.stderr.isatty()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._start, self._first, self._last = time.monotonic(), done, time.monotonic()
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                             console=self._console, disable=not self.tty)
        self._task = self._bar.add_task("training", total=steps, completed=done)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def due(self) -> bool:
        """Whether `step` wants to be called: reading the loss costs a wait for the device."""
        return self.active and time.monotonic() - self._last >= (1.0 if self.tty else self.every)

    def step(self, step: int, epoch: float, loss: float, rate: float) -> None:
        """`step` steps are done."""
        self._last = time.monotonic()
        speed = (step - self._first) / max(self._last - self._start, 1e-9)
        left = duration((self.steps - step) / speed) if speed > 0 else "?"
        text = f"epoch {epoch:.2f}  loss {loss:.4f}  lr {rate:.2e}  {speed * self.batch_size:.0f} images/s  {left} left"
        if self.tty:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self._console.print(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.active:
            self._console.print(text, markup=False)
