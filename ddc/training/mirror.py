"""Weights & Biases as a mirror of the records: it may fail, the run may not."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddc.training.config import Config

log = logging.getLogger(__name__)


class Mirror:
    """Sends rows to W&B, and stops with a warning at the first error."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._run: Any = None
        if config.wandb.mode != "disabled":
            try:
                self._run = self._start(config, folder)
            except Exception as error:  # a mirror must not take the run with it, whatever happened
                self._give_up(error)

    def _start(self, config: Config, folder: Path) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = config.wandb.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        arguments: dict[str, Any] = {
            "project": config.wandb.project,
            "entity": config.wandb.entity,
            "dir": str(folder),
            "id": config.run_id,
            "name": config.run_id,
            "group": f"{config.name}/{config.optimizer.name}",
            "job_type": "train",
            "config": config.identity,
        }
        settings = wandb.Settings(init_timeout=30, console="off")
        if mode == "online":
            try:
                return wandb.init(mode="online", resume="allow", settings=settings, **arguments)
            except Exception as error:  # no key, no network, a full quota: any of them
                log.warning("W&B cannot be reached (%s); logging offline, wandb sync sends it later", first_line(error))
                wandb.teardown()  # the failed attempt still holds the run's id
        return wandb.init(mode="offline", settings=settings, **arguments)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """Send what is still held back if the run stopped; a run that is complete comes to :meth:`finish`."""
        if kind is not None:
            self._send(lambda run: run.finish(exit_code=1))

    def log(self, row: dict[str, Any]) -> None:
        self._send(lambda run: run.log(row, step=row["step"]))

    def log_reading(self, row: dict[str, Any]) -> None:
        """Observables as numbers, spectra as histograms of log10 eigenvalues, which W&B draws over time."""

        def send(run: Any) -> None:
            import wandb

            values: dict[str, Any] = {"slt/loss": row["loss"], "slt/arc_length": row["arc_length"]}
            for layer in row["layers"]:
                values |= {f"slt/{layer['layer']}/{name}": value for name, value in layer["values"].items()}
                for side in ("activation", "gradient"):
                    eigenvalues = [math.log10(v) for v in layer[side]["spectrum"] if v > 0]
                    if eigenvalues:
                        values[f"slt/{layer['layer']}/{side}_spectrum"] = wandb.Histogram(eigenvalues)
            for key, value in row.get("learning_coefficient", {}).items():
                values[f"slt/learning_coefficient/{key}"] = value
            run.log(values, step=row["step"])

        self._send(send)

    def finish(self, summary: dict[str, Any], draw: Callable[[], Sequence[Path]] = tuple) -> None:
        """Send the summary and the figures of ``draw``, which is not called where nobody is there to send them to."""
        figures = draw() if self._run is not None else ()

        def send(run: Any) -> None:
            import wandb

            images = {path.stem: wandb.Image(str(path)) for path in figures if path.suffix == ".png"}
            if images:
                run.log(images)
            run.summary.update(summary)
            run.finish()

        self._send(send)

    def _send(self, send: Callable[[Any], None]) -> None:
        if self._run is not None:
            try:
                send(self._run)
            except Exception as error:  # as in __init__
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("W&B failed (%s); the run goes on without it, its records are complete", first_line(error))
        self._run = None


def first_line(error: Exception) -> str:
    """Type and first line of an error's message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
