r"""Grids: rules for the times of a sampler's steps.

A grid is called with a process and a number of steps n. It returns n + 1 decreasing times, float64,
from the start of the path to exactly 0 (data).

    sample(model, sampler, x, steps=20, grid=grids.Karras(rho=5))
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sde_diffusion.grids.frames import IS_FRAME, Frame, Straight
from sde_diffusion.processes import Process
from sde_diffusion.validate import Checked, Kind, Number, Positive, integer

__all__ = ["IS_GRID", "Ends", "FromTMax", "Grid", "Karras", "Power", "Uniform", "Usual", "cut"]

IS_GRID = Kind("a grid such as Karras()", "times", "__call__")

SLACK = 1e-9  # relative: a node nearer than this to the end of the trained range is that end


@dataclass(frozen=True)
class Grid(Checked, ABC):
    """A rule for n + 1 times. Subclasses define `times`."""

    def __call__(
        self, process: Process, steps: int | None, start: float = 1.0, least_ratio: float = 0.0
    ) -> Tensor:
        """Return the times (n + 1,), float64, decreasing to 0.

        Args:
            process: the process of the model.
            steps: n.
            start: the time at which the path begins.
            least_ratio: the smallest sigma / alpha at which the model is trained, 0 for no limit.
                `sample` replaces nodes below it, except the last, by one node there (`cut`).
        """
        return self.times(process, integer("steps", steps), start, least_ratio)

    @abstractmethod
    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        """Return the times of `__call__`; the arguments are already checked."""


@dataclass(frozen=True)
class Uniform(Grid):
    """Equally spaced times: start (1 - i / n), i = 0 .. n."""

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        return start * torch.linspace(1, 0, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Karras(Grid):
    r"""The noise-to-signal ratios of Karras et al. 2022, eq. 5, on any process; the last is 0.

    ratio_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,
    i = 0 .. n - 1;   ratio_n = 0.

    If the start of the path has a ratio above sigma_max, it becomes the first node, because a batch
    drawn from the prior belongs to t = 1 and to no other level. If it has a ratio below sigma_max,
    the ratios begin there.

    Args:
        sigma_max, sigma_min: the largest and the smallest ratio sigma / alpha.
        rho: exponent; a larger one places more nodes near sigma_min.
    """

    sigma_max: Positive = 80.0
    sigma_min: Positive = 0.002
    rho: Positive = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma_min < self.sigma_max:
            got = f"{self.sigma_min} and {self.sigma_max}"
            raise ValueError(f"sigma_min must be below sigma_max; got {got}")

    def ratios(self, steps: int) -> Tensor:
        """Return the ratios (n + 1,)."""
        return karras_ratios(steps, self.sigma_max, self.sigma_min, self.rho)

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        begin = torch.tensor([start], dtype=torch.float64)
        first = (-process.log_snr(begin) / 2).exp().item()
        above = first > self.sigma_max * (1 + 1e-9)  # EDM starts at 80 up to rounding
        # Samplers that need the drift start at t_max. There the drift is stiff: no node in front.
        in_front = above and (start != process.t_max or start == 1)
        high = min(self.sigma_max, first)
        low = max(min(self.sigma_min, high / 100), least_ratio)
        if low >= high or (in_front and steps == 1):
            return torch.tensor([start, 0.0], dtype=torch.float64)
        times = process.time(-2 * karras_ratios(steps - in_front, high, low, self.rho).log())
        if in_front:
            return torch.cat([begin, times])
        return times if above else torch.cat([begin, times[1:]])


def karras_ratios(steps: int, high: float, low: float, rho: float) -> Tensor:
    """Return the n ratios of Karras et al. 2022, eq. 5, from `high` to `low`, and 0."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return torch.cat([(top + ramp * (bottom - top)) ** rho, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class Power(Grid):
    """Nodes equally spaced in clock^(1/p) of a frame; p > 1 places more nodes near the data.

    Args:
        p: the exponent.
        frame: the frame of the clock, `frames.Straight()` or a `frames.GaussianFrame`.
        first: length of the first interval relative to the others, in (0, 1].
        ratio: the sigma / alpha at which the n steps begin, after one more step from the start of
            the path. None: the n steps begin at the start.
    """

    p: Positive = 1.0
    frame: Annotated[Frame, IS_FRAME] = Straight()  # noqa: RUF009 a frozen value
    first: Annotated[float, Number(0, 1, strict=True)] = 1.0
    ratio: Positive | None = None

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        begin = start
        if self.ratio is not None:
            begin = min(start, process.time(-2 * math.log(self.ratio)).item())
        (top,) = process.levels(torch.tensor([begin], dtype=torch.float64))
        places = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        places[1:] *= steps / (steps - 1 + self.first)
        times = process.time(self.frame.log_snr(self.frame.clock(top) * places**self.p))
        times[0], times[-1] = begin, 0.0
        return times if begin == start else torch.cat([times.new_full((1,), start), times])


@dataclass(frozen=True)
class Usual(Grid):
    """The default grid of each process.

    Equally spaced times on the variance-preserving family, rounded to the steps of a chain; the
    ratios of Karras et al. 2022 on all other processes.
    """

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        kind = Uniform() if process.even_times else Karras()
        return process.nearest(kind.times(process, steps, start, least_ratio))


@dataclass(frozen=True)
class FromTMax(Grid):
    """A grid that starts at most at t_max, up to which drift and diffusion are defined.

    Args:
        grid: the rule for the times.
    """

    grid: Annotated[Grid, IS_GRID] = Usual()

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        return self.grid.times(process, steps, min(start, process.t_max), least_ratio)


@dataclass(frozen=True)
class Ends(Grid):
    """The start and 0, for a solver that chooses the steps between them."""

    def __call__(
        self, process: Process, steps: int | None, start: float = 1.0, least_ratio: float = 0.0
    ) -> Tensor:
        return self.times(process, 1, start, least_ratio)

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        return torch.tensor([start, 0.0], dtype=torch.float64)


def cut(times: Tensor, end: float) -> Tensor:
    """Replace the times below `end`, except the last, by one node at `end`."""
    inner = times[:-1]
    kept = inner[inner >= end * (1 - SLACK)]
    if len(kept) == len(inner):
        return times
    if not len(kept) or kept[-1] > end * (1 + SLACK):
        kept = torch.cat([kept, kept.new_full((1,), end)])
    return torch.cat([kept, times[-1:]])
