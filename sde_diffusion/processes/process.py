r"""The base of all processes: two formulas, and everything that follows from them.

Convention: t in [0, 1], t = 0 is data, t = 1 is noise;  x_t = alpha(t) x_0 + sigma(t) eps.

A linear-Gaussian process is fixed by two functions, log alpha(t) and sigma^2(t); everything else
is derived from them here, once. In particular its SDE  dx = f x dt + g dW  is

    f = (log alpha)',     g^2 = (sigma^2)' - 2 f sigma^2,

found by automatic differentiation in float64, so that drift and marginal cannot disagree.
The variance is 0 at t = 0 for every process: the end of a path is data, not nearly data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sde_diffusion.noise.sources import start
from sde_diffusion.processes.level import (
    Level,
    RatedLevel,
    Scalar,
    double,
    log_snr_at,
    onto,
    readable,
    transformed,
    u_at,
    wide,
)
from sde_diffusion.validate import Checked, Kind, batch

__all__ = ["IS_PROCESS", "Process", "VariancePreserving"]

SLACK = 1e-6  # t_max in float32 may be above t_max

ENDS = 0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0  # times at which a new model checks its process


class IsProcess(Kind):
    """A process whose formulas describe a path from data to noise; the rule for annotations."""

    def __call__(self, name: str, value: Any) -> Any:
        super().__call__(name, value)
        t = torch.tensor(ENDS, dtype=torch.float64, device="cpu")
        log_alpha, variance = value.log_alpha(t), value.variance(t)
        if (log_alpha + variance).requires_grad and not isinstance(value, nn.Module):
            got = f"{type(value).__name__}, whose parameters would not be trained"
            raise TypeError(f"{name} must be a torch module to have parameters; got {got}")
        (shift, *_), (start, *_) = log_alpha.tolist(), variance.tolist()
        if shift != 0 or start != 0:
            got = f"log_alpha(0) = {shift:.3g}, variance(0) = {start:.3g}"
            raise ValueError(f"{name} must begin with the data, without noise; got {got}")
        log_snr = 2 * log_alpha - variance.log()
        flat = (~(log_snr[:-1] > log_snr[1:])).nonzero().flatten().tolist()
        if flat:
            got = f"{log_snr[flat[0]]:.4g} at t={ENDS[flat[0]]}, {log_snr[flat[0] + 1]:.4g} at "
            got += f"t={ENDS[flat[0] + 1]}"
            raise ValueError(f"{name} must have a log_snr that decreases in t; got {got}")
        return value


IS_PROCESS = IsProcess("a Process such as VP()", "log_alpha", "variance")


@dataclass(frozen=True)
class Process(Checked, ABC):
    """A linear-Gaussian noising process. Subclasses define `log_alpha` and `variance`.

    Attributes:
        even_times: True if noise grows so evenly that equally spaced times are a good grid.
            Elsewhere the usual grid has the levels of Karras et al. 2022 (see grids.Usual).
    """

    even_times: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Compare processes that are torch modules by identity: parameters are not fields."""
        if issubclass(cls, nn.Module):
            cls.__eq__, cls.__hash__ = object.__eq__, object.__hash__

    @property
    def t_max(self) -> float:
        """Drift and diffusion are defined on [0, t_max]; below 1 where alpha(1) = 0."""
        return 1.0

    @property
    def prior_std(self) -> float:
        """Sampling starts from N(0, prior_std^2 I)."""
        return 1.0

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha(t), 0 at t = 0; shaped like t."""

    @abstractmethod
    def variance(self, t: Tensor) -> Tensor:
        """sigma^2(t), 0 at t = 0 and smooth there, as sigma is not; shaped like t."""

    # ---- schedules: shaped like t, float64 inside --------------------------------------------

    def alpha(self, t: Scalar) -> Tensor:
        """Scale of the data in x_t."""
        return to_type(self.log_alpha(self._on_path(t)).exp(), t)

    def sigma(self, t: Scalar) -> Tensor:
        """Standard deviation of the noise in x_t."""
        return to_type(self.variance(self._on_path(t)).sqrt(), t)

    def log_snr(self, t: Scalar) -> Tensor:
        """log(alpha^2 / sigma^2), decreasing in t; +inf at t = 0."""
        t64 = self._on_path(t)
        return to_type(2 * self.log_alpha(t64) - self.variance(t64).log(), t)

    def u(self, t: Scalar) -> Tensor:
        """sigma / (alpha + sigma), the clock of the straight frame."""
        return to_type(u_at(self.log_snr(double(t))), t)

    def drift(self, t: Scalar) -> Tensor:
        """f(t) of dx = f x dt + g dW.

        Raises:
            ValueError: for negative times, and above t_max where alpha(1) = 0.
        """
        return to_type(self._rates(self._where_defined(t))[0], t)

    def diffusion(self, t: Scalar) -> Tensor:
        """g(t) of dx = f x dt + g dW.

        Raises:
            ValueError: for negative times, and above t_max where alpha(1) = 0.
        """
        return to_type(self._rates(self._where_defined(t))[1].sqrt(), t)

    def rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """f and g^2 of dx = f x dt + g dW at times of any shape, float64; nan above t_max."""
        t = within(times, 1.0, "times must lie in [0, 1]")
        f, g2 = self._rates(t)
        defined = t <= self.t_max + SLACK
        return torch.where(defined, f, torch.nan), torch.where(defined, g2, torch.nan)

    def time(self, log_snr: Scalar) -> Tensor:
        """The t in [0, 1] with this log-SNR, shaped like it.

        A log-SNR outside the range of the process gives the nearer end.
        """
        wanted = double(log_snr, "log_snr")
        if readable(wanted) and bool(wanted.isnan().any()):
            raise ValueError("log_snr must be a number; got nan")
        return to_type(self.inverse(wanted).clamp(0, 1), log_snr)

    def inverse(self, log_snr: Tensor) -> Tensor:
        """The t of `time`, in float64: by bisection, unless a process has a closed form.

        Values outside [0, 1] are clamped by `time`.
        """
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(80):
            middle = (low + high) / 2
            above = self.log_snr(middle) > log_snr
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return high

    @property
    def chain_steps(self) -> int | None:
        """N, if the process is a chain with the times i/N; None for a continuous path."""
        return None

    def nearest(self, times: Tensor) -> Tensor:
        """The nearest times at which the process is defined: i/N on a chain, any time elsewhere.

        Raises:
            ValueError: if two of the times have the same nearest one.
        """
        return times

    # ---- levels and batches ------------------------------------------------------------------

    def level(self, t: Scalar, like: Tensor) -> Level[Tensor]:
        """The levels of a batch whose samples are at times t; they broadcast against it.

        Args:
            t: () or (B,), in [0, 1].
            like: the batch (B, ...), which sets rank, dtype and device of the fields; they are at
                least float32. Parameters of the process get gradients through them.
        """
        batch("like", like)
        t = double(t)
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(like)):
            raise ValueError(f"t must have shape () or ({len(like)},); got {tuple(t.shape)}")
        shape = t.shape + (1,) * (like.ndim - t.ndim)
        dtype = torch.promote_types(like.dtype, torch.float32)  # bfloat16 merges 998 and 1000
        return Level(*(onto(value, like, dtype) for value in self._fields(t.reshape(shape))))

    def levels(self, times: Tensor) -> list[Level[float]]:
        """The levels of a whole grid (n,), as Python floats, in one vectorized float64 call."""
        if double(times).ndim != 1:
            raise ValueError(f"times must be a grid (n,); got shape {tuple(times.shape)}")
        return [Level(*row) for row in torch.stack(self._fields(double(times)), dim=1).tolist()]

    def rated_levels(self, times: Tensor) -> Sequence[RatedLevel]:
        """`levels` with f and g^2, which cost a differentiation."""
        levels, rates = self.levels(times), torch.stack(self.rates(times), dim=1).tolist()
        return [RatedLevel.of(*each) for each in zip(levels, rates, strict=True)]

    def level_at(self, u: float) -> Level[float]:
        """The level at which sigma / (alpha + sigma) = u."""
        u64 = torch.tensor([u], dtype=torch.float64).clamp(0, 1)
        return self.levels(self.time(log_snr_at(u64)))[0]

    def perturb(self, x0: Tensor, level: Level, eps: Tensor) -> Tensor:
        """x = alpha x0 + sigma eps, in the dtype of x0."""
        if eps.shape != x0.shape and torch.broadcast_shapes(eps.shape, x0.shape) != eps.shape:
            got = tuple(eps.shape)  # one x0 for all is fine, one noise is not
            raise ValueError(f"eps must be shaped like x0, {tuple(x0.shape)}; got {got}")
        return (level.alpha * wide(x0) + level.sigma * wide(eps)).to(x0.dtype)

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A batch of pure noise, N(0, prior_std^2 I), at t = 1.

        Args:
            shape: (B, ...).
            generator: source of the draw; fresh entropy if neither it nor `seeds` is given.
            seeds: one per sample; independent of the path that the same seeds drive in `sample`.
            dtype, device: of the batch.
        """
        return self.prior_std * start(shape, generator, seeds, dtype, device)

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
            raise ValueError(f"s and t must be 0 <= s <= t (forward in time); got s={s}, t={t}")
        if bool(self.log_alpha(s64).isneginf().any()):
            raise ValueError(f"s must have alpha(s) > 0; got s={s}")
        log_a, b2 = self._kernel(s64, t64)
        return to_type(log_a.exp(), t), to_type(b2.sqrt(), t)

    # ---- derived -----------------------------------------------------------------------------

    def _kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log a and b^2 of the kernel from s to t, float64.

        As differences: for t - s = d the relative rounding error is 1e-16 / d. Processes with a
        closed form override it.
        """
        log_a = self._log_ratio(s, t)
        b2 = self.variance(t) - (2 * log_a).exp() * self.variance(s)
        return log_a, b2.clamp(min=0)

    def _log_ratio(self, s: Tensor, t: Tensor) -> Tensor:
        """log(alpha(t) / alpha(s))."""
        return self.log_alpha(t) - self.log_alpha(s)

    def _on_path(self, t: Scalar) -> Tensor:
        """t in float64, if the formulas hold there: up to 1 where alpha(1) = 0, or any t >= 0."""
        last = 1.0 if self.t_max < 1 else math.inf
        return within(t, last, f"t must lie in [0, {last:g}]")

    def _where_defined(self, t: Scalar) -> Tensor:
        """t in float64, if drift and diffusion are defined there."""
        last = self.t_max + SLACK if self.t_max < 1 else math.inf
        return within(t, last, self.rates_domain)

    @property
    def rates_domain(self) -> str:
        """The rule of times for drift and diffusion, for messages."""
        name = type(self).__name__
        return f"drift and diffusion of {name} are defined for t in [0, {self.t_max}]"

    def _fields(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = within(t, 1.0, "times must lie in [0, 1]").detach()
        log_alpha, variance = self._formulas(t)
        return t, log_alpha.exp(), variance.sqrt(), 2 * log_alpha - variance.log()

    def _formulas(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log_alpha and variance; overridden where one follows from the other."""
        return self.log_alpha(t), self.variance(t)

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f and g^2 by differentiating the two formulas; float64."""
        with torch.inference_mode(False):
            t = t.detach().clone()
            f, (variance, slope) = slope_of(self.log_alpha, t)[1], slope_of(self.variance, t)
            g2 = slope - 2 * f * variance
        rounding = 1e-9 * (slope.abs() + (2 * f * variance).abs())
        if readable(g2) and bool((g2 < -rounding).any()):
            name, where = type(self).__name__, t[g2 < -rounding].flatten()[0].item()
            raise ValueError(f"log_snr of {name} must decrease in t; it rises at t={where}")
        return f, g2.clamp(min=0)


class VariancePreserving(Process):
    """sigma^2 = 1 - alpha^2: one formula is enough."""

    even_times = True

    def variance(self, t: Tensor) -> Tensor:
        return self._formulas(t)[1]

    def _formulas(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        return log_alpha, 0.0 - torch.expm1(2 * log_alpha)  # 0 at t = 0, not -0

    def _kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_a = self._log_ratio(s, t)
        return log_a, 0.0 - torch.expm1(2 * log_a)


def within(t: Scalar, last: float, rule: str) -> Tensor:
    """t in float64, checked to lie in [0, last]; on a GPU its values are not read: no stall."""
    t = double(t)
    if readable(t) and t.numel():
        low, high = (end.item() for end in t.detach().aminmax())  # nan, if there is one
        if not 0 <= low <= high <= last:
            raise ValueError(f"{rule}; got {low if not low >= 0 else high}")
    return t


def to_type(value: Tensor, t: Scalar) -> Tensor:
    """A float64 value with the dtype and device of t, if t is a tensor of floats."""
    return onto(value, t) if isinstance(t, Tensor) and t.is_floating_point() else value


def slope_of(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """y(t) and dy/dt of an elementwise function, differentiable in the parameters that it has.

    Reverse mode: for elementwise functions it equals forward mode, at a tenth of the cost.
    """
    y = function(t)
    if y.requires_grad or transformed(y):
        made = torch.func.vjp(function, t)
        return made[0], made[1](torch.ones_like(y))[0]
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        again = function(t)
        slope = torch.autograd.grad(again.sum(), t)[0] if again.requires_grad else t * 0
    return y, slope.detach()
