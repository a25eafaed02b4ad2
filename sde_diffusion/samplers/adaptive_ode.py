r"""An Adams method with steps per sample, controlled by a tolerance without extra calls.

On the clock u of a frame (frames.py) each sample keeps the slopes F_j = dz/du at its own last nodes
u_j. With l_j the Lagrange polynomials on k of these nodes and omega(v) = prod_j (v - u_j), a step
from u to w is

    predict    z'  = z + sum_j F_j int_u^w l_j dv                  (Adams-Bashforth)
    evaluate   F   = dz/du at (z', w)
    compare    d   = F - sum_j F_j l_j(w)                          with the extrapolated slope
    correct    z_w = z' + d int_u^w omega dv / omega(w)            (Adams-Moulton)

One call a step: F is also the newest slope of the next one (the mode PEC; Hairer, Norsett & Wanner
1993, III.1). The correction estimates the error of the prediction and must be at most
atol + rtol |z|; the corrected state, of one order more, is kept. The number of slopes grows from 1
by one a step, so there is no starting procedure. The last step is a prediction without correction,
whose error is estimated from d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.grids import Ends, frames
from sde_diffusion.grids.frames import IS_FRAME
from sde_diffusion.models.model import Model, select
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes.level import Level, Scalar, coordinates, double, onto
from sde_diffusion.samplers.sampler import (
    Claims,
    Memory,
    SampleReport,
    SolverError,
    check_down,
    finest,
    over,
)
from sde_diffusion.validate import Checked, Choice, Count, Integer, Positive

__all__ = ["AdaptiveODE"]


@dataclass(frozen=True)
class AdaptiveODE(Checked):
    """Variable-step Adams-Bashforth-Moulton, in which each sample has its own steps and levels.

    A sample does not depend on the rest of its batch: finished samples leave the batch, and the
    model follows by `select`. A step is kept if the correction of z is at most atol + rtol |z|,
    both as root mean squares over the coordinates.

    Args:
        rtol, atol: tolerances of z.
        frame: coordinates of the integration, `frames.Straight()` or a `frames.GaussianFrame`.
        k: most slopes in a prediction, 1 to 6.
        max_calls: limit of calls for one sample.
        return_partial: at the limit, extrapolate the rest and mark the sample as unfinished in the
            report, instead of a SolverError.
    """

    # Chosen by a search at equal calls, on seeds 4 to 6 of experiments/benchmark_problems.py; the
    # last five also on Gaussians of variance 0.01 to 1e-8: the largest error is 6,000 tolerances
    # without them and 8 with them.
    FIRST: ClassVar = 0.2  # of sqrt(tolerance / |slope|): the first step
    AIM: ClassVar = 0.1  # of the tolerance: target error of a step; few are then rejected
    DAMPING: ClassVar = 0.3  # exponent of the proportional part of PI control; the integral's is 1
    SHORTEST: ClassVar = 0.2  # change from a step to the next, at least,
    LONGEST: ClassVar = 1.6  # and at most: the weights cancel if the nodes are too uneven,
    RISING: ClassVar = 2.5  # and at most while the number of slopes grows
    LARGEST: ClassVar = 0.125  # step in u: in a Gaussian frame the first slopes may be 0
    SHARE: ClassVar = 0.9  # of the remaining way: the largest step except the last
    LAST: ClassVar = 0.01  # of the tolerance: the error the last step may have
    BEFORE: ClassVar = 0.03  # and its value one step earlier
    BLIND: ClassVar = 0.1  # of the last discrepancy: least error assumed for the rest
    REACH: ClassVar = 30.0  # tolerances: the longest last step,
    SPECK: ClassVar = 0.1  # and a last step short enough for slopes of size 1

    rtol: Positive = 7e-5
    atol: Positive = 7e-5
    frame: Annotated[frames.Frame, IS_FRAME] = frames.Straight()  # noqa: RUF009 a frozen value
    k: Annotated[int, Integer(1, 6)] = 5
    max_calls: Count = 10_000
    return_partial: Annotated[bool, Choice(True, False)] = False

    claims = Claims(order=None, adaptive=True)
    grid = Ends()

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, SampleReport]:  # fmt: skip
        """From t to s in steps chosen for each sample; the memory is a SampleReport.

        Its error is the sum of the estimates.

        Raises:
            SolverError: naming t, the step and the limit, where a sample reaches `max_calls` or its
                steps vanish (unless `return_partial`), and where the model is not finite.
        """
        check_down(self, t, s)
        state = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        whole = self.frame.clock(t) - self.frame.clock(s)
        if whole <= finest(state.dtype) or not x.numel():  # one level, or there is no sample
            return self.frame.leave(self.frame.enter(state, t), s).to(x), SampleReport.unmoved(x)
        walk = ODEWalk(self, model, state, t, s)
        while len(walk.front.samples):
            walk.advance()
        return self.frame.leave(walk.out, s).to(x), walk.report


class Front(NamedTuple):
    """The n samples that are not yet finished, along the first axis of every field.

    Attributes:
        samples: their indices in the batch.
        z: the last corrected state (n, ...).
        u: clock of that state.
        h: the next step, which leads down to u - h.
        ratio: the error of the last step that was kept, in tolerances.
        left_out: error of extrapolating the rest, likewise; infinite after a rejected step.
        error, rejections: as in the report, so far.
        nodes, known: u of the last evaluations, newest first (n, k + 1), and True where the slope
            is used, False where the step was rejected.
        slopes: the slopes at the nodes, k + 1 tensors (n, ...).
    """

    samples: Tensor
    z: Tensor
    u: Tensor
    h: Tensor
    ratio: Tensor
    left_out: Tensor
    error: Tensor
    rejections: Tensor
    nodes: Tensor
    known: Tensor
    slopes: tuple[Tensor, ...]

    def rows(self, index: Tensor) -> "Front":
        """Some of the samples."""
        *fields, slopes = self
        parts = [field[index] for field in fields]
        return Front._make([*parts, tuple(slope[index] for slope in slopes)])


class ODEWalk:
    """A batch x on its way from level t to level s.

    Attributes:
        front: the unfinished samples, after `calls` calls each.
        out, report: the results of the others.
    """

    def __init__(
        self, solver: AdaptiveODE, model: Model, x: Tensor, t: Level[float], s: Level[float]
    ) -> None:
        self.solver, self.whole, self.model = solver, model, model
        self.name = f"AdaptiveODE(rtol={solver.rtol:g}, atol={solver.atol:g})"
        self.end = solver.frame.clock(s)
        z, slope = solver.frame.enter(x, t), solver.frame.slope(model(x, t))
        self.out, self.report, self.calls = torch.empty_like(z), SampleReport.unmoved(z), 1
        size, slots = norm(slope), solver.k + 1
        u = torch.full_like(size, solver.frame.clock(t))
        self.refuse(~(size + self.tolerance(z)).isfinite(), slope, u)
        self.rule = Quadrature.of_degree(solver.k, like=u)
        # Euler's error h^2 |dF/du| / 2 is then 1/50 of the tolerance, for a slope that changes by
        # its own size over all u.
        h = solver.FIRST * (self.tolerance(z) / size).sqrt()
        self.front = Front(
            samples=torch.arange(len(u), device=u.device),
            z=z,
            u=u,
            h=self.bounded(h, u),
            ratio=torch.full_like(u, solver.AIM),
            left_out=torch.full_like(u, torch.inf),
            error=torch.zeros_like(u),
            rejections=torch.zeros_like(u, dtype=torch.long),
            nodes=u[:, None].expand(-1, slots),
            known=(torch.arange(slots, device=u.device) == 0).expand(len(u), -1),
            slopes=(slope,) * slots,
        )

    def advance(self) -> None:
        """One more call for each sample of the front; finished samples leave it."""
        solver, rule, front = self.solver, self.rule, self.front
        if self.calls >= solver.max_calls:
            self.give_up()
            return
        u, w, used = front.u, front.u - front.h, newest(front.known, solver.k)
        places = torch.cat([rule.places(u, w), w[:, None]], dim=1)
        basis, omega = lagrange(front.nodes, used, places), product(front.nodes, used, places)

        predicted = plus(front.z, rule.integral(basis[:, :-1], u, w), front.slopes)
        slope = self.slope(predicted, w)
        discrepancy = plus(slope, -basis[:, -1], front.slopes)
        gain = rule.integral(omega[:, :-1], u, w) / omega[:, -1]
        corrected = plus(predicted, gain[:, None], (discrepancy,))

        size, tolerance, order = norm(discrepancy), self.tolerance(corrected), used.sum(1)
        error = gain.abs() * size
        ratio = error / tolerance
        kept = ratio <= 1
        at = torch.where(kept, w, u)
        nodes = torch.cat([w[:, None], front.nodes[:, :-1]], dim=1)
        known = torch.cat([kept[:, None], front.known[:, :-1]], dim=1)
        # The error of extrapolating the rest is the integral of omega times a divided difference,
        # the newest of which is d / omega(w). It may vanish by chance, and is unreliable for
        # distant nodes: hence a least share of d, and agreement of two steps. Data of standard
        # deviation s bend a path by s^2 / 2u at u: for s above some tolerances and u below REACH
        # of them, the bend is visible in d.
        rest, places = at - self.end, rule.places(at, self.end)
        ahead = rule.integral(product(nodes, newest(known, order), places), at, self.end)
        ahead = (ahead / omega[:, -1]).abs()
        left_out = ahead.maximum(solver.BLIND * rest) * size / tolerance
        near = rest <= self.end + solver.REACH * tolerance
        good = (left_out <= solver.LAST) & (front.left_out <= solver.BEFORE)
        done = kept & near & (good | (rest <= solver.SPECK * (solver.atol + solver.rtol)))

        self.calls += 1
        self.front = front._replace(
            z=torch.where(over(kept, corrected), corrected, front.z),
            u=at,
            h=self.bounded(front.h * self.change(ratio, front.ratio, order), at),
            ratio=torch.where(kept, ratio, front.ratio),
            left_out=torch.where(kept, left_out, torch.inf),
            error=front.error + torch.where(kept, error + done * left_out * tolerance, 0),
            rejections=front.rejections + ~kept,
            nodes=nodes,
            known=known,
            slopes=(slope, *front.slopes[:-1]),
        )
        vanished = ~kept & (self.front.h < finest(slope.dtype) * at)
        self.part(done, vanished, ~(size + tolerance).isfinite(), w)

    def part(self, done: Tensor, vanished: Tensor, broken: Tensor, w: Tensor) -> None:
        """Remove finished and failed samples: one device-to-host synchronization per step."""
        front, go = self.front, done | vanished
        stay, failures = torch.stack([(~go).sum(), (broken | vanished).sum()]).tolist()
        if failures:
            self.refuse(broken, front.slopes[0], w)
            if not self.solver.return_partial:
                where = self.place(front.u[vanished], front.h[vanished])
                raise SolverError(f"{self.name} failed at {where}")
        if stay < len(go):
            order = go.to(torch.uint8).argsort(stable=True)  # the unfinished ones come first
            self.leave(order[stay:], done)
            self.front = front.rows(order[:stay])
            self.model = select(self.whole, self.front.samples, self.out.ndim)

    def give_up(self) -> None:
        """At max_calls, raise SolverError, or extrapolate the rest if return_partial."""
        front = self.front
        if not self.solver.return_partial:
            raise SolverError(f"{self.name} reached max_calls at {self.place(front.u, front.h)}")
        everyone = torch.arange(len(front.u), device=front.u.device)
        self.leave(everyone, everyone < 0)
        self.front = front.rows(everyone[:0])

    def leave(self, index: Tensor, done: Tensor) -> None:
        """Extrapolate these samples of the front to the end, and record them."""
        front = self.front.rows(index)
        # An unfinished sample is far from the end: one slope (Euler) is the safest extrapolation.
        used = newest(front.known, torch.where(done[index], self.solver.k + 1, 1))
        basis = lagrange(front.nodes, used, self.rule.places(front.u, self.end))
        weights = self.rule.integral(basis, front.u, self.end)
        self.out[front.samples] = plus(front.z, weights, front.slopes)
        record = self.calls, front.rejections, front.error, done[index]
        self.report.record(front.samples, *record)

    def slope(self, z: Tensor, u: Tensor) -> Tensor:
        """dz/du of samples, each at its own level."""
        frame = self.solver.frame
        level = self.model.process.level(self.time(u), z)
        return frame.slope(self.model(frame.leave(z, level), level))

    def time(self, u: Tensor) -> Tensor:
        return self.model.process.time(self.solver.frame.log_snr(u))

    def tolerance(self, z: Tensor) -> Tensor:
        return self.solver.atol + self.solver.rtol * norm(z)

    def change(self, ratio: Tensor, before: Tensor, order: Tensor) -> Tensor:
        """Factor of the next step by PI control (Hairer & Wanner 1996, IV.2)."""
        solver, power = self.solver, (order + 1).float().reciprocal()
        trend = torch.where(ratio <= 1, before / ratio, 1)
        wanted = (solver.AIM / ratio) ** power * trend ** (solver.DAMPING * power)
        longest = torch.where(order < solver.k, solver.RISING, solver.LONGEST).float()
        return wanted.nan_to_num(posinf=torch.inf).clamp(min=solver.SHORTEST).minimum(longest)

    def bounded(self, h: Tensor, u: Tensor) -> Tensor:
        return h.minimum(self.solver.SHARE * (u - self.end)).clamp(max=self.solver.LARGEST)

    def refuse(self, broken: Tensor, slope: Tensor, u: Tensor) -> None:
        """Raise SolverError if the norm of any of these samples is not finite."""
        if bool(broken.any()):
            model = not bool(slope[broken].isfinite().all())
            what = "the model is not finite" if model else "the state overflows"
            raise SolverError(f"{self.name}: {what} at {self.place(u[broken])}")

    def place(self, u: Tensor, h: Tensor | None = None) -> str:
        """The place of the first of these samples and its next step, for a message."""
        step = "" if h is None else f", {len(h)} of {len(self.out)} samples, step {float(h[0]):.1g}"
        t, at = float(self.time(u)[0]), float(u[0])
        return f"t={t:.3g} (u={at:.3g}{step}) after {self.calls} calls"


class Quadrature(NamedTuple):
    """Gauss-Legendre quadrature on [0, 1] with Q points, exact up to degree 2 Q - 1."""

    points: Tensor
    weights: Tensor

    @staticmethod
    def of_degree(degree: int, like: Tensor) -> "Quadrature":
        points, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
        return Quadrature(*torch.from_numpy(np.stack([points + 1, weights]) / 2).to(like))

    def places(self, start: Tensor, end: Scalar) -> Tensor:
        """The points between start and end, (n, Q)."""
        return start[:, None] + (end - start)[:, None] * self.points

    def integral(self, values: Tensor, start: Tensor, end: Scalar) -> Tensor:
        """The integral from start to end of values (n, Q, ...) at `places`: (n, ...)."""
        weights = (end - start)[:, None] * self.weights
        return (over(weights, values) * values).sum(1)


def newest(known: Tensor, count: int | Tensor) -> Tensor:
    """The first `count` of the nodes that are known (n, K); count an integer or (n,)."""
    most = count[:, None] if isinstance(count, Tensor) else count
    return known & (known.cumsum(1) <= most)


def lagrange(nodes: Tensor, used: Tensor, places: Tensor) -> Tensor:
    """Lagrange polynomials on the used nodes (n, K) at places (n, Q): (n, Q, K), 0 if unused."""
    others = used[:, None, :] & ~torch.eye(used.shape[1], dtype=torch.bool, device=used.device)
    above = (places[:, :, None] - nodes[:, None, :])[:, :, None, :]
    below = (nodes[:, :, None] - nodes[:, None, :])[:, None, :, :]
    factors = torch.where(others[:, None], above / below, 1)
    return torch.where(used[:, None, :], factors.prod(3), 0)


def product(nodes: Tensor, used: Tensor, places: Tensor) -> Tensor:
    """omega at places (n, Q): the product of place - node over the used nodes (n, K)."""
    factors = places[:, :, None] - nodes[:, None, :]
    return torch.where(used[:, None, :], factors, 1).prod(2)


def plus(z: Tensor, weights: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """z + sum_j weights_j slopes_j, weights (n, K): elementwise, so rows are independent."""
    for weight, slope in zip(onto(weights, z).unbind(1), slopes, strict=True):
        z = torch.addcmul(z, over(weight, z), slope)
    return z


def norm(z: Tensor) -> Tensor:
    """Root mean square over the coordinates of each sample, (n,) float64.

    A constant in derivatives: they are those of the path on the steps that it has chosen.
    """
    return double(coordinates(z.detach()).square().mean(1).sqrt())
