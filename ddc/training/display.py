"""What a person sees of a run: a progress bar on a terminal, a line an evaluation in a log."""

from __future__ import annotations

import codecs
import io
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddc.training.records import Row

#: What stands for a character that a terminal does not have: one for one, so that tables stay
#: tables.
PLAIN = {"…": ".", "–": "-", "−": "-", "×": "x", "±": "~", "²": "2", "≥": ">", "≤": "<", "→": ">"}


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
    would raise.
    """
    codecs.register_error("plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is another
            stream.reconfigure(errors="plain")


class Display:
    """Progress of one run, with losses, gap, accuracy, speed and time left; ``quiet`` shows
    nothing.
    """

    def __init__(self, steps: int, start: int, title: str, quiet: bool = False) -> None:
        self.console, self.quiet = Console(stderr=True), quiet
        self.steps, self.start, self.step = steps, start, start
        self.began = time.perf_counter()
        self.progress = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
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
        ((unit, value),) = speed.items()
        status = (
            f"train {row['train_loss']:.3f} val {row['validation_loss']:.3f} gap {row['gap']:+.3f}"
            f" acc {row['validation_accuracy']:.3f} {value:,.0f}"
            f" {unit.removesuffix('_per_second')}/s"
        )
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
