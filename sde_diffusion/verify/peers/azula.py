"""Samplers of azula as samplers of this package.

Nothing here imports azula: its objects are arguments, and their own code runs.
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

from torch import Tensor

from sde_diffusion.validate import Kind
from sde_diffusion.verify.peers.foreign import SINGLE, Foreign, PeerModel, only


@dataclass(frozen=True)
class Azula(Foreign):
    """A sampler of azula, with the model in place of its denoiser.

    Args:
        sampler: an instance, never changed, with its own schedule and steps.
        declared: its order; by default its attribute `order`, if it has one.
    """

    sampler: Annotated[Any, Kind("an azula sampler", "timesteps", "denoiser", "__call__")]
    declared: int | None = None
    rounding: float = SINGLE

    @property
    def name(self) -> str:
        return f"azula {type(self.sampler).__name__}"

    def __str__(self) -> str:
        return f"{self.name}, {len(self.sampler.timesteps) - 1} steps"

    @property
    def order(self) -> int:
        return self.declared or getattr(self.sampler, "order", 1)

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        first, last = (self._level(self.sampler.timesteps[at]) for at in (0, -1))
        return first, last

    def _loop(self, model: PeerModel, x: Tensor) -> tuple[Tensor, str]:
        def denoiser(x: Tensor, t: Tensor, **extra: Any) -> SimpleNamespace:
            return SimpleNamespace(mean=model(x, *self._level(t)).x0)

        setattr(denoiser, "schedule", self.sampler.denoiser.schedule)  # noqa: B010
        sampler = copy.copy(self.sampler)
        sampler.denoiser, sampler.silent = denoiser, True
        return sampler(x), ""

    def _level(self, t: Tensor) -> tuple[float, float]:
        alpha, sigma = self.sampler.denoiser.schedule(t)
        return only(alpha, "alpha"), only(sigma, "sigma")
