r"""Laws of t in training.

Each is a quantile function: it maps quantiles, random or evenly spread (`stratified`), to times.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from sde_diffusion.models.model import LogSNRRange
from sde_diffusion.processes.level import readable
from sde_diffusion.processes.process import IS_PROCESS, Process
from sde_diffusion.validate import Checked, Count, Number, Positive, Share, arguments, kind, number

__all__ = [
    "DiscreteTimes",
    "LikelihoodTimes",
    "NormalLogSNR",
    "TimeDistribution",
    "UniformTimes",
    "stratified",
]


class TimeDistribution(Protocol):
    """A law of t in (0, 1], given by its quantile function.

    The laws of this module also have `support`, (t_low, t_high): all their times lie between.
    """

    def __call__(self, quantile: Tensor) -> Tensor:
        """Return the t below which this share of the law lies, shaped like `quantile` in (0, 1)."""
        ...


def support_of(law: Any, process: Process) -> LogSNRRange | None:
    """The log-SNRs of the times that a law draws; None where it draws all, or states no support."""
    low, high = getattr(law, "support", (0.0, 1.0))
    if (low, high) == (0, 1):
        return None
    noisiest, cleanest = process.log_snr(torch.tensor([high, low], dtype=torch.float64)).tolist()
    return LogSNRRange(noisiest, cleanest)


@dataclass(frozen=True)
class UniformTimes(Checked):
    """t uniform in (t_min, t_max), (0, 1) by default."""

    t_min: Share = 0.0
    t_max: Share = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("t_max", self.t_max, self.t_min, 1, strict=True)

    @property
    def support(self) -> tuple[float, float]:
        return self.t_min, self.t_max

    def __call__(self, quantile: Tensor) -> Tensor:
        return self.t_min + (self.t_max - self.t_min) * checked_quantile(quantile)


@dataclass(frozen=True)
class DiscreteTimes(Checked):
    """t = i/N with i uniform in 1 .. N: training the discrete chain."""

    num_steps: Count

    @property
    def support(self) -> tuple[float, float]:
        return 1 / self.num_steps, 1.0

    def __call__(self, quantile: Tensor) -> Tensor:
        n = self.num_steps
        return (checked_quantile(quantile) * n).ceil().clamp(1, n) / n


@dataclass(frozen=True)
class LikelihoodTimes(Checked):
    r"""Times in proportion to g^2 / sigma^2, importance sampling for the likelihood weight.

    Since d log_snr / dt = -g^2 / sigma^2, this law is uniform in log-SNR, and

        integral of g^2 |score error|^2 dt = total E[ |eps error|^2 ],
        total = log_snr(t_min) - log_snr(t_max),

    so `Simple` with these times is `Likelihood` with uniform ones, at a fraction of the variance
    (Song et al. 2021 "Maximum likelihood training", sec. 5; Kingma et al. 2021, sec. 5).

    Args:
        process: the process whose path is sampled, up to process.t_max.
        t_min: start of the path, since log_snr(0) is infinite.
    """

    process: Annotated[Process, IS_PROCESS]
    t_min: Positive = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.t_min < self.process.t_max:
            raise ValueError(f"t_min must be below t_max={self.process.t_max}; got {self.t_min}")

    @property
    def support(self) -> tuple[float, float]:
        return self.t_min, self.process.t_max

    @property
    def total(self) -> float:
        """The integral of g^2 / sigma^2 over [t_min, t_max]."""
        ends = torch.tensor(self.support, dtype=torch.float64)
        return -self.process.log_snr(ends).diff().item()

    def __call__(self, quantile: Tensor) -> Tensor:
        first = self.process.log_snr(self.t_min)
        return self.process.time(first - self.total * checked_quantile(quantile))


@dataclass(frozen=True)
class NormalLogSNR(Checked):
    """Log-normal noise: log-SNR normal(mean, std^2), cut to the process's range.

    With -log_snr / 2 = log(sigma / alpha) this is the log-normal noise law of Karras et al. 2022,
    sec. 5, for any process; their P_mean = -1.2, P_std = 1.2 are mean = 2.4, std = 2.4 here.
    """

    process: Annotated[Process, IS_PROCESS]
    mean: Annotated[float, Number()] = 0.0
    std: Positive = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._above < 1e-100:
            law = f"mean={self.mean} and std={self.std}"
            lowest = f"log_snr > {self.process.log_snr(1.0):.4g}"
            raise ValueError(f"{law} leave nothing of the process's range, {lowest}")

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def _above(self) -> float:
        """The share of the normal law within the range."""
        lowest = self.process.log_snr(1.0).item()
        return 0.5 * math.erfc((lowest - self.mean) / (self.std * math.sqrt(2)))

    def __call__(self, quantile: Tensor) -> Tensor:
        share = checked_quantile(quantile) * self._above
        return self.process.time(self.mean - self.std * torch.special.ndtri(share))


@arguments
def stratified(
    offset: Annotated[float, Number(0, 1)], positions: Tensor, batch_size: Count
) -> Tensor:
    """Low discrepancy: one quantile in each of batch_size equal strata.

    (position + offset) / batch_size, `offset` drawn once from [0, 1) for the whole batch
    (Kingma et al. 2021, App. I.1). Pass it through a law: `UniformTimes()(stratified(...))`.
    """
    return (positions.to(torch.float64) + offset) / batch_size


def checked_quantile(quantile: Tensor) -> Tensor:
    """Return a tensor of shares in [0, 1]; not checked on a GPU, which would synchronize."""
    kind("quantile", quantile, "a tensor", "is_floating_point", "device")
    allowed = (quantile >= 0) & (quantile <= 1)
    if readable(quantile) and not bool(allowed.all()):
        raise ValueError(f"quantile must lie in [0, 1]; got {quantile[~allowed][0].item()}")
    return quantile
