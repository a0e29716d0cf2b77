"""Claims C9 and C9b: how sharp, and how singular, the minimum is that training ends in.

Written before anything was measured at the end of these runs, but after their losses were seen, for
they are those of past_fit, stage ``mechanism``, made again to keep their weights; and but for
pilots, on which tolerance, number of probes and the settings of
the sampler were chosen: the final weights of one run of the specification curve of past_fit
(DDCAdam, seed 0, another vertical mode than here), and those of AdamW after 300 steps.

*What the paper says.* The abstract gives no figure for either. It says that respecting the symmetry
changes the minimum that is reached and what is measurable there, and that built into the optimizer
the symmetry sharpens the minimum. Taken at its word, that is a larger curvature (C9); the word may
mean no more than *improves*, and then there is nothing to test. It gives the learning coefficient
no sign: of a minimum with more dead directions it is smaller, and that is what counts here (C9b);
the sign is ours. Minima are compared at the end of equal training, not at equal train loss, on
which both quantities depend; so the train losses stand beside the verdict.

*Runs.* AdamW, DDCAdam and the author's own step on the setting of past_fit, stage ``mechanism``:
4,000 steps, rate 0.001, decay 0.1 on matrices, radial rate 1; seeds 0 to 4, paired. The weights are
those of the last checkpoint, the loss is that of all windows of the training text.

*Sharpness.* The largest eigenvalue of the Hessian of the train loss by Lanczos' method, in float64,
to a residual of 1e-3 of it, and the trace by 20 probes. Both depend on the gauge
(arXiv:1703.04933): they are measured of the weights as they are (``raw``), at the balanced point of
their orbit under the paper's gauges (``balanced``), and, the eigenvalue alone and with no test, at
that under all continuous symmetries that are exact (``balanced_all``).

*Learning coefficient.* :func:`ddc.slt.estimate` at the balanced point, on batches of 16 windows at
the inverse temperature n / log n, n the predictions of the text; 4 chains at each of two step
sizes, of the same length in time (:data:`COARSE`, :data:`FINE`). Two estimates of a run *disagree*
if their 95% intervals over chains do not overlap; the report counts such runs, and says the largest
R-hat and bound on the bias. The temperature and the localisation are the same for all runs, and
decide the number: it compares minima, and is no coefficient in the limit of many data.

*Verdicts*, of DDCAdam and of the author's step, each against AdamW. C9: reproduced if the largest
eigenvalue is larger both raw and balanced, C9b if the learning coefficient is smaller at both step
sizes, each with p < 0.05: paired t-test, Holm over all eight tests. Direction only: at one of the
two with p < 0.05, and at the other not significantly the other way round. Runs that diverge are
left out and counted.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ddc.slt.learning_coefficient import Settings
from experiments.past_fit.plan import DECAY, RATE, author
from experiments.past_fit.settings import ADAMW, DDCADAM, SEARCH
from experiments.protocols import ROOT, Experiment, left_by, product

RESULTS, SEEDS = ROOT / "results/geometry", range(5)
#: What a script leaves in the folder of a run.
SCRIPT, FILE = "experiments/geometry/at_the_end.py", "geometry.json"
TOLERANCE, PROBES = 1e-3, 20
BATCH_SIZE = 16
COARSE = Settings(chains=4, draws=150, burn_in=150, gamma=1e3, step_size=4e-5)
FINE = Settings(chains=4, draws=150, burn_in=150, steps=2, gamma=1e3, step_size=2e-5)
SETTINGS = (
    SEARCH.setting(ADAMW, RATE, DECAY),
    SEARCH.setting(DDCADAM, RATE, DECAY, 1.0),
    author(RATE),
)


def measured(folder: Path, stages: Collection[str]) -> dict[str, Any]:
    """What was measured at the end of a run."""
    return {"geometry": left_by(SCRIPT, folder / FILE)}


EXPERIMENT = Experiment(
    overrides="+experiment=past_fit",
    seeds=SEEDS,
    curve=("step", "epoch", "train_loss", "validation_loss"),
    results=RESULTS,
    measured=measured,
    scripts={"runs": SCRIPT},
    more={"runs": lambda runs: product(SETTINGS, SEEDS)},
)
