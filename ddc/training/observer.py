"""Reads a model along its training: observables at log-spaced steps, arc length, learning
coefficient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ddc.gauges import GaugeSet, find_gauges, named_parameters, orbit_distance
from ddc.gauges.trace import in_evaluation
from ddc.models import check_fit, cross_entropy
from ddc.slt.config import SLTConfig
from ddc.slt.learning_coefficient import Settings, estimate, minibatches, module_loss
from ddc.slt.observables import Batches, Score, categorical_score, label_score, layers_of, observe

#: Seed of the labels drawn for the probe: fixed, so that all runs are read on the same random
#: numbers.
PROBE_SEED = 1_000_003
#: Largest R-hat at which chains count as mixed.
MIXED = 1.1


def reading_steps(count: int, steps: int) -> list[int]:
    """At most ``count`` different steps from 0 to ``steps``, evenly spaced in log(1 + step)."""
    if count == 0:
        return []
    return sorted(
        {round(float(s)) for s in np.expm1(np.linspace(0, np.log1p(steps), count))} | {0, steps}
    )


class Observer:
    """Makes one reading after another, and keeps the weights that it has read.

    It changes neither the model nor any global random state, so that training with and without it
    is the same.

    Args:
        config: what to read.
        model: one that :func:`ddc.slt.observables.layers_of` knows.
        probe: the probe's inputs and targets, in batches.
        training_data: gives the inputs and targets of the whole training split, for the learning
            coefficient and the null control: windows of a text, images, pairs. Asked once, if at
            all.
        steps: of the whole training.
        folder: for the snapshots.
    """

    def __init__(
        self,
        config: SLTConfig,
        model: nn.Module,
        probe: Batches,
        training_data: Callable[[], tuple[Tensor, Tensor]],
        steps: int,
        folder: Path,
    ) -> None:
        self.config, self.model, self.probe = config, model, probe
        self.training_data = functools.cache(training_data)
        self.folder = folder
        self.steps = reading_steps(config.readings, steps)
        self.layers = layers_of(model) if self.steps else []
        #: All gauges of the model, whichever the optimizer respects: one metric for all runs.
        self.gauges: GaugeSet = find_gauges(model)

    def read(self, step: int, before: dict[str, Any] | None) -> dict[str, Any]:
        """The reading at a step, as a row for the records, given the row of the reading before
        it.
        """
        weights = {name: p.detach() for name, p in named_parameters(self.model).items()}
        arc_length = 0.0
        if before is not None:
            saved = load_snapshot(self.folder, before["step"])
            last = {name: w.to(weights[name].device) for name, w in saved.items()}
            arc_length = before["arc_length"] + float(orbit_distance(last, weights, self.gauges))
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = snapshot_path(self.folder, step).with_suffix(".tmp")
        safetensors.torch.save_file(
            {name: w.cpu().contiguous().clone() for name, w in weights.items()}, temporary
        )
        temporary.replace(snapshot_path(self.folder, step))
        row = {"step": step, "arc_length": arc_length, **self.observe()}
        every = self.config.learning_coefficient.every
        if every and (len(self.steps) - 1 - self.steps.index(step)) % every == 0:
            try:
                row["learning_coefficient"] = self.learning_coefficient()
            except RuntimeError as error:  # chains that diverge: no reason to lose the run
                row["learning_coefficient"] = {"error": str(error)}
        return row

    def read_again(self) -> Iterator[dict[str, Any]]:
        """Readings of all snapshots, in the order of training. The model ends with the weights of
        the last one.

        Raises:
            FileNotFoundError: there are no snapshots; says what to do.
        """
        steps = snapshot_steps(self.folder)
        if not steps:
            raise FileNotFoundError(
                f"no snapshots in {self.folder}: train with slt=cells and slt.keep_snapshots=true,"
                " or read what was recorded during training with --recorded"
            )
        arc_length, last = 0.0, None
        for step in steps:
            weights = restore(self.model, self.folder, step)
            if last is not None:
                arc_length += float(orbit_distance(last, weights, self.gauges))
            last = weights
            yield {"step": step, "arc_length": arc_length, **self.observe()}

    def read_untrained(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Null control: the model as it is, read on another part of the data, with other labels,
        for every row.

        What differs between these readings is the noise of a probe; what they are paired with,
        step, loss and arc length, are those of the given rows.
        """
        inputs, targets = self.training_data()
        size = len(self.probe[0][0])
        count = sum(len(x) for x, _ in self.probe)
        if count >= len(inputs):  # the probe is all there is: another part is another half
            count = len(inputs) // 2
        for i, row in enumerate(rows):
            order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(i))[:count]
            probe = list(zip(inputs[order].split(size), targets[order].split(size), strict=True))
            yield {**row, "layers": self.observe(probe, PROBE_SEED * (i + 2))["layers"]}

    def forget(self) -> None:
        """Where snapshots are not to be kept, delete all but the last; safe once a checkpoint is
        behind that one.
        """
        if not self.config.keep_snapshots:
            for step in snapshot_steps(self.folder)[:-1]:
                snapshot_path(self.folder, step).unlink()

    def observe(self, probe: Batches | None = None, seed: int = PROBE_SEED) -> dict[str, Any]:
        """Loss of the probe, in nats per prediction, and the reading of every layer."""
        meter = LossMeter(categorical_score(seed) if self.config.labels == "model" else label_score)
        layers = [
            reading.record()
            for reading in observe(self.model, self.layers, probe or self.probe, meter)
        ]
        return {"loss": meter.mean, "layers": layers}

    def learning_coefficient(self) -> dict[str, Any]:
        """An estimate at the present weights, on the training data."""
        config, data = self.config.learning_coefficient, self.training_data()
        predictions = data[1].numel()
        settings = Settings(config.chains, config.draws, config.burn_in, gamma=config.gamma)
        with in_evaluation(self.model):
            result = estimate(
                module_loss(self.model, cross_entropy),
                named_parameters(self.model),
                predictions,
                config.n_beta / predictions,
                batches=minibatches(data, config.batch_size, settings),
                gauges=self.gauges,
                settings=settings,
            )
        return {
            "value": result.value,
            "low": result.interval[0],
            "high": result.interval[1],
            "mixed": result.r_hat <= MIXED,
            "r_hat": result.r_hat,
            "ess": result.ess,
            "step_size": result.step_size,
            "bias": result.bias,
        }


class LossMeter:
    """A score that adds up the loss of the data's own labels as it passes by."""

    def __init__(self, score: Score) -> None:
        self.score, self.total, self.count = score, 0.0, 0

    def __call__(self, outputs: Tensor, targets: Tensor, index: int) -> Tensor:
        self.total += float(cross_entropy(outputs, targets)) * targets.numel()
        self.count += targets.numel()
        return self.score(outputs, targets, index)

    @property
    def mean(self) -> float:
        return self.total / self.count


def snapshot_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def snapshot_steps(folder: Path) -> list[int]:
    """Steps of which the folder holds the weights."""
    return sorted(
        int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors")
    )


def load_snapshot(folder: Path, step: int) -> dict[str, Tensor]:
    """The weights at a reading.

    Raises:
        FileNotFoundError: there are none; says what to do.
    """
    path = snapshot_path(folder, step)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the run cannot be read any further; training.resume=never"
            " restarts it"
        )
    return safetensors.torch.load_file(path)


def restore(model: nn.Module, folder: Path, step: int) -> dict[str, Tensor]:
    """Put the weights of a snapshot into a model, and return them.

    Raises:
        ValueError: they are of another architecture.
    """
    parameters, weights = named_parameters(model), load_snapshot(folder, step)
    check_fit(parameters, weights, snapshot_path(folder, step))
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return weights


def joined(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All batches as one."""
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)
