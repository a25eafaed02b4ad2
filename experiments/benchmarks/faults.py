"""Known faults of diffusion samplers, planted, and the checks that catch them.

    python experiments/benchmarks/faults.py

Each fault is a sampler of this package with one line of it wrong, beside the right one. A row of
the matrix is a fault, a column a check of `sde_diffusion.verify`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file: its modules are there

from common import flags


@dataclass(frozen=True)
class Config:
    """Print the matrix of faults and checks, and write it as faults.md."""

    out: Path = Path("runs/faults")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import math
from collections.abc import Callable, Sequence

import torch
from common import command
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import progress, verify
from sde_diffusion.files import storage
from sde_diffusion.models.prediction import Prediction, truth
from sde_diffusion.processes.level import Level, RatedLevel
from sde_diffusion.samplers.euler_maruyama import rates_at
from sde_diffusion.verify import convergence, gaussians

STEPS = 64
SIZES = (32, 64, 128, 256)
CHECKS = ("refused", "step named", "law", "order", "local order", "limit", "identities")


# ---- the faults ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoubledDiffusion(sd.EulerMaruyama):
    """g² doubled."""

    def step(self, model: Any, x: Any, t: Any, s: Any, noise: Any, memory: Any) -> Any:
        f, g2 = rates_at(model.process, t)
        return super().step(model, x, RatedLevel.of(t, (f, 2 * g2)), s, noise, memory)


@dataclass(frozen=True)
class LastNoise(sd.Ancestral):
    """Noise in the last step of the chain."""

    def step(self, model: Any, x: Any, t: Any, s: Any, noise: Any, memory: Any) -> Any:
        made, memory = super().step(model, x, t, s, noise, memory)
        return (made + t.sigma * noise(t.t, s.t, x) if s.sigma == 0 else made), memory


@dataclass(frozen=True)
class NoiseOneLevelOff(sd.Ancestral):
    """Noise of the step before."""

    def step(self, model: Any, x: Any, t: Any, s: Any, noise: Any, memory: Any) -> Any:
        own = math.sqrt(t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2)
        scale = 1.0 if memory is None else memory / own

        def off(t: float, s: float, like: Tensor) -> Tensor:
            return scale * noise(t, s, like)

        return super().step(model, x, t, s, off, None)[0], own


@dataclass(frozen=True)
class StrideOffByOne(sd.Ancestral):
    """A step of a sub-chain that stops 1/1000 before its level."""

    def step(self, model: Any, x: Any, t: Any, s: Any, noise: Any, memory: Any) -> Any:
        if 0 < s.t < t.t - 0.001:
            s = model.process.levels(torch.tensor([s.t + 0.001], dtype=torch.float64))[0]
        return super().step(model, x, t, s, noise, memory)


@dataclass(frozen=True)
class DriftNotCorrected(sd.Ancestral):
    """Noise added to the drift of the flow, which needs none."""

    def step(self, model: Any, x: Any, t: Any, s: Any, noise: Any, memory: Any) -> Any:
        kernel2 = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
        mean = model(x, t).combine(s.alpha, s.sigma)
        std = math.sqrt(max(kernel2, 0.0)) * s.sigma / t.sigma
        return mean + std * noise(t.t, s.t, x), None


@dataclass(frozen=True)
class OnKarras(sd.DPMSolver):
    """DPM-Solver++(2M) on the levels of Karras et al. 2022, where every step shrinks."""

    @property
    def grid(self) -> sd.grids.Grid:
        return sd.Heun().grid


@dataclass(frozen=True)
class RatioInverted(OnKarras):
    """h / h_before for h_before / h."""

    def step(self, model: Any, x: Any, t: Any, s: Any, noise: Any, memory: Any) -> Any:
        if memory is not None and s.sigma > 0:
            here = t.log_snr / 2
            h_before, h = here - memory.half_log_snr[0], s.log_snr / 2 - here
            memory = memory._replace(half_log_snr=(here - h * h / h_before,))
        return super().step(model, x, t, s, noise, memory)


@dataclass(frozen=True)
class TimeRounded(OnKarras):
    """Time rounded to a whole step of 1000 for the network, where x lies between two."""

    def step(self, model: Any, x: Any, t: Any, s: Any, noise: Any, memory: Any) -> Any:
        class Rounded:
            process = model.process

            def __call__(self, x: Tensor, level: Level) -> Prediction:
                whole = max(round(1000 * level.t), 1) / 1000
                (near,) = model.process.levels(torch.tensor([whole], dtype=torch.float64))
                eps = model(x, near).eps
                return truth((x - level.sigma * eps) / level.alpha, eps, level)

            def rows(self, index: Tensor) -> Any:
                return self

        return super().step(Rounded(), x, t, s, noise, memory)


@dataclass(frozen=True)
class ClippedX0(sd.Ancestral):
    """x0 clipped to [-1, 1], and eps not computed anew."""

    def step(self, model: Any, x: Any, t: Any, s: Any, noise: Any, memory: Any) -> Any:
        found = model(x, t)

        class Clipped:
            process = model.process

            def __call__(self, x: Tensor, level: Level) -> Prediction:
                return truth(found.x0.clamp(-1, 1), found.eps, level)

            def rows(self, index: Tensor) -> Any:
                return self

        return super().step(Clipped(), x, t, s, noise, memory)


@dataclass(frozen=True)
class Fault:
    """A wrong sampler, the right one, and the process on which they are compared."""

    name: str
    wrong: Any
    right: Any
    process: sd.processes.Process


FAULTS = (
    Fault("g² doubled", DoubledDiffusion(), sd.EulerMaruyama(), sd.VP()),
    Fault("posterior variance for beta", sd.Ancestral(), sd.Ancestral("beta"), sd.VP()),
    Fault("beta for posterior variance", sd.Ancestral("beta"), sd.Ancestral(), sd.VP()),
    Fault("noise in the last step", LastNoise("beta"), sd.Ancestral("beta"), sd.VP()),
    Fault("noise one level off", NoiseOneLevelOff("beta"), sd.Ancestral("beta"), sd.VP()),
    Fault("stride off by one", StrideOffByOne(eta=0.0), sd.Ancestral(eta=0.0), sd.VP()),
    Fault("drift not corrected for noise", DriftNotCorrected(), sd.Ancestral(), sd.VP()),
    Fault("step ratio inverted", RatioInverted(), OnKarras(), sd.VP()),
    Fault("time step rounded", TimeRounded(), OnKarras(), sd.VP()),
    Fault("x0 clipped, eps kept", ClippedX0("beta"), sd.Ancestral("beta"), sd.VP()),
)


# ---- the matrix ----------------------------------------------------------------------------------


def caught(fault: Fault, wrap: Callable[[Any, Any], Any] | None = None) -> dict[str, bool | None]:
    """Return check -> True if it catches the fault; None if the probe refuses the sampler before.

    Args:
        wrap: (sampler, steps or times) -> the sampler to check in place of both, such as an
            adapter; by default they are checked themselves.
    """
    data = sd.exact.Gaussian(fault.process, torch.tensor([0.7], dtype=torch.float64), 0.25)
    right, wrong = fault.right, fault.wrong
    many: Any = wrong if wrap is None else lambda steps: wrap(wrong, steps)
    short: Any = wrong if wrap is None else lambda times: wrap(wrong, times)
    steps = STEPS if wrap is None else None
    some = wrong if wrap is None else wrap(wrong, STEPS)
    found: dict[str, bool | None] = dict.fromkeys(CHECKS)
    same = verify.identities(some, right, data, steps=STEPS)
    found["identities"] = not same.holds
    try:
        law = verify.law(some, data, steps=steps)
    except verify.NotAffine:
        return found | {"refused": True}
    reference = verify.law(right, data, steps=STEPS)
    apart = gaussians.w2((law.mean, law.covariance), (reference.mean, reference.covariance))
    at, laws = convergence.ladder(many, data, None, SIZES)
    return found | {
        "refused": False,
        "step named": not law.holds,
        "law": apart > 1e-8,
        "order": not convergence.fitted(at, data, SIZES, laws, right.claims.order).holds,
        "local order": not verify.local_order(short, data, declared=right.claims.order).holds,
        "limit": not convergence.extrapolated(at, data, SIZES, laws).holds,
    }


def through_function(sampler: Any, steps_or_times: int | Tensor) -> verify.Function:
    """Return a sampler as a foreign function f(eps_fn, x), with torch.randn_like for its noise."""
    given = steps_or_times
    process = FAULTS[0].process
    times = sampler.grid(process, given) if isinstance(given, int) else given

    def function(eps_fn: Callable[[Tensor, Any], Tensor], x: Tensor) -> Tensor:
        class Theirs:
            process = FAULTS[0].process

            def __call__(self, x: Tensor, level: Level) -> Prediction:
                eps = eps_fn(x, level.t)
                return truth((x - level.sigma * eps) / level.alpha, eps, level)

            def rows(self, index: Tensor) -> Any:
                return self

        return sd.sample(
            Theirs(), sampler, x, times=times, noise=lambda t, s, like: torch.randn_like(like)
        )

    return verify.Function(function, start=float(times[0]), end=float(times[-1]))


def matrix(
    wrap: Callable[[Any, Any], Any] | None = None, faults: Sequence[Fault] = FAULTS
) -> dict[str, dict[str, bool | None]]:
    """Return fault -> check -> True if it catches the fault."""
    return {fault.name: caught(fault, wrap) for fault in progress.bar(faults, desc="faults")}


def markdown(found: dict[str, dict[str, bool | None]] | None = None) -> str:
    """Return the matrix as a table."""
    words = {True: "**caught**", False: "-", None: ""}
    lines = ["| fault | " + " | ".join(CHECKS) + " |", "| --- |" + " --- |" * len(CHECKS)]
    for name, row in (found or matrix()).items():
        lines.append(f"| {name} | " + " | ".join(words[row[check]] for check in CHECKS) + " |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    command.check_out(config.out)
    print(f"{len(FAULTS)} faults -> {config.out}", flush=True)
    table = markdown()
    print(table)
    out = command.folder(config.out)
    storage.replace(out / "faults.md", table.encode())
    command.write_config(out, config)
    print(f"-> {out / 'faults.md'}")


if __name__ == "__main__":
    command.run(main, Config)
