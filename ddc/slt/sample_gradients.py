"""The Gram matrix of per-sample gradients of linear maps, and its smallest positive eigenvalue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddc.slt.observables import Batches, Layer, Score, Spectrum, check_untouched, observed, spectrum


def sample_gradient_spectra(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, score: Score
) -> list[Spectrum]:
    """Eigenvalues of K_ij = <g_i, g_j> / n over the n samples of a probe, for each linear map.

    g_i is the gradient, with respect to the weight of the map, of the log-likelihood of all labels
    of sample i. The eigenvalues of K other than zero are those of the Fisher block of the weight,
    which has as many rows as the weight has entries. Its smallest positive one is the third
    observable of arXiv:2606.21158.

    Args:
        model: maps the inputs of a batch, samples first, to one tensor.
        layers: linear maps, each read at its input, called once in a forward pass.
        batches: the probe: pairs of inputs and targets.
        score: as for :func:`ddc.slt.observables.observe`.

    Returns:
        By layer, ascending; those at the level of rounding are zero.

    Raises:
        ValueError: a layer that is no linear map read at its input, or does not run exactly once.
    """
    for layer in layers:
        module = model.get_submodule(layer.module)
        if layer.reads != "input" or not isinstance(module, nn.Linear):
            raise ValueError(f"layer {layer.name}: expected a linear map that is read at its input")
    gradients: list[list[Tensor]] = [[] for _ in layers]
    for index, (inputs, targets) in enumerate(batches):
        with torch.enable_grad(), observed(model, layers) as calls:
            outputs = model(inputs)
            for layer, made in zip(layers, calls, strict=True):
                if len(made) != 1:
                    raise ValueError(f"layer {layer.name}: runs {len(made)} times, expected once")
            check_untouched(layers, calls)
            at = torch.autograd.grad(
                outputs, [call.output for (call,) in calls], score(outputs.detach(), targets, index)
            )
        for found, (call,), gradient in zip(gradients, calls, at, strict=True):
            x, d = (t.double().flatten(1, -2) for t in (call.activation, gradient))
            found.append(torch.einsum("nto,nti->noi", d, x).flatten(1))
    spectra = []
    for found, (call,) in zip(gradients, calls, strict=True):
        rows = torch.cat(found)
        epsilon = torch.finfo(call.activation.dtype).eps
        spectra.append(spectrum(rows @ rows.T / len(rows), [], epsilon))
    return spectra


def smallest_positive(spectrum: Spectrum) -> float:
    """The smallest eigenvalue above rounding; nan where there is none."""
    positive = spectrum.values[spectrum.values > 0]
    return float(positive[0]) if len(positive) else float("nan")
