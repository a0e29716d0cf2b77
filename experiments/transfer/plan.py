"""Claim W3: a learning rate that is tuned on a small model, on wider and on deeper ones.

Written before the runs.

*Sizes.* The base is the GPT of W2, of width 64 and two blocks; the others are of width 128, 256 and
512, and of four and eight blocks at width 64. Heads are of 16 entries and the feed-forward blocks
of 172/64 times the width at all of them, and starts N(0, 1/fan_in). A run is of 50 steps of 512
tokens of text that is seen once (26 kB), with a cosine schedule after a warm-up of 5 steps, at all
sizes: so short because of width 512, where a step of Muon takes 1.4 seconds.

*Optimizers.* AdamW; AdamW under muP (``optimizer.base_width=64``, :mod:`ddc.optim.mup`), which is
AdamW at the base; AdamH, whose matrices but for embeddings keep their norms and take steps of a
constant length (hyperball, :class:`ddc.optim.relative_step.AdamH`: ``adamw_relative`` of W2 lets
norms grow); DDCAdam; Muon; DDCMuon. None of them is told of the depth, for which muP as it is used
here has no rule. One rate each: that of embeddings and vectors (``adam_lr``) is the same under
AdamH, and 1/20 under both Muons, as their defaults are. Decay 0.1, all else at its default; no step
is compiled.

*Tuning.* On seed 100, by the last validation loss. At the base six rates each, half a decade apart.
At every other size three: the one that was chosen at the base, which is the *transferred* one, and
its two neighbours. While an optimizer's choice has a neighbour that was not tried, this is tried,
up to three times: with one rate, a choice between two that are worse is what more settings would
give. What is at an edge after that is said to be.

*Reported.* On seeds 0 to 4, at every size: the last validation loss at the transferred rate, and at
the size's own tuned rate. The *regret* of a size is the first less the second: exactly 0 where both
are one rate, and it may be negative, for both were chosen on another seed. A run that diverges has
the loss of a model that knows nothing, log 256, and none has more.

*Verdicts*, of DDCAdam against AdamW, against AdamW under muP, and against AdamH, and of DDCMuon
against Muon: two effects, the regret and the loss at transferred rates, each the mean over the five
sizes other than the base, paired by seed, t-tests adjusted by Holm over all that were made. The
claim holds if both are smaller with p < 0.05; direction only: one of them, and the other not
significantly larger; else it does not hold.

What to expect: at starts of N(0, 1/fan_in) a step of DDCAdam is as long as one of AdamW, so nothing
in it follows the width.

Cost: about 400 runs. In seconds of one core that is not shared, one of a kind of Adam and one of a
Muon: 3 and 4 at the base, 4 and 5 at four blocks, 6 and 8 at eight, 4 and 6 at width 128, 10 and 18
at 256, 27 and 77 at 512. In all some 80 minutes, of which width 512 takes 50.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from experiments.own import loss_of
from experiments.protocols import ROOT, Experiment, Plan, product
from experiments.rate_range.plan import rate
from experiments.search import Point, Search, Tried

RESULTS = ROOT / "results/transfer"
SEEDS = range(5)
#: Width and blocks, in the order in which they run.
SIZES = {
    "w64": (64, 2),
    "d4": (64, 4),
    "d8": (64, 8),
    "w128": (128, 2),
    "w256": (256, 2),
    "w512": (512, 2),
}
BASE, *LARGER = SIZES
ADAMW, MUP, ADAMH, DDCADAM, MUON, DDCMUON = (
    "AdamW",
    "AdamW, muP",
    "AdamH",
    "DDCAdam",
    "Muon",
    "DDCMuon",
)
#: Overrides of each optimizer, but for its rates; how many times smaller ``adam_lr`` is; and the
#: exponent, in half decades, of the lowest of the six rates at the base.
OPTIMIZERS: dict[str, tuple[str, float | None, int]] = {
    ADAMW: ("optimizer=adamw", None, -7),
    MUP: ("optimizer=adamw optimizer.base_width=64", None, -7),
    ADAMH: ("optimizer=adamh", 1, -6),
    DDCADAM: ("optimizer=ddcadam optimizer.compiled=false", None, -7),
    MUON: ("optimizer=muon", 20, -5),
    DDCMUON: ("optimizer=ddcmuon optimizer.compiled=false", 20, -5),
}
COUNT = 6
ROUNDS = 3
#: All rates there are, in half decades.
LATTICE = range(-14, 5)


def shape(size: str) -> str:
    """Overrides of the model of a size."""
    width, layers = SIZES[size]
    parts = {
        "width": width,
        "layers": layers,
        "heads": width // 16,
        "kv_heads": width // 32,
        "hidden": 172 * width // 64,
    }
    return " ".join(f"model.{key}={value}" for key, value in parts.items())


def setting(optimizer: str, lr: float, size: str) -> str:
    """Overrides of a run."""
    overrides, ratio, _ = OPTIMIZERS[optimizer]
    rates = f"optimizer.lr={lr:g}" + ("" if ratio is None else f" optimizer.adam_lr={lr / ratio:g}")
    return f"{overrides} {rates} {shape(size)}"


@dataclass(frozen=True, eq=False)
class Rates(Search):
    """The tuning of the rate of every optimizer at one size; a point is one index into
    :data:`LATTICE`.
    """

    size: str = BASE

    def setting(self, optimizer: str, *values: float) -> str:
        (lr,) = values
        return setting(optimizer, lr, self.size)

    def widened(self, tried: Mapping[str, Tried]) -> dict[str, list[Point]]:
        """The untried neighbours of each choice."""
        return {
            name: self.untried(name, [*self.choices(each).values()], each)
            for name, each in tried.items()
        }


def rates(size: str, first: Mapping[str, list[int]]) -> Rates:
    """The tuning at a size, from the half decades that its first round tries."""
    lattice = {"lr": [rate(each) for each in LATTICE]}
    return Rates(
        axes=dict.fromkeys(OPTIMIZERS, lattice),
        first={name: [[rate(each) for each in tried]] for name, tried in first.items()},
        questions={"last": loss_of},
        rounds=ROUNDS,
        most=1,
        suffix=f"_{size}",
        size=size,
    )


def at_base() -> Rates:
    """The tuning at the base."""
    return rates(BASE, {name: [*range(low, low + COUNT)] for name, (*_, low) in OPTIMIZERS.items()})


#: The tuning at each size as far as records are read by it; what its first round tries at sizes
#: other than the base follows from the base (:func:`tuning`).
SEARCHES = {size: at_base() if size == BASE else rates(size, {}) for size in SIZES}


def tuning(size: str, runs: str | None) -> Rates:
    """The tuning at a size, whose first round may follow from what the base chose."""
    if size == BASE:
        return SEARCHES[BASE]
    return rates(
        size,
        {name: [at - 1, at, at + 1] for name, at in chosen(BASE, runs).items()},
    )


def chosen(size: str, runs: str | None) -> dict[str, int]:
    """The half decade that the tuning at a size chose, by optimizer.

    Raises:
        ValueError: a run of it has not ended.
    """
    search = tuning(size, runs)
    tried = search.tried(EXPERIMENT, ROUNDS, runs)
    return {name: LATTICE[search.choices(each)["last"][0]] for name, each in tried.items()}


def reported(size: str, runs: str | None) -> Plan:
    """Every optimizer at the transferred rate, and at the size's own where that is another."""
    transferred, own = chosen(BASE, runs), chosen(size, runs)
    settings = [
        setting(name, rate(each), size)
        for name in OPTIMIZERS
        for each in dict.fromkeys((transferred[name], own[name]))
    ]
    return product(settings, SEEDS)


def stages() -> dict[str, Callable[[str | None], Plan]]:
    """All stages, in an order in which they can run: the small sizes first."""

    def of_tuning(size: str, name: str) -> Callable[[str | None], Plan]:
        return lambda runs: tuning(size, runs).stages(lambda: EXPERIMENT)[name](runs)

    def of_report(size: str) -> Callable[[str | None], Plan]:
        return lambda runs: reported(size, runs)

    found: dict[str, Callable[[str | None], Plan]] = {}
    for size, search in SEARCHES.items():
        found |= {name: of_tuning(size, name) for name in search.names}
        found[f"reported_{size}"] = of_report(size)
    return found


EXPERIMENT: Experiment = Experiment(
    overrides="+experiment=transfer",
    seeds=SEEDS,
    curve=("step", "train_loss", "validation_loss"),
    results=RESULTS,
    more=stages(),
)
