"""The re-gauged checkpoints of a pretrained run: its weights moved along their gauge orbit as tools
of deployment move them, from their published formulas.

python -m experiments.regauged.starts RUN_FOLDER

writes ``starts/seedSEED/NAME`` beside the folder of the run (:func:`ddc.models.save_model`), for
``start.weights``, and the text on which these are fine-tuned. What a tool does is read off the
model's gauges, so it works for any model whose gauges are found, and is tried: the moved model must
compute the same.

- ``smoothquant`` (Xiao et al., arXiv:2211.10438, equation 4, α = 0.5): channel j of what a norm of
  a block gives is divided by s_j = max|X_j|^α / max|W_j|^(1 - α), the columns of its readers
  multiplied.
- ``awq`` (Lin et al., arXiv:2306.00978, equations 4 and 5): the same with s_j = mean|X_j|^α,
  normalised by the root of its largest times its smallest entry, α from a grid of twenty by the
  error of the readers' outputs under 4-bit rounding; and so for the units between the two maps of a
  gated block. Ours: one group of rounding a row, as rows are shorter than their groups of 128, no
  clipping, and no scales between values and outputs, which they leave out too where heads share
  values.
- ``quarot`` (Ashkboos et al., arXiv:2404.00456, stage 1): scales of norms go into their readers,
  the residual stream is turned by a randomised Hadamard matrix, and the values of each head by a
  Hadamard matrix; its rotations at run time are no part of the weights.
- ``absmax`` (Dettmers et al., arXiv:2208.07339): LLM.int8() divides each row of a matrix by its
  largest absolute entry before it rounds, and multiplies outputs by it. Where what follows is
  linear in the row (W_up, W_V) the scale goes into the columns that read it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ddc.gauges import Gauge, Rescale, find_gauges, named_parameters
from ddc.gauges.affine import General, StreamRotation
from ddc.gauges.base import Params, unit_view
from ddc.gauges.double import InDouble
from ddc.models import save_model
from experiments.regauged.plan import TEXT
from experiments.texts import write_second

KINDS = ("norm_scale", "gated_rescale", "relu_rescale", "value_map", "stream_rotation")
#: Weights that these tools do not quantise, nor smooth: those of the head.
HEADS = ("head.weight", "lm_head.weight")
ALPHA = 0.5
BITS = 4
#: Batches of text that tools see.
CALIBRATION = 8

#: What each linear map gets, (rows, inputs), by the name of its weight.
Inputs = dict[str, Tensor]


@torch.no_grad()
def inputs_of_maps(
    model: nn.Module,
    batches: Iterable[Tensor],
    kinds: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Linear,
) -> Inputs:
    """What each linear map of a model, or each module of other kinds, gets on some batches."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, []).append(args[0].flatten(0, -2).double())

        return keep

    hooks = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        for batch in batches:
            model(batch)
    finally:
        for each in hooks:
            each.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def smoothquant_(params: Params, gauges: Sequence[Gauge], inputs: Inputs) -> None:
    """Difficulty of activations moves into weights, channel by channel."""
    for gauge in norms(gauges):
        readers = columns(params, gauge)
        largest = inputs[gauge.minus[0].parameter].abs().amax(0)
        weights = torch.stack([each.abs().amax(1) for each in readers.values()]).amax(0)
        gauge.act_(params, 1 / scales(largest**ALPHA / weights.clamp(min=1e-5) ** (1 - ALPHA)))


def awq_(params: Params, gauges: Sequence[Gauge], inputs: Inputs) -> None:
    """Channels that carry more are scaled up before weights are rounded."""
    for gauge in [*norms(gauges), *gated(gauges)]:
        readers = columns(params, gauge)
        seen = inputs[gauge.minus[0].parameter]
        tried = []
        for i in range(20):
            scale = scales(seen.abs().mean(0) ** (i / 20), 1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = sum(
                float((seen @ (rounded(w * scale[:, None]) / scale[:, None] - w)).square().mean())
                for w in readers.values()
            )
            tried.append((error, i, scale))
        _, _, best = min(tried, key=lambda each: each[:2])
        gauge.act_(params, 1 / best)
        for name in inputs.keys() & {axis.parameter for axis in gauge.minus}:
            inputs[name] = inputs[name] / best  # what later gauges find there


def quarot_(params: Params, gauges: Sequence[Gauge], inputs: Inputs) -> None:
    """Scales of norms into their readers, then rotations by Hadamard matrices."""
    generator = torch.Generator().manual_seed(0)
    for gauge in gauges:
        if gauge.kind == "norm_scale":
            assert isinstance(gauge, Rescale)
            scale = next(axis.parameter for axis in gauge.plus if params[axis.parameter].ndim == 1)
            gauge.act_(params, 1 / params[scale].clone())
    for gauge in gauges:
        if isinstance(gauge, StreamRotation):
            signs = 2.0 * torch.randint(2, (gauge.width,), generator=generator) - 1
            gauge.act_(params, hadamard(gauge.width) * signs.double())
        elif isinstance(gauge, General):
            units, k = gauge.shape
            gauge.act_(params, hadamard(k).expand(units, k, k))


def absmax_(params: Params, gauges: Sequence[Gauge], inputs: Inputs) -> None:
    """Rows whose scale can go on into their readers, divided by their largest absolute entry."""
    for block in gated(gauges):
        rows = [unit_view(params[a.parameter], a.axis) for a in block.plus]
        largest = torch.stack([each.abs().amax(1) for each in rows if each.shape[1] > 1]).amax(0)
        block.act_(params, 1 / largest)
    for gauge in gauges:
        if isinstance(gauge, General):
            name, axis, indices = gauge.plus[0]
            values = unit_view(params[name], axis)[torch.from_numpy(indices)]
            # (units, copies, k, inputs)
            gauge.act_(params, torch.diag_embed(1 / values.abs().amax((1, 3))))


TOOLS: dict[str, Callable[[Params, Sequence[Gauge], Inputs], None]] = {
    "smoothquant": smoothquant_,
    "quarot": quarot_,
    "awq": awq_,
    "absmax": absmax_,
}


def norms(gauges: Sequence[Gauge]) -> list[Rescale]:
    """Scales of the norms of blocks against the columns of their readers."""
    return [
        gauge
        for gauge in gauges
        if isinstance(gauge, Rescale)
        and gauge.kind == "norm_scale"
        and not any(axis.parameter.endswith(HEADS) for axis in gauge.minus)
    ]


def gated(gauges: Sequence[Gauge]) -> list[Rescale]:
    """Units between the two maps of a feed-forward block."""
    kinds = ("gated_rescale", "relu_rescale")
    return [each for each in gauges if isinstance(each, Rescale) and each.kind in kinds]


def columns(params: Params, gauge: Rescale) -> dict[str, Tensor]:
    """The weights that read the units of a gauge, as (units, outputs), in float64."""
    return {a.parameter: unit_view(params[a.parameter], a.axis).double() for a in gauge.minus}


def scales(values: Tensor, least: float = 1e-5) -> Tensor:
    """Scales that are not too near to zero."""
    return values.clamp(min=least)


def rounded(weight: Tensor) -> Tensor:
    """A weight, (inputs, outputs), rounded to the nearest of 2^:data:`BITS` values between the
    smallest and the largest of its output.
    """
    low, high = weight.amin(0), weight.amax(0)
    step = ((high - low) / (2**BITS - 1)).clamp(min=1e-12)
    zero = (-low / step).round()
    return ((weight / step).round() + zero).clamp(0, 2**BITS - 1).sub(zero) * step


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, orthogonal, in float64.

    Raises:
        ValueError: the size is no power of two.
    """
    if size & (size - 1):
        raise ValueError(f"Invalid {size=}: Sylvester's matrices have a power of two of rows")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@torch.no_grad()
def regauged(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, nn.Module]:
    """Copies of a model that compute the same, by tool, the model itself among them.

    Args:
        model: left as it is.
        batches: of its inputs, for calibration.

    Raises:
        RuntimeError: a copy computes something else.
    """
    gauges = find_gauges(model, kinds=KINDS)
    seen = inputs_of_maps(model, batches)
    found = {"original": model}
    for name, move_ in TOOLS.items():
        exact = copy.deepcopy(model).double()
        move_(named_parameters(exact), gauges, dict(seen))
        changed = difference(model, exact, batches[0])
        if changed > 1e-8:
            raise RuntimeError(f"{name} changes what the model computes by {changed:.1e}")
        found[name] = exact.to(next(model.parameters()).dtype)
    return found


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module, batch: Tensor) -> float:
    """The largest difference of log-probabilities of a model in float64 from another."""

    def log_probs(each: nn.Module) -> Tensor:
        with InDouble():  # norms of transformers are in float32 otherwise
            outputs = each(batch)
        return (outputs if isinstance(outputs, Tensor) else outputs.logits).log_softmax(-1)

    return float((log_probs(copy.deepcopy(model).double()) - log_probs(other)).abs().max())


def main(folder: Path) -> None:
    """Write the checkpoints of a run, and the text."""
    from ddc.training.setup import restore

    setup = restore(folder)
    batches = [x for x, _ in setup.data.evaluation_batches("train", CALIBRATION, setup.batch_size)]
    write_second(folder.parent / TEXT)
    places = folder.parent / "starts" / f"seed{setup.config.seed}"
    for name, model in regauged(setup.model.eval(), batches).items():
        save_model(places / name, model, setup.config.model, setup.data.sizes, run=folder.name)
        print(places / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
