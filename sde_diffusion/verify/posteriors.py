r"""Methods for inverse problems: their samples against the exact posterior.

For data from a mixture and a linear measurement with Gaussian noise the posterior is a mixture too,
in closed form: the samples of a method on the exact model are compared with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.inverse.measurements import Measurement
from sde_diffusion.inverse.operators import Matrix
from sde_diffusion.models import Model
from sde_diffusion.models.exact import GaussianMixture
from sde_diffusion.verify import mixtures, report
from sde_diffusion.verify.mixtures import Samples, Seed

__all__ = ["Inverse", "Problem", "inverse"]

ROUNDING = 1e-6  # the residual that float32 leaves


# method(model, measurement, starts, generator) -> samples (B, d)
Method = Callable[[Model, Measurement, Tensor, torch.Generator], Tensor]


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

    data: Annotated[GaussianMixture, validate.Kind("an exact.GaussianMixture", "log_prob", "given")]
    matrix: Annotated[Tensor, validate.FloatBatch()]
    noise_std: validate.NonNegative
    y: Annotated[Tensor, validate.FloatBatch()]

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
    def posterior(self) -> GaussianMixture:
        """The law of  open^T x0  given y."""
        return self.data.given(self.matrix, self.y, self.noise_std, self.open)

    @property
    def measurement(self) -> Measurement:
        """The measurement, as an argument of a method."""
        return Measurement(Matrix(self.matrix), self.noise_std, self.y[None])


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
        k = mixtures.DEVIATIONS
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
            mixtures.beside_floors(self.distances, self.floors),
        )


@validate.arguments
def inverse(
    method: Annotated[
        Method, validate.Kind("a function of (model, measurement, x, generator)", "__call__")
    ],
    problem: Annotated[Problem, validate.Kind("a Problem", "posterior", "measurement")],
    *,
    samples: Samples = 2048,
    seed: Seed = 0,
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
    counting, d = mixtures.CountingModel(problem.data), problem.data.shape[0]
    starts = range(seed * samples, (seed + 1) * samples)
    x = counting.process.prior((samples, d), seeds=starts, dtype=torch.float64)
    made = method(counting, problem.measurement, x, torch.Generator().manual_seed(seed))
    validate.batch("the method's result", made)
    if made.shape != x.shape:
        raise ValueError(f"method must return shape {tuple(x.shape)}; got {tuple(made.shape)}")
    posterior, made = problem.posterior, made.double()
    law = mixtures.Known.of(posterior, samples)
    found = figures(law, made @ problem.open)
    floors = mixtures.floors_of(posterior, samples, seed, partial(figures, law))
    if not problem.noise_std:
        off = (made @ problem.matrix.double().T - problem.y).square().mean().sqrt()
        found["residual"] = float(off) / law.std
        floors["residual"] = torch.full((mixtures.FLOORS,), ROUNDING)
    own = getattr(method, "__name__", type(method).__name__)
    return Inverse(name or own, samples, counting.calls, found, floors)


def figures(law: mixtures.Known, x: Tensor) -> dict[str, float]:
    """The distances of samples x (n, d) to a known law."""
    off = x.T.cov().reshape(law.covariance.shape) - law.covariance
    return {
        "W2": law.w2(x) / law.std,
        "mean": float((x.mean(0) - law.mean).abs().max()) / law.std,
        "covariance": float(off.norm() / law.covariance.norm()),
        "calibration": calibration(law, x),
    }


def calibration(law: mixtures.Known, x: Tensor) -> float:
    """max |F_n(p) - p| over coordinates, for p = P(posterior <= x) of each sample."""
    stds = law.covariances.diagonal(dim1=1, dim2=2).sqrt()
    p = torch.special.ndtr((x[:, None] - law.means) / stds)  # (n, K, d)
    p = torch.einsum("k,nkd->nd", law.weights, p).sort(0).values
    step = torch.arange(len(p) + 1, dtype=p.dtype)[:, None] / len(p)
    return float(torch.maximum((step[1:] - p).abs(), (p - step[:-1]).abs()).max())
