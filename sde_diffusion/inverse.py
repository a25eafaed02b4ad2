r"""Inverse problems: samples of x0 given a measurement y of it.

A measurement says how likely an x0 is. Methods turn a model, or a sampler, towards it:

    PiGDM, DiffPIR   Model -> Model       DPS   Sampler -> Sampler

(completion of images: inpainting.py; particles that converge to the posterior: particles.py).
x0_hat is the model's E[x0 | x]; r = y - A(x0_hat). Each makes one call of the network a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion import errors
from sde_diffusion.denoiser import Model
from sde_diffusion.derivatives import leaf, least_squares, ordinary, recorded
from sde_diffusion.guidance import turned
from sde_diffusion.prediction import X0, Prediction, coordinates, per_sample
from sde_diffusion.processes import Level, Process, Scalar
from sde_diffusion.sampling import Sampler
from sde_diffusion.steering import Differentiable, ThroughNetwork

__all__ = ["DPS", "DiffPIR", "Evidence", "LogLikelihood", "Measurement", "PiGDM"]


class Evidence(Protocol):
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

    def rows(self, index: Tensor) -> "Evidence": ...


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
        errors.kind("operator", self.operator, "a function of a batch", "__call__")
        errors.number("noise_std", self.noise_std, 0)
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
        heard = getattr(self.operator, "heard", None)
        return y - seen if heard is None else heard(y - seen)

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
        errors.kind("log_prob", self.log_prob, "a function of (x0, y)", "__call__")
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


@dataclass(frozen=True, eq=False)
class PiGDM:
    r"""Pseudoinverse-guided diffusion (Song et al. 2023): the score of y in closed form.

    If x0 given x were N(x0_hat, s I), then y given x would be N(A x0_hat, s A A^T + noise_std^2 I),
    so  score + w J^T A^T (s A A^T + noise_std^2 I)^-1 r  with  J = dx0_hat / dx. For data of
    variance v in every direction

        s = sigma^2 v / (alpha^2 v + sigma^2),

    and for data N(m, v I) the result is the model of the posterior, exactly. J = alpha / sigma^2
    Cov[x0 | x] for an exact model; where alpha = 0 the covariance is taken to be s I, that is v I.
    Where alpha is small sigma^2 / alpha is large, and so is what it makes of a network's own J.
    With a `LogLikelihood`, which knows no spread, it is the score form of DPS.

    Args:
        model: any that can be differentiated; one forward and one backward pass a step.
        evidence: a Measurement, or a LogLikelihood.
        scale: w, 1 for Bayes' rule with this spread. (Their Algorithm 1 weighs the gradient by a
            factor of the level instead.)
        variance: v.
    """

    model: Model
    evidence: Evidence
    scale: float = 1.0
    variance: float = 1.0

    def __post_init__(self) -> None:
        errors.kind("model", self.model, "a model", "process", "__call__")
        errors.kind("evidence", self.evidence, "a Measurement", "spread_likelihood", "rows")
        errors.number("scale", self.scale)
        errors.number("variance", self.variance, 0, strict=True)

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        asked = Differentiable.of(self.model, x, level)
        spread = posterior_variance(level, self.variance)
        _, pull = self.evidence.spread_likelihood(asked.x0.detach(), spread)
        pull = self.scale * pull
        return turned(asked.found, level, asked.back(pull), spread * pull)

    def rows(self, index: Tensor) -> "PiGDM":
        return replace(self, model=self.model.rows(index), evidence=self.evidence.rows(index))


@dataclass(frozen=True, eq=False)
class DiffPIR:
    r"""Plug-and-play restoration (Zhu et al. 2023): x0_hat moved towards y, without derivatives.

        x0 = argmin |y - A x|^2 / noise_std^2 + |x - x0_hat|^2 / s,    s = sigma^2 / (lam alpha^2)
           = x0_hat + A^T (A A^T + noise_std^2 / s I)^-1 r

    and eps is that of this x0. Their zeta is the share of fresh noise in the sampler's step, as in
    Ancestral(eta=...). Without noise x0 is the nearest of those with A x0 = y (or with the least
    |y - A x0|, if none has), whatever lam is.

    Args:
        model: any.
        measurement: of which A must be linear.
        lam: lambda, the weight of the model against the measurement.
    """

    model: Model
    measurement: Measurement
    lam: float = 1.0

    def __post_init__(self) -> None:
        errors.kind("model", self.model, "a model", "process", "__call__")
        errors.kind("measurement", self.measurement, "a Measurement", "solve")
        errors.number("lam", self.lam, 0, strict=True)

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        found = self.model(x, level)
        x0, noise = found.x0, self.measurement.noise_std**2 * self.lam
        if noise:  # both sides times lam alpha^2: finite at both ends
            spread, ridge = level.sigma**2, noise * level.alpha**2
        else:
            spread, ridge = 1.0, 0.0
        d, _ = self.measurement.solve(x0, spread, ridge)
        return Prediction(x, x0 + spread * d, level, X0(), found.extra)

    def rows(self, index: Tensor) -> "DiffPIR":
        return replace(self, model=self.model.rows(index), measurement=self.measurement.rows(index))


def DPS(sampler: Sampler, measurement: Measurement, scale: float = 1.0) -> ThroughNetwork:
    r"""Diffusion posterior sampling (Chung et al. 2023, Algorithm 1): x_s - scale d/dx_t |r|.

    The gradient of the norm: that of its square, which their algorithm takes with a step size
    zeta / |r|, is 2 |r| times this one, so scale = 2 zeta.
    """
    errors.kind("measurement", measurement, "a Measurement", "cost")
    return ThroughNetwork(sampler, measurement.cost, scale)


def check_finite(y: Tensor) -> None:
    errors.batch("y", y)
    if not bool(y.isfinite().all()):
        raise ValueError("y must be finite")


def taken(y: Tensor, index: Tensor) -> Tensor:
    return y if len(y) == 1 else y[index.to(y.device)]


def posterior_variance(level: Level, variance: float) -> Scalar:
    """Variance of x0 given x for data of this variance in every direction."""
    return level.sigma**2 * variance / (level.alpha**2 * variance + level.sigma**2)
