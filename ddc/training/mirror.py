"""Weights & Biases as a mirror of the records: it may fail, the run may not."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddc.report.rates import by_layer, counts, describe
from ddc.slt.observables import OBSERVABLES
from ddc.slt.rates import APPROACHES, Cell, read_cells
from ddc.training.records import commit
from ddc.training.schema import Config

log = logging.getLogger(__name__)
#: Columns of the table of cells: keys of :meth:`ddc.slt.rates.Cell.record`.
CELL_COLUMNS = (
    *("approach", "layer", "observable", "verdict", "slope", "low", "high", "order", "share"),
    *("r2", "checkpoints", "decades"),
)


class Mirror:
    """Sends rows to W&B, and stops with a warning at the first error. ``docs/wandb.md`` says what
    is sent.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
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
            "group": config.wandb.group or config.name,
            "job_type": config.wandb.job_type,
            "tags": config.wandb.tags,
            "config": {**config.identity, "commit": commit()},
        }
        settings = wandb.Settings(init_timeout=30, console="off")
        if mode == "online":
            try:
                return wandb.init(mode="online", resume="allow", settings=settings, **arguments)
            except Exception as error:  # no key, no network, a full quota: any of them
                log.warning(
                    "W&B cannot be reached (%s); logging offline, wandb sync sends it later",
                    first_line(error),
                )
                wandb.teardown()  # the failed attempt still holds the run's id
        return wandb.init(mode="offline", settings=settings, **arguments)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """Send what is still held back if the run stopped; a run that is complete comes to
        :meth:`finish`.
        """
        if kind is None:
            return
        stopped_by = kind.__name__

        def send(run: Any) -> None:
            run.summary.update({"stopped_by": stopped_by})
            end(run, exit_code=1)

        self._send(send)

    def catch_up(
        self, rows: Sequence[Mapping[str, Any]], readings: Sequence[Mapping[str, Any]]
    ) -> None:
        """Send what a run that goes on has recorded before: offline, W&B begins a file anew, which
        shall be whole.
        """
        if self._run is None or not self._run.offline:
            return
        before = [
            *((self.log_reading, row) for row in readings),
            *((self.log, row) for row in rows),
        ]
        for send, row in sorted(before, key=lambda each: each[1]["step"]):
            send(row)

    def log(self, row: Mapping[str, Any]) -> None:
        self._send(lambda run: run.log(dict(row), step=row["step"]))

    def log_reading(self, row: Mapping[str, Any]) -> None:
        """Observables as numbers, spectra as histograms of log10 eigenvalues, which W&B draws over
        time.
        """

        def send(run: Any) -> None:
            import wandb

            values: dict[str, Any] = {"slt/loss": row["loss"], "slt/arc_length": row["arc_length"]}
            for layer in row["layers"]:
                values |= {
                    f"slt/{layer['layer']}/{name}": value for name, value in layer["values"].items()
                }
                for side in ("activation", "gradient"):
                    eigenvalues = [math.log10(v) for v in layer[side]["spectrum"] if v > 0]
                    if eigenvalues:
                        values[f"slt/{layer['layer']}/{side}_spectrum"] = wandb.Histogram(
                            eigenvalues
                        )
            for key, value in row.get("learning_coefficient", {}).items():
                values[f"slt/learning_coefficient/{key}"] = value
            run.log(values, step=row["step"])

        self._send(send)

    def finish(
        self,
        summary: Mapping[str, Any],
        readings: Sequence[Mapping[str, Any]] = (),
        draw: Callable[[], Sequence[Path]] = tuple,
    ) -> None:
        """Send what a complete run has come to.

        Args:
            summary: of the run.
            readings: all of its readings, whose cells are read here, by the rule of its
                configuration.
            draw: makes figures and returns their paths; not called where nobody is there to send
                them to.
        """

        def send(run: Any) -> None:
            import wandb

            shown: dict[str, Any] = {
                p.stem: wandb.Image(str(p)) for p in draw() if p.suffix == ".png"
            }
            found = dict(summary)
            if readings:
                slt = self._config.slt
                cells = {
                    each: read_cells(readings, each, slt.rule, slt.loss_floor)
                    for each in APPROACHES
                }
                shown |= cell_tables(cells, slt.approach)
                found |= cell_values(cells, slt.approach)
            if shown:
                run.log(shown)
            run.summary.update(found)
            end(run)

        self._send(send)

    def _send(self, send: Callable[[Any], None]) -> None:
        if self._run is not None:
            try:
                send(self._run)
            except Exception as error:  # as in __init__
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning(
            "W&B failed (%s); the run goes on without it, its records are complete",
            first_line(error),
        )
        self._run = None


def end(run: Any, **options: Any) -> None:
    """Finish a run, and wait until its file is whole: offline, ``finish`` returns before."""
    import wandb

    run.finish(**options)
    wandb.teardown()


def cell_values(cells: Mapping[str, Sequence[Cell]], primary: str) -> dict[str, Any]:
    """Counts of cells by approach parameter and verdict; of the primary one, the record of every
    cell.
    """
    values: dict[str, Any] = {}
    for approach, grid in cells.items():
        values[f"cells/{approach}/total"] = len(grid)
        values |= {
            f"cells/{approach}/{verdict}": count
            for verdict, count in ({"read": 0} | counts(grid)).items()
        }
    for cell in cells[primary]:
        values[f"cell/{cell.layer}/{cell.observable}"] = cell.record()
    return values


def cell_tables(cells: Mapping[str, Sequence[Cell]], primary: str) -> dict[str, Any]:
    """W&B tables: ``cells``, a row a cell and approach parameter; ``grid``, layers by observables,
    the primary one.
    """
    import wandb

    records = [cell.record() for each in cells.values() for cell in each]
    rows = [[each.get(key) for key in CELL_COLUMNS] for each in records]
    grid = [
        [layer, *(describe(row[observable]) for observable in OBSERVABLES)]
        for layer, row in by_layer(cells[primary]).items()
    ]
    return {
        "cells": wandb.Table(columns=[*CELL_COLUMNS], data=rows),
        "grid": wandb.Table(columns=["layer", *OBSERVABLES], data=grid),
    }


def first_line(error: Exception) -> str:
    """Type and first line of an error's message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
