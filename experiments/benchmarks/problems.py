"""Problems of the benchmark: random Gaussian mixtures, and the exact flow from a given noise.

    problems(seed=0)                       # 9: three kinds in d = 2, 8, 64
    problems(seed=0, kinds=("narrow",))    # one kind in d = 2, 8, 64
    named(("narrow-2",), seed=0)           # just this one

Any seed gives fresh ones. The data have mean 0 and variance 1, averaged over the coordinates. A
start is a draw of pure noise, carried by the exact flow to the level where a solver begins: every
solver begins on the same paths, at whatever level, and is compared with where these end.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from common.words import match
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import validate, verify
from sde_diffusion.grids import frames
from sde_diffusion.processes import Level

KINDS = ("narrow", "anisotropic", "low-rank")
DIMENSIONS = (2, 8, 64)
STRAIGHT = sd.RectifiedFlow()  # on which time is u


@dataclass(frozen=True, eq=False)
class Problem:
    """Data with a known exact flow, and starts.

    Attributes:
        name: its kind and dimension.
        data: the mixture, on VP.
        noise: pure noise, (n, d).
    """

    name: str
    data: sd.exact.GaussianMixture
    noise: Tensor = field(repr=False)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) of the data."""
        weights, means, d = self.data.log_weights.exp(), self.data.means, self.noise.shape[1]
        axes = torch.eye(d, dtype=torch.float64) if self.data.axes is None else self.data.axes
        within = axes * self.data.variances.expand(-1, d)[:, None, :] @ axes.mT
        mean = weights @ means
        apart = means - mean
        covariance = torch.einsum("k,kij->ij", weights, within) + (weights * apart.T) @ apart
        return mean, symmetric(covariance)

    @property
    def frame(self) -> frames.GaussianFrame:
        """The Gaussian frame of the data's own mean and covariance."""
        return frames.GaussianFrame.of(*self.moments)

    @property
    def start(self) -> Tensor:
        """The batch at t = 1 of VP, (n, d)."""
        return self.at(self.data.process.levels(torch.ones(1, dtype=torch.float64))[0])

    @property
    def end(self) -> Tensor:
        """End of the exact flow, (n, d)."""
        return path(self, 0.0)

    def at(self, level: Level[float]) -> Tensor:
        """The batch at a level of any process, (n, d)."""
        return frames.leave(path(self, level.u), level)

    def errors(self, made: Tensor) -> Tensor:
        """Return the root mean square error of each sample, (n,), against the end of the flow."""
        return (made - self.end).square().mean(1).sqrt()


@lru_cache(maxsize=2048)
def path(problem: Problem, u: float) -> Tensor:
    """y at u, in the straight frame, where y = noise at u = 1."""
    if u >= 1:
        return problem.noise
    return verify.flow(problem.data.on(STRAIGHT), problem.noise, 1.0, u)


def problems(
    seed: int = 0,
    kinds: tuple[str, ...] = KINDS,
    dimensions: tuple[int, ...] = DIMENSIONS,
    samples: int = 512,
) -> list[Problem]:
    """Return one problem of each kind in each dimension.

    Args:
        seed: of the mixtures and of the noise.
        kinds: narrow (isotropic modes of standard deviation 0.1 to 0.3), anisotropic (each mode
            with axes and variances of its own) or low-rank (means and most of the variance in a
            few directions).
        dimensions: d.
        samples: of the noise.
    """
    validate.integer("seed", seed, 0)
    validate.integer("samples", samples, 2)
    made: list[Problem] = []
    for kind in kinds:
        maker = MAKERS[validate.choice("kinds", kind, KINDS)]
        for d in dimensions:
            entropy = (
                3_000_017 * validate.integer("dimensions", d) + 1009 * seed + KINDS.index(kind)
            )
            source = torch.Generator().manual_seed(entropy)
            data = standardized(*maker(d, source))
            made.append(Problem(f"{kind}-{d}", data, normal(source, samples, d)))
    return made


def named(names: tuple[str, ...], seed: int = 0, samples: int = 512) -> list[Problem]:
    """Return the problems of these names; all if none is given."""
    known = {problem.name: problem for problem in problems(seed, samples=samples)}
    chosen = dict.fromkeys(match("--problems", name, known) for name in names)
    return [known[name] for name in chosen or known]


def standardized(weights: Tensor, means: Tensor, covariances: Tensor) -> sd.exact.GaussianMixture:
    """The mixture moved to mean 0 and scaled, all coordinates alike, to mean variance 1."""
    means = means - weights @ means
    variances = covariances.diagonal(dim1=1, dim2=2) if covariances.ndim == 3 else covariances
    within = variances.reshape(len(means), -1).mean(1)
    variance = weights @ (within + means.square().mean(1))
    return sd.exact.GaussianMixture(
        sd.VP(), weights, means / variance.sqrt(), covariances / variance
    )


def narrow(d: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Isotropic modes, 4 to 8 of them, of standard deviation 0.1 to 0.3."""
    k = components(source)
    std = 0.1 + 0.2 * uniform(source, k)
    return shares(source, k), normal(source, k, d), std**2


def anisotropic(d: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Modes of variances between 0.001 and 0.5; axes of their own up to 16 coordinates.

    Beyond, the axes are the coordinates, which is cheaper and all the same to a solver.
    """
    k = components(source)
    variances = 0.001 * 500 ** uniform(source, k, d)
    weights, means = shares(source, k), normal(source, k, d)
    if d > 16:
        return weights, means, variances
    axes = torch.linalg.qr(normal(source, k, d, d)).Q
    return weights, means, symmetric(axes * variances[:, None, :] @ axes.mT)


def low_rank(d: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Means in r = ceil(d / 8) directions of unequal size; variance 0.3^2 there, 0.05^2 aside."""
    k, r = components(source), -(-d // 8)
    size = 2.0 / (1 + torch.arange(r, dtype=torch.float64)) ** 0.5
    means = torch.zeros(k, d, dtype=torch.float64)
    means[:, :r] = size * normal(source, k, r)
    variances = torch.full((k, d), 0.05**2, dtype=torch.float64)
    variances[:, :r] = 0.3**2 * (0.5 + uniform(source, k, r))
    return shares(source, k), means, variances


MAKERS = dict(zip(KINDS, (narrow, anisotropic, low_rank), strict=True))


def components(source: torch.Generator) -> int:
    return int(torch.randint(4, 9, (1,), generator=source))


def shares(source: torch.Generator, k: int) -> Tensor:
    """Weights, the largest at most 3 times the smallest before they are normalized."""
    made = 0.5 + uniform(source, k)
    return made / made.sum()


def symmetric(covariances: Tensor) -> Tensor:
    """Free of the rounding of products."""
    return (covariances + covariances.mT) / 2


def uniform(source: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=source, dtype=torch.float64)


def normal(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)
