r"""An Adams method in which every sample has its own steps, held to a tolerance at no extra call.

On the clock u of a frame (frames.py) each sample keeps the slopes F_j = dz/du at its own last nodes
u_j. With l_j the Lagrange polynomials on k of these nodes and omega(v) = prod_j (v - u_j), a step
from u to w is

    predict    z'  = z + sum_j F_j int_u^w l_j dv                  (Adams-Bashforth)
    evaluate   F   = dz/du at (z', w)
    compare    d   = F - sum_j F_j l_j(w)                          with what the slopes foresaw
    correct    z_w = z' + d int_u^w omega dv / omega(w)            (Adams-Moulton)

One call a step: F is also the newest slope of the next one (the mode PEC; Hairer, Norsett & Wanner
1993, III.1). What the correction adds is the error of the prediction, and is held to
atol + rtol |z|; what is kept is the corrected state, of one order more. The number of slopes grows
from 1 by one a step, so there is no starting procedure. The last step is a prediction, which
nothing corrects: what it leaves out is known from d.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.grids import Ends, Grid, frames
from sde_diffusion.grids.frames import IS_FRAME
from sde_diffusion.models.model import Model, select
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level, Scalar, double
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers.sampler import Claims, Memory, SampleReport, SolverError, finest, over
from sde_diffusion.validate import Checked, Choice, Count, Integer, Positive

__all__ = ["AdaptiveODE"]


@dataclass(frozen=True)
class AdaptiveODE(Checked):
    """Variable-step Adams-Bashforth-Moulton, in which each sample has its own steps and levels.

    A sample is the same whatever else is in its batch: it leaves the batch when it is finished, and
    the model follows by `select`. A step is kept if what corrects z is at most atol + rtol times z,
    both as root mean squares over the coordinates.

    Args:
        rtol, atol: tolerances of z.
        frame: what is integrated, `frames.Straight()` or a `frames.Gaussian`.
        k: most slopes in a prediction, 1 to 6.
        max_calls: calls for one sample, after which it is given up.
        return_partial: predict the rest of the way of a sample that is given up, and say so in the
            report, instead of a SolverError.
    """

    # Chosen by a search at equal calls, on seeds 4 to 6 of experiments/benchmark_problems.py; the
    # last five also on Gaussians of variance 0.01 to 1e-8, where without them the error reached
    # 6,000 tolerances, and with them 8.
    FIRST: ClassVar = 0.2  # of sqrt(tolerance / |slope|): the first step
    AIM: ClassVar = 0.1  # of the tolerance: the error a step is chosen for; few are then rejected
    DAMPING: ClassVar = 0.3  # exponent of the proportional part of PI control; the integral's is 1
    SHORTEST: ClassVar = 0.2  # change from a step to the next, at least,
    LONGEST: ClassVar = 1.6  # and at most, for Adams' weights cancel where nodes are too unlike,
    RISING: ClassVar = 2.5  # and at most while the number of slopes grows
    LARGEST: ClassVar = 0.125  # step in u: in a Gaussian frame nothing shows at first
    SHARE: ClassVar = 0.9  # of the way that is left: the largest step but the last
    LAST: ClassVar = 0.01  # of the tolerance: the error the last step may have
    BEFORE: ClassVar = 0.03  # and what it would have been a step earlier
    BLIND: ClassVar = 0.1  # of the last surprise: the least that is taken to be left out
    REACH: ClassVar = 30.0  # tolerances: the longest last step,
    SPECK: ClassVar = 0.1  # and one that need not be good: slopes of size 1 do no harm there

    rtol: Positive = 7e-5
    atol: Positive = 7e-5
    frame: Annotated[frames.Frame, IS_FRAME] = frames.Straight()  # noqa: RUF009 a frozen value
    k: Annotated[int, Integer(1, 6)] = 5
    max_calls: Count = 10_000
    return_partial: Annotated[bool, Choice(True, False)] = False

    @property
    def claims(self) -> Claims:
        return Claims(order=None, adaptive=True)

    @property
    def grid(self) -> Grid:
        return Ends()

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, SampleReport]:  # fmt: skip
        """From t to s in as many steps as each sample takes; the memory is a Report.

        Its error is the sum of the estimates.

        Raises:
            SolverError: naming t, the step and the limit, where a sample reaches `max_calls` or its
                steps vanish (unless `return_partial`), and where the model is not finite.
        """
        state = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        whole = self.frame.clock(t) - self.frame.clock(s)
        if whole <= finest(state.dtype) or not x.numel():  # one level, or there is no sample
            return self.frame.leave(self.frame.enter(state, t), s).to(x), SampleReport.unmoved(x)
        walk = ODEWalk(self, model, state, t, s)
        while len(walk.front.samples):
            walk.advance()
        return self.frame.leave(walk.out, s).to(x), walk.report


class Front(NamedTuple):
    """The n samples that are still on their way: in every field the first axis is theirs.

    Attributes:
        samples: which of the batch they are.
        z: the last corrected state (n, ...).
        u: where it stands.
        h: the next step, which leads down to u - h.
        ratio: the error of the last step that was kept, in tolerances.
        left_out: by a prediction of the rest, likewise; infinite after a step that was rejected.
        error, rejections: as in the report, so far.
        nodes, known: where the model was asked last, newest first (n, k + 1), and whether the
            answer counts, which it does not where the step was rejected.
        slopes: the answers, k + 1 tensors (n, ...).
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
        front: the samples on their way, after so many `calls` for each.
        out, report: what the others have come to.
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
        # Euler's error h^2 |dF/du| / 2 is then a 50th of the tolerance, for a slope that changes by
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
        """One more call for each sample of the front; those that are done leave it."""
        solver, rule, front = self.solver, self.rule, self.front
        if self.calls >= solver.max_calls:
            self.give_up()
            return
        u, w, used = front.u, front.u - front.h, newest(front.known, solver.k)
        places = torch.cat([rule.places(u, w), w[:, None]], dim=1)
        basis, omega = lagrange(front.nodes, used, places), product(front.nodes, used, places)

        predicted = plus(front.z, rule.integral(basis[:, :-1], u, w), front.slopes)
        slope = self.slope(predicted, w)
        surprise = plus(slope, -basis[:, -1], front.slopes)
        gain = rule.integral(omega[:, :-1], u, w) / omega[:, -1]
        corrected = plus(predicted, gain[:, None], (surprise,))

        size, tolerance, order = norm(surprise), self.tolerance(corrected), used.sum(1)
        error = gain.abs() * size
        ratio = error / tolerance
        kept = ratio <= 1
        at = torch.where(kept, w, u)
        nodes = torch.cat([w[:, None], front.nodes[:, :-1]], dim=1)
        known = torch.cat([kept[:, None], front.known[:, :-1]], dim=1)
        # A prediction of the rest from as many slopes leaves out the integral of their omega times
        # a divided difference, the newest of which is d / omega(w). This may vanish by chance, and
        # hides much where nodes are far apart: hence a least share of d, and two steps that agree.
        # Data of standard deviation s bend a path by s^2 / 2u at u: where s is above some
        # tolerances and u below REACH of them, that shows in d.
        rest, places = at - self.end, rule.places(at, self.end)
        ahead = rule.integral(product(nodes, newest(known, order), places), at, self.end)
        ahead = (ahead / omega[:, -1]).abs()
        left_out = ahead.maximum(solver.BLIND * rest) * size / tolerance
        near = rest <= self.end + solver.REACH * tolerance
        good = (left_out <= solver.LAST) & (front.left_out <= solver.BEFORE)
        done = kept & near & (good | (rest <= solver.SPECK * (solver.atol + solver.rtol)))

        self.calls += 1
        self.front = Front(
            samples=front.samples,
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
        """Let go who is done or cannot go on. The host waits for two numbers, once a step."""
        front, go = self.front, done | vanished
        stay, failures = torch.stack([(~go).sum(), (broken | vanished).sum()]).tolist()
        if failures:
            self.refuse(broken, front.slopes[0], w)
            if not self.solver.return_partial:
                where = self.place(front.u[vanished], front.h[vanished])
                raise SolverError(f"{self.name} failed at {where}")
        if stay < len(go):
            order = go.to(torch.uint8).argsort(stable=True)  # those who stay come first
            self.leave(order[stay:], done)
            self.front = front.rows(order[:stay])
            self.model = select(self.whole, self.front.samples, self.out.ndim)

    def give_up(self) -> None:
        """At max_calls: by name, or by prediction."""
        front = self.front
        if not self.solver.return_partial:
            raise SolverError(f"{self.name} reached max_calls at {self.place(front.u, front.h)}")
        everyone = torch.arange(len(front.u), device=front.u.device)
        self.leave(everyone, everyone < 0)
        self.front = front.rows(everyone[:0])

    def leave(self, index: Tensor, done: Tensor) -> None:
        """These samples of the front go to the end by prediction, and are reported."""
        front = self.front.rows(index)
        # Who is given up has far to go: there one slope, which is Euler's rule, extrapolates least.
        used = newest(front.known, torch.where(done[index], self.solver.k + 1, 1))
        basis = lagrange(front.nodes, used, self.rule.places(front.u, self.end))
        weights = self.rule.integral(basis, front.u, self.end)
        self.out[front.samples] = plus(front.z, weights, front.slopes)
        self.report.calls[front.samples] = self.calls
        self.report.rejections[front.samples] = front.rejections
        self.report.error[front.samples] = front.error
        self.report.finished[front.samples] = done[index]

    def slope(self, z: Tensor, u: Tensor) -> Tensor:
        """dz/du of samples at levels of their own."""
        frame = self.solver.frame
        level = self.model.process.level(self.time(u), z)
        return frame.slope(self.model(frame.leave(z, level), level))

    def time(self, u: Tensor) -> Tensor:
        return self.model.process.time(self.solver.frame.log_snr(u))

    def tolerance(self, z: Tensor) -> Tensor:
        return self.solver.atol + self.solver.rtol * norm(z)

    def change(self, ratio: Tensor, before: Tensor, order: Tensor) -> Tensor:
        """Of the step, by PI control (Hairer & Wanner 1996, IV.2)."""
        solver, power = self.solver, 1 / (order + 1)
        trend = torch.where(ratio <= 1, before / ratio, 1)
        wanted = (solver.AIM / ratio) ** power * trend ** (solver.DAMPING * power)
        longest = torch.where(order < solver.k, solver.RISING, solver.LONGEST)
        return wanted.nan_to_num(posinf=torch.inf).clamp(min=solver.SHORTEST).minimum(longest)

    def bounded(self, h: Tensor, u: Tensor) -> Tensor:
        return h.minimum(self.solver.SHARE * (u - self.end)).clamp(max=self.solver.LARGEST)

    def refuse(self, broken: Tensor, slope: Tensor, u: Tensor) -> None:
        """A SolverError, if any of these samples has a norm without bound."""
        if bool(broken.any()):
            model = not bool(slope[broken].isfinite().all())
            what = "the model is not finite" if model else "the state overflows"
            raise SolverError(f"{self.name}: {what} at {self.place(u[broken])}")

    def place(self, u: Tensor, h: Tensor | None = None) -> str:
        """Where the first of these samples is, and what step it would make."""
        step = "" if h is None else f", {len(h)} of {len(self.out)} samples, step {float(h[0]):.1g}"
        t, at = float(self.time(u)[0]), float(u[0])
        return f"t={t:.3g} (u={at:.3g}{step}) after {self.calls} calls"


class Quadrature(NamedTuple):
    """The rule of Gauss and Legendre on [0, 1] with Q points, exact up to degree 2 Q - 1."""

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
        """From start to end, of values (n, Q, ...) at the places between: (n, ...)."""
        weights = (end - start)[:, None] * self.weights
        return (over(weights, values) * values).sum(1)


def newest(known: Tensor, count: int | Tensor) -> Tensor:
    """The first `count` of the nodes that are known (n, K); count an integer or (n,)."""
    most = count[:, None] if isinstance(count, Tensor) else count
    return known & (known.cumsum(1) <= most)


def lagrange(nodes: Tensor, used: Tensor, places: Tensor) -> Tensor:
    """Lagrange polynomials on the nodes used (n, K), at places (n, Q): (n, Q, K), else 0."""
    others = used[:, None, :] & ~torch.eye(used.shape[1], dtype=torch.bool, device=used.device)
    above = (places[:, :, None] - nodes[:, None, :])[:, :, None, :]
    below = (nodes[:, :, None] - nodes[:, None, :])[:, None, :, :]
    factors = torch.where(others[:, None], above / below, 1)
    return torch.where(used[:, None, :], factors.prod(3), 0)


def product(nodes: Tensor, used: Tensor, places: Tensor) -> Tensor:
    """omega at places (n, Q): the product over the nodes used (n, K) of place - node."""
    factors = places[:, :, None] - nodes[:, None, :]
    return torch.where(used[:, None, :], factors, 1).prod(2)


def plus(z: Tensor, weights: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """z + sum_j weights_j slopes_j, weights (n, K): elementwise, so that no row sees another."""
    for weight, slope in zip(weights.to(z).unbind(1), slopes, strict=True):
        z = torch.addcmul(z, over(weight, z), slope)
    return z


def norm(z: Tensor) -> Tensor:
    """Root mean square over the coordinates of each sample, (n,) float64."""
    return double(coordinates(z).square().mean(1).sqrt())
