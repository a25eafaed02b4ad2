r"""Measurements: the likelihood of x0 given y."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

from torch import Tensor

from sde_diffusion.inverse.least_squares import least_squares
from sde_diffusion.inverse.operators import check_fits
from sde_diffusion.models.derivatives import gradient, one_per_sample, ordinary
from sde_diffusion.models.model import finite, per_sample_field
from sde_diffusion.processes.level import Scalar, coordinates, per_sample
from sde_diffusion.validate import Checked, FloatBatch, Kind, NonNegative

__all__ = ["LogLikelihood", "Measurement", "Observation"]

IS_OBSERVATION = Kind("a Measurement or LogLikelihood", "cost", "spread_likelihood")


class Observation(Protocol):
    """Interface of a measured y and its likelihood."""

    def cost(self, x0: Tensor) -> Tensor:
        """Return the misfit of x0 (B, ...) to y, (B,); differentiable."""
        ...

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """Return log p(y | x0) up to a constant, (B,); differentiable."""
        ...

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        """Return log p(y) for x0' ~ N(x0, spread I) up to a constant, (B,), and its gradient."""
        ...


@dataclass(frozen=True, eq=False)
class Measurement(Checked):
    r"""A measurement y = A(x0) + noise_std eps.

    Args:
        operator: A, from (B, ...) to the shape of y: one of `operators`, or any differentiable
            function of each sample. Methods that need a linear A linearize it at x0_hat.
        noise_std: standard deviation of the noise; 0 for a measurement without noise.
        y: (B, ...), one per sample, or (1, ...) for all.
    """

    operator: Annotated[Callable[[Tensor], Tensor], Kind("a function of a batch", "__call__")]
    noise_std: NonNegative
    y: Annotated[FloatBatch, finite] = per_sample_field()

    def residual(self, x0: Tensor) -> Tensor:
        """Return y - A(x0), shaped like y; 0 in parts of y that the operator leaves out."""
        seen = self.operator(x0)
        if len(seen) != len(x0):
            wanted = f"one entry for each of {len(x0)} samples"
            raise ValueError(f"operator must return {wanted}; got {tuple(seen.shape)}")
        y = check_fits(ordinary(self.y.to(x0)), seen, "operator(x0)")
        part = getattr(self.operator, "observed_part", None)
        return y - seen if part is None else part(y - seen)

    def cost(self, x0: Tensor) -> Tensor:
        """Return |r|, in units of y."""
        return coordinates(self.residual(x0)).norm(dim=1)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """Return -|r|^2 / (2 noise_std^2).

        Raises:
            ValueError: if noise_std is 0: a measurement without noise has no density.
        """
        if self.noise_std == 0:
            raise ValueError("noise_std must be above 0 for a likelihood; got 0")
        return -coordinates(self.residual(x0)).square().sum(1) / (2 * self.noise_std**2)

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        r"""Return -r^T z / 2 with z = (spread A A^T + noise_std^2 I)^-1 r, and its gradient A^T z.

        r^T z is computed as  spread |A^T z|^2 + noise_std^2 |z|^2.
        """
        ridge = self.noise_std**2
        d, rest = self.solve(x0, spread, ridge)
        size = coordinates(per_sample(spread, d) * d.square()).sum(1)
        if ridge:
            size = size + coordinates(rest).square().sum(1) / ridge
        return -size / 2, d

    def solve(self, x0: Tensor, spread: Scalar, ridge: Scalar) -> tuple[Tensor, Tensor]:
        """Solve `least_squares` for the residual at x0."""
        return least_squares(self.operator, x0, self.residual(x0), spread, ridge)


@dataclass(frozen=True, eq=False)
class LogLikelihood(Checked):
    """A measurement defined by its log p(y | x0).

    Args:
        log_prob: a function of (x0, y) that returns log p(y | x0) up to a constant, (B,);
            differentiable.
        y: (B, ...), one per sample, or (1, ...) for all.
    """

    log_prob: Annotated[
        Callable[[Tensor, Tensor], Tensor], Kind("a function of (x0, y)", "__call__")
    ]
    y: Annotated[FloatBatch, finite] = per_sample_field()

    def log_likelihood(self, x0: Tensor) -> Tensor:
        return one_per_sample("log_prob", self.log_prob(x0, ordinary(self.y.to(x0))), x0)

    def cost(self, x0: Tensor) -> Tensor:
        """Return -log p(y | x0)."""
        return -self.log_likelihood(x0)

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        """Return log p(y | x0) and its gradient; `spread` is ignored, its effect is unknown."""
        return gradient("log_prob", self.log_likelihood, x0)
