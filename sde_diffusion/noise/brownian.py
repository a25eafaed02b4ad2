r"""A Brownian path for each sample: the noise of a sampler that is given `seeds=`.

Row k of a batch follows its own path, a function of seeds[k] alone: equal in any batch, and nearly
equal for any number of steps. The noise of an interval [s, t] is the path's increment over it,
divided by its standard deviation.

The increment of the whole path is the same on every grid. Over one of N steps, and over the two of
2 N steps in its place, increments correlate by .8 to .9 in the median and by .3 at least (N = 4 to
64 on VP, grids even in t or in u^(1/1.25)), because grids split the path at nodes of their own.
Where they split it at the same nodes, increments are equal.

The clock of the path is the share of signal

    kappa = alpha^2 / (alpha^2 + sigma^2),        from 0 (noise) to 1 (data),

which is finite at both ends and has the same meaning on every process. On this clock the noise of
the reverse SDE is additive:  y = alpha x / (alpha^2 + sigma^2)  solves

    dy = (x0 + alpha score) dkappa + dW.

The path is a virtual tree (Gaines & Lyons 1997) of rotations. An interval holds its increment over
its standard deviation, z. A split at the share r of its length gives

    noise side   sqrt(r) z + sqrt(1 - r) n,         n ~ N(0, I), the normal of this split,
    data side    sqrt(1 - r) z - sqrt(r) n,         which is the Brownian bridge.

Both are standard normal and independent for every r, and no nearly equal numbers are subtracted.
Only the intervals ahead of the current time are stored, about log2 of the steps.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.noise.counter import WORDS, mixed, mixed_, normals, signed
from sde_diffusion.noise.sources import Purpose, check_seeds, stream

__all__ = ["ROOT", "WHOLE", "Brownian", "child", "rotated", "share", "span"]

# Each normal is drawn by a code.
WHOLE = mixed(1)  # the increment of the whole path

ROOT = mixed(2)  # the first split of the path

FREE = mixed(3)  # intervals without length: this code and the following ones

# An interval that holds more grid times than this is split at its middle, any other at a grid time.
# On a mixture, 20 and 40 steps of SDE-DPM-Solver++ 2M differ by this share of the difference of two
# seeds: .160 on the exact path (6.6 normals a step); .168 for FEW = 1 (2 normals), .170 for 2
# (1.5), .176 for 3 (1.35), .192 if every split is at a grid time (1).
FEW = 3


def span(high: Any, low: Any) -> Any:
    """Return the length of the path in kappa from u = high down to u = low; floats or tensors.

    kappa = (1 - u)^2 / ((1 - u)^2 + u^2), and the difference of two values is this product.
    """
    return (high - low) * cross(high, low) / (total_power(high) * total_power(low))


def share(high: Any, low: Any, whole_high: Any, whole_low: Any) -> Any:
    """Return span(high, low) / span(whole_high, whole_low); by factors, as spans may underflow."""
    gaps = (high - low) / (whole_high - whole_low)
    powers = total_power(whole_high) / total_power(high) * total_power(whole_low) / total_power(low)
    return gaps * cross(high, low) / cross(whole_high, whole_low) * powers


def cross(high: Any, low: Any) -> Any:
    """Return high + low - 2 high low, without cancellation."""
    return (1 - low) * high + (1 - high) * low


def total_power(u: Any) -> Any:
    """Return (alpha^2 + sigma^2) / (alpha + sigma)^2."""
    return (1 - u) ** 2 + u**2


def child(code: Any, side: int) -> Any:
    """Return the code of one part of an interval: side 0 towards noise, 1 towards data.

    Args:
        code: a word, or a tensor of words as int64.
    """
    return mixed_(2 * code + side) if isinstance(code, Tensor) else mixed((2 * code + side) % WORDS)


def rotated(z: Tensor, n: Tensor, first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Return the increments of the two parts of an interval, each over its standard deviation.

    Args:
        z: the increment of the whole.
        n: the normal of this split; overwritten.
        first, second: the shares of the parts, floats or tensors that broadcast against z.
    """
    a, b = first**0.5, second**0.5
    # Not by add(alpha=), whose rounding depends on the size of the batch.
    return (z * a).add_(n * b), (z * b).sub_(n.mul_(a))


class Interval(NamedTuple):
    """A part of the path ahead of the current time.

    Attributes:
        high, low: its ends in u.
        code: of the normal of its split.
        z: its increment over its standard deviation, (B, ...).
    """

    high: float
    low: float
    code: int
    z: Tensor


def path_keys(seeds: Iterable[int]) -> Tensor:
    """Return the key of each row's path, (B,) int64."""
    words = [stream(seed, Purpose.PATH).integers(WORDS, dtype=np.uint64) for seed in seeds]
    return torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64))


class Brownian:
    """Standard normals noise(t, s, like), one Brownian path per sample.

    The tree halves [0, 1] in u = sigma / (alpha + sigma) until an interval holds few grid times; it
    is then split at the one nearest to its middle: 1.35 normals a step. On every grid the same
    normals belong to nearly the same times, so two grids differ only within a step: the strong
    order is 1. Increments over the same interval are not equal: see the head of this file.

    A source is used once, downwards in time. An interval that reaches above the end of the previous
    one begins a new path: repeated draws over the same times, as in resampling and correctors, are
    independent. Draws for intervals without length are independent, too.

    Args:
        seeds: one non-negative integer per row of the batch.
        clock: u = sigma / (alpha + sigma) of the process, at times (n,).
        times: the grid of the sampler; other times are located when they occur.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        clock: Callable[[Tensor], Tensor],
        times: Sequence[float] = (),
    ) -> None:
        self.keys = path_keys(seeds)
        self.clock = clock
        self.levels: dict[float, float] = {}  # u by t
        self.locate(times)
        self.grid = sorted(set(self.levels.values()))
        self.ahead: list[Interval] = []  # the next one is the last
        self.reached = 1.0
        self.free = 0  # draws for intervals without length
        self.like: tuple[torch.Size, torch.dtype] | None = None

    def locate(self, times: Sequence[float]) -> None:
        """Find u at these times."""
        u = self.clock(torch.tensor(times, dtype=torch.float64))
        self.levels |= zip(times, u.tolist(), strict=True)

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        check_seeds(self.keys, like)
        if self.keys.device != like.device:
            self.keys = self.keys.to(like.device, non_blocking=True)
        if not (t in self.levels and s in self.levels):
            self.locate([t, s])
        high, low = self.levels[t], self.levels[s]
        if not high > low:
            self.free += 1
            return self.normal((FREE + self.free) % WORDS, like).to(like.dtype)
        if high > self.reached:
            self.keys, self.ahead = mixed_(self.keys + 1), []
        if not self.ahead or self.like != (like.shape, like.dtype):
            self.ahead = [Interval(1.0, 0.0, ROOT, self.normal(WHOLE, like))]
        self.reached, self.like = low, (like.shape, like.dtype)
        return self.increment(high, low).to(like.dtype)

    def normal(self, code: int, like: Tensor) -> Tensor:
        """Return the N(0, I) of this code, at least float32."""
        if like.dtype not in (torch.float32, torch.float64):
            like = like.new_empty((), dtype=torch.float32).expand_as(like)
        return normals(self.keys + signed(code), like)

    def increment(self, high: float, low: float) -> Tensor:
        """Advance to `low`; return the increment from `high` over its standard deviation."""
        while self.ahead[-1].high > high:
            if self.ahead[-1].low >= high:
                self.ahead.pop()
            else:
                self.split(high)
        parts: list[Interval] = []
        while not parts or parts[-1].low > low:
            if self.ahead[-1].low >= low:
                parts.append(self.ahead.pop())
            else:
                self.split(low)
        first, *others = parts
        if not others:
            return first.z
        made = first.z * share(first.high, first.low, high, low) ** 0.5
        for part in others:
            made.add_(part.z * share(part.high, part.low, high, low) ** 0.5)
        return made

    def split(self, wanted: float) -> None:
        """Replace the next interval by its two parts."""
        high, low, code, z = self.ahead.pop()
        at = self.place(high, low, wanted)
        first, second = share(high, at, high, low), share(at, low, high, low)
        noise, data = rotated(z, self.normal(code, z), first, second)
        self.ahead.append(Interval(at, low, child(code, 1), data))
        self.ahead.append(Interval(high, at, child(code, 0), noise))

    def place(self, high: float, low: float, wanted: float) -> float:
        """Return where to split an interval: at its middle, at a grid time, or at `wanted`."""
        first, last = bisect_right(self.grid, low), bisect_left(self.grid, high)
        middle = (high + low) / 2
        after = bisect_left(self.grid, middle, first, last)
        beside = self.grid[max(after - 1, first) : min(after + 1, last)]
        nearest = min(beside, key=lambda u: abs(u - middle), default=wanted)
        # A time equal to the middle up to rounding would leave an empty interval.
        own = last - first > FEW and abs(nearest - middle) > 1e-6 * (high - low)
        return middle if own and low < middle < high else nearest
