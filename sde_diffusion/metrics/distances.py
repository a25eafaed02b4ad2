r"""Distances between two sets of points, and measured numbers with their sample sizes.

Points are (N, ...), any rank from 1, flattened to (N, d); arithmetic is float64. A distance between
samples is not 0 where the laws are equal: compare it with `metrics.floor`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from sde_diffusion import validate

__all__ = ["Figure", "MissingExtra", "energy_distance", "mmd", "sliced_wasserstein", "wasserstein"]


class MissingExtra(ImportError, ValueError):
    """A library of the extra `metrics` is not installed; scripts report it in one line."""


def required(module: str) -> Any:
    """Import a module of the extra `metrics`, or raise MissingExtra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{error.name or module} is needed to measure: pip install 'sde-diffusion[metrics]'"
        ) from None


class Figure(float):
    """A measured number with its sample sizes and its standard error.

    Attributes:
        counts: numbers of real and of made samples; None where unknown.
        standard_error: of the number; None where unknown.
    """

    counts: tuple[int | None, int | None]
    standard_error: float | None

    def __new__(
        cls,
        value: float,
        counts: tuple[int | None, int | None],
        standard_error: float | None = None,
    ) -> "Figure":
        figure = super().__new__(cls, value)
        figure.counts, figure.standard_error = counts, standard_error
        return figure

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2g}"
        real, made = ("unknown" if n is None else f"{n:,}" for n in self.counts)
        return f"{float(self):.4g}{error} (N = {made} against {real})"


@dataclass(frozen=True)
class Cloud:
    """Rule of sets of samples: finite floats (N, ...) with N > above, of `ndim` axes if given."""

    ndim: int | None = None
    above: int = 1

    def __call__(self, name: str, value: Tensor) -> None:
        validate.batch(name, value)
        form = "(N, ...)" if self.ndim is None else "(N, d)"
        fits = value.ndim >= 2 if self.ndim is None else value.ndim == self.ndim
        if not fits or len(value) <= self.above or not value[0].numel():
            shape = tuple(value.shape)
            raise ValueError(f"{name} must be {form}, N > {self.above}; got shape {shape}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite; got nan or infinity")


Points = Annotated[Tensor, Cloud()]
Features = Annotated[Tensor, Cloud(2)]
Samples = Annotated[Tensor, Cloud(above=0)]


@validate.arguments
def wasserstein(real: Points, made: Points) -> Figure:
    r"""Exact Wasserstein-2 distance of two samples, by POT's network simplex.

    W_2 = (min_P  sum_ij P_ij |x_i - y_j|^2)^(1/2),  P >= 0 with rows 1/N and columns 1/M: the root
    of the cheapest transport where the ground cost is the squared Euclidean distance. Time grows as
    the cube of N and memory as its square: up to about 5,000 points.
    """
    x, y = as_points(real, made)
    ot = required("ot")
    cost = gaps(x, y).square().numpy()
    value, log = ot.emd2([], [], cost, numItermax=10**9, log=True)
    if log["warning"]:
        raise ValueError(f"the transport was not solved: {log['warning']}")
    return Figure(max(0.0, float(value)) ** 0.5, (len(x), len(y)))


@validate.arguments
def sliced_wasserstein(
    real: Points,
    made: Points,
    projections: validate.Count = 500,
    seed: Annotated[int, validate.Integer(0)] = 0,
) -> Figure:
    r"""Sliced Wasserstein-2 distance (Bonneel et al. 2015), by POT.

    SW_2 = (E_theta W_2(theta . x, theta . y)^2)^(1/2) over directions theta uniform on the sphere,
    here `projections` of them, a function of (seed, d) alone. For a shift by c it is |c| / sqrt(d).
    """
    x, y = as_points(real, made)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    distance = required("ot").sliced_wasserstein_distance
    value = distance(x.numpy(), y.numpy(), projections=directions.numpy(), p=2)
    return Figure(float(value), (len(x), len(y)))


@validate.arguments
def mmd(real: Points, made: Points, bandwidth: validate.Positive | None = None) -> Figure:
    r"""Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, Lemma 6).

    MMD^2 = mean_(i != j) k(x_i, x_j) + mean_(i != j) k(y_i, y_j) - 2 mean_ij k(x_i, y_j)
    with  k(x, y) = exp(-|x - y|^2 / (2 h^2)).  Below 0 as often as above where the laws are equal.

    Args:
        bandwidth: h; None takes the median distance between two real points.
    """
    x, y = as_points(real, made)
    h = float(off_diagonal(gaps(x, x)).median()) if bandwidth is None else bandwidth
    if h == 0:
        raise ValueError("half of the real points are the same one: give a bandwidth")
    return discrepancy(x, y, lambda gap: torch.exp(-gap.square() / (2 * h**2)))


@validate.arguments
def energy_distance(real: Points, made: Points) -> Figure:
    r"""Energy distance, unbiased (Szekely and Rizzo 2013, Section 2).

    2 mean_ij |x_i - y_j| - mean_(i != j) |x_i - x_j| - mean_(i != j) |y_i - y_j|:  an estimate of
    2 E|X - Y| - E|X - X'| - E|Y - Y'|, which is 0 only where the laws are equal. It has no
    parameter, and is below 0 as often as above where they are.
    """
    x, y = as_points(real, made)
    return discrepancy(x, y, torch.neg)


def discrepancy(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> Figure:
    """Unbiased squared maximum mean discrepancy for a kernel of the distance of points."""
    within = sum(off_diagonal(kernel(gaps(part, part))).mean() for part in (x, y))
    return Figure(float(within - 2 * kernel(gaps(x, y)).mean()), (len(x), len(y)))


def gaps(x: Tensor, y: Tensor) -> Tensor:
    """Return the Euclidean distances |x_i - y_j|, (N, M)."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def off_diagonal(square: Tensor) -> Tensor:
    """Return the N (N - 1) entries of a square matrix that are off its diagonal."""
    size = len(square)
    return square.flatten()[1:].reshape(size - 1, size + 1)[:, :-1]


def as_points(real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets as float64 (N, d) on the CPU: not every device has float64."""
    x, y = (points.detach().cpu().flatten(1).double() for points in (real, made))
    check_widths(x.shape[1], y.shape[1])
    return x, y


def check_widths(real: int, made: int) -> None:
    """Refuse two sets whose samples differ in their numbers of coordinates."""
    if real != made:
        raise ValueError(f"real and made must have the same width; got {real} and {made}")
