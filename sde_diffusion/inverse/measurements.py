r"""Measurements: the likelihood of x0 given y.

A method that diverges, or that takes too few steps, returns finite samples that do not fit y. After
each run that ends at t = 0 the samples are compared with the noise of y, and a RuntimeWarning names
both: |y - A x0| with noise_std, or the slope of a log-likelihood with its curvature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.inverse.least_squares import least_squares
from sde_diffusion.inverse.operators import check_fits, observed_part
from sde_diffusion.models.derivatives import (
    check_differentiable,
    gradient,
    in_graph,
    leaf,
    one_per_sample,
    ordinary,
    pull,
    recorded,
)
from sde_diffusion.models.model import finite, per_sample_field
from sde_diffusion.processes.level import Scalar, coordinates, per_sample, wide
from sde_diffusion.validate import Checked, FloatBatch, Kind, shown

__all__ = ["LogLikelihood", "Measurement", "Observation"]

IS_OBSERVATION = Kind("a Measurement or LogLikelihood", "cost", "spread_likelihood")

FACTOR = 2.0  # of noise_std: a larger residual does not fit
SLOPE = 1.4  # the same for the slope of a log-likelihood, a sum over all of y
DEVIATIONS = 4.5  # |z| < sqrt(m) + 4.5 for m standard normals z, but for one in 150,000
RELATIVE = 0.01  # a residual of this share of y counts as a fit, whatever the noise
SMALL = 1e-4  # the same of x0: y may be 0
RARE = 0.05  # share of rows: the tails of a slope are not those of normals
PROBES = 16  # of the curvature of a log-likelihood


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


def deviations(name: str, value: Any) -> None:
    """Refuse a standard deviation that is neither a number >= 0 nor such numbers (B,)."""
    if not isinstance(value, Tensor):
        validate.number(name, value, 0)
    elif finite(name, value).ndim != 1 or not bool((value >= 0).all()):
        raise ValueError(f"{name} must be a number, or numbers (B,), at least 0; got {value!r:.60}")


def is_y(name: str, value: Any) -> None:
    """Refuse a y that is no tensor (B, ...) of real or complex floats."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor (B, ...); got {shown(value)}")
    if value.ndim == 0 or not (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"{name} must be a batch (B, ...) of floats; got {shown(value)}")


def real(y: Tensor) -> Tensor:
    """Return a complex tensor as real and imaginary part, in a new last axis."""
    return torch.view_as_real(y) if y.is_complex() else y


@dataclass(frozen=True, eq=False)
class Measurement(Checked):
    r"""A measurement y = A(x0) + noise_std eps.

    Args:
        operator: A, from (B, ...) to the shape of y: one of `operators`, or any differentiable
            function of each sample. PiGDM and its relatives linearize A at x0_hat; DiffPIR refuses
            an A that is not linear.
        noise_std: standard deviation of the noise, for a complex y that of each of the real and
            the imaginary part; a number, or (B,), one per sample; 0 without noise.
        y: (B, ...), one per sample, or (1, ...) for all; real or complex as A(x0). Parts that the
            operator leaves out, such as masked pixels, are ignored and may be nan.
    Raises:
        ValueError: in `sample`, before the first step, if the operator has no derivative.
    Warns:
        RuntimeWarning: at the end of `sample`, if the root mean square of r = y - A x0 of a sample
            is above max(2, 1 + 4.5 / sqrt(m)) noise_std + 0.01 |y|, for m measured numbers of root
            mean square |y|. Samples of the posterior exceed this less than once in 150,000, as
            r / noise_std has then, on average over y, the law of m standard normals.
    """

    operator: Annotated[Callable[[Tensor], Tensor], Kind("a function of a batch", "__call__")]
    noise_std: Annotated[float | Tensor, deviations] = per_sample_field()
    y: Annotated[Tensor, is_y] = per_sample_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        finite("y", self.observed_part(self.y))

    def observed_part(self, y: Tensor) -> Tensor:
        """Return y with 0 in the parts that the operator leaves out."""
        return observed_part(self.operator, y)

    def __call__(self, x0: Tensor) -> Tensor:
        """Return A(x0); a complex one as real and imaginary part, in a new last axis."""
        return real(self.operator(x0))

    def residual(self, x0: Tensor) -> Tensor:
        """Return y - A(x0), 0 in parts of y that the operator leaves out; shaped like A(x0).

        A complex residual is returned as real and imaginary part, in a new last axis.
        """
        seen = self.operator(x0)
        if len(seen) != len(x0):
            wanted = f"one entry for each of {len(x0)} samples"
            raise ValueError(f"operator must return {wanted}; got {tuple(seen.shape)}")
        if isinstance(self.noise_std, Tensor) and len(self.noise_std) not in (1, len(x0)):
            got = len(self.noise_std)
            raise ValueError(f"noise_std must hold one number per sample, {len(x0)}; got {got}")
        if seen.is_complex() != self.y.is_complex():
            wanted = "complex" if seen.is_complex() else "real"
            raise ValueError(f"y must be {wanted}, as operator(x0); got {self.y.dtype}")
        y = check_fits(ordinary(self.y.to(seen)), seen, "operator(x0)")
        return real(self.observed_part(y - seen))

    def cost(self, x0: Tensor) -> Tensor:
        """Return |r|, in units of y."""
        return coordinates(self.residual(x0)).norm(dim=1)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """Return -|r|^2 / (2 noise_std^2).

        Raises:
            ValueError: if noise_std is 0: a measurement without noise has no density.
        """
        if self.noiseless:
            raise ValueError("noise_std must be above 0 for a likelihood; got 0")
        square = coordinates(self.residual(x0)).square().sum(1)
        return -square / (2 * per_sample(ordinary(self.noise_std), square) ** 2)

    @property
    def noiseless(self) -> bool:
        """True if the noise of a sample is 0."""
        noise = self.noise_std
        return bool((noise == 0).any()) if isinstance(noise, Tensor) else noise == 0

    def noise_variance(self, x0: Tensor) -> Scalar:
        """Return noise_std^2: a number, or (B, 1, ..., 1) in the dtype of x0."""
        noise = per_sample(self.noise_std, x0)
        return noise.to(x0) ** 2 if isinstance(noise, Tensor) else noise**2

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        r"""Return -r^T z / 2 with z = (spread A A^T + noise_std^2 I)^-1 r, and its gradient A^T z.

        r^T z is computed as  spread |A^T z|^2 + noise_std^2 |z|^2.
        """
        ridge = self.noise_variance(x0)
        d, rest = self.solve(x0, spread, ridge)
        size = coordinates(per_sample(spread, d) * d.square()).sum(1)
        of_rest = coordinates(rest).square().sum(1)
        if isinstance(ridge, Tensor):
            ridge = ridge.flatten()
            size = size + torch.where(ridge > 0, of_rest / ridge.where(ridge > 0, 1), 0)
        elif ridge:
            size = size + of_rest / ridge
        return -size / 2, d

    def solve(self, x0: Tensor, spread: Scalar, ridge: Scalar) -> tuple[Tensor, Tensor]:
        """Solve `least_squares` for the residual at x0; in closed form if the operator has one."""
        self.check_constant(x0)
        r, closed = self.residual(x0), getattr(self.operator, "least_squares", None)
        if closed is not None:
            return closed(r, per_sample(spread, x0), per_sample(ridge, x0))
        return least_squares(self, x0, r, spread, ridge)

    def check_constant(self, x0: Tensor) -> None:
        """Refuse gradients by the operator's own tensors and by noise_std: a solution has none."""
        if in_graph(x0):
            noise = getattr(self.noise_std, "requires_grad", False)
            if noise or self.operator(x0.detach()).requires_grad:
                name = "noise_std" if noise else "operator"
                advice = "its gradient is not computed; use requires_grad_(False)"
                raise ValueError(f"{name} must not require a gradient; got one that does; {advice}")

    @torch.no_grad()
    def check_linear(self, x: Tensor, method: str) -> None:
        """Refuse an operator that is not affine, by A(2 u - v) = 2 A(u) - A(v) for random u, v."""
        source = torch.Generator().manual_seed(0)
        u, v = torch.randn((2, *x.shape), generator=source, dtype=torch.float64).to(x)
        of_u, of_v = self(u), self(v)
        off = wide(self(2 * u - v) - (2 * of_u - of_v)).norm()
        size = wide(2 * of_u).norm() + wide(of_v).norm()
        if not bool(off <= torch.finfo(x.dtype).eps ** 0.5 * size):
            raise ValueError(
                f"operator must be linear for {method}; A(2 u - v) - 2 A(u) + A(v) is "
                f"{float(off / size):.1g} of A(u)"
            )

    def before_run(self, x: Tensor) -> None:
        """Refuse a y of the wrong shape, and an operator without derivatives."""
        check_differentiable("operator", self.residual, x)

    @torch.no_grad()
    def after_run(self, x0: Tensor) -> None:
        """Warn of samples that do not fit y; see the class."""
        r = wide(coordinates(self.residual(x0)))
        known = coordinates(self.observed_part(torch.ones_like(self.y))) != 0
        m = known.sum(1).clamp(min=1).to(r.device) * (2 if self.y.is_complex() else 1)
        y = coordinates(real(self.observed_part(self.y))).to(r)
        found, size = ((part.square().sum(1) / m).sqrt() for part in (r, y))
        noise = per_sample(self.noise_std, found) + torch.zeros_like(found)
        floor = RELATIVE * size + SMALL * wide(coordinates(x0)).square().mean(1).sqrt()
        off = found > noise * (1 + DEVIATIONS / m.sqrt()).clamp(min=FACTOR) + floor
        if bool(off.any()):
            k = int(torch.where(off, found, 0).argmax())
            text = f"|y - A x0| is {float(found[k]):.3g} (root mean square) at row {k}"
            warn_of_misfit(off, f"{text}, for noise_std {float(noise[k]):.3g}")


def warn_of_misfit(off: Tensor, misfit: str) -> None:
    """Warn of the samples `off` that do not fit a measurement."""
    text = f"{int(off.sum())} of {len(off)} samples do not fit y: {misfit}"
    validate.warn(f"{text}; the method diverged, or needs more steps", RuntimeWarning)


@dataclass(frozen=True, eq=False)
class LogLikelihood(Checked):
    """A measurement defined by its log p(y | x0).

    Args:
        log_prob: a function of (x0, y) that returns log p(y | x0) up to a constant, (B,);
            differentiable.
        y: (B, ...), one per sample, or (1, ...) for all.
    Warns:
        RuntimeWarning: at the end of `sample`, if the slope g of log p is too large for its
            curvature H = -d^2 log p / dx0^2:  |g| > max(1.4, 1 + 4.5 |H|_F / tr H) sqrt(tr H).  On
            average over y, |g|^2 = tr H (Bartlett's second identity). A log p without curvature is
            not checked.
    """

    log_prob: Annotated[
        Callable[[Tensor, Tensor], Tensor], Kind("a function of (x0, y)", "__call__")
    ]
    y: Annotated[FloatBatch, finite] = per_sample_field()

    def before_run(self, x: Tensor) -> None:
        """Refuse a log_prob without derivatives."""
        check_differentiable("log_prob", self.log_likelihood, x)

    def after_run(self, x0: Tensor) -> None:
        """Warn of samples that do not fit y; see the class."""
        found = curvature(self.log_likelihood, wide(x0))
        if found is None:
            return
        square, trace, root = found
        ratio = (square / trace.where(trace > 0, 1)).sqrt()
        allowed = (1 + DEVIATIONS * root / trace.where(trace > 0, 1)).clamp(min=SLOPE)
        off = (trace > 0) & (ratio > allowed)
        if float(off.double().mean()) > RARE:
            k = int(torch.where(off, ratio, 0).argmax())
            slope = f"{float(ratio[k]):.3g} of its noise at row {k}"
            warn_of_misfit(off, f"the slope of log_prob is {slope}")

    def log_likelihood(self, x0: Tensor) -> Tensor:
        return one_per_sample("log_prob", self.log_prob(x0, ordinary(self.y.to(x0))), x0)

    def cost(self, x0: Tensor) -> Tensor:
        """Return -log p(y | x0)."""
        return -self.log_likelihood(x0)

    def spread_likelihood(self, x0: Tensor, spread: Scalar) -> tuple[Tensor, Tensor]:
        """Return log p(y | x0) and its gradient; `spread` is ignored, its effect is unknown."""
        return gradient("log_prob", self.log_likelihood, x0)


def curvature(
    log_prob: Callable[[Tensor], Tensor], x0: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return |g|^2, tr H and |H|_F of H = -d^2 log p / dx0^2, (B,) each; None without an H.

    The last two are means over random signs v, of v^T H v and |H v|^2 (Hutchinson 1989).
    """
    with recorded():
        point = leaf(x0)
        (slope,) = torch.autograd.grad(log_prob(point).sum(), point, create_graph=True)
    if not slope.requires_grad:
        return None
    source, bends = torch.Generator().manual_seed(0), list[tuple[Tensor, Tensor]]()
    for _ in range(PROBES):
        v = torch.randint(0, 2, x0.shape, generator=source).to(x0) * 2 - 1
        try:
            bend = pull(slope, point, v)
        except RuntimeError:  # an operation that is differentiable once only
            return None
        if bend is None:
            return None
        bends.append((coordinates(-bend * v).sum(1), coordinates(bend).square().sum(1)))
    trace, square = (torch.stack(part).mean(0) for part in zip(*bends, strict=True))
    return coordinates(slope.detach()).square().sum(1), trace, square.sqrt()
