r"""The processes of the literature, as their two formulas.

Convention: t in [0, 1]; x_t = alpha(t) x_0 + sigma(t) eps; sigma(0) = 0 for every process.

At t = 1 a batch is N(0, prior_std^2 I), nearly (alpha(1) or 1 / sigma(1) small) or exactly
(alpha(1) = 0: Cosine, RectifiedFlow). Where alpha(1) = 0 the drift has a pole there, and drift and
diffusion are defined up to t_max < 1 only.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sde_diffusion.processes.process import Process, VariancePreserving
from sde_diffusion.validate import NonNegative, Positive

__all__ = ["EDM", "OU", "VE", "VP", "Cosine", "RectifiedFlow", "SubVP"]


@dataclass(frozen=True)
class LinearRate(Process):
    """alpha of  dx = -beta(t) x / 2 dt + ...,  beta(t) = beta_min + t (beta_max - beta_min)."""

    beta_min: Positive = 0.1
    beta_max: Positive = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta_min <= self.beta_max:
            raise ValueError(f"beta_min must be at most beta_max; got {self}")

    def log_alpha(self, t: Tensor) -> Tensor:
        return -self.beta_min * t / 2 - (self.beta_max - self.beta_min) * t**2 / 4

    def _log_ratio(self, s: Tensor, t: Tensor) -> Tensor:
        return -(t - s) * (self.beta_min / 2 + (self.beta_max - self.beta_min) * (t + s) / 4)

    def _time_at(self, log_alpha: Tensor) -> Tensor:
        """The t in [0, 1] with this log alpha: the positive root of a quadratic."""
        half, slope = self.beta_min / 2, self.beta_max - self.beta_min
        fall = (-log_alpha).clamp(max=half + slope / 4)  # its value at t = 1
        return 2 * fall / (half + (half**2 + slope * fall).sqrt())


@dataclass(frozen=True)
class VP(VariancePreserving, LinearRate):
    """Variance-preserving:  dx = -beta x / 2 dt + sqrt(beta) dW  (Song et al. 2021, eq. 11, 32).

    VP(b, b) is the Ornstein-Uhlenbeck process OU(b / 2).
    """

    def inverse(self, log_snr: Tensor) -> Tensor:
        """alpha^2 = sigmoid(log_snr)."""
        return self._time_at(logsigmoid(log_snr) / 2)


@dataclass(frozen=True)
class SubVP(LinearRate):
    """dx = -beta x / 2 dt + sqrt(beta (1 - e^(-2 int beta))) dW  (Song et al. 2021, eq. 12).

    The alpha of VP, and sigma = 1 - alpha^2, the square of VP's; g(0) = 0.
    """

    even_times = True

    def variance(self, t: Tensor) -> Tensor:
        return torch.expm1(2 * self.log_alpha(t)) ** 2

    def _kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """b^2 = (1 - a^2) (1 - alpha_s^2 alpha_t^2)."""
        log_a, both = self._log_ratio(s, t), self.log_alpha(s) + self.log_alpha(t)
        return log_a, torch.expm1(2 * log_a) * torch.expm1(2 * both)

    def inverse(self, log_snr: Tensor) -> Tensor:
        """sigma / alpha = 1 / alpha - alpha = 2 sinh(-log alpha)."""
        return self._time_at(-torch.asinh((-log_snr / 2).exp() / 2))


@dataclass(frozen=True)
class OU(VariancePreserving):
    """Ornstein-Uhlenbeck:  dx = -rate x dt + sqrt(2 rate) dW.

    Its kernel over any dt >= 0 is  N(e^(-rate dt) x, 1 - e^(-2 rate dt)),  which `transition`
    gives at any times >= 0; samplers use [0, 1]. With the default rate alpha(1) = 0.0067, as for
    VP. w(t) of TTIC 31230 is OU(1.0).
    """

    rate: Positive = 5.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return -self.rate * t

    def inverse(self, log_snr: Tensor) -> Tensor:
        """alpha^2 = sigmoid(log_snr)."""
        return logsigmoid(log_snr) / (-2 * self.rate)

    def _log_ratio(self, s: Tensor, t: Tensor) -> Tensor:
        return -self.rate * (t - s)


@dataclass(frozen=True)
class Cosine(VariancePreserving):
    r"""alpha = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)).

    Nichol & Dhariwal 2021, eq. 17. With c = (pi/2) / (1 + s) it is  sin(c (1 - t)) / sin(c),  which
    is 0 at t = 1 exactly: drift and diffusion are defined on [0, 0.999]. `Discrete.cosine` is its
    chain, clipped as published.

    Args:
        s: offset, which keeps the noise from growing too slowly at t = 0.
    """

    s: NonNegative = 0.008

    @property
    def t_max(self) -> float:
        return 0.999

    @property
    def c(self) -> float:
        """The angle at t = 0, from the end of the path."""
        return math.pi / 2 / (1 + self.s)

    def log_alpha(self, t: Tensor) -> Tensor:
        # Each form is precise at one end: the first is log1p(alpha - 1), expanded.
        near_data = t < 0.5
        early = self.c * torch.where(near_data, t, 0.0)
        late = self.c * (1 - torch.where(near_data, 0.5, t))
        fall = 2 * (early / 2).sin() ** 2 + early.sin() / math.tan(self.c)
        from_noise = late.sin().log() - math.log(math.sin(self.c))
        return torch.where(near_data, torch.log1p(-fall), from_noise)

    def _log_ratio(self, s: Tensor, t: Tensor) -> Tensor:
        """1 - a = 2 cos(c (1 - (s + t) / 2)) sin(c (t - s) / 2) / sin(c (1 - s)), where small."""
        middle, half = self.c * (1 - (s + t) / 2), self.c * (t - s) / 2
        fall = 2 * middle.cos() * half.sin() / (self.c * (1 - s)).sin()
        small = fall < 0.5
        return torch.where(small, torch.log1p(-fall.clamp(max=0.5)), super()._log_ratio(s, t))

    def inverse(self, log_snr: Tensor) -> Tensor:
        """c t by the tangent of c less the angle whose sine is alpha sin(c)."""
        sin, cos = math.sin(self.c), math.cos(self.c)
        noise = sin**2 * torch.sigmoid(-log_snr)  # sin^2(c) sigma^2
        of_sin, of_cos = sin * torch.sigmoid(log_snr).sqrt(), (cos**2 + noise).sqrt()
        angle = torch.atan2(noise / (sin * of_cos + cos * of_sin), cos * of_cos + sin * of_sin)
        return angle / self.c


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """The straight path x_t = (1 - t) x_0 + t eps (Liu et al. 2023; Lipman et al. 2023).

    alpha(1) = 0, so drift and diffusion, which divide by alpha, are defined on [0, 0.999].
    """

    @property
    def t_max(self) -> float:
        return 0.999

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def variance(self, t: Tensor) -> Tensor:
        return t**2

    def _kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """b^2 = (t - s) (t (1 - s) + s (1 - t)) / (1 - s)^2."""
        return self._log_ratio(s, t), (t - s) * (t * (1 - s) + s * (1 - t)) / (1 - s) ** 2

    def inverse(self, log_snr: Tensor) -> Tensor:
        """t / (1 - t) = e^(-log_snr / 2)."""
        return torch.sigmoid(-log_snr / 2)


class VarianceExploding(Process):
    """alpha = 1: noise is added to unscaled data."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    @property
    def prior_std(self) -> float:
        """sigma(1)."""
        return self.sigma(1.0).item()


@dataclass(frozen=True)
class VE(VarianceExploding):
    r"""dx = sigma_min r^t sqrt(2 log r) dW,  r = sigma_max / sigma_min.

    Song et al. 2021, eq. 9 and 31.
    sigma^2(t) = sigma_min^2 (r^(2t) - 1) is the exact variance of that SDE, 0 at t = 0; the
    paper's sigma_min^2 r^(2t) includes the variance sigma_min^2 of its first level.
    """

    sigma_min: Positive = 0.01
    sigma_max: Positive = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max; got {self}")

    @property
    def growth(self) -> float:
        """2 log r."""
        return 2 * math.log(self.sigma_max / self.sigma_min)

    def variance(self, t: Tensor) -> Tensor:
        return self.sigma_min**2 * torch.expm1(self.growth * t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        """sigma^2 = e^(-log_snr)."""
        return torch.log1p((-log_snr).exp() / self.sigma_min**2) / self.growth

    def _kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        b2 = self.sigma_min**2 * (self.growth * s).exp() * torch.expm1(self.growth * (t - s))
        return torch.zeros_like(b2), b2


@dataclass(frozen=True)
class EDM(VarianceExploding):
    """sigma = sigma_max t:  dx = sigma_max sqrt(2 t) dW  (Karras et al. 2022, on the clock t).

    The paper's time is sigma itself; its sigma_min = 0.002 is a setting of the grid. g(0) = 0.
    """

    sigma_max: Positive = 80.0

    def variance(self, t: Tensor) -> Tensor:
        return (self.sigma_max * t) ** 2

    def _kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        b2 = self.sigma_max**2 * (t - s) * (t + s)
        return torch.zeros_like(b2), b2

    def inverse(self, log_snr: Tensor) -> Tensor:
        """sigma = e^(-log_snr / 2)."""
        return (-log_snr / 2).exp() / self.sigma_max
