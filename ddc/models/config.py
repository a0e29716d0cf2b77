"""What the configurations of all models share."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

#: Why gauges are absent, in several models.
NO_CHAIN = "it takes a chain of ReLU layers without biases: model=deep_mlp model.residual=false"
QK_NORM = (
    "model.qk_norm=true gives queries and keys a scale of their own, which does not commute with"
    " rotations"
)


@dataclass
class ModelConfig:
    """Base of the architectures; ``name`` says which one."""

    name: str = MISSING

    def __post_init__(self) -> None:
        if self.name != type(self).name:
            raise ValueError(
                f"Invalid model.name={self.name}: expected {type(self).name}; model=NAME chooses"
                " another"
            )

    @property
    def absent_gauges(self) -> dict[str, str]:
        """Kinds of gauge that the model does not have, with the reason in the words of its
        configuration.
        """
        raise NotImplementedError
