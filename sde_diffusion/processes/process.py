r"""What all processes share: two formulas, and everything that follows from them.

Convention: t in [0, 1], t = 0 is data, t = 1 is noise;  x_t = alpha(t) x_0 + sigma(t) eps.

A linear-Gaussian process is fixed by two functions, log alpha(t) and sigma^2(t); everything else
is derived from them here, once. In particular its SDE  dx = f x dt + g dW  is

    f = (log alpha)',     g^2 = (sigma^2)' - 2 f sigma^2,

found by automatic differentiation in float64, so that drift and marginal cannot disagree.
The variance is 0 at t = 0 for every process: the end of a path is data, not nearly data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.noise.sources import Generated, Noise, Purpose, Seeded
from sde_diffusion.processes import spacings
from sde_diffusion.processes.level import Level, Scalar, double

__all__ = ["Process", "Shortened", "VariancePreserving"]

SLACK = 1e-6  # t_max in float32 may be above t_max


@dataclass(frozen=True)
class Process(ABC):
    """A linear-Gaussian noising process. A new one defines `log_alpha` and `variance`."""

    @property
    def t_max(self) -> float:
        """Drift and diffusion are promised on [0, t_max]; below 1 where alpha(1) = 0."""
        return 1.0

    @property
    def prior_std(self) -> float:
        """Sampling starts from N(0, prior_std^2 I)."""
        return 1.0

    @property
    def first_time(self) -> float:
        """The smallest time at which a model of this process is trained: 1/N on a chain, or 0."""
        return 0.0

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha(t), 0 at t = 0; shaped like t."""

    @abstractmethod
    def variance(self, t: Tensor) -> Tensor:
        """sigma^2(t), 0 at t = 0 and smooth there, as sigma is not; shaped like t."""

    def alpha(self, t: Scalar) -> Tensor:
        """Scale of the data in x_t; like every schedule below shaped like t, float64 inside."""
        return to_type(self.log_alpha(self._on_path(t)).exp(), t)

    def sigma(self, t: Scalar) -> Tensor:
        """Standard deviation of the noise in x_t."""
        return to_type(self.variance(self._on_path(t)).sqrt(), t)

    def log_snr(self, t: Scalar) -> Tensor:
        """log(alpha^2 / sigma^2), decreasing in t; +inf at t = 0."""
        t64 = self._on_path(t)
        return to_type(2 * self.log_alpha(t64) - self.variance(t64).log(), t)

    def drift(self, t: Scalar) -> Tensor:
        """f(t) of dx = f x dt + g dW.

        Raises:
            ValueError: for negative times, and above t_max where alpha(1) = 0.
        """
        return to_type(self._rates(self._promised(t))[2], t)

    def diffusion(self, t: Scalar) -> Tensor:
        """g(t) of dx = f x dt + g dW.

        Raises:
            ValueError: for negative times, and above t_max where alpha(1) = 0.
        """
        return to_type(self._rates(self._promised(t))[3].sqrt(), t)

    def time(self, log_snr: Scalar) -> Tensor:
        """The t in [0, 1] with this log-SNR, shaped like it.

        A log-SNR outside the process's range gives the nearer end.
        """
        wanted = double(log_snr, "log_snr")
        if wanted.device.type == "cpu" and bool(wanted.isnan().any()):
            raise ValueError("log_snr must not be nan")
        return to_type(self.inverse(wanted).clamp(0, 1), log_snr)

    def inverse(self, log_snr: Tensor) -> Tensor:
        """The t of `time`, in float64: by bisection, unless a process knows a closed form.

        What that gives beyond [0, 1] is held to it.
        """
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(80):
            middle = (low + high) / 2
            above = self.log_snr(middle) > log_snr
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return high

    def transition(self, s: Scalar, t: Scalar) -> tuple[Tensor, Tensor]:
        r"""Scale a and standard deviation b of the forward kernel  x_t | x_s ~ N(a x_s, b^2 I).

        a = alpha_t / alpha_s,   b^2 = sigma_t^2 - a^2 sigma_s^2        (Kingma et al. 2021, App. A)

        Args:
            s: earlier time, () or (B,), at least 0, with alpha(s) > 0.
            t: later time, same shape. Beyond 1 the formulas go on.
        Returns:
            (a, b), each shaped like t; b = 0 where s = t.
        Raises:
            ValueError: unless 0 <= s <= t and alpha(s) > 0 everywhere.
        """
        s64, t64 = double(s, "s"), self._on_path(t)
        if s64.shape != t64.shape and s64.ndim and t64.ndim:
            raise ValueError(f"s and t must agree in shape; got {s64.shape} and {t64.shape}")
        if not bool(((s64 >= 0) & (s64 <= t64)).all()):
            raise ValueError(f"transition runs forward: need 0 <= s <= t; got s={s}, t={t}")
        if bool(self.log_alpha(s64).isneginf().any()):
            raise ValueError(f"no kernel starts where alpha(s) = 0; got s={s}")
        log_a, b2 = self._kernel(s64, t64)
        return to_type(log_a.exp(), t), to_type(b2.sqrt(), t)

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
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be one of floats; got {dtype}")
        sizes = validate.shape("shape", shape)
        if not sizes:
            raise ValueError("shape must be that of a batch (B, ...); got ()")
        like = torch.empty(sizes, dtype=dtype, device=device)
        return self.prior_std * source(1.0, 1.0, like)

    def level(self, t: Scalar, like: Tensor) -> Level[Tensor]:
        """The levels of a batch whose samples stand at times t, broadcast here and nowhere else.

        Args:
            t: () or (B,), in [0, 1].
            like: the batch (B, ...), whose rank, dtype and device the fields take; t and log_snr,
                which networks are told, are at least float32.
        """
        validate.batch("the batch", like)
        t = double(t)
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(like)):
            raise ValueError(
                f"t must have shape () or ({len(like)},) for this batch; got {tuple(t.shape)}"
            )
        shape = t.shape + (1,) * (like.ndim - t.ndim)
        fields = [field.reshape(shape).to(like.device) for field in self._fields(t)]
        exact = torch.promote_types(like.dtype, torch.float32)  # bfloat16 cannot tell 998 from 1000
        dtypes = [exact if name in ("t", "log_snr") else like.dtype for name in Level._fields]
        return Level(*map(Tensor.to, fields, dtypes))

    def levels(self, times: Tensor) -> list[Level[float]]:
        """The levels of a whole grid (n,), as Python floats, in one vectorized float64 call."""
        if double(times).ndim != 1:
            raise ValueError(f"times must be a grid (n,); got shape {tuple(times.shape)}")
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
        above = ratio > 80 * (1 + 1e-9)  # EDM's own 80 is reached with rounding
        in_front = above and start == 1.0
        if in_front and steps == 1:
            return spacings.uniform(1)
        high = min(80.0, ratio)
        levels = spacings.karras(steps - in_front, high, sigma_min=min(0.002, high / 100))
        times = self.time(-2 * levels.log())
        if in_front:
            return torch.cat([end, times])
        return times if above else torch.cat([end, times[1:]])

    def _kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log a and b^2 of the kernel from s to t, float64.

        As differences: for t - s = d they lose a share 1e-16 / d of their digits, which a process
        overrides that can do without.
        """
        log_a = self._log_ratio(s, t)
        b2 = self.variance(t) - (2 * log_a).exp() * self.variance(s)
        return log_a, b2.clamp(min=0)

    def _log_ratio(self, s: Tensor, t: Tensor) -> Tensor:
        """log(alpha(t) / alpha(s))."""
        return self.log_alpha(t) - self.log_alpha(s)

    def until(self, end: float, std: float = 1.0) -> "Process":
        """The path up to time `end` as a process of its own, started from N(0, std^2 I) there."""
        return Shortened(self, end, std)

    def _on_path(self, t: Scalar) -> Tensor:
        """t in float64, if the formulas hold there: up to 1 where alpha(1) = 0, or any t >= 0."""
        last = 1.0 if self.t_max < 1 else math.inf
        return within(t, last, f"t must lie in [0, {last:g}]")

    def _promised(self, t: Scalar) -> Tensor:
        """t in float64, if drift and diffusion are promised there."""
        last = self.t_max + SLACK if self.t_max < 1 else math.inf
        name = type(self).__name__
        return within(t, last, f"{name} promises drift and diffusion on [0, {self.t_max}]")

    def _fields(self, t: Tensor) -> tuple[Tensor, ...]:
        t = within(t, 1.0, "times must lie in [0, 1]").detach()
        log_alpha, variance, *rates = self._rates(t)
        drift, diffusion2 = (
            torch.where(t <= self.t_max + SLACK, rate, torch.nan) for rate in rates
        )
        log_snr = 2 * log_alpha - variance.log()
        return t, log_alpha.exp(), variance.sqrt(), log_snr, drift, diffusion2

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log alpha, sigma^2 and, by differentiating them, f and g^2; all float64."""
        with torch.inference_mode(False), torch.enable_grad():
            t = t.detach().clone().requires_grad_()
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
        return spacings.uniform(steps, start)

    def _kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_a = self._log_ratio(s, t)
        return log_a, 0.0 - torch.expm1(2 * log_a)


@dataclass(frozen=True)
class Shortened(Process):
    """A process up to time `end`, on a slower clock that reads 1 there: t is its time t end.

    Args:
        process: the whole path.
        end: in (0, 1].
        std: standard deviation of the prior there.
    """

    process: Process
    end: float
    std: float

    def __post_init__(self) -> None:
        validate.number("end", self.end, 0, 1, strict=True)
        validate.number("std", self.std, 0, strict=True)

    @property
    def t_max(self) -> float:
        return min(1.0, self.process.t_max / self.end)

    @property
    def prior_std(self) -> float:
        return self.std

    @property
    def first_time(self) -> float:
        return self.process.first_time / self.end

    def log_alpha(self, t: Tensor) -> Tensor:
        return self.process.log_alpha(t * self.end)

    def variance(self, t: Tensor) -> Tensor:
        return self.process.variance(t * self.end)

    def inverse(self, log_snr: Tensor) -> Tensor:
        return self.process.inverse(log_snr) / self.end

    def times(self, steps: int, start: float = 1.0) -> Tensor:
        """The whole path's own kind of grid."""
        times = self.process.times(steps, start * self.end) / self.end
        return torch.cat([torch.tensor([start], dtype=torch.float64), times[1:]])


def within(t: Scalar, last: float, rule: str) -> Tensor:
    """t in float64, if it lies in [0, last]; a GPU is not asked, it would stall."""
    t = double(t)
    allowed = (t >= 0) & (t <= last)
    if t.device.type == "cpu" and not bool(allowed.all()):
        raise ValueError(f"{rule}; got {t[~allowed][0].item()}")
    return t


def to_type(value: Tensor, t: Scalar) -> Tensor:
    """A float64 value with the dtype and device of t, if t is a tensor of floats."""
    return value.to(t) if isinstance(t, Tensor) and t.is_floating_point() else value


def slope_of(y: Tensor, t: Tensor) -> Tensor:
    """dy/dt of an elementwise function y(t); 0 where y is constant.

    Reverse mode: for elementwise functions it equals forward mode, at a tenth of the cost.
    """
    if not y.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(y.sum(), t, retain_graph=True)[0]
