r"""Noise levels of a batch, and the broadcasting of per-sample numbers against a batch.

Convention: x = alpha x0 + sigma eps. The straight frame is y = x / (alpha + sigma) with the clock
u = sigma / (alpha + sigma), and log_snr = 2 log((1 - u) / u).
"""

import math
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

__all__ = [
    "Level",
    "RatedLevel",
    "Scalar",
    "double",
    "forward_kernel",
    "onto",
    "posterior_kernel",
    "readable",
    "wide",
]

HALF = torch.float16, torch.bfloat16
WITHOUT_FLOAT64 = ("mps",)  # types of devices; a float64 tensor there is an error

Scalar = float | Tensor
S = TypeVar("S", float, Tensor)


class Level(NamedTuple, Generic[S]):
    """A noise level.

    In sampling the whole batch shares one level and the fields are Python floats: they never
    promote or move a batch, nor synchronize a GPU. In training each sample has its own level and
    the fields are tensors (B, 1, ..., 1) that broadcast against the batch.

    Attributes:
        t, alpha, sigma: x_t = alpha x_0 + sigma eps.
        log_snr: log(alpha^2 / sigma^2).
    """

    t: S
    alpha: S
    sigma: S
    log_snr: S

    @property
    def u(self) -> S:
        """The clock of the straight frame, from 0 (data) to 1 (pure noise)."""
        return self.sigma / (self.alpha + self.sigma)


class RatedLevel(Level[float]):
    """A level of a grid with the rates there, for the samplers that need them.

    Attributes:
        rates: f and g^2 of dx = f x dt + g dW.
    """

    rates: Sequence[float]

    @staticmethod
    def of(level: Level[float], rates: Sequence[float]) -> "RatedLevel":
        made = RatedLevel._make(level)
        made.rates = rates
        return made


def u_at(log_snr: Tensor) -> Tensor:
    """u = sigma / (alpha + sigma) of a log-SNR."""
    return 1 / (1 + (log_snr / 2).exp())


def log_snr_at(u: Tensor) -> Tensor:
    """The log-SNR of u: the inverse of `u_at`."""
    return 2 * (torch.log1p(-u) - u.log())


def enter(x: Tensor, level: Level) -> Tensor:
    """y = x / (alpha + sigma)."""
    return x / (level.alpha + level.sigma)


def leave(y: Tensor, level: Level) -> Tensor:
    """x = (alpha + sigma) y."""
    return y * (level.alpha + level.sigma)


def forward_kernel(s: Level[float], t: Level[float]) -> tuple[float, float]:
    """Scale a and standard deviation b of the kernel from level s up to t,  x_t = a x_s + b z."""
    a = t.alpha / s.alpha if s.alpha else 0.0  # where both have underflowed nothing is kept
    b2 = (t.sigma - a * s.sigma) * (t.sigma + a * s.sigma)
    return a, math.sqrt(max(b2, 0.0))


def posterior_kernel(s: Level[float], t: Level[float]) -> tuple[float, float]:
    r"""Weight of x0 in the mean of q(x_s | x_t, x0), and its variance (Ho et al. 2020, eq. 7).

        mean = c x0 + (a sigma_s^2 / sigma_t^2) x_t,   c = alpha_s b^2 / sigma_t^2
        variance = b^2 sigma_s^2 / sigma_t^2

    a and b are those of `forward_kernel`. With eps in place of x_t the mean is
    alpha_s x0 + sqrt(sigma_s^2 - variance) eps.
    """
    if not t.sigma:
        return s.alpha, 0.0
    share = (forward_kernel(s, t)[1] / t.sigma) ** 2
    return s.alpha * share, share * s.sigma**2


def posterior_variance(variance: Any, alpha: Scalar, sigma: Scalar) -> Any:
    """Return the variance of x0 given x for Gaussian data of this variance."""
    return sigma**2 * variance / (alpha**2 * variance + sigma**2)


def home(device: torch.device) -> torch.device:
    """The device of float64 numbers that belong to a batch on `device`: the CPU if it has none."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def double(t: Scalar | Sequence[float], name: str = "t") -> Tensor:
    """t in float64, on the CPU if its device has no float64."""
    if not isinstance(t, Tensor):
        try:
            return torch.tensor(t, dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a number or a tensor; got {t!r}") from None
    return t.to(home(t.device)).to(torch.float64)


def wide(x: Tensor) -> Tensor:
    """x, in float32 if it is in half precision, whose squares overflow or lose their digits."""
    return x.float() if x.dtype in HALF else x


def onto(value: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Cast to `dtype`, that of `like` by default, then move: its device may have no float64."""
    return value.to(like.dtype if dtype is None else dtype).to(like.device)


def transformed(value: Tensor) -> bool:
    """True for a tensor inside a transform of torch.func, such as vmap: it has no value to read."""
    return is_functorch_wrapped_tensor(value)


def readable(value: Tensor) -> bool:
    """True if values may be read: not on a GPU, which would stall, nor inside a transform."""
    return value.device.type == "cpu" and not transformed(value)


def coordinates(x: Tensor) -> Tensor:
    """A batch (B, ...) as (B, d), any rank from 1, any size from 0."""
    return x.reshape(len(x), x.shape[1:].numel())


def per_sample(values: Any, like: Tensor) -> Any:
    """(B,) as (B, 1, ..., 1) on the device of `like`; a single value unchanged."""
    if not isinstance(values, Tensor):
        return values
    shape = (-1, *[1] * (like.ndim - 1)) if values.ndim else ()
    return values.reshape(shape).to(like.device)
