"""Benchmark of laws: distances between the samples of a stochastic sampler and the data's law.

Two distances computed from the exact law, the sliced W2 of `verify.distribution` and an MMD, each
beside its floor: the same distance of as many exact samples.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from benchmarks.ends import Counted, Refusal, steps_for
from benchmarks.problems import Problem
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.verify.mixtures import Known

COLUMNS = (10, 20, 50, 100)  # network calls
TOLERANCES = (1e-1, 3e-2, 1e-2)
FLOORS = 8  # batches of exact samples
FREQUENCIES = 512

Family = Callable[[int], sd.samplers.Sampler]  # of a number of steps
Adaptive = Callable[[float], sd.samplers.Sampler]  # of a tolerance

OURS: dict[str, Family] = {
    "ancestral": lambda steps: sd.Ancestral(),
    "euler-maruyama": lambda steps: sd.EulerMaruyama(),
    "sde-dpmsolver": lambda steps: sd.DPMSolver(2, eta=1.0),
    "velocity-multistep": lambda steps: sd.VelocityMultistep(),
    "adams auto (no noise)": lambda steps: sd.Adams.auto(steps),
}
OURS_ADAPTIVE: dict[str, Adaptive] = {
    "adaptive-sde": lambda tolerance: sd.AdaptiveSDE(rtol=tolerance, atol=tolerance),
}


@dataclass(frozen=True)
class Distance:
    """Distances of one sampler's samples.

    Attributes:
        solver, problem: their names.
        setting: network calls, at most, or the tolerance.
        calls: network evaluations per sample, on average.
        distances: name -> its value.
        floors: name -> mean and standard deviation for exact samples.
    """

    solver: str
    problem: str
    setting: float
    calls: float
    distances: dict[str, float]
    floors: dict[str, tuple[float, float]]

    @property
    def ratio(self) -> float:
        """Largest distance in units of its floor; exact samples have about 1."""
        return max(self.distances[name] / self.floors[name][0] for name in self.distances)


@dataclass(frozen=True)
class Characteristic:
    r"""The MMD with a Gaussian kernel, as the distance of characteristic functions.

    mmd^2 = mean_j |phi_n(w_j) - phi(w_j)|^2,   phi(w) = sum_k p_k exp(i w m_k - w S_k w / 2),

    over fixed w_j drawn from N(0, h^-2 I), h^2 = d: the kernel exp(-|x - y|^2 / 2 d). Its cost is
    linear in the samples, where the double sum of `verify.distribution` is quadratic.

    Attributes:
        frequencies: w, (J, d).
        known: phi, (J,), complex.
    """

    frequencies: Tensor
    known: Tensor

    @staticmethod
    def of(data: sd.exact.GaussianMixture, source: torch.Generator) -> "Characteristic":
        d = data.means.shape[1]
        w = torch.randn(FREQUENCIES, d, dtype=torch.float64, generator=source) / math.sqrt(d)
        turned = w[None] if data.axes is None else w @ data.axes  # (K or 1, J, d)
        spread = (turned.square() * data.variances.expand(-1, d)[:, None]).sum(2)  # (K, J)
        phases = torch.complex(-spread / 2, data.means @ w.T)
        weights = data.log_weights.exp().to(phases.dtype)
        return Characteristic(w, weights @ phases.exp())

    def mmd(self, x: Tensor) -> float:
        """Return the distance of the points (n, d), as a law, to the mixture."""
        found = torch.zeros_like(self.known)
        for part in x.split(2048):
            phase = part @ self.frequencies.T
            found += torch.complex(phase.cos().sum(0), phase.sin().sum(0))
        return float((found / len(x) - self.known).abs().square().mean().sqrt())


@dataclass(frozen=True)
class Ruler:
    """The distances of a problem, and their floors."""

    measures: dict[str, Callable[[Tensor], float]]
    floors: dict[str, tuple[float, float]]

    @staticmethod
    def of(problem: Problem, samples: int, seed: int) -> "Ruler":
        law = Known(problem.data, samples)
        wave = Characteristic.of(problem.data, torch.Generator().manual_seed(seed))
        measures = {"sliced W2": law.w2, "MMD": wave.mmd}
        apart = torch.Generator().manual_seed(seed + 2**31)
        exact = [problem.data.sample(samples, apart) for _ in range(FLOORS)]
        floors = {name: spread(measure(x) for x in exact) for name, measure in measures.items()}
        return Ruler(measures, floors)

    def distances(self, x: Tensor) -> dict[str, float]:
        return {name: measure(x) for name, measure in self.measures.items()}


def distances(
    families: dict[str, Family],
    adaptive: dict[str, Adaptive],
    problems: Iterable[Problem],
    refusals: list[Refusal],
    samples: int = 20_000,
    seed: int = 0,
    columns: Iterable[int] = COLUMNS,
) -> Iterator[Distance]:
    """Measure every sampler on every problem at every number of calls or tolerance.

    Args:
        refusals: what cannot run is added here.
        samples: drawn of each.
        seed: of starts, noise, floors and frequencies.
    """
    for problem in problems if families or adaptive else ():
        ruler = Ruler.of(problem, samples, seed)
        for name, family in families.items():
            for column in columns:
                made = filled(name, problem, family, column, samples, seed, refusals)
                if made is not None:
                    x, calls = made
                    found = ruler.distances(x)
                    yield Distance(name, problem.name, column, calls, found, ruler.floors)
        for name, family in adaptive.items():
            for tolerance in TOLERANCES:
                x, calls = drawn(problem, family(tolerance), None, samples, seed)
                found = ruler.distances(x)
                yield Distance(name, problem.name, tolerance, calls, found, ruler.floors)


def filled(
    name: str, problem: Problem, family: Family, column: int, samples: int, seed: int,
    refusals: list[Refusal],
) -> tuple[Tensor, float] | None:  # fmt: skip
    """Return samples within this number of calls and their calls, or None, and add a refusal."""
    reasons = [f"1 step makes more than {column} calls"]

    def count(steps: int) -> int | None:
        try:
            return math.ceil(drawn(problem, family(steps), steps, 2, seed)[1])
        except Exception as error:  # the peer's own code: any error is recorded
            reasons.append(f"{steps} steps: {type(error).__name__}: {error!s:.200}")
            return None

    steps = steps_for(column, count)
    if steps is None:
        refusals.append(Refusal(name, problem.name, column, " ".join(reasons[-1].split())))
        return None
    made = drawn(problem, family(steps), steps, samples, seed)
    if not bool(made[0].isfinite().all()):
        refusals.append(Refusal(name, problem.name, column, f"{steps} steps: not finite"))
        return None
    return made


def drawn(
    problem: Problem, sampler: sd.samplers.Sampler, steps: int | None, samples: int, seed: int
) -> tuple[Tensor, float]:
    """Return samples, and the mean number of network evaluations of each.

    Args:
        steps: number of steps; adapters, which know their process, have their own.
    """
    process = getattr(sampler, "process", None)
    given = steps if process is None else None
    model = Counted(problem.data if process is None else problem.data.on(process))
    source = torch.Generator().manual_seed(seed)
    x = start(model, sampler, given, problem, samples, source)
    made = sd.sample(model, sampler, x, steps=given, generator=source)
    return made, model.samples / samples


def start(
    model: Counted, sampler: sd.samplers.Sampler, steps: int | None, problem: Problem, samples: int,
    source: torch.Generator,
) -> Tensor:  # fmt: skip
    """Draws of the exact law at the level where the sampler begins, so that no start is wrong."""
    first = model.process.levels(sampler.grid(model.process, steps)[:1])[0]
    x0 = problem.data.sample(samples, source)
    return first.alpha * x0 + first.sigma * torch.randn(x0.shape, dtype=x0.dtype, generator=source)


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and standard deviation."""
    made = torch.tensor(list(values), dtype=torch.float64)
    return float(made.mean()), float(made.std())
