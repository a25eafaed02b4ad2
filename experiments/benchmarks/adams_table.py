"""The table of `Adams.auto`: the best k, p and start for each number of calls, on mixtures.

    python experiments/benchmarks/adams_table.py

Every setting is run on random mixtures (those of solvers.py at seeds of its own, and the
same with modes a third as wide) and compared with the exact flow. The score is the geometric mean
over the problems of the RMS error; among settings within 3 % of the best the one with the least
median error is taken. Writes adams_table.md and adams_table.json, and prints the two tables as
samplers/adams.py has them.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file: its modules are there

from common import flags

CALLS = (3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)


@dataclass(frozen=True)
class Config:
    """Print the tables of Adams.auto, and write them with their figures."""

    calls: tuple[int, ...] = CALLS
    """numbers of calls, each with its best setting"""
    seeds: tuple[int, ...] = (100, 101)
    """seeds of the problems, eighteen for each"""
    num_samples: int = 256
    """samples of each problem"""
    out: Path = Path("runs/adams_table")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import json
import math
from collections.abc import Iterator

import torch
from benchmarks.problems import Problem, problems, standardized
from common import command

import sde_diffusion as sd
from sde_diffusion import validate
from sde_diffusion.files import storage
from sde_diffusion.grids import frames
from sde_diffusion.grids.frames import Frame

POWERS = (1.0, 1.2, 1.3, 1.4, 1.6, 1.8)
STARTS = (2.0, 4.0, 6.0, 12.0)  # sigma / alpha, for few calls
FEW = 15


@dataclass(frozen=True)
class Setting:
    """A setting and its figures, geometric means over the problems."""

    frame: str
    calls: int
    k: int
    p: float
    start: float | None
    rms: float
    median: float


def candidates(calls: int, gaussian: bool) -> Iterator[tuple[int, float, float | None]]:
    """Iterate over (k, p, start) worth a trial: the order grows with the calls.

    In a Gaussian frame at most three slopes up to 20 calls. Mixtures would take four, but a trained
    network's outputs are rougher: on MNIST (packaged weights, 16 digits, 20 calls, p = 1.6) three
    end at a median of 0.005 from the flow, four at 0.024.
    """
    least = 1 if calls < 5 else 2 if calls < 15 else 3
    most = 3 if gaussian and calls <= 20 else least + 2 if calls < 50 else 5
    for k in range(least, min(calls, most) + 1):
        for p in POWERS:
            yield k, p, None
            for start in STARTS if gaussian and calls <= FEW else ():
                yield k, p, start


def sharper(problem: Problem) -> Problem:
    """Return the problem with modes a third as wide."""
    data = problem.data
    spread = data.variances.expand(-1, data.means.shape[1])
    if data.axes is not None:
        spread = data.axes * spread[:, None, :] @ data.axes.mT
    made = standardized(data.log_weights.exp(), data.means, spread / 9)
    return Problem(f"sharper {problem.name}", made, problem.noise)


def frame_of(problem: Problem) -> Frame:
    mean, covariance = problem.moments
    return frames.GaussianFrame.of(mean, covariance)


def tried(
    name: str,
    calls: int,
    setting: tuple[int, float, float | None],
    over: list[tuple[Problem, Frame]],
) -> Setting:
    """Measure one setting on all problems."""
    k, p, start = setting
    rms, medians = [], []
    for problem, frame in over:
        sampler = sd.Adams(k, p, frame, start)
        made = command.sampled(sampler, problem.data, sampler, problem.start, steps=calls)
        errors = problem.errors(made)
        rms.append(float(errors.square().mean().sqrt()))
        medians.append(float(errors.median()))
    return Setting(name, calls, k, p, start, geometric(rms), geometric(medians))


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def best(settings: list[Setting]) -> Setting:
    """Return the setting of least median error among those within 3 % of the least RMS."""
    least = min(setting.rms for setting in settings)
    near = [setting for setting in settings if setting.rms <= 1.03 * least]
    return min(near, key=lambda setting: setting.median)


def markdown(settings: list[Setting]) -> str:
    lines = ["| frame | calls | k | p | start | RMS | median |", "| " + "--- | " * 7]
    for s in settings:
        start = "" if s.start is None else f"{s.start:g}"
        lines.append(
            f"| {s.frame} | {s.calls} | {s.k} | {s.p:g} | {start} | {s.rms:.3g} | {s.median:.3g} |"
        )
    return "\n".join([*lines, ""])


def main(config: Config) -> None:
    for calls in config.calls:
        validate.integer("--calls", calls, at_most=1000)
    for seed in config.seeds:
        validate.integer("--seeds", seed, at_least=0)
    validate.integer("--num-samples", config.num_samples, at_least=2)
    command.check_out(config.out)
    print(f"settings for {config.calls} calls -> {config.out}", flush=True)
    found: list[Setting] = []
    given = [p for seed in config.seeds for p in problems(seed, samples=config.num_samples)]
    made = [*given, *map(sharper, given)]
    straight: list[tuple[Problem, Frame]] = [(problem, frames.Straight()) for problem in made]
    gaussian = [(problem, frame_of(problem)) for problem in made]
    for name, over in (("Straight", straight), ("Gaussian", gaussian)):
        for calls in config.calls:
            trials = [
                tried(name, calls, setting, over)
                for setting in candidates(calls, name == "Gaussian")
            ]
            found.append(best(trials))
            print(found[-1], flush=True)
    out = command.folder(config.out)
    for name in ("Straight", "Gaussian"):
        rows = {s.calls: (s.k, s.p, s.start) for s in found if s.frame == name}
        print(f"{name}: {rows}")
    storage.replace(out / "adams_table.md", markdown(found).encode())
    figures = json.dumps([asdict(setting) for setting in found], indent=1)
    storage.replace(out / "adams_table.json", f"{figures}\n".encode())
    command.write_config(out, config)
    print(f"-> {out / 'adams_table.md'}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    command.run(main, Config)
