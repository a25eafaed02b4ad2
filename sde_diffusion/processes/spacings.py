"""Decreasing grids of noise levels, as plain float64 numbers that know no process.

A grid of n steps has n + 1 entries, from noise to data; the last one is exactly 0.
"""

import torch
from torch import Tensor

from sde_diffusion import validate

__all__ = ["karras", "power", "uniform"]


def uniform(steps: int, start: float = 1.0) -> Tensor:
    """Evenly spaced: start * (1 - i / n), i = 0 .. n."""
    validate.integer("steps", steps)
    return start * torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def power(steps: int, start: float, p: float = 1.0, first: float = 1.0) -> Tensor:
    """Evenly spaced in u^(1/p): start * (1 - i / n)^p.  p > 1 gathers the levels near the data.

    Args:
        first: length of the first interval, in units of the others, in (0, 1].
    """
    validate.number("p", p, 0, strict=True)
    validate.number("first", first, 0, 1, strict=True)
    places = uniform(steps)
    places[1:] *= steps / (steps - 1 + first)
    return start * places**p


def karras(
    steps: int, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> Tensor:
    """Noise-to-signal ratios sigma / alpha of Karras et al. 2022, eq. 5, then 0.

    sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,
    i = 0 .. n - 1;   sigma_n = 0.
    """
    validate.integer("steps", steps)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max; got {sigma_min} and {sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
