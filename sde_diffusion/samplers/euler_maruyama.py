r"""Solvers of the reverse SDE  dx = (f x - g^2 score) dt + g dW,  t running down to 0.

Anderson 1982; Song et al. 2021, eq. 6. Their variable is t and they use drift and diffusion, so
they start at `process.t_max`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from sde_diffusion.grids import FromTMax
from sde_diffusion.processes.level import RatedLevel
from sde_diffusion.processes.process import SLACK, Process
from sde_diffusion.samplers.sampler import Claims, Level, Memory, Model, Noise, check_down

__all__ = ["EulerMaruyama"]


@dataclass(frozen=True)
class EulerMaruyama:
    """x_s = x - (f x - g^2 score) (t - s) + g sqrt(t - s) z, in every step, the last included."""

    claims = Claims(order=1, noise=True, rates=True)
    grid = FromTMax()

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        check_down(self, t, s)
        rates, dt = rates_at(model.process, t), t.t - s.t
        drift = reverse_drift(model, x, t, rates)
        return x + drift.mul_(dt).add_(noise(t.t, s.t, x), alpha=sqrt(rates[1] * dt)), None


def rates_at(process: Process, t: Level[float]) -> Sequence[float]:
    """Return f and g^2 at a level, which those of a grid have already."""
    if isinstance(t, RatedLevel):
        return t.rates
    return process.rated_levels(torch.tensor([t.t], dtype=torch.float64))[0].rates


def reverse_drift(model: Model, x: Tensor, t: Level[float], rates: Sequence[float]) -> Tensor:
    """-(f x - g^2 score), the rate of x as t decreases."""
    process = model.process
    if not t.t <= process.t_max + SLACK:
        raise ValueError(f"{process.rates_domain}; got t={t.t}; start the grid there")
    f, g2 = rates
    return model(x, t).score.mul_(g2).sub_(x, alpha=f)
