"""What is measured during a run, and by which rule it is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from ddc.slt.rates import APPROACHES, RateRule

LABELS = ("model", "data")


@dataclass
class LearningCoefficientConfig:
    """Estimates of the local learning coefficient beside the readings, by SGLD on the training
    data.

    They compare weights under one setting. An estimate whose chains have not mixed (R-hat over 1.1)
    says so.

    Args:
        every: at every so many-th reading, counted from the last one backwards; 0 for none. An
            estimate costs about (6 · burn_in + draws) · 1.5 · chains · batch_size sequences,
            forward and backward.
        n_beta: inverse temperature nβ. The asymptotic choice is n / log n with n the tokens of the
            training text, but minibatches that a run can afford are too noisy to be sampled there:
            no step size passes the rule.
        gamma: strength of the localisation.
        chains: run as one batch.
        draws: recorded for each chain.
        burn_in: draws before them, in each trial of a step size.
        batch_size: sequences a chain and step.
    """

    every: int = 0
    n_beta: float = 100.0
    gamma: float = 1e3
    chains: int = 4
    draws: int = 100
    burn_in: int = 40
    batch_size: int = 4

    def __post_init__(self) -> None:
        for key, least in (
            ("every", 0),
            ("chains", 2),
            ("draws", 4),
            ("burn_in", 20),
            ("batch_size", 1),
        ):
            if (value := getattr(self, key)) < least:
                raise ValueError(
                    f"Invalid slt.learning_coefficient.{key}={value}: expected an integer >="
                    f" {least}"
                )
        for key in ("n_beta", "gamma"):
            if not (value := getattr(self, key)) > 0:
                raise ValueError(
                    f"Invalid slt.learning_coefficient.{key}={value}: expected a positive number"
                )


@dataclass
class SLTConfig:
    """Readings of singular structure.

    Args:
        readings: how many, at log-spaced steps, the first at step 0 and the last at the end; 0 for
            none.
        sequences: size of the fixed probe batch, taken evenly from the training split: windows of a
            text, or images. Of pairs of residues the probe is all.
        labels: ``model``: gradients for labels drawn from the model, so that G is a Fisher block;
            ``data``: for the text's own.
        approach: parameter against which cells are read: ``excess_loss``, ``arc_length`` or
            ``step``.
        loss_floor: loss per prediction at the minimum; the excess loss is what is above it.
        keep_snapshots: keep the weights at every reading (4 bytes a parameter each), so that they
            can be read again.
        rule: constants by which a cell is read or refused.
        learning_coefficient: estimates beside the readings.

    Raises:
        ValueError: on construction, a value out of range.
    """

    readings: int = 0
    sequences: int = 64
    labels: str = "model"
    approach: str = "excess_loss"
    loss_floor: float = 0.0
    keep_snapshots: bool = True
    rule: RateRule = field(default_factory=RateRule)
    learning_coefficient: LearningCoefficientConfig = field(
        default_factory=LearningCoefficientConfig
    )

    def __post_init__(self) -> None:
        if self.readings != 0 and self.readings < self.rule.min_checkpoints:
            raise ValueError(
                f"Invalid slt.readings={self.readings}: expected 0, or at least "
                f"slt.rule.min_checkpoints={self.rule.min_checkpoints}, for fewer read no rate"
            )
        if self.sequences < 1:
            raise ValueError(f"Invalid slt.sequences={self.sequences}: expected a positive integer")
        for key, choices in (("labels", LABELS), ("approach", APPROACHES)):
            if (value := getattr(self, key)) not in choices:
                raise ValueError(f"Invalid slt.{key}={value}: expected one of {', '.join(choices)}")
