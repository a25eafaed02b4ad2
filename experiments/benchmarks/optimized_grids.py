"""Comparison of grids: exact W2 on a Gaussian spectrum, and RMS errors on mixtures.

    python experiments/benchmarks/optimized_grids.py

First table: the exact W2 of each sampler to Gaussian data of MNIST's spectrum, or of a power law,
on each grid. Second: the RMS of its end against the exact flow on the mixtures of
problems.py, where the grids are optimized for the covariance of each mixture. Third: the
factor by which the W2 predicted from a mixture's covariance is too small, on the sampler's own
grid, and the factor by which the steps of `verify.steps_for` are too few for the measured RMS.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file: its modules are there

from common import flags


@dataclass(frozen=True)
class Config:
    """Print the tables; write them as optimized_grids.md, .json and .png."""

    spectrum: Literal["mnist", "power"] = "mnist"
    """eigenvalues of the dequantized digits' covariance, or 10 / i^1.5 for i = 1 .. 784"""
    steps: tuple[int, ...] = (5, 10, 20, 50)
    """numbers of sampling steps"""
    seeds: tuple[int, ...] = (0,)
    """seeds of the mixtures"""
    dimensions: tuple[int, ...] = (2, 8, 64)
    """dimensions of the mixtures"""
    num_samples: int = 256
    """samples of each mixture"""
    cases_only: bool = False
    """leave out the first two tables"""
    out: Path = Path("runs/optimized_grids")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import json
import math
from collections.abc import Callable

import torch
from benchmarks.problems import Problem, problems
from common import best_grids, command
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import plots, progress, validate, verify
from sde_diffusion.files import storage
from sde_diffusion.grids import frames
from sde_diffusion.verify import spectra

VP = sd.VP()
SAMPLERS: dict[str, Callable[[int], sd.samplers.Sampler]] = {
    "Ancestral(eta=0)": lambda steps: sd.Ancestral(eta=0.0),
    "Heun": lambda steps: sd.Heun(),
    "Adams.auto": sd.Adams.auto,
    "Ancestral": lambda steps: sd.Ancestral(),
}
STOCHASTIC = ("Ancestral",)  # no RMS: its end belongs to its noise
GRIDS: dict[str, Callable[[sd.samplers.Sampler, int], Tensor]] = {
    "own": lambda sampler, steps: sampler.grid(VP, steps),
    "uniform": lambda sampler, steps: sd.grids.Uniform()(VP, steps),
    "log-SNR": lambda sampler, steps: even_log_snr(sd.grids.Karras()(VP, steps)),
    "Karras": lambda sampler, steps: sd.grids.Karras()(VP, steps),
    "u^(1/1.25)": lambda sampler, steps: sd.grids.Power(1.25)(VP, steps),
}
NAMES = (*GRIDS, "optimized")


@dataclass(frozen=True)
class Row:
    """One sampler at one number of steps: a figure for each grid."""

    sampler: str
    steps: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Case:
    """Results on a mixture, relative to predictions from Gaussians.

    Attributes:
        error: RMS by the W2 per coordinate that the covariance predicts.
        error_narrowest: RMS by that of the worst Gaussian, with `narrowest` of the least mode.
        short: steps by those of `verify.steps_for` for the RMS.
        short_narrowest: the same with `narrowest`.
    """

    sampler: str
    steps: int
    problem: str
    error: float
    error_narrowest: float
    short: float
    short_narrowest: float


def spectrum(name: str) -> Tensor:
    if name == "power":
        return 10 / torch.arange(1, 785, dtype=torch.float64) ** 1.5
    frame = frames.GaussianFrame.pretrained("mnist")
    left = len(frame.axes) - len(frame.variances)
    return torch.cat([frame.variances, frame.variances.new_full((left,), frame.rest)])


def even_log_snr(times: Tensor) -> Tensor:
    """Return the grid evenly spaced in the log-SNR between the first and the last level above 0.

    The first below pure noise, that is: sigma / alpha = 80 and 0.002 in the levels of Karras et al.
    """
    log_snr = VP.log_snr(times[:-1])
    first = min(int(log_snr[0] < -2 * math.log(80.001)), len(log_snr) - 1)
    even = torch.linspace(
        log_snr[first].item(), log_snr[-1].item(), len(log_snr) - first, dtype=torch.float64
    )
    return torch.cat([times[:first], VP.time(even), times[-1:]])


def times_of(name: str, sampler: sd.samplers.Sampler, steps: int, covariance: Tensor) -> Tensor:
    if name == "optimized":
        return best_grids.optimized(sampler, steps, covariance, VP)
    return GRIDS[name](sampler, steps)


def gaussian(steps: int, name: str, eigenvalues: Tensor) -> Row:
    """Return the exact W2 per coordinate on each grid, of a run from the prior."""
    sampler, data = SAMPLERS[name](steps), spectra.centred(eigenvalues, VP)
    figures: dict[str, float] = {}
    for grid in NAMES:
        found = spectra.along(sampler, data, times=times_of(grid, sampler, steps, eigenvalues))
        figures[grid] = per_coordinate(found.errors)
    return Row(name, steps, figures)


def mixtures(steps: int, name: str, over: list[Problem]) -> Row:
    """Return the geometric mean over the mixtures of the RMS on each grid."""
    sampler = SAMPLERS[name](steps)
    figures: dict[str, float] = {}
    for grid in NAMES:
        found = [
            rms(problem, sampler, times_of(grid, sampler, steps, problem.moments[1]))
            for problem in over
        ]
        figures[grid] = math.exp(sum(map(math.log, found)) / len(found))
    return Row(name, steps, figures)


def case(steps: int, name: str, problem: Problem) -> Case:
    """Compare errors and steps with predictions from Gaussians, on the sampler's own grid."""
    family, covariance = SAMPLERS[name], problem.moments[1]
    sampler, d = family(steps), len(covariance)
    made = rms(problem, sampler, sampler.grid(VP, steps))
    row: list[float] = []
    for least in (None, float(problem.data.variances.min()) ** 0.5):
        predicted = verify.steps_for(
            made * d**0.5, covariance, family, VP, narrowest=least, most=256
        )
        row += [made / at(steps, family, covariance, least), steps / predicted.steps]
    return Case(name, steps, problem.name, row[0], row[2], row[1], row[3])


def at(
    steps: int,
    family: Callable[[int], sd.samplers.Sampler],
    covariance: Tensor,
    least: float | None,
) -> float:
    """Return the W2 per coordinate at this number of steps."""
    data = spectra.centred(covariance, VP)
    own = spectra.along(family(steps), data, steps).errors
    if least is None:
        return per_coordinate(own)
    band = spectra.centred(spectra.band(least**2, float(data.variances.max())), VP)
    between = spectra.along(family(steps), band, steps).errors
    return float(torch.cat([own, between]).max())


def rms(problem: Problem, sampler: sd.samplers.Sampler, times: Tensor) -> float:
    made = command.sampled(sampler, problem.data, sampler, problem.start, times=times)
    return float(problem.errors(made).square().mean().sqrt())


def per_coordinate(distances: Tensor) -> float:
    return float(distances.square().mean().sqrt())


def table(title: str, rows: list[Row]) -> str:
    lines = [f"## {title}", "", f"| sampler | steps | {' | '.join(NAMES)} |"]
    lines.append("| " + "--- | " * (2 + len(NAMES)))
    for row in rows:
        figures = " | ".join(f"{row.figures[name]:.3g}" for name in NAMES)
        lines.append(f"| {row.sampler} | {row.steps} | {figures} |")
    return "\n".join([*lines, ""])


def case_table(found: list[Case]) -> str:
    columns = ("error", "error_narrowest", "short", "short_narrowest")
    lines = ["## RMS on mixtures by predictions from Gaussians: median, 90 %, maximum", ""]
    lines.append(
        "| sampler | steps | RMS / W2 | with narrowest | steps / steps_for | with narrowest |"
    )
    lines.append("| " + "--- | " * 6)
    kinds = dict.fromkeys((each.sampler, each.steps) for each in found)
    for name, steps in [*kinds, *((name, 0) for name in dict.fromkeys(k for k, _ in kinds))]:
        own = [each for each in found if each.sampler == name and steps in (0, each.steps)]
        cells = [", ".join(quantiles([getattr(each, column) for each in own]))
                 for column in columns]  # fmt: skip
        lines.append(f"| {name} | {steps or 'all'} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def quantiles(values: list[float]) -> list[str]:
    levels = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(levels)
    return [f"{value:.2g}" for value in found.tolist()]


def picture(rows: list[Row]) -> Any:
    """Draw the first table in logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(SAMPLERS), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(SAMPLERS), sharey=True), SAMPLERS, strict=True):
        own = [row for row in rows if row.sampler == name]
        for marker, grid in zip("os^Dvx", NAMES, strict=True):
            axis.plot(
                [row.steps for row in own], [row.figures[grid] for row in own],
                marker=marker, label=grid,
            )  # fmt: skip
        axis.set(title=name, xlabel="steps")
        plots.log_scale(axis)
        axis.set_xticks([row.steps for row in own], [str(row.steps) for row in own])
        axis.xaxis.minorticks_off()
    figure.axes[0].set_ylabel("W2 per coordinate")
    figure.axes[0].legend(fontsize=7)
    return figure


def main(config: Config) -> None:
    for count in config.steps:
        validate.integer("--steps", count, 2)
    for seed in config.seeds:
        validate.integer("--seeds", seed, 0)
    for dimension in config.dimensions:
        validate.integer("--dimensions", dimension)
    validate.integer("--num-samples", config.num_samples, 2)
    if config.cases_only:
        flags.unused(config, ("spectrum",), "with --cases-only")
    command.check_out(config.out)
    print(f"grids of {config.steps} steps -> {config.out}", flush=True)
    over = [p for seed in config.seeds for p in problems(
        seed, dimensions=config.dimensions, samples=config.num_samples)]  # fmt: skip
    flows = [name for name in SAMPLERS if name not in STOCHASTIC]
    exact: list[Row] = []
    on_mixtures: list[Row] = []
    if not config.cases_only:
        eigenvalues = spectrum(config.spectrum)
        each_one = [(name, n) for name in SAMPLERS for n in config.steps]
        bar = progress.bar(each_one, desc="Gaussian")
        exact = [gaussian(n, name, eigenvalues) for name, n in bar]
        each_flow = [(name, n) for name in flows for n in config.steps]
        bar = progress.bar(each_flow, desc="mixtures")
        on_mixtures = [mixtures(n, name, over) for name, n in bar]
    cases = [(n, name, each) for name in flows for n in config.steps for each in over]
    found = [case(*each) for each in progress.bar(cases, desc="cases")]
    parts = [case_table(found)]
    if exact:
        title = f"Exact W2 per coordinate, Gaussian data, spectrum {config.spectrum}"
        second = "RMS on mixtures, geometric mean"
        parts = [table(title, exact), table(second, on_mixtures), *parts]
    report = "\n".join(parts)
    print(report)
    out = command.folder(config.out)
    storage.replace(out / "optimized_grids.md", report.encode())
    figures = {"gaussian": exact, "mixtures": on_mixtures, "cases": found}
    record = {name: [asdict(row) for row in rows] for name, rows in figures.items()}
    storage.replace(out / "optimized_grids.json", f"{json.dumps(record, indent=1)}\n".encode())
    if exact:
        storage.replace(out / "optimized_grids.png", plots.png(picture(exact)))
    command.write_config(out, config)
    print(f"-> {out / 'optimized_grids.md'}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    command.run(main, Config)
