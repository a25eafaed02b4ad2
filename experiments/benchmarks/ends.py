"""Benchmark of ends: errors of deterministic samplers against the exact flow, by network calls.

Network calls are counted, never steps: a sampler that makes more calls than steps gets as many
steps as the calls allow.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from benchmarks.problems import Problem
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.models.model import Model
from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import Level, Process

COLUMNS = (3, 5, 10, 20, 50, 100)  # network calls
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)

Fixed = Callable[[int, Problem], sd.samplers.Sampler]  # of a number of steps
Adaptive = Callable[[float, Problem], sd.samplers.Sampler]  # of a tolerance

OURS: dict[str, Fixed] = {
    "adams auto": lambda steps, problem: sd.Adams.auto(steps),
    "adams auto, Gaussian frame": lambda steps, problem: sd.Adams.auto(steps, problem.frame),
    **{f"adams {k}": lambda steps, problem, k=k: sd.Adams(k) for k in range(1, 6)},
    "dpmsolver 2": lambda steps, problem: sd.DPMSolver(2),
    "dpmsolver 3": lambda steps, problem: sd.DPMSolver(3),
    "ddim": lambda steps, problem: sd.Ancestral(eta=0.0),
    "heun": lambda steps, problem: sd.Heun(),
}
OURS_ADAPTIVE: dict[str, Adaptive] = {
    "adaptive-ode": lambda tolerance, problem: sd.AdaptiveODE(tolerance, tolerance),
    "adaptive-ode, Gaussian frame": lambda tolerance, problem: sd.AdaptiveODE(
        tolerance, tolerance, problem.frame
    ),
    **{
        f"torch-ode {method}": lambda tolerance, problem, method=method: sd.TorchODE(
            method, tolerance, tolerance
        )
        for method in ("dopri5", "bosh3")
    },
}


@dataclass(frozen=True)
class End:
    """Result of one sampler on one problem.

    Attributes:
        solver, problem: their names.
        setting: the column, in calls, or the tolerance.
        calls: network evaluations per sample, on average.
        slowest: number of network batches: the calls of the slowest sample.
        rms, median, worst: of the errors, each the root mean square over a sample's coordinates.
    """

    solver: str
    problem: str
    setting: float
    calls: float
    slowest: int
    rms: float
    median: float
    worst: float


@dataclass(frozen=True)
class Refusal:
    """A sampler that does not run, and the reason: many peers need several steps."""

    solver: str
    problem: str
    setting: float
    reason: str


@dataclass
class Counted:
    """Model that counts its batches and samples."""

    model: Model
    calls: int = 0
    samples: int = 0

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        self.calls += 1
        self.samples += len(x)
        return self.model(x, level)

    def rows(self, index: Tensor) -> "Counted":
        return self


def shouted(t: float, s: float, like: Tensor) -> Tensor:
    """Return noise that a sampler must not add: it may multiply it by 0, or it ends far away."""
    return torch.full_like(like, 1e6)


def end(
    solver: str,
    setting: float,
    problem: Problem,
    sampler: sd.samplers.Sampler,
    steps: int | None = None,
) -> End:
    """Run it, from where it begins to the data.

    Args:
        steps: number of steps; adapters, which know their process, have their own.
    """
    process = getattr(sampler, "process", None)
    steps = steps if process is None else None
    model = Counted(problem.data if process is None else problem.data.on(process))
    times = sampler.grid(model.process, steps)
    start = problem.at(model.process.levels(times[:1])[0])
    made = sd.sample(model, sampler, start, steps=steps, noise=shouted)
    off = problem.errors(made)
    if not bool(off.isfinite().all()):
        raise ValueError(f"{solver} is not finite on {problem.name}")
    return End(
        solver, problem.name, setting, model.samples / len(start), model.calls,
        float(off.square().mean().sqrt()), float(off.median()), float(off.max()),
    )  # fmt: skip


def steps_for(calls: int, count: Callable[[int], int | None]) -> int | None:
    """Return the largest number of steps within this number of calls; None if there is none.

    Args:
        calls: at most.
        count: steps -> calls of a run, not decreasing; None where it does not run.
    """
    steps = calls
    while steps:
        made = count(steps)
        if made is not None and made <= calls:
            return steps
        # Calls are linear in the steps, give or take one for the last of them.
        down = steps - 1 if made is None else math.floor(steps * calls / made) + 1
        steps = min(steps - 1, down)
    return None


def by_calls(
    families: dict[str, Fixed],
    problems: Sequence[Problem],
    refusals: list[Refusal],
    columns: Iterable[int] = COLUMNS,
) -> Iterator[End]:
    """Measure every sampler on every problem at every number of calls.

    Args:
        refusals: what cannot run is added here.
    """
    first, *others = problems
    for name, family in families.items():
        for calls in columns:
            tries: list[Refusal] = []
            runs: dict[int, End] = {}

            def count(steps: int) -> int | None:
                made = tried(name, calls, first, family, steps, tries)  # noqa: B023 called at once
                if made is None:
                    return None
                runs[steps] = made  # noqa: B023
                return made.slowest

            steps = steps_for(calls, count)
            if steps is None:
                reason = tries[-1].reason if tries else f"1 step makes more than {calls} calls"
                refusals.append(Refusal(name, "any", calls, reason))
                continue
            yield runs[steps]
            for problem in others:
                made = tried(name, calls, problem, family, steps, refusals)
                if made is not None:
                    yield made


def tried(
    name: str, setting: float, problem: Problem, family: Fixed, steps: int, refusals: list[Refusal]
) -> End | None:
    """Return `end`, or None, and add a refusal."""
    try:
        return end(name, setting, problem, family(steps, problem), steps)
    except Exception as error:  # the peer's own code: any error is recorded
        reason = f"{steps} steps: {type(error).__name__}: {' '.join(str(error).split()):.200}"
        refusals.append(Refusal(name, problem.name, setting, reason))
        return None


def by_tolerance(
    families: dict[str, Adaptive],
    problems: Sequence[Problem],
    tolerances: Iterable[float] = TOLERANCES,
) -> Iterator[End]:
    """Measure every adaptive sampler on every problem at every tolerance."""
    for name, family in families.items():
        for tolerance in tolerances:
            for problem in problems:
                yield end(name, tolerance, problem, family(tolerance, problem))


# ---- over the problems ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """Figures over all problems: geometric means of errors, mean and maximum of calls."""

    solver: str
    setting: float
    calls: float
    slowest: int
    rms: float
    median: float


def means(ends: Iterable[End], problems: int) -> list[Mean]:
    """Return one mean per solver and setting that solved all problems."""
    groups: dict[tuple[str, float], list[End]] = {}
    for made in ends:
        groups.setdefault((made.solver, made.setting), []).append(made)
    return [
        Mean(
            solver, setting, sum(e.calls for e in group) / problems, max(e.slowest for e in group),
            geometric(e.rms for e in group), geometric(e.median for e in group),
        )
        for (solver, setting), group in groups.items()
        if len(group) == problems
    ]  # fmt: skip


def geometric(values: Iterable[float]) -> float:
    """Return the geometric mean; 0 if a value is 0."""
    logs = [math.log(value) if value else -math.inf for value in values]
    return math.exp(sum(logs) / len(logs))


def front(points: Iterable[Mean]) -> list[Mean]:
    """Return the Pareto front in calls and error, by calls."""
    left: list[Mean] = []
    for point in sorted(points, key=lambda p: (p.calls, p.rms)):
        if not left or point.rms < left[-1].rms:
            left.append(point)
    return left
