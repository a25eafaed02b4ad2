r"""Frames: changes of variables in which the probability flow is integrated.

In the straight frame,  u = sigma / (alpha + sigma),  y = x / (alpha + sigma),  every process has
one and the same flow:

    dy/du = eps - x0 = velocity,        log_snr = 2 log((1 - u) / u),

from u near 1 (noise) to u = 0 (data), and nothing is singular on the way. In t the flow
dx/dt = f x - g^2 score / 2  is: sigma(t) starts like sqrt(t), and solvers spend their steps there.
"""

import math

import torch
from torch import Tensor

from sde_diffusion import grids
from sde_diffusion.processes import Level, Process

__all__ = ["enter", "grid", "leave", "level_at"]


def enter(x: Tensor, level: Level) -> Tensor:
    """y = x / (alpha + sigma)."""
    return x / (level.alpha + level.sigma)


def leave(y: Tensor, level: Level) -> Tensor:
    """x = (alpha + sigma) y."""
    return y * (level.alpha + level.sigma)


def level_at(process: Process, u: float) -> Level[float]:
    """The level of a process at which sigma / (alpha + sigma) = u."""
    if u <= 0:
        log_snr = math.inf
    else:
        log_snr = 2 * (math.log1p(-u) - math.log(u)) if u < 1 else -math.inf
    return process.levels(process.time(torch.tensor([log_snr], dtype=torch.float64)))[0]


def grid(process: Process, steps: int, p: float = 1.0) -> Tensor:
    """n + 1 times whose u is evenly spaced in u^(1/p), from t = 1 to exactly 0."""
    start = process.levels(torch.ones(1, dtype=torch.float64))[0].u
    u = grids.power(steps, start, p)
    times = process.time(2 * (torch.log1p(-u) - u.log()))
    times[0], times[-1] = 1.0, 0.0
    return times
