r"""The rules of DPM-Solver++ and UniPC on exact levels of VP: no time is rounded.

    solvers()      # name -> its family: number of steps -> sampler

With l = log(alpha / sigma), h = l_s - l_t, r_m = (l_m - l_t) / h for the m-th of the earlier levels
and D_m = x0_m - x0 (Zhao et al. 2023, eq. 3, 8 and 9, in data prediction; for order 2 without the
correction this is DPM-Solver++(2M) of Lu et al. 2022b):

    predict   x_s = sigma_s / sigma_t x - alpha_s (e^-h - 1) x0 - alpha_s B sum_m a_m D_m / r_m
    correct   likewise, r = 1 at the level s itself among the r_m,
    B = e^-h - 1,     sum_m a_m r_m^(i-1) = i! phi_(i+1)(-h) (-h) / B,     i = 1, 2, ..
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.models.model import Model
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level

Family = Callable[[int], sd.samplers.Sampler]


class Past(NamedTuple):
    """The state and the level that the last step began from, and what was seen, newest first."""

    x: Tensor
    level: Level[float]
    seen: tuple[tuple[float, Tensor], ...]  # l, x0


@dataclass(frozen=True)
class Spaced(sd.grids.Grid):
    """Levels even in t, in t^(1/2) or in l, from t = 1 to `end`, then 0."""

    spacing: str
    end: float

    def times(
        self, process: sd.processes.Process, steps: int, start: float, least_ratio: float
    ) -> Tensor:
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        if self.spacing == "log-SNR":
            ends = torch.tensor([1.0, self.end], dtype=torch.float64)
            first, last = (level.log_snr for level in process.levels(ends))
            times = process.time(first + ramp * (last - first))
            times[0] = 1.0
        else:
            power = 2 if self.spacing == "quadratic" else 1
            times = (1 + ramp * (self.end ** (1 / power) - 1)) ** power
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class UniP:
    """The prediction alone, on levels even in t, in t^(1/2) or in l, from t = 1 to `end`, then 0.

    Args:
        rank: its order, 1 to 3.
        spacing: of the levels: "time", "quadratic" or "log-SNR".
        end: the last time before 0. The step from there is of first order: x_0 = x0.
    """

    rank: int
    spacing: str
    end: float

    @property
    def claims(self) -> sd.samplers.Claims:
        return sd.samplers.Claims(self.rank)

    @property
    def grid(self) -> sd.grids.Grid:
        return Spaced(self.spacing, self.end)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Past | None,
    ) -> tuple[Tensor, Past | None]:  # fmt: skip
        here = t.log_snr / 2, model(x, t).x0
        if memory is not None:
            x = self.corrected(memory, here, t, x)
        seen = (here, *(memory.seen if memory else ()))[: self.rank]
        if s.sigma == 0:
            return here[1], None
        return advanced(x, t, s, here, seen[1:]), Past(x, t, seen)

    def corrected(
        self, past: Past, here: tuple[float, Tensor], t: Level[float], x: Tensor
    ) -> Tensor:
        """The state at t, once x0 is known there."""
        return x


@dataclass(frozen=True)
class UniPC(UniP):
    """With the correction, which costs no call."""

    def corrected(
        self, past: Past, here: tuple[float, Tensor], t: Level[float], x: Tensor
    ) -> Tensor:
        return advanced(past.x, past.level, t, past.seen[0], (here, *past.seen[1:]))


def advanced(
    x: Tensor, t: Level[float], s: Level[float], here: tuple[float, Tensor],
    others: Sequence[tuple[float, Tensor]],
) -> Tensor:  # fmt: skip
    """x_s from x_t, x0 at t and x0 at other levels."""
    log_ratio, x0 = here
    h = s.log_snr / 2 - log_ratio
    r = [(other - log_ratio) / h for other, _ in others]
    made = s.sigma / t.sigma * x - s.alpha * math.expm1(-h) * x0
    for a, r_m, (_, other) in zip(weights(h, r), r, others, strict=True):
        made = made - s.alpha * math.expm1(-h) * (a / r_m) * (other - x0)
    return made


def weights(h: float, r: Sequence[float]) -> list[float]:
    """a_m; 1/2 where there is one of them, as Zhao et al. take it."""
    if len(r) < 2:
        return [0.5] * len(r)
    b, phi = [], math.expm1(-h) / -h  # phi_1(-h)
    for i in range(1, len(r) + 1):
        phi = (phi - 1 / math.factorial(i)) / -h  # phi_(i+1)
        b.append(math.factorial(i) * phi * -h / math.expm1(-h))
    vandermonde = np.vander(np.array(r), increasing=True).T
    return np.linalg.solve(vandermonde, np.array(b)).tolist()


def solvers() -> dict[str, Family]:
    """Orders 2 and 3, with and without the correction, on every spacing."""

    def family(kind: type[UniP], rank: int, spacing: str, end: float) -> Family:
        return lambda steps: kind(rank, spacing, end)

    rules = {"++ {}M": UniP, "UniPC-{}": UniPC}
    return {
        f"dpm-solver {rule.format(rank)}, {spacing} to {end:g}": family(kind, rank, spacing, end)
        for rule, kind in rules.items()
        for rank in (2, 3)
        for spacing in ("time", "quadratic", "log-SNR")
        for end in (1e-2, 1e-3, 1e-4)
    }
