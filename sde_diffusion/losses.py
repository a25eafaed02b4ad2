r"""Losses: denoising, in any space and with any weight; and where on the path to train.

Convention: x = alpha x0 + sigma eps with eps drawn; a loss compares a prediction with that truth.
The eps-loss |eps_hat - eps|^2 is sigma^2 |score_hat - grad log p(x | x0)|^2: denoising score
matching (Vincent 2011) weighted by the variance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion import errors
from sde_diffusion.denoiser import Denoiser
from sde_diffusion.prediction import Parameterization, truth
from sde_diffusion.processes import Level, Process, Scalar

__all__ = [
    "DiscreteTimes",
    "NormalLogSNR",
    "TimeDistribution",
    "UniformTimes",
    "denoising_loss",
    "stratified",
]


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    cond: Tensor | None = None,
    space: Parameterization | None = None,
    weight: Callable[[Level], Scalar] | None = None,
) -> Tensor:
    r"""w(level) |target(prediction) - target(truth)|^2, averaged over each sample's coordinates.

    Args:
        denoiser: the model that is trained.
        x0: clean data (B, ...).
        t: times in [0, 1], (B,).
        eps: standard normal noise, shaped like x0.
        cond: condition (B, width) for a conditional network.
        space: what is compared (Eps(), X0(), V(), Score()); the network's own output by default.
        weight: w as a function of the level; 1 by default.
    Returns:
        (B,) losses; take the mean to train.
    """
    if eps.shape != x0.shape:
        raise ValueError(f"eps must be shaped like x0, {tuple(x0.shape)}; got {tuple(eps.shape)}")
    space = space or denoiser.parameterization
    level = denoiser.process.level(t, x0)
    prediction = denoiser(denoiser.process.perturb(x0, level, eps), level, cond)
    error = space.target(prediction) - space.target(truth(x0, eps, level))
    if weight is not None:
        return (weight(level) * error**2).flatten(1).mean(1)
    return (error**2).flatten(1).mean(1)


class TimeDistribution(Protocol):
    """A law of t in (0, 1], given by its quantile function, so that strata pass through it."""

    def __call__(self, quantile: Tensor) -> Tensor:
        """The t below which this share of the law lies; shaped like `quantile`, in (0, 1)."""
        ...


@dataclass(frozen=True)
class UniformTimes:
    """t uniform in (0, 1)."""

    def __call__(self, quantile: Tensor) -> Tensor:
        return quantile


@dataclass(frozen=True)
class DiscreteTimes:
    """t = i/N with i uniform in 1 .. N: training the discrete chain."""

    num_steps: int

    def __post_init__(self) -> None:
        errors.integer("num_steps", self.num_steps)

    def __call__(self, quantile: Tensor) -> Tensor:
        return (quantile * self.num_steps).ceil().clamp(1, self.num_steps) / self.num_steps


@dataclass(frozen=True)
class NormalLogSNR:
    """log-SNR normal(mean, std^2), cut to the process's range: more work at the middle levels.

    With -log_snr / 2 = log(sigma / alpha) this is the log-normal noise law of Karras et al. 2022,
    sec. 5, for any process.
    """

    process: Process
    mean: float = 0.0
    std: float = 2.0

    def __post_init__(self) -> None:
        errors.number("mean", self.mean)
        errors.number("std", self.std, 0, strict=True)

    def __call__(self, quantile: Tensor) -> Tensor:
        lowest = self.process.log_snr(torch.ones((), dtype=torch.float64)).item()
        above = 0.5 * math.erfc((lowest - self.mean) / (self.std * math.sqrt(2)))
        return self.process.time(self.mean - self.std * torch.special.ndtri(quantile * above))


def stratified(offset: float, positions: Tensor, batch_size: int) -> Tensor:
    """One quantile in each of batch_size equal strata, shifted together by `offset` in [0, 1).

    (position + offset) / batch_size: the low-discrepancy draw of Kingma et al. 2021, App. I.1.
    """
    return (positions.to(torch.float64) + offset) / batch_size
