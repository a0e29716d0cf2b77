"""The gauges of the paper against the complete group: what the difference does to training.

Written before the runs, but for two of 100 steps each of DDCAdam and DDCMuon on the language model,
seed 0, which showed that they run.

*Models.* A GPT of 0.12M parameters (RMSNorm, SwiGLU, rotary positions) on 41 kB of text, which it
sees 7.5 times in 600 steps (until after the runs this said once: that ``scale=cpu`` cuts the text
had been overlooked); and a vision transformer of 0.2M (LayerNorm, biases, ReLU) on 2,000 images of
Fashion-MNIST, 500 steps, 16 epochs. Cosine schedule after a warm-up.

*Gauges.* None (AdamW and Muon as they are), those of the paper, and all exact kinds, without those
that the optimizer refuses (``gauges.leave_out=true``): of the rotation of the stream and the maps
of heads DDCAdam takes the maps, DDCMuon the rotation, and rotations of heads in place of the
maps.

*Tuning.* On seed 100, by the last validation loss, each gauge set for itself: rate × decay, and on
the language model under Muon, for which decay was thought to matter little, rate × rate of vectors
(``adam_lr``). Six settings first; in up to three rounds the untried neighbours of what is chosen,
at most four each, as many for each of the three (:class:`experiments.search.Search`). What is at an
edge then is said to be.

*Reported.* Each at its setting, seeds 0 to 4: the last validation loss, complete less paper, paired
by seed, t-tests adjusted by Holm over the three comparisons. Said to differ where p < 0.05.
Beside it, unadjusted, each of the two less no gauges.

Cost: about 160 runs of ten to sixty seconds on one core, an hour and a half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from experiments.protocols import ROOT, Experiment, Plan, product
from experiments.search import Search, last_loss

RESULTS = ROOT / "results/ablation"
SEEDS = range(5)
LANGUAGE = (
    "model=gpt data=shakespeare model.context=64 model.layers=2 model.width=64 model.heads=4"
    " model.kv_heads=2 model.hidden=172 training.steps=600 training.batch_size=8"
)
VISION = "model=vit data=fashion_mnist training.steps=500"
#: What follows the name of an optimizer, by what its gauges are called.
PAPER, COMPLETE = "gauges=all", "gauges=complete gauges.leave_out=true"
GAUGES = {"none": "", "paper": f" {PAPER}", "complete": f" {COMPLETE}"}
_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_ADAM = {"lr": _RATES, "weight_decay": _DECAYS}
_MUON = {"lr": (6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1, 6e-1), "adam_lr": _RATES}


def named(base: str, lifted: str) -> dict[str, str]:
    """An optimizer as :class:`experiments.search.Search` names it, by its gauges."""
    return {gauges: f"{lifted if words else base}{words}" for gauges, words in GAUGES.items()}


ADAM, MUON = named("adamw", "ddcadam"), named("muon", "ddcmuon")


def search(
    optimizers: dict[str, str],
    axes: dict[str, tuple[float, ...]],
    first: tuple[tuple[float, ...], ...],
    shared: str,
    suffix: str,
) -> Search:
    """The tuning of an optimizer under each set of gauges."""
    return Search(
        axes=dict.fromkeys(optimizers.values(), axes),
        first=dict.fromkeys(optimizers.values(), first),
        questions={"last": last_loss},
        rounds=3,
        most=4,
        shared=shared,
        suffix=suffix,
    )


@dataclass(frozen=True)
class Comparison:
    """A model and a base optimizer.

    Attributes:
        optimizers: by gauges, as the search names them.
        search: their tuning.
    """

    optimizers: Mapping[str, str]
    search: Search

    @property
    def reported(self) -> str:
        """Name of the stage of the seeds of the report."""
        return f"reported{self.search.suffix}"


COMPARISONS = {
    "GPT, Adam": Comparison(
        ADAM, search(ADAM, _ADAM, ((1e-3, 3e-3, 1e-2), (0.1, 1.0)), LANGUAGE, "_gpt_adam")
    ),
    "ViT, Adam": Comparison(
        ADAM, search(ADAM, _ADAM, ((3e-4, 1e-3, 3e-3), (0.3, 3.0)), VISION, "_vit_adam")
    ),
    "GPT, Muon": Comparison(
        MUON, search(MUON, _MUON, ((6e-3, 2e-2, 6e-2), (1e-3, 3e-3)), LANGUAGE, "_gpt_muon")
    ),
}


def reported(search: Search, runs: str | None) -> Plan:
    """What a tuning chose, on the seeds of the report."""
    chosen = search.chosen(EXPERIMENT, ["last"], runs).values()
    return product([setting for settings in chosen for setting in settings], SEEDS)


def stages() -> dict[str, Callable[[str | None], Plan]]:
    """Comparison by comparison."""
    found: dict[str, Callable[[str | None], Plan]] = {}
    for comparison in COMPARISONS.values():
        found |= comparison.search.stages(lambda: EXPERIMENT)
        found[comparison.reported] = partial(reported, comparison.search)
    return found


EXPERIMENT: Experiment = Experiment(
    overrides="+experiment=ablation",
    seeds=SEEDS,
    curve=("step", "train_loss", "validation_loss"),
    results=RESULTS,
    more=stages(),
)
