r"""Levels: where on the path a batch stands, and how numbers of each sample meet a batch.

Convention: x = alpha x0 + sigma eps; the straight frame is y = x / (alpha + sigma).
"""

import math
from typing import Generic, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

__all__ = [
    "Level",
    "Scalar",
    "coordinates",
    "double",
    "enter",
    "forward_kernel",
    "leave",
    "per_sample",
]

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
        drift, diffusion2: f and g^2 of dx = f x dt + g dW; nan above the process's t_max.
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


def forward_kernel(s: Level[float], t: Level[float]) -> tuple[float, float]:
    """a and b of the forward kernel from level s up to t,  x_t = a x_s + b z."""
    if not s.sigma or not t.alpha:
        return t.alpha / s.alpha if s.alpha else 0.0, t.sigma
    a = t.alpha / s.alpha
    return a, a * s.sigma * math.sqrt(math.expm1(max(s.log_snr - t.log_snr, 0.0)))


def double(t: Scalar, name: str = "t") -> Tensor:
    """t in float64, on the CPU if its device has none."""
    if not isinstance(t, Tensor):
        try:
            return torch.tensor(t, dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a number or a tensor; got {t!r}") from None
    return t.to("cpu" if t.device.type == "mps" else t.device, torch.float64)


def enter(x: Tensor, level: Level) -> Tensor:
    """y = x / (alpha + sigma)."""
    return x / (level.alpha + level.sigma)


def leave(y: Tensor, level: Level) -> Tensor:
    """x = (alpha + sigma) y."""
    return y * (level.alpha + level.sigma)


def coordinates(x: Tensor) -> Tensor:
    """A batch (B, ...) as (B, d), any rank from 1, any size from 0."""
    return x.reshape(len(x), x.shape[1:].numel())


@overload
def per_sample(values: Tensor, like: Tensor) -> Tensor: ...


@overload
def per_sample(values: Scalar, like: Tensor) -> Scalar: ...


def per_sample(values: Scalar, like: Tensor) -> Scalar:
    """(B,) as (B, 1, ..., 1) on the device of `like`; a single value as it is."""
    if not isinstance(values, Tensor):
        return values
    shape = (-1, *[1] * (like.ndim - 1)) if values.ndim else ()
    return values.reshape(shape).to(like.device)
