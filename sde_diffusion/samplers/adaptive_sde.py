r"""The reverse SDE with adaptive steps per sample, on a fixed Brownian path.

In kappa = alpha^2 / (alpha^2 + sigma^2), from 0 (noise) to 1 (data), and y = alpha x / (alpha^2 +
sigma^2), the reverse SDE (Anderson 1982) of every process has additive noise and no singular end:

    dy = D dkappa + dW,        D = x0 + alpha score = x0 - (alpha / sigma) eps,

with D = 0 for data N(0, I). A step of length k with the path's increment sqrt(k) z is predicted by
Euler-Maruyama and corrected, before the next one, with the slope at the predicted point:

    predict    y' = y + k D + sqrt(k) z,         D' at y'
    correct    y  = y + k (D + D') / 2 + sqrt(k) z,        error  k (D' - D) / 2,

one call a step. A step whose error is too large is split in two by the tree of the path: the same
noise is used at finer times, none is discarded. New draws would bias the law towards samples whose
noise is easy to follow (Gaines & Lyons 1997; Rackauckas & Nie 2017).

An error estimate that is small only because the noise of a step is small also biases the law, and
leaves tails on narrow modes. The error is therefore scaled to noise of the usual size, |z|^2 = d.

The noise that is left at kappa has the standard deviation sqrt(1 - kappa): a mode narrower than
this is not resolved yet. An error is small only in relation to it, so tolerances are multiplied by
sqrt(1 - kappa), down to a floor: a network whose D grows like 1 / sigma would need endless steps.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sde_diffusion.grids import Ends
from sde_diffusion.models.model import Model, select
from sde_diffusion.noise import Brownian
from sde_diffusion.noise.brownian import ROOT, WHOLE, Interval, child, rotated, share, span
from sde_diffusion.noise.counter import mixed_, normals, signed
from sde_diffusion.noise.sources import Generated, Noise
from sde_diffusion.processes.level import (
    Level,
    coordinates,
    double,
    enter,
    home,
    leave,
    log_snr_at,
)
from sde_diffusion.samplers.sampler import (
    Claims,
    Memory,
    SampleReport,
    SolverError,
    check_down,
    over,
)
from sde_diffusion.validate import Checked, Choice, Count, Positive

__all__ = ["AdaptiveSDE"]


@dataclass(frozen=True)
class AdaptiveSDE(Checked):
    """Error-controlled steps of the reverse SDE, chosen for each sample, on a fixed path.

    A step is accepted if the root mean square over coordinates of its error, over
    (atol + rtol |y|) max(sigma / sqrt(alpha^2 + sigma^2), 0.05), is at most 1/2: tolerances are
    shares of the noise that is left. Steps are dyadic in u = sigma / (alpha + sigma): the intervals
    of the tree of the path. A sample does not depend on the rest of its batch.

    The default costs about 80 calls on a mixture of modes of standard deviation 0.02 and 0.3, and
    120 on one mode of 0.02; their standard deviations are right within 1 %. Modes below 0.02 need
    smaller tolerances; calls grow like tolerance^(-2/3).

    Noise comes from `seeds=`, with the same paths as for the other samplers, or from `generator=`,
    which draws the keys of the paths. On a grid of several intervals each has its own paths.

    Args:
        rtol, atol: tolerances.
        max_calls: limit of calls for one sample.
        return_partial: at the limit, extrapolate the rest and mark the sample as unfinished in the
            report, instead of a SolverError.
    """

    # An error of order 3/2 in the length of a step allows (ALLOWED / error)^(2/3) of that length.
    ALLOWED: ClassVar = 0.5  # of the tolerance
    AIM: ClassVar = 0.4  # of the tolerance: target error of a step
    SHRINK: ClassVar = 0.1  # change of the step from one to the next, at least,
    FLOOR: ClassVar = 0.05  # of the noise that tolerances are shares of
    GROW: ClassVar = 2.0  # and at most: a small error may be an accident

    rtol: Positive = 2e-2
    atol: Positive = 2e-2
    max_calls: Count = 10_000
    return_partial: Annotated[bool, Choice(True, False)] = False

    claims = Claims(order=None, noise=True, adaptive=True)
    grid = Ends()

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, SampleReport]:
        """From t to s in steps chosen for each sample; the memory is a SampleReport.

        Its error is the root of the sum of the squared estimates, in y.

        Raises:
            SolverError: naming t, the step and the limit, where a sample reaches `max_calls`
                (unless `return_partial`), where steps fall below rounding, and where the model is
                not finite.
            ValueError: for injected noise, which cannot be refined.
        """
        check_down(self, t, s)
        keys = keys_of(noise, x)
        if memory is not None:
            keys = mixed_(keys + int(t.u * 2**53))
        if s.u == t.u or not x.numel():  # alpha underflows at both, or there is no sample
            return leave(enter(x, t), s), SampleReport.unmoved(x)
        state = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision shows no error
        walk = SDEWalk(self, model, state, t, s, keys)
        while len(walk.rows):
            walk.advance()
        return (walk.made * scale(s)).to(x.dtype), walk.report


def keys_of(noise: Noise, x: Tensor) -> Tensor:
    """The keys of the samples' paths, (B,)."""
    if isinstance(noise, Brownian):
        return noise.keys.to(x.device)
    if not isinstance(noise, Generated):
        advice = "it refines its path; give seeds= or generator="
        raise ValueError(f"noise must be left out for AdaptiveSDE; {advice}")
    source = noise.generator
    keys = torch.randint(-(2**63), 2**63 - 1, (len(x),), generator=source, device=source.device)
    return keys.to(x.device)


def scale(level: Level) -> Any:
    """x / y."""
    return (level.alpha**2 + level.sigma**2) / level.alpha


class SDEWalk:
    """A batch between level t and level s.

    Attributes:
        made, report: results of the finished samples, in y.
        rows: indices of the n unfinished samples, to which the attributes below belong.
        y, u, slope: their states, clocks and D.
        longest: the longest step that the last error allows, in kappa.
        length: of the last step, in kappa.
        squares, rejections: as in the report, so far.
        low, code, z: the intervals ahead, stacks (L, n, ...). The next step of a sample is the one
            at its `top`, unless that is split.
    """

    ROWS = (
        "rows", "keys", "y", "u", "slope", "longest", "length", "squares", "rejections", "top"
    )  # fmt: skip
    STACKS = ("low", "code", "z")

    def __init__(
        self,
        solver: AdaptiveSDE,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        keys: Tensor,
    ) -> None:
        self.solver, self.whole, self.model, self.end = solver, model, model, s.u
        self.made, self.report, self.calls = torch.empty_like(x), SampleReport.unmoved(x), 0
        clocks = home(x.device)
        self.rows, self.keys = torch.arange(len(x), device=clocks), keys.to(clocks)
        self.u = torch.full((len(x),), t.u, dtype=torch.float64, device=clocks)
        self.y = x * (t.alpha / (t.alpha**2 + t.sigma**2))
        self.slope = self.slope_at(x, t)
        # Of the order of the steps that the error allows later.
        self.longest = torch.full_like(self.u, min(solver.rtol, solver.atol) ** (2 / 3))
        self.length = self.longest
        self.squares, self.rejections = torch.zeros_like(self.u), torch.zeros_like(self.rows)
        ahead = covering(t.u, s.u, keys, x)
        self.low = self.u.new_tensor([part.low for part in ahead])[:, None].repeat(1, len(x))
        codes = [signed(part.code) for part in ahead]
        self.code = self.rows.new_tensor(codes)[:, None].repeat(1, len(x))
        self.z = torch.stack([part.z for part in ahead])
        self.top = torch.full_like(self.rows, len(ahead) - 1)

    def advance(self) -> None:
        """Try the next step of every sample."""
        self.refine()
        low, count, z = self.next()
        reached, noise = self.predicted(low, z), mean_square(z).sqrt().clamp(min=0.1)
        there = low <= self.end
        if bool(there.any()):
            self.leave(there, reached, finished=True)
            low, count, reached, noise = (v[~there] for v in (low, count, reached, noise))
        if len(self.rows) and self.calls >= self.solver.max_calls:
            self.give_up()
        if not len(self.rows):
            return
        process = self.model.process
        level = process.level(process.time(log_snr_at(low)), reached)
        slope = self.slope_at(reached * scale(level), level)
        length = span(self.u, low)
        change = (slope - self.slope).mul_(over(length / 2, slope))
        # The tolerance at the start of the step: its end also depends on the noise.
        tolerance = self.solver.atol + self.solver.rtol * self.y.abs()
        left = (self.u / torch.hypot(self.u, 1 - self.u)).clamp(min=self.solver.FLOOR)
        error = mean_square(change / tolerance).sqrt() / (noise * left)
        allowed = length * (self.solver.AIM / error) ** (2 / 3)
        most = torch.maximum(self.longest, self.solver.GROW * length)
        self.longest = allowed.clamp(min=self.solver.SHRINK * length).minimum(most)
        self.length = length
        kept = error <= self.solver.ALLOWED
        self.y = torch.where(over(kept, change), reached + change, self.y)
        self.slope = torch.where(over(kept, change), slope, self.slope)
        self.u = torch.where(kept, low, self.u)
        self.squares = self.squares + torch.where(kept, mean_square(change), 0)
        self.rejections = self.rejections + ~kept
        self.top = self.top - torch.where(kept, count, 0)

    def slope_at(self, x: Tensor, level: Level) -> Tensor:
        """D = x0 + alpha score."""
        self.calls += 1
        slope = self.model(x, level).combine(1.0, -level.alpha / level.sigma)
        bad = ~coordinates(slope).isfinite().all(1)
        if bool(bad.any()):
            raise SolverError(
                f"{self.where(self.u[bad.to(self.u.device)])}: the model is not finite"
            )
        return slope

    def predicted(self, low: Tensor, z: Tensor) -> Tensor:
        """y at u = low."""
        k = over(span(self.u, low), z)
        return self.y + (k * self.slope + k.sqrt() * z)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """End and increment of the next step of each sample, and its number of intervals.

        One, except for the first step: the tree may begin with many short intervals.
        """
        each = torch.arange(len(self.rows), device=self.rows.device)
        low, z = self.low[self.top, each], self.z[self.top, each]
        count = torch.ones_like(self.top)
        joined = self.calls == 1
        while joined:
            place = self.top - count
            further = self.low[place.clamp(min=0), each]
            (more,) = torch.where((place >= 0) & (span(self.u, further) <= self.longest))
            parts = z[more], self.z[place[more], more]
            z[more] = both(*parts, self.u[more], low[more], further[more])
            low[more] = further[more]
            count[more] += 1
            joined = len(more) > 0
        return low, count, z

    def refine(self) -> None:
        """Split the next intervals until none is longer than the error of its sample allows.

        The one to the data, which no call corrects, is also no longer than the step before it.
        """
        each = torch.arange(len(self.rows), device=self.rows.device)
        while True:
            low = self.low[self.top, each]
            last = torch.where(low <= 0, self.length, torch.inf)
            (wide,) = torch.where(span(self.u, low) > torch.minimum(self.longest, last))
            if not len(wide):
                return
            high, top = self.u[wide], self.top[wide]
            low, code, z = (v[top, wide] for v in (self.low, self.code, self.z))
            middle = (high + low) / 2
            if not bool(((low < middle) & (middle < high)).all()):
                raise SolverError(f"{self.where(high)}: its steps vanish")
            shares = share(high, middle, high, low), share(middle, low, high, low)
            n = normals((self.keys[wide] + code).to(z.device), z)
            noise, data = rotated(z, n, *(over(part, z) for part in shares))
            if int(top.max()) + 1 == len(self.low):
                for name in self.STACKS:
                    stack = getattr(self, name)
                    setattr(self, name, torch.cat([stack, torch.zeros_like(stack[:1])]))
            for place, end, side, part in ((top, low, 1, data), (top + 1, middle, 0, noise)):
                at = place, wide
                self.low[at], self.code[at], self.z[at] = end, child(code, side), part
            self.top[wide] += 1

    def leave(self, gone: Tensor, y: Tensor, *, finished: bool) -> None:
        """Record y as the result of these samples and remove them."""
        rows, left = self.rows[gone], ~gone
        self.made[rows] = y[gone]
        record = self.calls, self.rejections[gone], self.squares[gone].sqrt(), finished
        self.report.record(rows, *record)
        for name in self.ROWS:
            setattr(self, name, getattr(self, name)[left])
        for name in self.STACKS:
            setattr(self, name, getattr(self, name)[:, left])
        self.model = select(self.whole, self.rows, self.made.ndim)

    def give_up(self) -> None:
        """At max_calls, raise SolverError, or extrapolate along the path if return_partial."""
        if not self.solver.return_partial:
            who = f"{len(self.rows)} of {len(self.made)} samples"
            step = f"next step {float(self.longest[0]):.2g} in kappa"
            raise SolverError(f"{self.where(self.u)}: max_calls reached by {who}; {step}")
        end, z = torch.full_like(self.u, self.end), torch.zeros_like(self.y)
        place = torch.arange(len(self.low), device=self.top.device)[:, None]
        high = torch.where(place == self.top, self.u, self.low.roll(-1, 0))
        weight = share(high, self.low, self.u, end).sqrt().where(place <= self.top, 0)
        for part in (over(weight, self.z) * self.z).flip(0):  # in order: zeros change no bit
            z = z + part
        self.leave(self.top >= 0, self.predicted(end, z), finished=False)

    def where(self, u: Tensor) -> str:
        """The solver and the place of the first of these samples, for a message."""
        level = self.model.process.level_at(float(u[0]))
        solver = f"AdaptiveSDE(rtol={self.solver.rtol:g}, atol={self.solver.atol:g})"
        return f"{solver} failed at t={level.t:.3g} (u={level.u:.3g}) after {self.calls} calls"


def covering(high: float, low: float, keys: Tensor, x: Tensor) -> list[Interval]:
    """The intervals of the tree that cover [low, high], the one nearest to noise last."""
    waiting = [Interval(1.0, 0.0, ROOT, normals(keys + signed(WHOLE), x))]
    found: list[Interval] = []
    while waiting:
        above, below, code, z = waiting.pop()
        if below >= high or above <= low:
            continue
        if above <= high and below >= low:
            found.append(Interval(above, below, code, z))
            continue
        # Halves, as in the whole tree, until the rest is negligible and is cut off.
        if span(above, below) > 1e-4 * span(high, low):
            at, codes, drawn_by = (above + below) / 2, (child(code, 0), child(code, 1)), code
        else:
            at, codes, drawn_by = (high if high < above else low), (code, code), child(code, 2)
        n = normals(keys + signed(drawn_by), x)
        noise, data = rotated(z, n, share(above, at, above, below), share(at, below, above, below))
        waiting.append(Interval(at, below, codes[1], data))
        waiting.append(Interval(above, at, codes[0], noise))
    return found[::-1]


def both(first: Tensor, second: Tensor, high: Tensor, middle: Tensor, low: Tensor) -> Tensor:
    """The increment over [low, high] from those over its two parts, the noise side first."""
    of_first, of_second = share(high, middle, high, low), share(middle, low, high, low)
    return first * over(of_first.sqrt(), first) + second * over(of_second.sqrt(), second)


def mean_square(x: Tensor) -> Tensor:
    """Mean square over the coordinates, (n,) in float64."""
    return double(coordinates(x)).square().mean(1)
