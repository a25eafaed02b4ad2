r"""A Brownian path for each sample: what `seeds=` drives a sampler with.

Row k of a batch follows a path of its own, a function of seeds[k] alone: the same in any batch and
on any number of steps. The noise of an interval [s, t] is the path's increment over it, divided by
its standard deviation. The clock of the path is the share of signal

    kappa = alpha^2 / (alpha^2 + sigma^2),        from 0 (noise) to 1 (data),

which is finite at both ends and has the same meaning on every process. In it the noise of the
reverse SDE is additive:  y = alpha x / (alpha^2 + sigma^2)  solves

    dy = (x0 + alpha score) dkappa + dW.

The path is a virtual tree (Gaines & Lyons 1997) of rotations. An interval holds its increment over
its standard deviation, z. Split at the share r of its length it gives

    noise side   sqrt(r) z + sqrt(1 - r) n,         n ~ N(0, I), the normal of this split,
    data side    sqrt(1 - r) z - sqrt(r) n,         the Brownian bridge in other words,

which are standard normal and independent whatever r is. Nothing is subtracted that is nearly equal.
Only the intervals that lie ahead on the way from the root are stored, about log2 of the steps.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from sde_diffusion.noise import Purpose, stream

__all__ = ["ROOT", "WHOLE", "Brownian", "child", "mixed_", "normals", "rotated", "share", "span"]

# SplitMix64 (Steele, Lea & Flood 2014): the k-th word of a stream is mixed(key + k GAMMA).
GAMMA = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST = 31
WORDS = 2**64


# ---- numbers by counting -------------------------------------------------------------------------


def signed(word: int) -> int:
    """The 64-bit word as torch.int64 reads it."""
    return word - WORDS if word >= WORDS // 2 else word


def mixed(word: int) -> int:
    """SplitMix64's mixing of a 64-bit word, Variant 13 of Stafford."""
    for shift, factor in ROUNDS:
        word = (word ^ word >> shift) * factor % WORDS
    return word ^ word >> LAST


def mixed_(words: Tensor) -> Tensor:
    """The same in place for a tensor of int64, whose shifts would draw in the sign."""
    shifted = torch.empty_like(words)
    for shift, factor in ROUNDS:
        torch.bitwise_right_shift(words, shift, out=shifted).bitwise_and_(2 ** (64 - shift) - 1)
        words.bitwise_xor_(shifted).mul_(signed(factor))
    torch.bitwise_right_shift(words, LAST, out=shifted).bitwise_and_(2 ** (64 - LAST) - 1)
    return words.bitwise_xor_(shifted)


def normals(keys: Tensor, like: Tensor) -> Tensor:
    r"""N(0, I) by key: row k is a function of keys[k] and of the shape of a row.

    The two 32-bit halves of a word make two normals (Box & Muller 1958): with u, v in (-1, 1),

        sign(u) sqrt(-2 log |u|) (sin(pi v / 2), cos(pi v / 2)).

    A float64 batch has 31 more bits in u and v; else the numbers are those of a float32 one.

    Args:
        keys: (B,) int64, on the device of `like`.
        like: (B, ...), float32 or float64.
    """
    if not like.numel():
        return torch.empty_like(like)
    size = like.shape[1:].numel()
    uniform = odd_halves(keys, size, like)
    if like.dtype == torch.float64:
        uniform.add_(odd_halves(keys ^ signed(GAMMA), size, like).mul_(2.0**-31))
    uniform.mul_(2.0**-31)
    v, u = uniform[:, 0], uniform[:, 1]
    radius = u.abs().log_().neg_().sqrt_().mul_(u.sign())
    torch.abs(v, out=u).sub_(1)  # cos(pi v / 2) = sin(pi (1 - |v|) / 2); its sign is that of u
    made = quarter_sine(uniform).mul_(radius[:, None])
    return made.flatten(1)[:, :size].reshape(like.shape)


def odd_halves(keys: Tensor, size: int, like: Tensor) -> Tensor:
    """Odd integers of 32 bits, with sign, in the type of `like`: (B, 2, pairs) for `size` numbers.

    Odd, so that none is 0 and each is as likely as its negative.
    """
    words = mixed_(keys[:, None] + counters((size + 1) // 2, keys.device))
    words.bitwise_or_(2**32 + 1)
    made = torch.empty((len(words), 2, words.shape[1]), dtype=like.dtype, device=like.device)
    return made.copy_(words.view(torch.int32).view(*words.shape, 2).mT)


@lru_cache(maxsize=8)
def counters(n: int, device: torch.device) -> Tensor:
    """GAMMA, 2 GAMMA, ..., n GAMMA."""
    return torch.arange(1, n + 1, device=device).mul_(signed(GAMMA))


def quarter_sine(v: Tensor) -> Tensor:
    """sqrt(2) sin(pi v / 2) on [-1, 1], by a polynomial: half the time of torch.sin."""
    first, *rest = sine_series(5 if v.dtype == torch.float32 else 9)
    square = v * v
    made = square * rest[-1]
    for coefficient in rest[-2::-1]:
        made.add_(coefficient).mul_(square)
    return made.add_(first).mul_(v)


@lru_cache
def sine_series(terms: int) -> list[float]:
    """c_k of sqrt(2) sin(pi v / 2) = sum c_k v^(2 k + 1), by Chebyshev interpolation in v^2.

    To 1e-8 with 5 terms, 2e-15 with 9.
    """
    ratio = Chebyshev.interpolate(
        lambda square: np.pi / np.sqrt(2) * np.sinc(np.sqrt(square) / 2), terms - 1, domain=[0, 1]
    )
    return ratio.convert(kind=Polynomial).coef.tolist()


# ---- the path ------------------------------------------------------------------------------------

# What normals are drawn by: a code.
WHOLE = mixed(1)  # the increment of the whole path
ROOT = mixed(2)  # its first split
FREE = mixed(3)  # and what follows it: intervals without length

# An interval with more times of the grid in it is split at its middle, any other at a time. On a
# mixture 20 and 40 steps of SDE-DPM-Solver++ 2M differ by this share of what two seeds do: .160 on
# the path itself (6.6 normals a step); .168 for 1 time (2 normals), .170 for 2 (1.5), .176 for 3
# (1.35), .192 where every split is at a time (1).
FEW = 3


def span(high: Any, low: Any) -> Any:
    """The length of the path in kappa from u = high down to u = low; floats, or tensors of them.

    kappa = (1 - u)^2 / power, so the difference of two is this product.
    """
    return (high - low) * cross(high, low) / (power(high) * power(low))


def share(high: Any, low: Any, whole_high: Any, whole_low: Any) -> Any:
    """span(high, low) / span(whole_high, whole_low), factor by factor: spans may underflow."""
    gaps = (high - low) / (whole_high - whole_low)
    powers = power(whole_high) / power(high) * power(whole_low) / power(low)
    return gaps * cross(high, low) / cross(whole_high, whole_low) * powers


def cross(high: Any, low: Any) -> Any:
    return (1 - low) * high + (1 - high) * low


def power(u: Any) -> Any:
    return (1 - u) ** 2 + u**2


def child(code: Any, side: int) -> Any:
    """The code of one part of an interval: 0 towards noise, 1 towards data.

    Args:
        code: a word, or a tensor of words as int64.
    """
    return mixed_(2 * code + side) if isinstance(code, Tensor) else mixed((2 * code + side) % WORDS)


def rotated(z: Tensor, n: Tensor, first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """The increments of the two parts of an interval, each over its own standard deviation.

    Args:
        z: the increment of the whole.
        n: the normal of this split; what it holds afterwards is of no use.
        first, second: the shares of the parts, floats or tensors that broadcast against z.
    """
    a, b = first**0.5, second**0.5
    # Not by add(alpha=): fused or not, it would round by the size of the batch.
    return (z * a).add_(n * b), (z * b).sub_(n.mul_(a))


class Interval(NamedTuple):
    """A part of the path that is not yet walked.

    Attributes:
        high, low: its ends in u.
        code: what its split is drawn by.
        z: its increment over its standard deviation, (B, ...).
    """

    high: float
    low: float
    code: int
    z: Tensor


def path_keys(seeds: Iterable[int]) -> Tensor:
    """The key of each row's path, (B,) int64."""
    words = [stream(seed, Purpose.PATH).integers(WORDS, dtype=np.uint64) for seed in seeds]
    return torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64))


class Brownian:
    """Standard normals noise(t, s, like), one Brownian path per sample.

    The tree halves [0, 1] in u = sigma / (alpha + sigma) until few times of the grid are left in an
    interval, which is then split at the one nearest to its middle: 1.35 normals a step. On every
    grid the same normals belong to nearly the same times, so two grids differ by what happens
    within a step: the strong order is 1.

    A source is walked once, downwards. An interval that reaches above the last one's end begins a
    new path: who draws more than once over the same times, as resampling and correctors do, gets
    independent noise each time. So does an interval without length.

    Args:
        seeds: one non-negative integer per row of the batch.
        log_snr: of the process, at times (n,).
        times: the grid that will be walked; other times are found as they are asked for.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        log_snr: Callable[[Tensor], Tensor],
        times: Sequence[float] = (),
    ) -> None:
        self.keys = path_keys(seeds)
        self.log_snr = log_snr
        self.levels: dict[float, float] = {}  # u by t
        self.locate(times)
        self.grid = sorted(set(self.levels.values()))
        self.ahead: list[Interval] = []  # the next one is the last
        self.reached = 1.0
        self.free = 0  # draws for intervals without length
        self.like: tuple[torch.Size, torch.dtype] | None = None

    def locate(self, times: Sequence[float]) -> None:
        """Find u at these times."""
        log_snr = self.log_snr(torch.tensor(times, dtype=torch.float64))
        u = 1 / (1 + (log_snr / 2).exp())
        self.levels |= zip(times, u.tolist(), strict=True)

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        if len(self.keys) != len(like):
            raise ValueError(
                f"seeds must hold one seed per sample; got {len(self.keys)} for a batch of "
                f"{len(like)}"
            )
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
        """N(0, I) of this code, at least float32."""
        if like.dtype not in (torch.float32, torch.float64):
            like = like.new_empty((), dtype=torch.float32).expand_as(like)
        return normals(self.keys + signed(code), like)

    def increment(self, high: float, low: float) -> Tensor:
        """The path's increment from high down to low, over its standard deviation; walks there."""
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
        """Put two parts in the place of the next interval."""
        high, low, code, z = self.ahead.pop()
        at = self.place(high, low, wanted)
        first, second = share(high, at, high, low), share(at, low, high, low)
        noise, data = rotated(z, self.normal(code, z), first, second)
        self.ahead.append(Interval(at, low, child(code, 1), data))
        self.ahead.append(Interval(high, at, child(code, 0), noise))

    def place(self, high: float, low: float, wanted: float) -> float:
        """Where an interval is split: its middle, a time of the grid, or what is asked for."""
        first, last = bisect_right(self.grid, low), bisect_left(self.grid, high)
        middle = (high + low) / 2
        after = bisect_left(self.grid, middle, first, last)
        beside = self.grid[max(after - 1, first) : min(after + 1, last)]
        nearest = min(beside, key=lambda u: abs(u - middle), default=wanted)
        # A time that is the middle but for rounding would leave an interval of no use.
        own = last - first > FEW and abs(nearest - middle) > 1e-6 * (high - low)
        return middle if own and low < middle < high else nearest
