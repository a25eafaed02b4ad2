r"""Measurements: how likely an x0 is, given y."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.inverse.least_squares import least_squares
from sde_diffusion.models.derivatives import leaf, ordinary, recorded
from sde_diffusion.models.model import per_sample_field
from sde_diffusion.processes import Scalar
from sde_diffusion.processes.level import coordinates, per_sample
from sde_diffusion.validate import Checked, Kind, NonNegative

__all__ = ["IS_OBSERVATION", "LogLikelihood", "Measurement", "Observation", "finite"]

IS_OBSERVATION = Kind("a Measurement or LogLikelihood", "cost", "spread_likelihood")


def finite(name: str, value: Any) -> Any:
    """The rule that a batch is finite."""
    validate.batch(name, value)
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite; got nan or infinity")
    return value


class Observation(Protocol):
    """The evidence of a measurement about x0."""

    def cost(self, x0: Tensor) -> Tensor:
        """How badly x0 (B, ...) fits, (B,); differentiable."""
        ...

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log p(y | x0) up to a constant, (B,); differentiable."""
        ...

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        """log p(y) for x0' ~ N(x0, spread I), up to a constant, (B,), and its gradient at x0."""
        ...


@dataclass(frozen=True, eq=False)
class Measurement(Checked):
    r"""y = A(x0) + noise_std eps.

    Args:
        operator: A, from (B, ...) to the shape of y; linear, or linearized at x0_hat by the methods
            that need it linear. Those of `operators`, or any differentiable function of each
            sample.
        noise_std: 0 for a measurement without noise.
        y: (B, ...), one per sample, or (1, ...) for all.
    """

    operator: Annotated[Callable[[Tensor], Tensor], Kind("a function of a batch", "__call__")]
    noise_std: NonNegative
    y: Annotated[Tensor, finite] = per_sample_field()

    def residual(self, x0: Tensor) -> Tensor:
        """y - A(x0), shaped like y; 0 where the operator has no part in y."""
        seen, y = self.operator(x0), ordinary(self.y.to(x0))
        if len(seen) != len(x0):
            raise ValueError(
                f"operator must return one entry for each of {len(x0)} samples; got "
                f"{tuple(seen.shape)}"
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
        """`least_squares` of the residual at x0."""
        return least_squares(self.operator, x0, self.residual(x0).detach(), spread, ridge)


@dataclass(frozen=True, eq=False)
class LogLikelihood(Checked):
    """Any measurement of which log p(y | x0) is known.

    Args:
        log_prob: log p(y | x0) up to a constant, (B,) of (x0, y); differentiable.
        y: (B, ...), one per sample, or (1, ...) for all.
    """

    log_prob: Annotated[
        Callable[[Tensor, Tensor], Tensor], Kind("a function of (x0, y)", "__call__")
    ]
    y: Annotated[Tensor, finite] = per_sample_field()

    def log_likelihood(self, x0: Tensor) -> Tensor:
        value = self.log_prob(x0, ordinary(self.y.to(x0)))
        if value.shape != x0.shape[:1]:
            raise ValueError(
                f"log_prob must return shape {tuple(x0.shape[:1])}; got {tuple(value.shape)}"
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
