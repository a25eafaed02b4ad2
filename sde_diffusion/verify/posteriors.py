r"""A meter of truth for inverse problems: a method's samples against the exact posterior.

For data from a mixture and a linear measurement with Gaussian noise the posterior is a mixture too,
in closed form: what a method makes of the exact model can be held against it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.inverse.measurements import Measurement
from sde_diffusion.inverse.operators import Matrix
from sde_diffusion.models.exact import GaussianMixture
from sde_diffusion.models.model import Model
from sde_diffusion.processes.level import coordinates
from sde_diffusion.verify.gaussians import ending
from sde_diffusion.verify.mixtures import FLOORS, CountingModel, Known

__all__ = ["Inverse", "Problem", "inverse"]

ROUNDING = 1e-6  # the residual that float32 leaves


# From the model, what was measured and a batch of starts to samples (B, d).
Method = Callable[[Model, Measurement, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Data, and one measurement of a sample of them.

    Args:
        data: a mixture, or a Gaussian: the model too, of samples of shape (d,).
        matrix: A, (m, d).
        noise_std: of the measurement. Where it is 0 the posterior is that of the directions which
            A leaves open; A's rows must then be independent.
        y: (m,).
    """

    data: GaussianMixture
    matrix: Tensor
    noise_std: float
    y: Tensor

    def __post_init__(self) -> None:
        validate.kind("data", self.data, "an exact.GaussianMixture", "log_prob", "given")
        if len(self.data.shape) != 1:
            raise ValueError(f"data must be of shape (d,); got {tuple(self.data.shape)}")
        validate.batch("matrix", self.matrix)
        validate.batch("y", self.y)
        if self.matrix.ndim != 2 or not bool(self.matrix.isfinite().all()):
            raise ValueError(
                f"matrix must be (m, d), of finite numbers; got {tuple(self.matrix.shape)}"
            )
        if not self.open.shape[1]:
            raise ValueError("matrix leaves nothing open")
        _ = self.posterior  # refuses what does not fit

    @property
    def open(self) -> Tensor:
        """Orthonormal directions (d, k) that are to be found: all, or A's null space if noise_std
        is 0."""
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
        """What a method is given."""
        return Measurement(Matrix(self.matrix), self.noise_std, self.y[None])


@dataclass(frozen=True, repr=False)
class Inverse:
    """How far a method's samples are from the posterior, beside as many exact ones; print it.

    Attributes:
        method: its name.
        samples: how many were drawn.
        calls: network calls.
        distances: name -> its value. "W2" is sliced where there are several coordinates, in
            units of the posterior's standard deviation (the root of its mean variance) like "mean",
            the largest error of a coordinate's mean, and "residual", |A x - y| (root mean square),
            which is there without noise only; "covariance" is the error of the covariance, relative
            (Frobenius); "calibration" the largest Kolmogorov distance, over coordinates, between
            the posterior's own probabilities of the samples and uniform ones.
        floors: name -> the values for independent batches of as many exact samples.
    """

    method: str
    samples: int
    calls: int
    distances: dict[str, float]
    floors: dict[str, Tensor]

    @property
    def holds(self) -> bool:
        """Whether every distance is what exact samples show, within 4.5 standard deviations."""
        return all(
            value <= float(self.floors[name].mean() + 4.5 * self.floors[name].std())
            for name, value in self.distances.items()
        )

    def __str__(self) -> str:
        rows = [f"posterior samples of {self.method}: {self.samples}, {self.calls} calls"]
        rows.append(f"  {'distance':>12}{'samples':>12}{'exact':>12}{'+-':>10}")
        for name, value in self.distances.items():
            floor = self.floors[name]
            rows.append(
                f"  {name:>12}{value:12.3e}{float(floor.mean()):12.3e}{float(floor.std()):10.1e}"
            )
        verdict = (
            f"not told from {self.samples} exact samples" if self.holds else "NOT THE POSTERIOR"
        )
        left = "anything of other data, other measurements, or a network that is not exact"
        return "\n".join([*rows, *ending(verdict, left)])

    __repr__ = __str__


def inverse(
    method: Method, problem: Problem, *, samples: int = 2048, seed: int = 0, name: str | None = None
) -> Inverse:
    """Distances of a method's samples to the exact posterior of a problem.

    Args:
        method: called as method(model, measurement, x, generator), with the exact model and starts
            x (samples, d) float64 from its prior; it answers with samples (samples, d).
        problem: what is to be solved.
        samples: how many.
        seed: of starts, noise and floors.
        name: what to call it.
    """
    validate.kind("method", method, "a function of (model, measurement, x, generator)", "__call__")
    validate.kind("problem", problem, "a Problem", "posterior", "measurement")
    validate.integer("samples", samples, 2)
    asked, d = CountingModel(problem.data), problem.data.shape[0]
    starts = range(seed * samples, (seed + 1) * samples)
    x = asked.process.prior((samples, d), seeds=starts, dtype=torch.float64)
    made = method(asked, problem.measurement, x, torch.Generator().manual_seed(seed))
    validate.batch("the method's answer", made)
    if made.shape != x.shape:
        raise ValueError(f"method must answer with shape {tuple(x.shape)}; got {tuple(made.shape)}")
    posterior, made = problem.posterior, made.double()
    apart = torch.Generator().manual_seed(seed + 2**31)
    exact = [coordinates(posterior.sample(samples, apart)) for _ in range(FLOORS)]
    law = Known.of(posterior, samples)
    measure = Meter.of(law)
    found, floors = measure(made @ problem.open), [measure(e) for e in exact]
    if not problem.noise_std:
        off = (made @ problem.matrix.double().T - problem.y).square().mean().sqrt()
        found["residual"] = float(off) / measure.std
        floors = [{**floor, "residual": ROUNDING} for floor in floors]
    return Inverse(
        name or getattr(method, "__name__", type(method).__name__), samples, asked.calls, found,
        {key: torch.tensor([floor[key] for floor in floors]) for key in found},
    )  # fmt: skip


@dataclass(frozen=True)
class Meter:
    """The figures of samples (n, d) against a known law."""

    law: Known
    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(law: Known) -> "Meter":
        mean = law.weights @ law.means
        off = law.means - mean
        covariance = torch.einsum("k,kij->ij", law.weights, law.covariances)
        return Meter(law, mean, covariance + torch.einsum("k,ki,kj->ij", law.weights, off, off))

    @property
    def std(self) -> float:
        """The root of the mean variance."""
        return float(self.covariance.diagonal().mean().sqrt())

    def __call__(self, x: Tensor) -> dict[str, float]:
        off = x.T.cov().reshape(self.covariance.shape) - self.covariance
        return {
            "W2": self.law.w2(x) / self.std,
            "mean": float((x.mean(0) - self.mean).abs().max()) / self.std,
            "covariance": float(off.norm() / self.covariance.norm()),
            "calibration": self.calibration(x),
        }

    def calibration(self, x: Tensor) -> float:
        """max |F_n(p) - p| over coordinates, for p = P(posterior <= x) of each sample."""
        stds = self.law.covariances.diagonal(dim1=1, dim2=2).sqrt()
        p = torch.special.ndtr((x[:, None] - self.law.means) / stds)  # (n, K, d)
        p = torch.einsum("k,nkd->nd", self.law.weights, p).sort(0).values
        n = len(p)
        step = torch.arange(n + 1, dtype=p.dtype)[:, None] / n
        return float(torch.maximum((step[1:] - p).abs(), (p - step[:-1]).abs()).max())
