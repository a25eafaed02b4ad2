r"""Processes: how data becomes noise.

Convention: t in [0, 1], t = 0 is data, t = 1 is noise;  x_t = alpha(t) x_0 + sigma(t) eps.

A linear-Gaussian process is fixed by two functions, log alpha(t) and sigma^2(t); everything else
is derived from them here, once. In particular its SDE  dx = f x dt + g dW  is

    f = (log alpha)',     g^2 = (sigma^2)' - 2 f sigma^2,

found by automatic differentiation in float64, so that drift and marginal cannot disagree.
The variance is 0 at t = 0 for every process: the end of a path is data, not nearly data.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import errors, grids
from sde_diffusion.noise import Generated, Noise, Purpose, Seeded

__all__ = ["VP", "Discrete", "Interpolated", "Level", "Process", "RectifiedFlow"]

Scalar = float | Tensor
S = TypeVar("S", float, Tensor)


class Level(NamedTuple, Generic[S]):
    """Where on the path a batch stands.

    In sampling the whole batch shares one level and the fields are Python floats, which neither
    promote a batch, nor move it, nor synchronize a GPU. In training each sample has its own and
    the fields are tensors (B, 1, ..., 1) that broadcast against it.

    Attributes:
        t, alpha, sigma: x_t = alpha x_0 + sigma eps.
        log_snr: log(alpha^2 / sigma^2).
        drift, diffusion2: f and g^2 of dx = f x dt + g dW.
    """

    t: S
    alpha: S
    sigma: S
    log_snr: S
    drift: S
    diffusion2: S

    @property
    def u(self) -> S:
        """The straight frame's time, sigma / (alpha + sigma), from 0 (data) to 1 (pure noise)."""
        return self.sigma / (self.alpha + self.sigma)


@dataclass(frozen=True)
class Process(ABC):
    """A linear-Gaussian noising process. A new one defines `log_alpha` and `variance`."""

    t_max: ClassVar[float] = 1.0  # drift and diffusion are promised on [0, t_max]
    prior_std: ClassVar[float] = 1.0  # sampling starts from N(0, prior_std^2 I)

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha(t), 0 at t = 0; shaped like t."""

    @abstractmethod
    def variance(self, t: Tensor) -> Tensor:
        """sigma^2(t), 0 at t = 0 and smooth there, as sigma is not; shaped like t."""

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data in x_t."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in x_t."""
        return self.variance(t).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), decreasing in t; +inf at t = 0."""
        return 2 * self.log_alpha(t) - self.variance(t).log()

    def drift(self, t: Tensor) -> Tensor:
        """f(t) of dx = f x dt + g dW, for t in [0, t_max]."""
        return self._rates(t)[2].to(t.dtype)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) of dx = f x dt + g dW, for t in [0, t_max]."""
        return self._rates(t)[3].sqrt().to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        """The t in [0, 1] with this log-SNR, by bisection in float64; shaped like log_snr.

        A log-SNR outside the process's range gives the nearer end.
        """
        target = log_snr.to(torch.float64)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(80):
            middle = (low + high) / 2
            above = self.log_snr(middle) > target
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return high.to(log_snr.dtype)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Scale a and standard deviation b of the forward kernel  x_t | x_s ~ N(a x_s, b^2 I).

        a = alpha_t / alpha_s,   b^2 = sigma_t^2 - a^2 sigma_s^2        (Kingma et al. 2021, App. A)

        Args:
            s: earlier time, () or (B,), in [0, t], with alpha(s) > 0.
            t: later time, same shape.
        Returns:
            (a, b), each shaped like t; b = 0 where s = t.
        Raises:
            ValueError: if s > t anywhere.
        """
        if bool((s > t).any()):
            raise ValueError(f"transition runs forward: need s <= t; got s={s}, t={t}")
        s64, t64 = s.to(torch.float64), t.to(torch.float64)
        a = (self.log_alpha(t64) - self.log_alpha(s64)).exp()
        b2 = (self.variance(t64) - a**2 * self.variance(s64)).clamp(min=0)
        return a.to(t.dtype), b2.sqrt().to(t.dtype)

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A batch of pure noise, N(0, prior_std^2 I), to start sampling from.

        Args:
            shape: (B, ...).
            generator: source of the draw; fresh entropy if neither it nor `seeds` is given.
            seeds: one per sample; independent of the path that the same seeds drive in `sample`.
            dtype, device: of the batch.
        """
        if generator is not None and seeds is not None:
            raise ValueError("give generator or seeds, not both")
        source: Noise = Seeded(seeds, Purpose.PRIOR) if seeds is not None else Generated(generator)
        return self.prior_std * source(1.0, 1.0, torch.empty(*shape, dtype=dtype, device=device))

    def level(self, t: Tensor, like: Tensor) -> Level[Tensor]:
        """The levels of a batch whose samples stand at times t, broadcast here and nowhere else.

        Args:
            t: () or (B,), in [0, 1].
            like: the batch (B, ...), whose rank, dtype and device the fields take.
        """
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(like)):
            raise ValueError(
                f"t must have shape () or ({len(like)},) for this batch; got {tuple(t.shape)}"
            )
        shape = t.shape + (1,) * (like.ndim - t.ndim)
        return Level(*(field.reshape(shape).to(like) for field in self._fields(t)))

    def levels(self, times: Tensor) -> list[Level[float]]:
        """The levels of a whole grid (n,), as Python floats, in one vectorized float64 call."""
        return [Level(*row) for row in torch.stack(self._fields(times), dim=1).tolist()]

    def perturb(self, x0: Tensor, level: Level, eps: Tensor) -> Tensor:
        """x = alpha x0 + sigma eps."""
        return level.alpha * x0 + level.sigma * eps

    def times(self, steps: int, start: float = 1.0) -> Tensor:
        """The process's own grid of n steps from `start` (1, or t_max) to data, (n + 1,) float64.

        Levels of Karras et al. 2022, from a noise-to-signal ratio of 80 or, where the path starts
        above it, from the start and then 80: a batch drawn from the prior belongs to t = 1 and to
        no other level. A solver that starts at t_max < 1 leaves the start out, where its drift is
        too stiff to step from. The variance-preserving family overrides this with i / n.
        """
        end = torch.tensor([start], dtype=torch.float64)
        ratio = (-self.log_snr(end) / 2).exp().item()
        in_front = ratio > 80 and start == 1.0
        if in_front and steps == 1:
            return grids.uniform(1)
        high = min(80.0, ratio)
        levels = grids.karras(steps - in_front, high, sigma_min=min(0.002, high / 100))
        times = self.time(-2 * levels.log())
        return torch.cat([end, times]) if in_front else times

    def _fields(self, t: Tensor) -> tuple[Tensor, ...]:
        t = t.detach().to("cpu" if t.device.type == "mps" else t.device, torch.float64)
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):  # a GPU would stall
            raise ValueError(f"times must lie in [0, 1]; got {t.tolist()}")
        log_alpha, variance, drift, diffusion2 = self._rates(t)
        log_snr = 2 * log_alpha - variance.log()
        return t, log_alpha.exp(), variance.sqrt(), log_snr, drift, diffusion2

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log alpha, sigma^2 and, by differentiating them, f and g^2; all float64."""
        with torch.inference_mode(False), torch.enable_grad():
            t = t.detach().to(torch.float64, copy=True).requires_grad_()
            log_alpha, variance = self.log_alpha(t), self.variance(t)
            f = slope_of(log_alpha, t)
            slope = slope_of(variance, t)
        log_alpha, variance = log_alpha.detach(), variance.detach()
        diffusion2 = slope - 2 * f * variance
        rounding = 1e-9 * (slope.abs() + (2 * f * variance).abs())
        if t.device.type == "cpu" and bool((diffusion2 < -rounding).any()):
            where = t[diffusion2 < -rounding].flatten()[0].item()
            raise ValueError(f"{type(self).__name__}: log_snr must decrease; it rises at t={where}")
        return log_alpha, variance, f, diffusion2.clamp(min=0)


class VariancePreserving(Process):
    """sigma^2 = 1 - alpha^2: one formula is enough."""

    def variance(self, t: Tensor) -> Tensor:
        return 0.0 - torch.expm1(2 * self.log_alpha(t))  # 0 at t = 0, not -0

    def times(self, steps: int, start: float = 1.0) -> Tensor:
        """Evenly spaced times."""
        return grids.uniform(steps, start)


@dataclass(frozen=True)
class VP(VariancePreserving):
    """The variance-preserving SDE of Song et al. 2021, eq. 32: beta(t) linear, f = -beta / 2."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        errors.number("beta_min", self.beta_min)
        errors.number("beta_max", self.beta_max)
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"need 0 < beta_min <= beta_max; got {self.beta_min} and {self.beta_max}"
            )

    def log_alpha(self, t: Tensor) -> Tensor:
        return -self.beta_min * t / 2 - (self.beta_max - self.beta_min) * t**2 / 4

    def time(self, log_snr: Tensor) -> Tensor:
        """The positive root of the quadratic in `log_alpha`; alpha^2 = sigmoid(log_snr)."""
        half, slope = self.beta_min / 2, self.beta_max - self.beta_min
        minus_log_alpha = torch.nn.functional.softplus(-log_snr.to(torch.float64)) / 2
        minus_log_alpha = minus_log_alpha.clamp(max=half + slope / 4)  # its value at t = 1
        root = 2 * minus_log_alpha / (half + (half**2 + slope * minus_log_alpha).sqrt())
        return root.clamp(max=1).to(log_snr.dtype)


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """The straight path x_t = (1 - t) x_0 + t eps (Liu et al. 2023; Lipman et al. 2023).

    alpha(1) = 0, so drift and diffusion, which divide by alpha, are promised on [0, 0.999].
    """

    t_max: ClassVar[float] = 0.999

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def variance(self, t: Tensor) -> Tensor:
        return t**2

    def time(self, log_snr: Tensor) -> Tensor:
        """t / (1 - t) = e^(-log_snr / 2)."""
        return torch.sigmoid(-log_snr / 2)


@dataclass(frozen=True)
class Interpolated(VariancePreserving):
    """The SDE that passes through a discrete chain: beta(t) constant between the chain's times i/N.

    log alpha(i/N) = 1/2 sum_(j <= i) log(1 - beta_j), linear in between. Its marginals and
    transitions at the times i/N are the chain's own.

    Args:
        betas: (N,) variances of the chain's kernels, each in (0, 1).
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        given = self.betas
        betas = torch.as_tensor(given if isinstance(given, Tensor) else np.asarray(given)).cpu()
        if betas.ndim != 1 or not len(betas) or not betas.is_floating_point():
            raise ValueError(
                f"betas must be a non-empty 1-D sequence of floats; "
                f"got shape {tuple(betas.shape)}, {betas.dtype}"
            )
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must lie in (0, 1); got {betas.min():g} to {betas.max():g}")
        object.__setattr__(self, "betas", tuple(betas.to(torch.float64).tolist()))

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.betas)

    @cached_property
    def table(self) -> Tensor:
        """log alpha at i/N, i = 0 .. N, float64."""
        betas = torch.tensor((0.0, *self.betas), dtype=torch.float64)
        return torch.log1p(-betas).cumsum(0) / 2

    def log_alpha(self, t: Tensor) -> Tensor:
        table = self.table.to(t)
        position = t * self.num_steps
        left = position.detach().floor().clamp(0, self.num_steps - 1).long()
        return table[left] + (position - left) * (table[left + 1] - table[left])

    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse interpolation in the table; alpha^2 = sigmoid(log_snr)."""
        table = self.table.to(log_snr.device)
        target = torch.nn.functional.logsigmoid(log_snr.to(torch.float64)) / 2
        right = torch.searchsorted(-table, -target.contiguous()).clamp(1, self.num_steps)
        fraction = (target - table[right - 1]) / (table[right] - table[right - 1])
        return ((right - 1 + fraction) / self.num_steps).clamp(0, 1).to(log_snr.dtype)


@dataclass(frozen=True)
class Discrete(Interpolated):
    """The DDPM chain of Ho et al. 2020 as a process: index i in 1 .. N is the time i/N.

    Its own grids stand on the chain's times, where a network trained on the chain has been; a grid
    of n < N steps is the nearest sub-chain. `equivalence.continuous` gives the SDE between them.

    Args:
        betas: (N,) variances of the chain's kernels, each in (0, 1).
    """

    @classmethod
    def linear(
        cls, num_steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
    ) -> "Discrete":
        """beta_i evenly spaced from beta_min to beta_max (Ho et al. 2020, sec. 4)."""
        errors.integer("num_steps", num_steps)
        return cls(
            tuple(torch.linspace(beta_min, beta_max, num_steps, dtype=torch.float64).tolist())
        )

    def times(self, steps: int, start: float = 1.0) -> Tensor:
        """n + 1 of the chain's own times, as evenly spaced as they can be."""
        if steps > self.num_steps:
            raise ValueError(
                f"a chain of {self.num_steps} steps has no grid of {steps}; "
                f"use equivalence.continuous(process) to go between its times"
            )
        return (grids.uniform(steps, start) * self.num_steps).round() / self.num_steps


def slope_of(y: Tensor, t: Tensor) -> Tensor:
    """dy/dt of an elementwise function y(t); 0 where y is constant.

    Reverse mode: for elementwise functions it equals forward mode, at a tenth of the cost.
    """
    if not y.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(y.sum(), t, retain_graph=True)[0]
