"""What a person sees of a run: a progress bar on a terminal, a line an evaluation in a log."""

from __future__ import annotations

import codecs
import io
import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ddc.training.records import Row

#: What stands for a character that a terminal does not have: one for one, so that tables stay
#: tables.
PLAIN = dict(zip("…–−×±²≥≤→√·Δβα", ".--x~2><>v*Dba", strict=True))


def plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: characters of :data:`PLAIN`, and question marks for others."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return (
        "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]),
        error.end,
    )


def print_plainly() -> None:
    """Print what a terminal cannot show, one in ASCII say, as :func:`plain` has it, where Python
    would raise, or write what the terminal cannot read.
    """
    codecs.register_error("plain", plain)
    # where the locale is C, which is ASCII, Python writes UTF-8 all the same, unless told by name
    names = (os.environ.get(key) for key in ("LC_ALL", "LC_CTYPE", "LANG"))
    is_c = next(filter(None, names), "") in ("C", "POSIX")
    told = os.environ.keys() & {"PYTHONIOENCODING", "PYTHONUTF8"}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is another
            stream.reconfigure(encoding="ascii" if is_c and not told else None, errors="plain")


class Display:
    """Progress of one run, with losses, gap, accuracy, speed and time left; ``quiet`` shows
    nothing. Where a terminal is narrow, step and time left are whole, and the others are cut.
    """

    def __init__(self, steps: int, start: int, title: str, quiet: bool = False) -> None:
        self.console, self.quiet = Console(stderr=True), quiet
        self.steps, self.start, self.step = steps, start, start
        self.began = time.perf_counter()

        def whole() -> Column:
            return Column(no_wrap=True)

        self.progress = Progress(
            BarColumn(bar_width=10, table_column=whole()),
            MofNCompleteColumn(table_column=whole()),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=whole()),
            TextColumn(
                "{task.fields[status]}", table_column=Column(no_wrap=True, ratio=1, overflow="crop")
            ),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            expand=True,
        )
        self.task = self.progress.add_task("", total=steps, completed=start, status="")
        self.title = title

    def __enter__(self) -> Display:
        if not self.quiet:
            print(
                f"{self.title}: {self.steps} steps"
                + (f", from step {self.start}" if self.start else ""),
                flush=True,
            )
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def advance(self) -> None:
        self.step += 1
        self.progress.advance(self.task)

    def evaluated(self, row: Row, speed: dict[str, float]) -> None:
        """Show an evaluation; ``speed`` has one entry, such as tokens_per_second."""
        status = (
            f"train {row['train_loss']:.3f} val {row['validation_loss']:.3f} gap {row['gap']:+.3f}"
            f" acc {row['validation_accuracy']:.3f}"
        )
        ((unit, value),) = speed.items()
        if value:  # before the first step there is no speed
            status += f" {number(value)} {unit.removesuffix('_per_second')}/s"
        self.progress.update(self.task, status=status)
        if not self.console.is_terminal and not self.quiet:
            done = self.step - self.start
            left = (
                (time.perf_counter() - self.began) / done * (self.steps - self.step)
                if done
                else None
            )
            tail = f"  {left:.0f} s left" if left else ""
            print(f"step {row['step']:>6}/{self.steps}  {status}{tail}", flush=True)


def number(value: float) -> str:
    """A positive number: whole from 100 on, with three digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
