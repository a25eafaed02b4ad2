r"""Measurements: how likely an x0 is, given y."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.inverse.least_squares import least_squares
from sde_diffusion.models.derivatives import leaf, ordinary, recorded
from sde_diffusion.processes import Scalar
from sde_diffusion.processes.level import coordinates, per_sample

__all__ = ["LogLikelihood", "Measurement", "Observation"]


class Observation(Protocol):
    """What a measurement says of x0."""

    def cost(self, x0: Tensor) -> Tensor:
        """How badly x0 (B, ...) fits, (B,); differentiable."""
        ...

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x0) up to a constant, (B,); differentiable."""
        ...

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        """log p(y) for x0' ~ N(x0, spread I), up to a constant, (B,), and its gradient at x0."""
        ...

    def rows(self, index: Tensor) -> "Observation": ...


@dataclass(frozen=True, eq=False)
class Measurement:
    r"""y = A(x0) + noise_std eps.

    Args:
        operator: A, from (B, ...) to the shape of y; linear, or linearized at x0_hat by the methods
            that need it linear. Those of `operators`, or any differentiable function of each
            sample.
        noise_std: 0 for a measurement without noise.
        y: (B, ...), one per sample, or (1, ...) for all.
    """

    operator: Callable[[Tensor], Tensor]
    noise_std: float
    y: Tensor

    def __post_init__(self) -> None:
        validate.kind("operator", self.operator, "a function of a batch", "__call__")
        validate.number("noise_std", self.noise_std, 0)
        check_finite(self.y)

    def residual(self, x0: Tensor) -> Tensor:
        """y - A(x0), shaped like y; 0 where the operator says nothing of y."""
        seen, y = self.operator(x0), ordinary(self.y.to(x0))
        if len(seen) != len(x0):
            raise ValueError(
                f"operator must answer for each of {len(x0)} samples; got {tuple(seen.shape)}"
            )
        if seen.shape[1:] != y.shape[1:] or len(y) not in (1, len(x0)):
            raise ValueError(
                f"y must be shaped like operator(x0), {tuple(seen.shape)}; got {tuple(y.shape)}"
            )
        part = getattr(self.operator, "observed_part", None)
        return y - seen if part is None else part(y - seen)

    def cost(self, x0: Tensor) -> Tensor:
        """|r|, in units of y."""
        return torch.linalg.vector_norm(coordinates(self.residual(x0)), dim=1)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """-|r|^2 / (2 noise_std^2).

        Raises:
            ValueError: if noise_std is 0: the likelihood of a measurement without noise is no
                function.
        """
        if self.noise_std == 0:
            raise ValueError("noise_std must be above 0 for a likelihood; got 0")
        return -coordinates(self.residual(x0)).square().sum(1) / (2 * self.noise_std**2)

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        r"""-r^T z / 2 with z = (spread A A^T + noise_std^2 I)^-1 r, and its gradient A^T z.

        r^T z is taken as  spread |A^T z|^2 + noise_std^2 |z|^2.
        """
        ridge = self.noise_std**2
        d, rest = self.solve(x0, spread, ridge)
        size = coordinates(per_sample(spread, d) * d.square()).sum(1)
        if ridge:
            size = size + coordinates(rest).square().sum(1) / ridge
        return -size / 2, d

    def solve(self, x0: Tensor, spread: Scalar, ridge: Scalar) -> tuple[Tensor, Tensor]:
        """`derivatives.least_squares` of the residual at x0."""
        return least_squares(self.operator, x0, self.residual(x0).detach(), spread, ridge)

    def rows(self, index: Tensor) -> "Measurement":
        """That of the samples `index`; an operator that holds something of each has rows too."""
        part = getattr(self.operator, "rows", None)
        operator = self.operator if part is None else part(index, self.y.ndim)
        return replace(self, operator=operator, y=taken(self.y, index))


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Any measurement of which log p(y | x0) is known.

    Args:
        log_prob: log p(y | x0) up to a constant, (B,) of (x0, y); differentiable.
        y: (B, ...), one per sample, or (1, ...) for all.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    y: Tensor

    def __post_init__(self) -> None:
        validate.kind("log_prob", self.log_prob, "a function of (x0, y)", "__call__")
        check_finite(self.y)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        value = self.log_prob(x0, ordinary(self.y.to(x0)))
        if value.shape != x0.shape[:1]:
            raise ValueError(
                f"log_prob must answer with shape {tuple(x0.shape[:1])}; got {tuple(value.shape)}"
            )
        return value

    def cost(self, x0: Tensor) -> Tensor:
        """-log p(y | x0)."""
        return -self.log_likelihood(x0)

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        """That of x0 itself: what a spread does to it is not known."""
        with recorded():
            x0 = leaf(x0)
            value = self.log_likelihood(x0)
            return value.detach(), torch.autograd.grad(value.sum(), x0)[0]

    def rows(self, index: Tensor) -> "LogLikelihood":
        return replace(self, y=taken(self.y, index))


def check_finite(y: Tensor) -> None:
    validate.batch("y", y)
    if not bool(y.isfinite().all()):
        raise ValueError("y must be finite")


def taken(y: Tensor, index: Tensor) -> Tensor:
    return y if len(y) == 1 else y[index.to(y.device)]
