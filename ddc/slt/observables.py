"""Five observables a layer, from the activations and output gradients of a fixed probe batch.

At a layer, let the rows of X (N × d) be its activations and the rows of D (N × d') the gradients of
the log-likelihood of labels with respect to its output. Their second moments A = XᵀX/N and G =
DᵀD/N are the Kronecker factors of the layer's Fisher block (K-FAC, Martens and Grosse,
arXiv:1503.05671). Where a direction dies, the smallest eigenvalues of both fall with the approach
to the minimum, by powers that :mod:`ddc.slt.rates` reads.

Algebraic zeros (exact null vectors and rank limits that follow from the architecture) are gauge or
bookkeeping, not singular structure. They are removed before anything is read, and named in the
reading.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddc.gauges import Gauge
from ddc.slt.zeros import (
    MEAN_OF_LOGITS,
    Nulls,
    Zeros,
    after_layer_norm,
    mean_of_stream,
    sums_to_zero,
    zeros_of_gauge,
)

#: Observables of a layer, in the order of tables: what is read, and whether it is a second moment
#: of a single direction (so that its slope is 2(k - 1)), the root of one, or a log-volume.
OBSERVABLES = (
    "activation_sigma_min",
    "gradient_lambda_min",
    "activation_log_volume",
    "gradient_log_volume",
    "fisher_min",
)

#: Gradient of the log-likelihood of some labels with respect to the model's outputs:
#: ``score(outputs, targets, index)`` for the probe's batch number ``index``, of the shape of
#: ``outputs``.
Score = Callable[[Tensor, Tensor, int], Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layer:
    """A place where a network is observed.

    Args:
        name: in tables.
        module: the module's name, as in ``model.named_modules()``.
        reads: ``input``: X is the module's input (a linear map: A and G are the factors of its own
            Fisher block); ``output``: X is its output (an embedding, a block: X and D belong to one
            point of the residual stream).
        gradient_ones: why the all-ones vector is an exact null vector of D, if it is
            (:mod:`ddc.slt.zeros`).
        activation_rank, gradient_rank: bounds that follow from the architecture.
        pooled: what follows reads one vector a sample, a mean over positions or a single position:
            so D has no more directions than the probe has samples.
        gauges: of the model, that say which zeros the module's weight has at any weights
            (:func:`ddc.slt.zeros.zeros_of_gauge`).
    """

    name: str
    module: str
    reads: str = "output"
    gradient_ones: str | None = None
    activation_rank: int | None = None
    gradient_rank: int | None = None
    pooled: bool = False
    gauges: tuple[Gauge, ...] = ()

    def __post_init__(self) -> None:
        if self.reads not in ("input", "output"):
            raise ValueError(f"Invalid reads={self.reads!r}: expected input or output")


@singledispatch
def layers_of(model: nn.Module) -> list[Layer]:
    """The layers at which a model is observed by default: embedding and blocks, or every linear map
    of an MLP.

    Raises:
        TypeError: no rule for this class of model; name the modules with :func:`named_layers`.
    """
    # a model of timm is here only if timm is
    timm = sys.modules.get("timm.models.vision_transformer")
    if timm is not None and isinstance(model, timm.VisionTransformer):
        return layers_of_vision_transformer(model)
    raise TypeError(
        f"no default layers for {type(model).__name__}: name its modules, as in named_layers(model,"
        " ['blocks.0', …])"
    )


def layers_of_vision_transformer(model: Any) -> list[Layer]:
    """Embedding (patches and positions) and blocks of timm's vision transformer, read at the
    residual stream.
    """
    ones = mean_of_stream(model, "blocks.0.mlp.fc2.weight")
    pixels, tokens = model.patch_embed.proj.weight[0].numel(), model.pos_embed.shape[1]
    stream = [
        ("embedding", "norm_pre"),
        *((f"block {i + 1}", f"blocks.{i}") for i in range(len(model.blocks))),
    ]
    layers = [Layer(name, module, gradient_ones=ones) for name, module in stream]
    # a linear map of pixels, and a vector a position
    layers[0] = replace(layers[0], activation_rank=pixels + tokens)
    layers[-1] = replace(layers[-1], pooled=True)
    return layers


@layers_of.register
def _(model: nn.Sequential) -> list[Layer]:
    layers: list[Layer] = []
    modules = list(model)
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Linear):
            continue
        # linear maps that follow each other without a nonlinearity pass no more directions than the
        # narrowest has
        before, after = [module.in_features], [module.out_features]
        for earlier in reversed(modules[:i]):
            if not isinstance(earlier, nn.Linear):
                break
            before.append(earlier.in_features + (earlier.bias is not None))
        for later in modules[i + 1 :]:
            if not isinstance(later, nn.Linear):
                break
            after.append(later.out_features)
        layers.append(
            Layer(f"linear {len(layers) + 1}", str(i), "input", None, min(before), min(after))
        )
    return layers


def named_layers(
    model: nn.Module, names: Iterable[str], gauges: Iterable[Gauge] = ()
) -> list[Layer]:
    """Layers for the modules of these names: linear maps are read at their input, all else at the
    output.

    Args:
        model: any.
        names: as in ``model.named_modules()``.
        gauges: of this model, as ``find_gauges(model, inputs=inputs, kinds="complete")`` returns
            them: what they say is an exact zero of a linear map or an embedding is removed, of a
            head (averaged with another, say) where the score is that of a softmax. Without, as
            where a model cannot be traced, what is removed is what the operations beside a module
            say: a LayerNorm just before, a softmax of its outputs.

    Raises:
        ValueError: a module that does not exist.
    """
    modules = dict(model.named_modules())
    params = dict(model.named_parameters())
    of_weight: dict[str, list[Gauge]] = {}
    for gauge in gauges:
        if gauge.kind == "logit_shift":  # of a head: whether it is a zero, the score says
            of_weight.setdefault(gauge.parameters[0], []).append(gauge)
        elif (nulls := zeros_of_gauge(gauge, params)) is not None:
            of_weight.setdefault(nulls.weight, []).append(gauge)
    layers = []
    for name in names:
        if name not in modules:
            close = [other for other in modules if name.split(".")[-1] in other][:5]
            hint = f"; there are {', '.join(close)}" if close else ""
            raise ValueError(f"no module {name!r} in {type(model).__name__}{hint}")
        reads = "input" if isinstance(modules[name], nn.Linear) else "output"
        layers.append(Layer(name, name, reads, gauges=tuple(of_weight.get(f"{name}.weight", ()))))
    return layers


def categorical_score(seed: int) -> Score:
    """Labels drawn from the model's own softmax, so that G is a block of the Fisher metric.

    The uniform numbers behind the draws are a function of ``seed`` and the batch number alone: two
    checkpoints are compared on common random numbers, and the global generator is not touched.
    """

    def score(outputs: Tensor, targets: Tensor, index: int) -> Tensor:
        probabilities = outputs.softmax(-1)
        generator = torch.Generator().manual_seed(seed + index)
        uniform = torch.rand(outputs.shape[:-1], generator=generator, dtype=outputs.dtype).to(
            outputs.device
        )
        labels = (
            (probabilities.cumsum(-1) < uniform[..., None]).sum(-1).clamp_max(outputs.shape[-1] - 1)
        )
        return probabilities.scatter_add(
            -1, labels[..., None], -torch.ones_like(probabilities[..., :1])
        ).neg()

    return score


def label_score(outputs: Tensor, targets: Tensor, index: int) -> Tensor:
    """The data's own labels: G is then the second moment of the loss gradient (the "empirical
    Fisher").
    """
    return torch.nn.functional.one_hot(targets, outputs.shape[-1]).to(outputs) - outputs.softmax(-1)


def gaussian_score(seed: int) -> Score:
    """Residuals of a Gaussian model with unit noise: random signs, whose second moment is the
    identity.
    """

    def score(outputs: Tensor, targets: Tensor, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + index)
        return (2 * torch.randint(2, outputs.shape, generator=generator) - 1).to(outputs)

    return score


@dataclass
class Moments:
    """Second moments of one layer, summed over batches, and what is known about their exact zeros.

    Attributes:
        activation, gradient: XᵀX and DᵀD, float64.
        rows: N.
        samples: of the probe; N counts their positions.
        epsilon: machine epsilon of the activations' dtype.
        seen: for an embedding, which of its rows the probe has touched.
        activation_zeros, gradient_zeros: exact null vectors.
    """

    activation: Tensor
    gradient: Tensor
    rows: int
    samples: int
    epsilon: float
    seen: Tensor | None
    activation_zeros: list[Zeros]
    gradient_zeros: list[Zeros]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a second moment without its algebraic zeros.

    Attributes:
        values: ascending, float64; those at rounding level are set to zero.
        floor: eigenvalues up to this are rounding: λ_max · max(d · 2⁻⁵², 100 ε²), ε the
            activations' epsilon. (The eigensolver resolves d · 2⁻⁵² of λ_max; entries rounded by ε
            carry a noise of second moment ε².)
        removed: how many zeros of which reason were taken out.
    """

    values: Tensor
    floor: float
    removed: dict[str, int]

    @property
    def rank(self) -> int:
        """Eigenvalues above the floor."""
        return int((self.values > 0).sum())

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue; 0 if it is at the floor."""
        return float(self.values[0])

    @property
    def log_volume(self) -> float:
        """Sum of the logarithms of the eigenvalues above the floor, log det⁺."""
        return float(self.values[self.values > 0].log().sum())


@dataclass(frozen=True)
class Reading:
    """What one layer shows at one checkpoint."""

    layer: str
    rows: int
    activation: Spectrum
    gradient: Spectrum
    values: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        a, g = self.activation, self.gradient
        values = (
            math.sqrt(a.smallest),
            g.smallest,
            a.log_volume,
            g.log_volume,
            a.smallest * g.smallest,
        )
        object.__setattr__(self, "values", dict(zip(OBSERVABLES, values, strict=True)))

    def record(self, spectrum_points: int = 64) -> dict[str, Any]:
        """The reading as a row for JSON; of each spectrum at most so many order statistics, both
        ends included.
        """

        def describe(spectrum: Spectrum) -> dict[str, Any]:
            count = len(spectrum.values)
            points = torch.linspace(0, count - 1, min(count, spectrum_points)).round().long()
            return {
                "dimension": count,
                "rank": spectrum.rank,
                "floor": float(f"{spectrum.floor:.5g}"),
                "removed": spectrum.removed,
                "spectrum": [float(f"{v:.5g}") for v in spectrum.values[points].tolist()],
            }

        return {
            "layer": self.layer,
            "rows": self.rows,
            "values": self.values,
            "activation": describe(self.activation),
            "gradient": describe(self.gradient),
        }


def observe(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, score: Score
) -> list[Reading]:
    """Read all layers on a probe.

    One forward and one backward pass to the layers' outputs; no gradient of a parameter is computed
    or changed, nor is any global random state. Memory does not depend on the number of batches.

    Args:
        model: maps the inputs of a batch to one tensor; put in evaluation mode for the time of the
            call.
        layers: where.
        batches: the probe: pairs of inputs and targets.
        score: see :data:`Score`.

    Raises:
        ValueError: a layer that does not run, whose activations are no matrix or not finite, or are
            changed in place, or that the outputs do not depend on.
    """
    moments = accumulate(model, layers, batches, score)
    for layer, m in zip(layers, moments, strict=True):
        if not (m.activation.isfinite().all() and m.gradient.isfinite().all()):
            raise ValueError(f"layer {layer.name}: activations or gradients are not finite")
    return [
        Reading(
            layer.name,
            m.rows,
            spectrum(
                m.activation / m.rows, [*m.activation_zeros, *rank_limits(layer, m)], m.epsilon
            ),
            spectrum(
                m.gradient / m.rows, [*m.gradient_zeros, *gradient_limits(layer, m)], m.epsilon
            ),
        )
        for layer, m in zip(layers, moments, strict=True)
    ]


def accumulate(
    model: nn.Module, layers: Sequence[Layer], batches: Batches, score: Score
) -> list[Moments]:
    """Second moments of all layers over the probe; arguments and errors as for :func:`observe`."""
    moments: list[Moments | None] = [None] * len(layers)
    params = dict(model.named_parameters())
    told = [nulls_of(layer, params) for layer in layers]
    for index, (inputs, targets) in enumerate(batches):
        with torch.enable_grad(), observed(model, layers) as calls:
            outputs = model(inputs)
            for layer, made in zip(layers, calls, strict=True):
                if not made:
                    raise ValueError(
                        f"layer {layer.name}: module {layer.module!r} does not run in a forward"
                        " pass"
                    )
            # gradients of the score with respect to all that was observed
            check_untouched(layers, calls)
            flat = [call.output for made in calls for call in made]
            output_gradient = score(outputs.detach(), targets, index)
            gradients = iter(torch.autograd.grad(outputs, flat, output_gradient, allow_unused=True))
        # their second moments
        for i, (layer, made) in enumerate(zip(layers, calls, strict=True)):
            for call in made:
                gradient = next(gradients)
                if gradient is None:
                    raise ValueError(
                        f"layer {layer.name}: the model's outputs do not depend on its output"
                    )
                head = call.output is outputs or any(g.kind == "logit_shift" for g in layer.gauges)
                softmax = head and sums_to_zero(output_gradient)
                moments[i] = add(moments[i], layer, call, gradient, softmax, told[i])
    if any(m is None for m in moments):
        raise ValueError("the probe has no batches")
    return [m for m in moments if m is not None]


class Call(NamedTuple):
    """One call of an observed module; versions are those of activation and output, to tell if they
    were changed.
    """

    module: nn.Module
    inputs: Tensor
    activation: Tensor
    output: Tensor
    versions: tuple[int, int]
    after: nn.LayerNorm | None


@contextlib.contextmanager
def observed(model: nn.Module, layers: Sequence[Layer]) -> Iterator[list[list[Call]]]:
    """Record, by forward hooks, every call of the layers' modules while the context is open.

    Parameters need no gradients meanwhile: the graph begins at the first observed output.
    """
    modules = dict(model.named_modules())
    calls: list[list[Call]] = [[] for _ in layers]
    normed: dict[int, tuple[Tensor, nn.LayerNorm]] = {}  # outputs of LayerNorms, by identity

    def watch(made: list[Call], layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            output = result if isinstance(result, Tensor) else result[0]
            if not output.requires_grad:
                output.requires_grad_()
            activation = args[0] if layer.reads == "input" else output
            if not activation.is_floating_point() or activation.ndim < 2:
                raise ValueError(f"layer {layer.name}: X must be a real (…, d) tensor, got "
                                 f"{activation.dtype} {tuple(activation.shape)}")  # fmt: skip
            after = normed[id(activation)][1] if id(activation) in normed else None
            versions = activation._version, output._version
            made.append(Call(module, args[0], activation.detach(), output, versions, after))

        return hook

    def remember(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        assert isinstance(module, nn.LayerNorm)
        normed[id(result)] = result, module  # kept alive, so that the id stays its own

    # hooks, and the model without gradients of its own, as long as the context is open
    handles = [
        m.register_forward_hook(remember) for m in modules.values() if isinstance(m, nn.LayerNorm)
    ]
    handles += [
        modules[layer.module].register_forward_hook(watch(made, layer))
        for layer, made in zip(layers, calls, strict=True)
    ]
    needed = {p: p.requires_grad for p in model.parameters()}
    training = {m: m.training for m in model.modules()}
    try:
        model.eval().requires_grad_(False)
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in needed.items():
            p.requires_grad_(flag)
        for m, mode in training.items():
            m.training = mode


def check_untouched(layers: Sequence[Layer], calls: Sequence[Sequence[Call]]) -> None:
    """Raise ValueError where the model has changed in place what a hook has seen."""
    for layer, made in zip(layers, calls, strict=True):
        for call in made:
            if (call.activation._version, call.output._version) != call.versions:
                raise ValueError(
                    f"layer {layer.name}: the model changes the activations of module"
                    f" {layer.module!r} in place (an inplace=True or a += after it): switch that"
                    " off, or observe another module"
                )


def nulls_of(layer: Layer, params: Mapping[str, Tensor]) -> list[Nulls]:
    """What the gauges of a layer say about its moments, at these weights."""
    said = (zeros_of_gauge(gauge, params) for gauge in layer.gauges)
    return [nulls for nulls in said if nulls is not None]


def add(
    moments: Moments | None,
    layer: Layer,
    call: Call,
    gradient: Tensor,
    softmax: bool,
    told: Sequence[Nulls],
) -> Moments:
    """Add one call's activations and gradients to the moments."""
    # rows of X and D; behind a LayerNorm X is taken without the shift
    x, d = (t.flatten(0, -2).double() for t in (call.activation, gradient))
    norm = call.after
    behind = [nulls for nulls in told if nulls.activation and layer.reads == "input"]
    shift: Tensor | None = None
    if norm is not None:
        shift = norm.bias
    elif behind:  # a norm that is no module of torch, say
        shift = behind[0].shift
    if shift is not None:
        x = x - shift.detach().double()
    # the first call says what is zero by construction
    if moments is None:
        ones = layer.gradient_ones or (MEAN_OF_LOGITS if softmax else None)
        gradient_zeros = [zero for nulls in told for zero in nulls.gradient][:1]  # the ones, all
        if ones:
            gradient_zeros = [Zeros(ones, vector=d.new_ones(d.shape[1]))]
        activation_zeros = behind[0].activation if behind else []
        if norm is not None:
            scale = norm.weight if norm.elementwise_affine else None
            activation_zeros = after_layer_norm(scale, x, x.shape[1])
        moments = Moments(
            activation=x.new_zeros(x.shape[1], x.shape[1]),
            gradient=d.new_zeros(d.shape[1], d.shape[1]),
            rows=0,
            samples=0,
            epsilon=torch.finfo(call.activation.dtype).eps,
            seen=(
                x.new_zeros(call.module.num_embeddings, dtype=torch.bool)
                if isinstance(call.module, nn.Embedding)
                else None
            ),
            activation_zeros=activation_zeros,
            gradient_zeros=gradient_zeros,
        )
    moments.activation.addmm_(x.T, x)
    moments.gradient.addmm_(d.T, d)
    moments.rows += len(x)
    moments.samples += len(call.activation)
    if moments.seen is not None:
        moments.seen[call.inputs.flatten()] = True
    return moments


def rank_limits(layer: Layer, moments: Moments) -> list[Zeros]:
    """Bounds on the rank of the activations."""
    limits = [Zeros(f"only {moments.rows} samples", rank=moments.rows)]
    if moments.seen is not None:
        seen = int(moments.seen.sum())
        limits.append(Zeros(f"only {seen} different tokens", rank=seen))
    if layer.activation_rank is not None:
        limits.append(
            Zeros(f"at most {layer.activation_rank} directions come in", rank=layer.activation_rank)
        )
    return limits


def gradient_limits(layer: Layer, moments: Moments) -> list[Zeros]:
    """Bounds on the rank of the output gradients."""
    limits = [Zeros(f"only {moments.rows} samples", rank=moments.rows)]
    if layer.pooled:
        limits.append(
            Zeros(f"one direction of each of {moments.samples} samples", rank=moments.samples)
        )
    if layer.gradient_rank is not None:
        limits.append(
            Zeros(f"at most {layer.gradient_rank} directions go on", rank=layer.gradient_rank)
        )
    return limits


def spectrum(moment: Tensor, zeros: Sequence[Zeros], epsilon: float = 2.0**-52) -> Spectrum:
    """Eigenvalues of a symmetric second moment (d × d, float64) without its algebraic zeros.

    Null vectors are projected out by an orthonormal basis of their complement; of what is left, a
    rank bound takes away the smallest eigenvalues that exceed it in number.
    """
    removed: dict[str, int] = {}
    vectors = [zero for zero in zeros if zero.vector is not None]
    size = len(moment)
    if vectors:
        stacked = torch.stack(
            [zero.vector.to(moment) for zero in vectors if zero.vector is not None], dim=1
        )
        q, _ = torch.linalg.qr(stacked, mode="complete")
        complement = q[:, stacked.shape[1] :]
        moment = complement.T @ moment @ complement
        for zero in vectors:
            removed[zero.reason] = removed.get(zero.reason, 0) + 1
    values = torch.linalg.eigvalsh(moment).clamp_min(0)
    limits = [zero for zero in zeros if zero.rank is not None and zero.rank < len(values)]
    if limits:
        limit = min(limits, key=lambda zero: zero.rank or 0)
        assert limit.rank is not None
        removed[limit.reason] = len(values) - limit.rank
        values = values[len(values) - limit.rank :]
    floor = float(values[-1]) * max(size * 2.0**-52, 100 * epsilon**2)
    return Spectrum(torch.where(values > floor, values, 0.0).cpu(), floor, removed)


def fisher_block(
    model: nn.Module,
    names: Sequence[str],
    inputs: Tensor,
    labels: Tensor,
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The exact (not Kronecker-factored) Fisher block of named parameters, from per-sample
    gradients.

    Args:
        model: any module.
        names: parameters, as in ``model.named_parameters()``.
        inputs: one sample along the first axis.
        labels: one label a sample, as drawn from the model.
        log_likelihood: scalar log-likelihood of one sample, from the model's output for a batch of
            one and its label.

    Returns:
        (P, P) float64: mean of g gᵀ over samples, g the gradients of the named parameters,
            flattened and joined.

    Raises:
        ValueError: a parameter that does not exist.
    """
    parameters = dict(model.named_parameters())
    if missing := [name for name in names if name not in parameters]:
        raise ValueError(f"no parameter {', '.join(missing)} in {type(model).__name__}")
    fixed = {name: p.detach() for name, p in parameters.items() if name not in names}
    state = {**fixed, **{name: b.detach() for name, b in model.named_buffers()}}

    def sample(chosen: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, {**state, **chosen}, (x.unsqueeze(0),))
        return log_likelihood(output, y.unsqueeze(0))

    chosen = {name: parameters[name].detach() for name in names}
    gradients = torch.func.vmap(torch.func.grad(sample), in_dims=(None, 0, 0))(
        chosen, inputs, labels
    )
    rows = torch.cat([gradients[name].flatten(1) for name in names], dim=1).double()
    return rows.T @ rows / len(rows)
