"""Claim W1b: W1 on a Llama of transformers; all is said in :mod:`experiments.regauged.plan`."""

from __future__ import annotations

from experiments.regauged.plan import FineTuning

FINE_TUNING = FineTuning(
    "regauged_llama",
    "W1b",
    "Llama of transformers, 0.12M parameters, fine-tuned on another text",
)
EXPERIMENT = FINE_TUNING.experiment
