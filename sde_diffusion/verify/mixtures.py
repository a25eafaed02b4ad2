r"""Samplers on a mixture: data that are not Gaussian, with a known flow and a known law.

The end of a deterministic sampler is compared with the exact flow from the same start, sample by
sample; the samples of any sampler with the mixture's law, beside the figures of exact samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from sde_diffusion.models import Model, Prediction
from sde_diffusion.models.exact import GaussianMixture
from sde_diffusion.noise import Purpose, stream
from sde_diffusion.processes import Level, Process
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers import Sampler, ScipyODE
from sde_diffusion.sampling import path_of, sample
from sde_diffusion.validate import FloatBatch, Integer, Kind, arguments
from sde_diffusion.verify import probe, report

__all__ = ["Distribution", "Endpoint", "distribution", "endpoint", "flow"]

DIRECTIONS = 64  # of the sliced distance
FLOORS = 32  # batches of exact samples, from which the floor is estimated
KEPT = 32  # flows in memory, the oldest goes first
DEVIATIONS = 4.5  # of the floor, within which samples are indistinguishable from exact ones

AMixture = Annotated[GaussianMixture, Kind("an exact.GaussianMixture", "log_prob", "on")]
Samples = Annotated[int, Integer(2)]
Seed = Annotated[int, Integer(0)]


@dataclass(frozen=True, repr=False)
class Endpoint(report.Report):
    """Errors of a sampler's samples against the exact flow, from the same starts.

    Attributes:
        sampler: its name.
        calls: network calls.
        errors: one per sample, the root mean square over its coordinates.
    """

    sampler: str
    calls: int
    errors: Tensor

    @property
    def rms(self) -> float:
        return float(self.errors.square().mean().sqrt())

    @property
    def median(self) -> float:
        return float(self.errors.median())

    @property
    def worst(self) -> float:
        return float(self.errors.max())

    @property
    def verdict(self) -> str:
        return f"RMS {self.rms:.2e}, median {self.median:.2e}, worst {self.worst:.2e}"

    def page(self) -> report.Page:
        return report.Page(
            f"end of {self.sampler}: {self.calls} calls, {len(self.errors)} samples",
            "anything of another number of steps or of other data; an RMS above the median is that "
            "of a few samples far off",
            facts=["against the flow by DOP853 at 1e-10"],
        )


@arguments
def endpoint(
    sampler: probe.ASampler,
    data: AMixture,
    process: probe.AProcess | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    samples: Samples = 256,
) -> Endpoint:
    """Measure the error of each sample of a deterministic sampler, with fixed steps or not.

    Args:
        sampler: any that draws no noise.
        data: a mixture, or a Gaussian.
        process, times, steps: as in `law`.
        samples: their number, from fixed starts.
    Raises:
        NotAffine: if the sampler draws noise, so that its end is no function of its start.
    """
    model, x, ends = begun(sampler, data, process, times, steps, samples)
    counting = CountingModel(model)
    made = sample(counting, sampler, x, steps=steps, times=times, noise=none)
    off = coordinates(made - flow(model, x, *ends))
    return Endpoint(probe.one_line(sampler), counting.calls, off.square().mean(1).sqrt())


def none(t: float, s: float, like: Tensor) -> Tensor:
    """Noise source of a sampler that must draw none."""
    raise probe.NotAffine("the solver draws noise, so its end is no function of its start")


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


@arguments
def distribution(
    sampler: probe.ASampler,
    data: AMixture,
    process: probe.AProcess | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    samples: Samples = 2048,
    seed: Seed = 0,
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
    model, x, _ = begun(sampler, data, process, times, steps, samples, seed)
    source = torch.Generator().manual_seed(seed)
    made = coordinates(sample(model, sampler, x, steps=steps, times=times, generator=source))
    law = Known.of(model, samples)
    name, floors = probe.one_line(sampler), floors_of(model, samples, seed, law.distances)
    return Distribution(name, samples, law.distances(made), floors)


def floors_of(
    data: GaussianMixture, samples: int, seed: int, measure: Callable[[Tensor], dict[str, float]]
) -> dict[str, Tensor]:
    """The distances of independent batches of exact samples, by name."""
    apart = torch.Generator().manual_seed(seed + 2**31)  # the floor is that of the data alone
    found = [measure(coordinates(data.sample(samples, apart))) for _ in range(FLOORS)]
    return {name: torch.tensor([each[name] for each in found]) for name in found[0]}


@dataclass(frozen=True)
class Known:
    """A mixture's law in flat coordinates, and its quantiles.

    Attributes:
        weights: (K,).
        means: (K, d).
        covariances: (K, d, d).
        directions: (J, d), unit vectors.
        quantiles: (J, n), of the law projected on each, at (i + 1/2) / n.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    directions: Tensor
    quantiles: Tensor

    @staticmethod
    def of(data: GaussianMixture, n: int) -> "Known":
        d, covariances, weights = data.means.shape[1], data.covariances, data.log_weights.exp()
        directions = torch.ones(1, 1).double() if d == 1 else fixed_directions(d)
        means = directions @ data.means.T
        stds = torch.einsum("ji,kil,jl->jk", directions, covariances, directions).sqrt()
        rows = [line_quantiles(weights, m, s, n) for m, s in zip(means, stds, strict=True)]
        return Known(weights, data.means, covariances, directions, torch.stack(rows))

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the mixture, (d,)."""
        return self.weights @ self.means

    @cached_property
    def covariance(self) -> Tensor:
        """Covariance of the mixture, (d, d)."""
        off = self.means - self.mean
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        return within + torch.einsum("k,ki,kj->ij", self.weights, off, off)

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


# ---- the reference flow --------------------------------------------------------------------------

FLOWS: dict[Any, Tensor] = {}


@arguments
def flow(
    data: AMixture, x: Annotated[Tensor, FloatBatch()], t: float = 1.0, s: float = 0.0
) -> Tensor:
    """Compute the exact probability flow from time t to s, by DOP853 at 1e-10; cached (32)."""
    parts = (x, data.log_weights, data.means, data.variances, data.axes)
    # Levels distinguish two processes of one name, such as an edited class.
    levels = data.process.levels(torch.linspace(s, t, 5, dtype=torch.float64))
    shapes = repr((data.process, levels, t, s, x.dtype, x.shape))
    key = (shapes, *(None if part is None else part.numpy().tobytes() for part in parts))
    if key not in FLOWS:
        FLOWS[key] = sample(data, ScipyODE("DOP853", rtol=1e-10, atol=1e-10), x, times=[t, s])
    if len(FLOWS) > KEPT:
        del FLOWS[next(iter(FLOWS))]
    return FLOWS[key].clone()


@dataclass
class CountingModel:
    """A model that counts its calls."""

    model: Model
    calls: int = 0

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        self.calls += 1
        return self.model(x, level)


def begun(
    sampler: Sampler, data: Any, process: Process | None,
    times: Tensor | Sequence[float] | None, steps: int | None, samples: int, seed: int = 0,
) -> tuple[Any, Tensor, tuple[float, float]]:  # fmt: skip
    """The model, starts from its prior, and the first and the last time of the sampler."""
    model = probe.on_process_of(data, sampler, process)
    grid = path_of(model, sampler, steps, None, times)
    seeds = range(seed * samples, (seed + 1) * samples)
    shape = (samples, *probe.sizes(model, None))
    x = model.process.prior(shape, seeds=seeds, dtype=torch.float64)
    return model, x, (float(grid[0]), float(grid[-1]))
