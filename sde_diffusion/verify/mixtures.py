r"""Samples against a mixture's exact law, of data or of a posterior, beside exact samples.

For data from a mixture and a linear measurement with Gaussian noise the posterior is a mixture too,
in closed form: the samples of a method on the exact model are compared with it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.inverse import Measurement, operators
from sde_diffusion.models import Model, exact
from sde_diffusion.noise import Purpose, stream
from sde_diffusion.processes.level import coordinates
from sde_diffusion.verify import endpoints, probe, report

__all__ = ["Distribution", "Inverse", "Problem", "distribution", "inverse"]

DIRECTIONS = 64  # of the sliced distance
FLOORS = 32  # batches of exact samples, from which the floor is estimated
DEVIATIONS = 4.5  # of the floor, within which samples are indistinguishable from exact ones
ROUNDING = 1e-6  # the residual that float32 leaves

# method(model, measurement, starts, generator) -> samples (B, d)
Method = Callable[[Model, Measurement, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, repr=False)
class Distribution(report.Report):
    """Distances of a sampler's samples to the data's law, beside those of exact samples.

    Attributes:
        sampler: its name.
        samples: their number.
        distances: name -> its value.
        floors: name -> the values for independent batches of as many exact samples.
    """

    sampler: str
    samples: int
    distances: dict[str, float]
    floors: dict[str, Tensor]

    @property
    def excess(self) -> dict[str, float]:
        """Each distance above its floor, in standard deviations of the floor, in logarithms."""
        return {
            name: (math.log(value) - float(self.floors[name].log().mean()))
            / (float(self.floors[name].log().std()) * math.sqrt(1 + 1 / FLOORS))
            for name, value in self.distances.items()
        }

    @property
    def holds(self) -> bool:
        """True if every distance is within 4.5 standard deviations of that of exact samples."""
        return max(self.excess.values()) <= DEVIATIONS

    @property
    def verdict(self) -> str:
        if self.holds:
            return f"indistinguishable from {self.samples} exact samples"
        by, name = max((by, name) for name, by in self.excess.items())
        return f"NOT THE DATA: {name} is {by:.1f} standard deviations above"

    def page(self) -> report.Page:
        return report.Page(
            f"samples of {self.sampler}: {self.samples}",
            "that an error smaller than that of as many exact samples is 0",
            beside_floors(self.distances, self.floors),
        )


def beside_floors(distances: dict[str, float], floors: dict[str, Tensor]) -> report.Table:
    """Each distance beside the mean and standard deviation of those of exact samples."""
    means, stds = ([f(floors[n]).item() for n in distances] for f in (torch.mean, torch.std))
    rows = zip(distances, distances.values(), means, stds, strict=True)
    return report.Table({"distance": "", "samples": ".3e", "exact": ".3e", "+-": ".1e"}, rows)


@validate.arguments
def distribution(
    sampler: probe.ASampler,
    data: endpoints.AMixture,
    process: probe.AProcess | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    samples: endpoints.Samples = 2048,
    seed: endpoints.Seed = 0,
) -> Distribution:
    r"""Measure the distances of samples to the data's law: W2 (sliced, if d > 1) and MMD.

    Both use the law itself, not samples of it. The sliced W2 is the root mean over fixed
    directions of the W2^2 on the line, where the mixture's quantiles are computed. The MMD with the
    kernel k = exp(-|x - y|^2 / 2 h^2) is the distance of characteristic functions,
    int |phi_n - phi|^2 N(w; 0, h^-2 I) dw, whose three parts are closed forms; h is the data's
    standard deviation.

    Args:
        sampler: any, fixed steps or not.
        data: a mixture, or a Gaussian.
        process, times, steps: as in `law`.
        samples: their number.
        seed: of starts, noise and floors.
    """
    model, made, _ = endpoints.drawn(sampler, data, process, times, steps, samples, seed)
    law = Known(model, samples)
    name, floors = probe.one_line(sampler), floors_of(model, samples, seed, law.distances)
    return Distribution(name, samples, law.distances(made), floors)


def floors_of(
    data: exact.GaussianMixture,
    samples: int,
    seed: int,
    measure: Callable[[Tensor], dict[str, float]],
) -> dict[str, Tensor]:
    """The distances of independent batches of exact samples, by name."""
    apart = torch.Generator().manual_seed(seed + 2**31)  # the floor is that of the data alone
    found = [measure(coordinates(data.sample(samples, apart))) for _ in range(FLOORS)]
    return {name: torch.tensor([each[name] for each in found]) for name in found[0]}


# ---- the law of a mixture ------------------------------------------------------------------------


class Known:
    """A mixture's law in flat coordinates, and its quantiles.

    Args:
        data: the mixture.
        n: number of quantiles.

    Attributes:
        weights: (K,).
        means: (K, d).
        covariances: (K, d, d).
        mean: of the mixture, (d,).
        covariance: of the mixture, (d, d).
        directions: (J, d), unit vectors.
        quantiles: (J, n), of the law projected on each, at (i + 1/2) / n.
    """

    def __init__(self, data: exact.GaussianMixture, n: int) -> None:
        weights, means, covariances = data.log_weights.exp(), data.means, data.covariances
        self.weights, self.means, self.covariances = weights, means, covariances
        self.mean = weights @ means
        off, d = means - self.mean, means.shape[1]
        within = torch.einsum("k,kij->ij", weights, covariances)
        self.covariance = within + torch.einsum("k,ki,kj->ij", weights, off, off)
        self.directions = axes = torch.ones(1, 1).double() if d == 1 else fixed_directions(d)
        stds = torch.einsum("ji,kil,jl->jk", axes, covariances, axes).sqrt()
        lines = zip(axes @ means.T, stds, strict=True)
        self.quantiles = torch.stack([line_quantiles(weights, m, s, n) for m, s in lines])

    @property
    def std(self) -> float:
        """Root of the mean variance of a coordinate."""
        return float(self.covariance.diagonal().mean().sqrt())

    def distances(self, x: Tensor) -> dict[str, float]:
        """Both distances of samples x (n, d) to the law, by name."""
        name = "W2" if x.shape[1] == 1 else "sliced W2"
        return {name: self.w2(x), "MMD": self.mmd(x)}

    def w2(self, x: Tensor) -> float:
        """Root of the mean over directions of W2^2 between the projections, x (n, d)."""
        lines = (x @ self.directions.T).sort(0).values.T
        return float((lines - self.quantiles).square().mean().sqrt())

    def mmd(self, x: Tensor) -> float:
        """MMD between the empirical law of the points and the mixture."""
        w, m, S, h2 = self.weights, self.means, self.covariances, self.std**2
        own = torch.exp(-torch.cdist(x, x).square() / (2 * h2)).mean()
        cross = w @ smoothed(x - m[:, None], S, h2).mean(1)
        parts = zip(m, S, strict=True)
        inner = torch.cat([w @ smoothed((a - m)[:, None], S + A, h2) for a, A in parts])
        return math.sqrt(max(float(own - 2 * cross + w @ inner), 0.0))


def line_quantiles(weights: Tensor, means: Tensor, stds: Tensor, n: int) -> Tensor:
    """Quantiles (i + 1/2) / n of a mixture on the line, by bisection, (n,)."""
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    low = (means - 10 * stds).min().expand_as(level)
    high = (means + 10 * stds).max().expand_as(level)
    for _ in range(50):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - means) / stds) @ weights < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def smoothed(z: Tensor, covariances: Tensor, h2: float) -> Tensor:
    """E exp(-|z - y|^2 / 2 h^2) over y ~ N(0, S_k), (K, n), for z (K, n, d)."""
    root = torch.linalg.cholesky(covariances / h2 + torch.eye(z.shape[2]).double())
    scaled = torch.linalg.solve_triangular(root, z.mT, upper=False)
    volume = root.diagonal(dim1=1, dim2=2).prod(1)
    return torch.exp(-scaled.square().sum(1) / (2 * h2)) / volume[:, None]


def fixed_directions(d: int) -> Tensor:
    """Unit vectors from a fixed seed, (DIRECTIONS, d)."""
    made = torch.from_numpy(stream(0, Purpose.TOY).standard_normal((DIRECTIONS, d)))
    return made / made.norm(dim=1, keepdim=True)


# ---- posteriors ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem(validate.Checked):
    """An inverse problem: the law of the data, and a measurement y = A x0 + noise_std eps.

    Args:
        data: a mixture, or a Gaussian, of samples of shape (d,); it is the model too.
        matrix: A, (m, d).
        noise_std: of the measurement. If it is 0 the posterior is that of the directions which A
            leaves open; A's rows must then be independent.
        y: (m,).
    """

    data: endpoints.AMixture
    matrix: validate.FloatBatch
    noise_std: validate.NonNegative
    y: validate.FloatBatch

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.data.shape) != 1:
            raise ValueError(f"data must be of shape (d,); got {tuple(self.data.shape)}")
        if self.matrix.ndim != 2 or not bool(self.matrix.isfinite().all()):
            got = tuple(self.matrix.shape)
            raise ValueError(f"matrix must be (m, d), of finite numbers; got {got}")
        if not self.open.shape[1]:
            raise ValueError("matrix must leave a direction open where noise_std is 0")
        _ = self.posterior  # checks that the parts fit together

    @property
    def open(self) -> Tensor:
        """Orthonormal directions (d, k) to be sampled: all, or A's null space if noise_std is 0."""
        if self.noise_std:
            return torch.eye(self.data.shape[0], dtype=torch.float64)
        _, size, right = torch.linalg.svd(self.matrix.double())
        return right[int((size > 1e-12 * size.max()).sum()) :].T

    @property
    def posterior(self) -> exact.GaussianMixture:
        """The law of  open^T x0  given y."""
        return self.data.given(self.matrix, self.y, self.noise_std, self.open)

    @property
    def measurement(self) -> Measurement:
        """The measurement, as an argument of a method."""
        return Measurement(operators.Matrix(self.matrix), self.noise_std, self.y[None])


@dataclass(frozen=True, repr=False)
class Inverse(report.Report):
    """Distances of a method's samples to the exact posterior, beside those of exact samples.

    Attributes:
        method: its name.
        samples: their number.
        calls: network calls.
        distances: name -> its value. "W2", sliced for several coordinates; "mean", the largest
            error of a coordinate's mean; without noise also "residual", |A x - y| (root mean
            square): these in units of the posterior's standard deviation (the root of its mean
            variance). "covariance", the relative error of the covariance (Frobenius).
            "calibration", the largest Kolmogorov distance, over coordinates, between the
            posterior's cumulative probabilities of the samples and uniform ones.
        floors: name -> the values for independent batches of as many exact samples.
    """

    method: str
    samples: int
    calls: int
    distances: dict[str, float]
    floors: dict[str, Tensor]

    @property
    def holds(self) -> bool:
        """True if every distance is within 4.5 standard deviations of that of exact samples."""
        k = DEVIATIONS
        floors = {name: float(v.mean() + k * v.std()) for name, v in self.floors.items()}
        return all(value <= floors[name] for name, value in self.distances.items())

    @property
    def verdict(self) -> str:
        near = f"indistinguishable from {self.samples} exact samples"
        return near if self.holds else "NOT THE POSTERIOR"

    def page(self) -> report.Page:
        return report.Page(
            f"posterior samples of {self.method}: {self.samples}, {self.calls} calls",
            "anything of other data, other measurements, or a network that is not exact",
            beside_floors(self.distances, self.floors),
        )


@validate.arguments
def inverse(
    method: Annotated[
        Method, validate.Kind("a function of (model, measurement, x, generator)", "__call__")
    ],
    problem: Annotated[Problem, validate.Kind("a Problem", "posterior", "measurement")],
    *,
    samples: endpoints.Samples = 2048,
    seed: endpoints.Seed = 0,
    name: str | None = None,
) -> Inverse:
    """Measure the distances of a method's samples to the exact posterior of a problem.

    Args:
        method: called as method(model, measurement, x, generator), with the exact model and starts
            x (samples, d) float64 from its prior; returns samples (samples, d).
        problem: the inverse problem.
        samples: their number.
        seed: of starts, noise and floors.
        name: of the method, for the report.
    """
    counting = endpoints.CountingModel(problem.data)
    x = endpoints.starts(problem.data, samples, seed)
    made = method(counting, problem.measurement, x, torch.Generator().manual_seed(seed))
    validate.batch("the method's result", made)
    if made.shape != x.shape:
        raise ValueError(f"method must return shape {tuple(x.shape)}; got {tuple(made.shape)}")
    posterior, made = problem.posterior, made.double()
    law = Known(posterior, samples)
    found = figures(law, made @ problem.open)
    floors = floors_of(posterior, samples, seed, partial(figures, law))
    if not problem.noise_std:
        off = (made @ problem.matrix.double().T - problem.y).square().mean().sqrt()
        found["residual"] = float(off) / law.std
        floors["residual"] = torch.full((FLOORS,), ROUNDING)
    own = getattr(method, "__name__", type(method).__name__)
    return Inverse(name or own, samples, counting.calls, found, floors)


def figures(law: Known, x: Tensor) -> dict[str, float]:
    """The distances of samples x (n, d) to a known law."""
    off = x.T.cov().reshape(law.covariance.shape) - law.covariance
    return {
        "W2": law.w2(x) / law.std,
        "mean": float((x.mean(0) - law.mean).abs().max()) / law.std,
        "covariance": float(off.norm() / law.covariance.norm()),
        "calibration": calibration(law, x),
    }


def calibration(law: Known, x: Tensor) -> float:
    """max |F_n(p) - p| over coordinates, for p = P(posterior <= x) of each sample."""
    stds = law.covariances.diagonal(dim1=1, dim2=2).sqrt()
    p = torch.special.ndtr((x[:, None] - law.means) / stds)  # (n, K, d)
    p = torch.einsum("k,nkd->nd", law.weights, p).sort(0).values
    step = torch.arange(len(p) + 1, dtype=p.dtype)[:, None] / len(p)
    return float(torch.maximum((step[1:] - p).abs(), (p - step[:-1]).abs()).max())
