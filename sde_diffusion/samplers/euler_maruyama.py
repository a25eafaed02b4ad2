r"""Solvers of the reverse SDE  dx = (f x - g^2 score) dt + g dW,  t running down to 0.

Anderson 1982; Song et al. 2021, eq. 6. They step in t and use drift and diffusion, so they start
at `process.t_max`.
"""

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.model import Model
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level, Process
from sde_diffusion.samplers.sampler import Memory

__all__ = ["EulerMaruyama"]


@dataclass(frozen=True)
class EulerMaruyama:
    """x_s = x - (f x - g^2 score) (t - s) + g sqrt(t - s) z, in every step, the last included."""

    @property
    def order(self) -> int:
        return 1

    def grid(self, process: Process, steps: int | None) -> Tensor:
        """The process's own from t_max: evenly spaced on the variance-preserving family."""
        return process.times(validate.integer("steps", steps), process.t_max)

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        dt = t.t - s.t
        drift = reverse_drift(model, x, t)
        return x + drift.mul_(dt).add_(noise(t.t, s.t, x), alpha=sqrt(t.diffusion2 * dt)), None


def reverse_drift(model: Model, x: Tensor, t: Level[float]) -> Tensor:
    """-(f x - g^2 score), the rate at which x moves as t runs down."""
    if not t.t <= model.process.t_max:
        raise ValueError(
            f"{type(model.process).__name__} promises drift and diffusion on "
            f"[0, {model.process.t_max}]; got t={t.t}: start the grid there"
        )
    return model(x, t).score.mul_(t.diffusion2).sub_(x, alpha=t.drift)
