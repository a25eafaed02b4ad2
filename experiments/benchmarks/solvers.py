"""The benchmark of solvers: error against network calls, ours and with --peers everybody's.

    python experiments/benchmarks/solvers.py
    python experiments/benchmarks/solvers.py --peers --seed 3

Four parts: `ends`, the error of fixed-step samplers against the exact flow; `adaptive`, the same
for those with steps of their own; `laws`, the distance of stochastic samplers to the data's law;
`overhead`, what a step costs beside its call. The problems are Gaussian mixtures made at random
from the seed. Writes benchmark.md, benchmark.json and benchmark.png.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file: its modules are there

import torch
from benchmarks import ends, laws, overhead, peers, problems
from benchmarks.ends import End, Refusal
from benchmarks.laws import Distance
from benchmarks.overhead import Overhead
from benchmarks.written import markdown, picture
from common import command

from sde_diffusion import plots, validate
from sde_diffusion.files import storage

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
    ends: list[End] = field(default_factory=list)
    adaptive: list[End] = field(default_factory=list)
    laws: list[Distance] = field(default_factory=list)
    overhead: list[Overhead] = field(default_factory=list)
    unet: list[Overhead] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def chosen(known: dict[str, Any], beginnings: tuple[str, ...]) -> dict[str, Any]:
    """Those whose name begins with one of these; all if there are none."""
    return {name: made for name, made in known.items() if name.startswith(beginnings or "")}


def families(config: Config) -> dict[str, dict[str, Any]]:
    """Part -> name -> family, of the solvers asked for."""
    fixed: dict[str, Any] = dict(ends.OURS)
    adaptive: dict[str, Any] = dict(ends.OURS_ADAPTIVE)
    stochastic: dict[str, Any] = dict(laws.OURS)
    paths: dict[str, Any] = dict(laws.OURS_ADAPTIVE)
    if config.peers:
        fixed |= {name: told_steps(family) for name, family in peers.solvers().items()}
        adaptive |= peers.adaptive()
        stochastic |= peers.stochastic()
    found = {"ends": fixed, "adaptive": adaptive, "laws": stochastic, "paths": paths}
    for beginning in config.solvers:
        if not any(name.startswith(beginning) for part in found.values() for name in part):
            known = ", ".join(name for part in found.values() for name in part)
            raise ValueError(f"--solvers {beginning}: no name begins so; there are: {known:.600}")
    return {part: chosen(known, config.solvers) for part, known in found.items()}


def told_steps(family: peers.Family) -> ends.Fixed:
    """A family that needs not know the problem."""
    return lambda steps, problem: family(steps)


def measure(config: Config, say: Callable[[str], None] = print) -> Found:
    """All parts asked for."""
    posed = problems.named(config.problems, config.seed, config.samples)
    known = families(config)
    found = Found([problem.name for problem in posed], config.draws)
    if "ends" in config.parts:
        for made in ends.by_calls(known["ends"], posed, found.refusals):
            found.ends.append(made)
            say(f"{made.solver:50s} {made.problem:14s} {made.setting:5g} calls  {made.rms:.1e}")
    if "adaptive" in config.parts:
        for made in ends.by_tolerance(known["adaptive"], posed):
            found.adaptive.append(made)
            say(f"{made.solver:50s} {made.problem:14s} {made.calls:5.0f} calls  {made.rms:.1e}")
    if "laws" in config.parts:
        for made in laws.distances(
            known["laws"], known["paths"], posed, found.refusals, config.draws, config.seed
        ):
            found.laws.append(made)
            say(f"{made.solver:50s} {made.problem:14s} {made.calls:5.0f} calls  {made.ratio:.2f}")
    if "overhead" in config.parts:
        loops = overhead.with_peers if config.peers else overhead.ours
        found.overhead += overhead.overheads(
            lambda network, shape: chosen(loops(network, shape), config.solvers),
            rounds=config.rounds,
        )
        found.unet += overhead.unet(chosen(overhead.OURS, config.solvers), rounds=config.rounds)
    return found


def versions() -> dict[str, str]:
    """Of the other libraries, where they are installed."""
    found: dict[str, str] = {}
    for library in ("diffusers", "k-diffusion", "azula", "torchdiffeq"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def main(config: Config) -> None:
    validate.integer("--seed", config.seed, 0)
    validate.integer("--samples", config.samples, 2)
    validate.integer("--draws", config.draws, 2)
    validate.integer("--rounds", config.rounds)
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
    overhead.quiet()
    command.run(main, Config)
