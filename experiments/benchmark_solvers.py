"""The benchmark of solvers: error against network calls, ours and with --peers everybody's.

    python experiments/benchmark_solvers.py
    python experiments/benchmark_solvers.py --peers --seed 3

Four parts: `ends`, the error of fixed-step samplers against the exact flow; `adaptive`, the same
for those with steps of their own; `laws`, the distance of stochastic samplers to the data's law;
`overhead`, what a step costs beside its call. The problems are Gaussian mixtures made at random
from the seed. Writes benchmark.md, benchmark.json and benchmark.png.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import benchmark_ends
import benchmark_laws
import benchmark_overhead
import benchmark_peers
import benchmark_problems
import command
import torch
from benchmark_written import markdown, picture

from sde_diffusion import errors, plots, storage

PARTS = ("ends", "adaptive", "laws", "overhead")


@dataclass(frozen=True)
class Config:
    """Measure the solvers, and write the tables as Markdown and JSON and a picture."""

    parts: tuple[Literal["ends", "adaptive", "laws", "overhead"], ...] = PARTS
    """what is measured"""
    peers: bool = False
    """diffusers, k-diffusion and azula as well: pip install '.[peers]'"""
    problems: tuple[str, ...] = ()
    """which, by name such as narrow-2; all nine if none is given"""
    solvers: tuple[str, ...] = ()
    """only those whose name begins so, such as adams or azula; all if none is given"""
    seed: int = 0
    """of the mixtures, the starts and the noise"""
    samples: int = 512
    """per problem, for the errors of ends"""
    draws: int = 20_000
    """per problem, for the distances of laws"""
    rounds: int = 41
    """repetitions of the timings"""
    out: Path = Path("runs/benchmark")
    """folder of everything written"""


@dataclass
class Found:
    """Everything that was measured.

    Attributes:
        problems: names.
        ends, adaptive: one per solver, setting and problem.
        laws: one per solver, setting and problem.
        overhead: one per solver and shape.
        unet: likewise, with a real network, as a multiple of its forward passes.
        refusals: who does not run at what, and why.
    """

    problems: list[str]
    draws: int
    ends: list[benchmark_ends.End] = field(default_factory=list)
    adaptive: list[benchmark_ends.End] = field(default_factory=list)
    laws: list[benchmark_laws.Distance] = field(default_factory=list)
    overhead: list[benchmark_overhead.Overhead] = field(default_factory=list)
    unet: list[benchmark_overhead.Overhead] = field(default_factory=list)
    refusals: list[benchmark_ends.Refusal] = field(default_factory=list)


def chosen(known: dict[str, Any], beginnings: tuple[str, ...]) -> dict[str, Any]:
    """Those whose name begins with one of these; all if there are none."""
    return {name: made for name, made in known.items() if name.startswith(beginnings or "")}


def families(config: Config) -> dict[str, dict[str, Any]]:
    """Part -> name -> family, of the solvers asked for."""
    fixed: dict[str, Any] = dict(benchmark_ends.OURS)
    adaptive: dict[str, Any] = dict(benchmark_ends.OURS_ADAPTIVE)
    stochastic: dict[str, Any] = dict(benchmark_laws.OURS)
    paths: dict[str, Any] = dict(benchmark_laws.OURS_ADAPTIVE)
    if config.peers:
        fixed |= {name: told_steps(family) for name, family in benchmark_peers.solvers().items()}
        adaptive |= benchmark_peers.adaptive()
        stochastic |= benchmark_peers.stochastic()
    found = {"ends": fixed, "adaptive": adaptive, "laws": stochastic, "paths": paths}
    for beginning in config.solvers:
        if not any(name.startswith(beginning) for part in found.values() for name in part):
            known = ", ".join(name for part in found.values() for name in part)
            raise ValueError(f"--solvers {beginning}: no name begins so; there are: {known:.600}")
    return {part: chosen(known, config.solvers) for part, known in found.items()}


def told_steps(family: benchmark_peers.Family) -> benchmark_ends.Fixed:
    """A family that needs not know the problem."""
    return lambda steps, problem: family(steps)


def measure(config: Config, say: Callable[[str], None] = print) -> Found:
    """All parts asked for."""
    problems = benchmark_problems.named(config.problems, config.seed, config.samples)
    known = families(config)
    found = Found([problem.name for problem in problems], config.draws)
    if "ends" in config.parts:
        for made in benchmark_ends.by_calls(known["ends"], problems, found.refusals):
            found.ends.append(made)
            say(f"{made.solver:50s} {made.problem:14s} {made.setting:5g} calls  {made.rms:.1e}")
    if "adaptive" in config.parts:
        for made in benchmark_ends.by_tolerance(known["adaptive"], problems):
            found.adaptive.append(made)
            say(f"{made.solver:50s} {made.problem:14s} {made.calls:5.0f} calls  {made.rms:.1e}")
    if "laws" in config.parts:
        for made in benchmark_laws.distances(
            known["laws"], known["paths"], problems, found.refusals, config.draws, config.seed
        ):
            found.laws.append(made)
            say(f"{made.solver:50s} {made.problem:14s} {made.calls:5.0f} calls  {made.ratio:.2f}")
    if "overhead" in config.parts:
        loops = benchmark_overhead.with_peers if config.peers else benchmark_overhead.ours
        found.overhead += benchmark_overhead.overheads(
            lambda network, shape: chosen(loops(network, shape), config.solvers),
            rounds=config.rounds,
        )
        found.unet += benchmark_overhead.unet(
            chosen(benchmark_overhead.OURS, config.solvers), rounds=config.rounds
        )
    return found


def versions() -> dict[str, str]:
    """Of the other libraries, where they are installed."""
    found: dict[str, str] = {}
    for library in ("diffusers", "k-diffusion", "azula", "torchdiffeq"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def main(config: Config) -> None:
    errors.integer("--seed", config.seed, 0)
    errors.integer("--samples", config.samples, 2)
    errors.integer("--draws", config.draws, 2)
    errors.integer("--rounds", config.rounds)
    command.check_out(config.out)
    found = measure(config, lambda line: print(line, flush=True))
    out = command.folder(config.out)
    text = markdown(found)
    print(f"\n{text}")
    storage.replace(out / "benchmark.md", text.encode())
    storage.replace(out / "benchmark.json", f"{json.dumps(asdict(found), indent=1)}\n".encode())
    storage.replace(out / "benchmark.png", plots.png(picture(found)))
    command.write_config(out, config, peers=versions(), threads=torch.get_num_threads())
    print(f"-> {out / 'benchmark.md'}")


if __name__ == "__main__":
    benchmark_overhead.quiet()
    command.run(main, Config)
