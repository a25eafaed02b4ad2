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
from sde_diffusion.guidance import turned
from sde_diffusion.prediction import X0, Prediction, coordinates, per_sample
from sde_diffusion.processes import Level, Process, Scalar
from sde_diffusion.sampling import Sampler
from sde_diffusion.steering import Differentiable, ThroughNetwork

__all__ = ["DPS", "DiffPIR", "Evidence", "Likelihood", "Measurement", "PiGDM"]

ROUNDS = 200  # of conjugate gradients, at most


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
            that need it linear. Those of `operators`, or any differentiable function.
        noise_std: 0 for a measurement without noise.
        y: (B, ...), one per sample, or (1, ...) for all.
    """

    operator: Callable[[Tensor], Tensor]
    noise_std: float
    y: Tensor

    def __post_init__(self) -> None:
        errors.kind("operator", self.operator, "a function of a batch", "__call__")
        errors.number("noise_std", self.noise_std, 0)
        errors.batch("y", self.y)
        if not bool(self.y.isfinite().all()):
            raise ValueError("y must be finite")

    def residual(self, x0: Tensor) -> Tensor:
        """y - A(x0), shaped like y."""
        seen, y = self.operator(x0), self.y.to(x0)
        if seen.shape[1:] != y.shape[1:] or len(y) not in (1, len(x0)):
            raise ValueError(
                f"y must be shaped like operator(x0), {tuple(seen.shape)}; got {tuple(y.shape)}"
            )
        return y - seen

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
        r"""-r^T (spread A A^T + noise_std^2 I)^-1 r / 2 and its gradient."""
        residual, solved, pulled = self.solve(x0, spread, self.noise_std**2)
        return -(coordinates(residual) * coordinates(solved)).sum(1) / 2, pulled

    def solve(self, x0: Tensor, spread: Scalar, ridge: Scalar) -> tuple[Tensor, Tensor, Tensor]:
        r"""r,  z = (spread A A^T + ridge I)^-1 r  and  A^T z, by conjugate gradients.

        A is the operator's derivative at x0: A^T z by back-propagation, and A v by that of A^T.
        """
        residual = self.residual(x0).detach()
        with torch.enable_grad():
            leaf = x0.detach().requires_grad_()
            seen = self.operator(leaf)
            dual = torch.zeros_like(seen).requires_grad_()
            (turned_back,) = torch.autograd.grad(seen, leaf, dual, create_graph=True)

        def product(z: Tensor) -> tuple[Tensor, Tensor]:
            (back,) = torch.autograd.grad(seen, leaf, z, retain_graph=True)
            (made,) = torch.autograd.grad(turned_back, dual, back, retain_graph=True)
            return spread * made + ridge * z, back

        spread, ridge = per_sample(spread, residual), per_sample(ridge, residual)
        solved, left, way = torch.zeros_like(residual), residual.clone(), residual.clone()
        pulled = torch.zeros_like(x0)
        size = coordinates(left).square().sum(1)
        enough = size * (16 * torch.finfo(size.dtype).eps) ** 2
        for _ in range(min(ROUNDS, residual.shape[1:].numel())):
            going = size > enough
            if not bool(going.any()):
                break
            made, back = product(way)
            bend = (coordinates(way) * coordinates(made)).sum(1)
            step = torch.where(going & (bend > 0), size / bend, 0)
            solved = solved + per_sample(step, way) * way
            left = left - per_sample(step, way) * made
            pulled = pulled + per_sample(step, back) * back
            before, size = size, coordinates(left).square().sum(1)
            way = left + per_sample(torch.where(going, size / before, 0), way) * way
        return residual, solved, pulled

    def rows(self, index: Tensor) -> "Measurement":
        return self if len(self.y) == 1 else replace(self, y=self.y[index.to(self.y.device)])


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Any measurement of which log p(y | x0) is known.

    Args:
        log_prob: log p(y | x0) up to a constant, (B,) of (x0, y); differentiable.
        y: (B, ...), one per sample, or (1, ...) for all.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    y: Tensor

    def __post_init__(self) -> None:
        errors.kind("log_prob", self.log_prob, "a function of (x0, y)", "__call__")
        errors.batch("y", self.y)
        if not bool(self.y.isfinite().all()):
            raise ValueError("y must be finite")

    def log_likelihood(self, x0: Tensor) -> Tensor:
        value = self.log_prob(x0, self.y.to(x0))
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
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            value = self.log_likelihood(x0)
            return value.detach(), torch.autograd.grad(value.sum(), x0)[0]

    def rows(self, index: Tensor) -> "Likelihood":
        return self if len(self.y) == 1 else replace(self, y=self.y[index.to(self.y.device)])


@dataclass(frozen=True, eq=False)
class PiGDM:
    r"""Pseudoinverse-guided diffusion (Song et al. 2023): the score of y in closed form.

    If x0 given x were N(x0_hat, s I), then y given x would be N(A x0_hat, s A A^T + noise_std^2 I),
    so  score + w J^T A^T (s A A^T + noise_std^2 I)^-1 r  with  J = dx0_hat / dx. For data of
    variance v in every direction

        s = sigma^2 v / (alpha^2 v + sigma^2),

    and for data N(m, v I) the result is the model of the posterior, exactly. With a `Likelihood`,
    which knows no spread, it is the score form of DPS.

    Args:
        model: any that can be differentiated; one forward and one backward pass a step.
        evidence: a Measurement, or a Likelihood.
        scale: w, 1 for the published rule.
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
        return turned(asked.found, level, self.scale * asked.back(pull))

    def rows(self, index: Tensor) -> "PiGDM":
        return replace(self, model=self.model.rows(index), evidence=self.evidence.rows(index))


@dataclass(frozen=True, eq=False)
class DiffPIR:
    r"""Plug-and-play restoration (Zhu et al. 2023): x0_hat moved towards y, without derivatives.

        x0 = argmin |y - A x|^2 / noise_std^2 + |x - x0_hat|^2 / s,    s = sigma^2 / (lam alpha^2)
           = x0_hat + A^T (A A^T + noise_std^2 / s I)^-1 r

    and eps is that of this x0. Their zeta is the share of fresh noise in the sampler's step, as in
    Ancestral(eta=...). Without noise, A x0 = y exactly.

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
        _, _, pulled = self.measurement.solve(x0, spread, ridge)
        return Prediction(x, x0 + spread * pulled, level, X0(), found.extra)

    def rows(self, index: Tensor) -> "DiffPIR":
        return replace(self, model=self.model.rows(index), measurement=self.measurement.rows(index))


def DPS(sampler: Sampler, measurement: Measurement, scale: float = 1.0) -> ThroughNetwork:
    r"""Diffusion posterior sampling (Chung et al. 2023, Algorithm 1): x_s - scale d/dx_t |r|.

    The gradient of the norm, not of its square: this is their step size zeta / |r|.
    """
    errors.kind("measurement", measurement, "a Measurement", "cost")
    return ThroughNetwork(sampler, measurement.cost, scale)


def posterior_variance(level: Level, variance: float) -> Scalar:
    """Variance of x0 given x for data of this variance in every direction."""
    return level.sigma**2 * variance / (level.alpha**2 * variance + level.sigma**2)
