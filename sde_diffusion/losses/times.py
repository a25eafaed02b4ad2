r"""Laws of t: where on the path to train.

Each is given by its quantile function, so that evenly spread quantiles (`stratified`) pass through
it as well as random ones.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.processes import Process

__all__ = [
    "DiscreteTimes",
    "LikelihoodTimes",
    "NormalLogSNR",
    "TimeDistribution",
    "UniformTimes",
    "stratified",
]


class TimeDistribution(Protocol):
    """A law of t in (0, 1], given by its quantile function, so that strata pass through it."""

    def __call__(self, quantile: Tensor) -> Tensor:
        """The t below which this share of the law lies; shaped like `quantile`, in (0, 1)."""
        ...


@dataclass(frozen=True)
class UniformTimes:
    """t uniform in (t_min, t_max), (0, 1) by default."""

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        validate.number("t_min", self.t_min, 0, 1)
        validate.number("t_max", self.t_max, self.t_min, 1, strict=True)

    def __call__(self, quantile: Tensor) -> Tensor:
        return self.t_min + (self.t_max - self.t_min) * checked_quantile(quantile)


@dataclass(frozen=True)
class DiscreteTimes:
    """t = i/N with i uniform in 1 .. N: training the discrete chain."""

    num_steps: int

    def __post_init__(self) -> None:
        validate.integer("num_steps", self.num_steps)

    def __call__(self, quantile: Tensor) -> Tensor:
        return (checked_quantile(quantile) * self.num_steps).ceil().clamp(
            1, self.num_steps
        ) / self.num_steps


@dataclass(frozen=True)
class LikelihoodTimes:
    r"""Times in proportion to g^2 / sigma^2, importance sampling for the likelihood weight.

    Since d log_snr / dt = -g^2 / sigma^2, this law is uniform in log-SNR, and

        integral of g^2 |score error|^2 dt = total E[ |eps error|^2 ],
        total = log_snr(t_min) - log_snr(t_max),

    so `Simple` with these times is `Likelihood` with uniform ones, at a fraction of the variance
    (Song et al. 2021 "Maximum likelihood training", sec. 5; Kingma et al. 2021, sec. 5).

    Args:
        process: whose path it is.
        t_min: where the path is cut, since log_snr(0) is infinite; its end is process.t_max.
    """

    process: Process
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        validate.kind("process", self.process, "a Process", "log_alpha", "variance")
        validate.number("t_min", self.t_min, 0, self.process.t_max, strict=True)
        if not self.t_min < self.process.t_max:
            raise ValueError(f"t_min must be below t_max={self.process.t_max}; got {self.t_min}")

    @property
    def total(self) -> float:
        """The integral of g^2 / sigma^2 over [t_min, t_max]."""
        first, last = self.process.log_snr(
            torch.tensor([self.t_min, self.process.t_max], dtype=torch.float64)
        ).tolist()
        return first - last

    def __call__(self, quantile: Tensor) -> Tensor:
        first = self.process.log_snr(self.t_min)
        return self.process.time(first - self.total * checked_quantile(quantile))


@dataclass(frozen=True)
class NormalLogSNR:
    """Log-normal noise: log-SNR normal(mean, std^2), cut to the process's range.

    With -log_snr / 2 = log(sigma / alpha) this is the log-normal noise law of Karras et al. 2022,
    sec. 5, for any process; their P_mean = -1.2, P_std = 1.2 are mean = 2.4, std = 2.4 here.
    """

    process: Process
    mean: float = 0.0
    std: float = 2.0

    def __post_init__(self) -> None:
        validate.kind("process", self.process, "a Process", "log_alpha", "variance")
        validate.number("mean", self.mean)
        validate.number("std", self.std, 0, strict=True)
        if self._above < 1e-100:
            raise ValueError(
                f"mean={self.mean} and std={self.std} leave nothing of the process's range, "
                f"log_snr > {self.process.log_snr(1.0):.4g}"
            )

    @property
    def _above(self) -> float:
        """The share of the normal law within the range."""
        lowest = self.process.log_snr(1.0).item()
        return 0.5 * math.erfc((lowest - self.mean) / (self.std * math.sqrt(2)))

    def __call__(self, quantile: Tensor) -> Tensor:
        share = checked_quantile(quantile) * self._above
        return self.process.time(self.mean - self.std * torch.special.ndtri(share))


def stratified(offset: float, positions: Tensor, batch_size: int) -> Tensor:
    """Low discrepancy: one quantile in each of batch_size equal strata.

    (position + offset) / batch_size, `offset` drawn once from [0, 1) for the whole batch
    (Kingma et al. 2021, App. I.1). Pass it through a law: `UniformTimes()(stratified(...))`.
    """
    validate.integer("batch_size", batch_size)
    validate.number("offset", offset, 0, 1)
    return (positions.to(torch.float64) + offset) / batch_size


def checked_quantile(quantile: Tensor) -> Tensor:
    """The quantile, if it is a tensor of shares in [0, 1]; a GPU is not asked, it would stall."""
    validate.kind("quantile", quantile, "a tensor", "is_floating_point", "device")
    allowed = (quantile >= 0) & (quantile <= 1)
    if quantile.device.type == "cpu" and not bool(allowed.all()):
        raise ValueError(f"quantile must lie in [0, 1]; got {quantile[~allowed][0].item()}")
    return quantile
