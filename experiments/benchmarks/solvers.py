"""Benchmark of solvers: error against network calls, ours and with --peers those of others.

    python experiments/benchmarks/solvers.py
    python experiments/benchmarks/solvers.py --peers --seed 3

Four parts: `ends`, the error of fixed-step samplers against the exact flow; `adaptive`, the error
of samplers that choose their own steps; `laws`, the distance of stochastic samplers to the data's
law; `overhead`, the cost of a step beside its network call. The problems are Gaussian mixtures made
at random from the seed. Writes benchmark.md, benchmark.json and benchmark.png.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file: its modules are there

import tyro
from common import flags

PARTS = ("ends", "adaptive", "laws", "overhead")


@dataclass(frozen=True)
class Config:
    """Measure the solvers, and write the tables as Markdown and JSON and a picture."""

    parts: tuple[Literal["ends", "adaptive", "laws", "overhead"], ...] = PARTS
    """what to measure"""
    peers: bool = False
    """also measure diffusers, k-diffusion and azula: pip install '.[peers]'"""
    problems: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all nine)")
    ] = ()
    """problems, by name such as narrow-2"""
    solvers: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all)")
    ] = ()
    """only solvers whose names begin so, such as adams or azula"""
    num_samples: int = 512
    """samples of each problem, for the errors of ends"""
    law_samples: int = 20_000
    """samples of each problem, for the distances of laws"""
    rounds: int = 41
    """repetitions of the timings"""
    seed: int = 0
    """seed of the mixtures, the starts and the noise"""
    out: Path = Path("runs/benchmark")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import contextlib
import json
from collections.abc import Callable
from importlib import metadata

import torch
from benchmarks import ends, laws, overhead, peers, problems
from benchmarks.ends import End, Refusal
from benchmarks.laws import Distance
from benchmarks.overhead import Overhead
from benchmarks.written import markdown, picture
from common import command

from sde_diffusion import plots, validate
from sde_diffusion.files import storage


@dataclass
class Found:
    """All measurements.

    Attributes:
        problems: names.
        ends, adaptive: one per solver, setting and problem.
        laws: one per solver, setting and problem.
        overhead: one per solver and shape.
        unet: likewise, with a real network, as a multiple of its forward passes.
        refusals: solvers that do not run on a problem, and why.
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
    """Return the entries whose names begin with one of these; all if there are none."""
    small = tuple(beginning.lower() for beginning in beginnings) or ""
    return {name: made for name, made in known.items() if name.lower().startswith(small)}


def families(config: Config) -> dict[str, dict[str, Any]]:
    """Return part -> name -> family, of the solvers in the flags."""
    fixed: dict[str, Any] = dict(ends.OURS)
    adaptive: dict[str, Any] = dict(ends.OURS_ADAPTIVE)
    stochastic: dict[str, Any] = dict(laws.OURS)
    paths: dict[str, Any] = dict(laws.OURS_ADAPTIVE)
    if config.peers:
        fixed |= {name: without_problem(family) for name, family in peers.solvers().items()}
        adaptive |= peers.adaptive()
        stochastic |= peers.stochastic()
    found = {"ends": fixed, "adaptive": adaptive, "laws": stochastic, "paths": paths}
    for beginning in config.solvers:
        if not any(chosen(part, (beginning,)) for part in found.values()):
            known = ", ".join(name for part in found.values() for name in part)
            raise ValueError(f"--solvers {beginning}: no name begins so; there are: {known:.600}")
    return {part: chosen(known, config.solvers) for part, known in found.items()}


def without_problem(family: peers.Family) -> ends.Fixed:
    """Return a family that ignores the problem."""
    return lambda steps, problem: family(steps)


def measure(config: Config, show: Callable[[str], None] = print) -> Found:
    """Measure all parts in the flags."""
    posed = problems.named(config.problems, config.seed, config.num_samples)
    known = families(config)
    found = Found([problem.name for problem in posed], config.law_samples)
    show(f"measuring {', '.join(config.parts)} -> {config.out}")
    if "ends" in config.parts:
        for made in ends.by_calls(known["ends"], posed, found.refusals):
            found.ends.append(made)
            show(f"{made.solver:50s} {made.problem:14s} {made.setting:5g} calls  {made.rms:.1e}")
    if "adaptive" in config.parts:
        for made in ends.by_tolerance(known["adaptive"], posed):
            found.adaptive.append(made)
            show(f"{made.solver:50s} {made.problem:14s} {made.calls:5.0f} calls  {made.rms:.1e}")
    if "laws" in config.parts:
        for made in laws.distances(
            known["laws"], known["paths"], posed, found.refusals, config.law_samples, config.seed
        ):
            found.laws.append(made)
            show(f"{made.solver:50s} {made.problem:14s} {made.calls:5.0f} calls  {made.ratio:.2f}")
    if "overhead" in config.parts:
        loops = overhead.with_peers if config.peers else overhead.ours
        found.overhead += overhead.overheads(
            lambda network, shape: chosen(loops(network, shape), config.solvers),
            rounds=config.rounds,
        )
        found.unet += overhead.unet(chosen(overhead.OURS, config.solvers), rounds=config.rounds)
    return found


def versions() -> dict[str, str]:
    """Return the versions of the other libraries that are installed."""
    found: dict[str, str] = {}
    for library in ("diffusers", "k-diffusion", "azula", "torchdiffeq"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def main(config: Config) -> None:
    validate.integer("--seed", config.seed, 0)
    validate.integer("--num-samples", config.num_samples, 2)
    validate.integer("--law-samples", config.law_samples, 2)
    validate.integer("--rounds", config.rounds)
    needs = {"num_samples": {"ends", "adaptive"}, "law_samples": {"laws"}, "rounds": {"overhead"},
             "problems": {"ends", "adaptive", "laws"}}  # fmt: skip
    for name, parts in needs.items():
        if parts.isdisjoint(config.parts):
            flags.unused(config, (name,), f"without --parts {' or '.join(sorted(parts))}")
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
