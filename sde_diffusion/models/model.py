"""Models: all that a sampler sees.

Convention: a model is called as model(x, level) and returns a Prediction; x is (B, ...).
"""

from typing import Protocol

from torch import Tensor

from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import Level, Process

__all__ = ["Model"]


class Model(Protocol):
    """All that a sampler ever sees."""

    @property
    def process(self) -> Process:
        """The process whose levels the model understands."""
        ...

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        """What the model says of the batch x (B, ...) at this level."""
        ...

    def rows(self, index: Tensor) -> "Model":
        """The same model for the samples `index` of the batch.

        Itself, unless the model holds per-sample state such as a condition.
        """
        ...
