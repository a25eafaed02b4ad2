"""Solvers of the probability flow, all in the straight frame, dy/du = velocity (see frames.py)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion import errors, frames
from sde_diffusion.denoiser import Model
from sde_diffusion.noise import Noise
from sde_diffusion.processes import Level, Process
from sde_diffusion.sampling import Memory

__all__ = ["Heun", "Report", "ScipyODE", "SolverError", "TorchODE"]

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


class SolverError(RuntimeError):
    """An adaptive solver gave up; the message says where and why."""


class Report(NamedTuple):
    """What a solver that picks its own steps leaves in the memory."""

    calls: int


@dataclass(frozen=True)
class Heun:
    """The trapezoidal rule with an Euler predictor, two calls a step (Karras et al. 2022, Alg. 1).

    y' = y + h velocity(y, t),    y_s = y + h/2 (velocity(y, t) + velocity(y', s)),    h = u_s - u_t

    The step that ends at sigma = 0 is Euler's alone: n steps make 2 n - 1 calls.
    """

    @property
    def order(self) -> int:
        return 2

    def grid(self, process: Process, steps: int | None) -> Tensor:
        """The levels of Karras et al. 2022, on every process."""
        return Process.times(process, errors.integer("steps", steps))

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        y, h = frames.enter(x, t), s.u - t.u
        slope = model(x, t).velocity
        x_s = frames.leave(y + h * slope, s)
        if s.sigma == 0:
            return x_s, None
        slope = slope + model(x_s, s).velocity
        return frames.leave(y + h / 2 * slope, s), None


@dataclass(frozen=True)
class TorchODE:
    """Any method of torchdiffeq. One error norm and one step size serve the whole batch.

    Args:
        method: adaptive ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"), or fixed-step
            ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"),
            which takes one step per interval of `times`.
        rtol, atol: tolerances of y.
        max_calls: network calls after which it gives up.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_calls: int = 10_000

    def __post_init__(self) -> None:
        errors.choice("method", self.method, ADAPTIVE + FIXED)
        check_tolerances(self)

    @property
    def order(self) -> int:
        """1: once the interval is resolved the error follows the tolerances, not the grid."""
        return 1

    def grid(self, process: Process, steps: int | None) -> Tensor:
        return whole_interval(self, steps)

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        from torchdiffeq import odeint

        slope, end = Slope(self, model, t), end_of_integration(self, t, s)
        span = torch.tensor([t.u, end], dtype=torch.float64, device=x.device)
        # An adaptive method oversteps and interpolates unless told to stop; past u = 0 is nothing.
        options = {"step_t": span[1:]} if self.method in ADAPTIVE else None
        try:
            y = odeint(
                slope,
                frames.enter(x, t),
                span,
                rtol=self.rtol,
                atol=self.atol,
                method=self.method,
                options=options,
            )
        except AssertionError as error:  # torchdiffeq's way to say that a step underflowed
            raise SolverError(f"{self} failed at {slope.where}: {error}") from None
        assert isinstance(y, Tensor)
        return frames.leave(slope.finish(y[-1], end, s), s), Report(slope.calls)


@dataclass(frozen=True)
class ScipyODE:
    """Any method of scipy.integrate.solve_ivp, in float64: an oracle, slow on purpose.

    Args:
        method: "RK45", "RK23", "DOP853", "Radau", "BDF" or "LSODA".
        rtol, atol: tolerances of y.
        max_calls: network calls after which it gives up.
    """

    method: str = "DOP853"
    rtol: float = 1e-8
    atol: float = 1e-8
    max_calls: int = 100_000

    def __post_init__(self) -> None:
        errors.choice("method", self.method, ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"))
        check_tolerances(self)

    @property
    def order(self) -> int:
        """As for TorchODE."""
        return 1

    def grid(self, process: Process, steps: int | None) -> Tensor:
        return whole_interval(self, steps)

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        from scipy.integrate import solve_ivp

        slope, end = Slope(self, model, t), end_of_integration(self, t, s)
        y = frames.enter(x.to(torch.float64), t)

        def flat(u: float, state: object) -> object:
            here = torch.as_tensor(state, dtype=torch.float64).reshape(x.shape).to(x.device)
            return slope(u, here).flatten().cpu().numpy()

        solution = solve_ivp(
            flat, (t.u, end), y.flatten().cpu().numpy(), self.method, rtol=self.rtol, atol=self.atol
        )
        if not solution.success:
            raise SolverError(f"{self} failed at {slope.where}: {solution.message}")
        y = torch.from_numpy(solution.y[:, -1]).reshape(x.shape).to(x.device)
        return frames.leave(slope.finish(y, end, s), s).to(x), Report(slope.calls)


class Slope:
    """dy/du as a function of (u, y), counting its calls."""

    def __init__(self, solver: TorchODE | ScipyODE, model: Model, start: Level[float]) -> None:
        self.solver, self.model, self.level, self.calls = solver, model, start, 0

    @property
    def where(self) -> str:
        return f"t={self.level.t:.3g} (u={self.level.u:.3g}) after {self.calls} calls"

    def __call__(self, u: Tensor | float, y: Tensor) -> Tensor:
        if self.calls >= self.solver.max_calls:
            raise SolverError(f"{self.solver} reached max_calls at {self.where}")
        if float(u) != self.level.u:
            self.level = frames.level_at(self.model.process, float(u))
        self.calls += 1
        velocity = self.model(frames.leave(y, self.level), self.level).velocity
        if not bool(torch.isfinite(velocity).all()):
            raise SolverError(f"{self.solver}: the model is not finite at {self.where}")
        return velocity

    def finish(self, y: Tensor, end: float, s: Level[float]) -> Tensor:
        """y at s, by Euler's rule from `end`, where the integration stopped."""
        return y if end == s.u else y + (s.u - end) * self(end, y)


def end_of_integration(solver: TorchODE | ScipyODE, t: Level[float], s: Level[float]) -> float:
    """The u at which to stop: s.u, or a little short of 0, where no network has been trained.

    At sigma = 0 eps is 0 for data that have a density and anything for data that have none, and a
    network that puts out x0 cannot say it. Euler's rule covers the rest, an error u^2 |y''| / 2:
    with u = sqrt(tolerance) / 10 it is a two-hundredth of the tolerance times |y''|.
    """
    return s.u if s.u > 0 else min(0.1 * min(solver.rtol, solver.atol) ** 0.5, t.u / 2)


def whole_interval(solver: object, steps: int | None) -> Tensor:
    """(1, 0): the steps between are the solver's to choose."""
    if steps is not None:
        raise ValueError(f"{type(solver).__name__} chooses its own steps; leave out steps")
    return torch.tensor([1.0, 0.0], dtype=torch.float64)


def check_tolerances(solver: TorchODE | ScipyODE) -> None:
    """Raise unless the solver's settings make sense."""
    errors.number("rtol", solver.rtol, 0, strict=True)
    errors.number("atol", solver.atol, 0, strict=True)
    errors.integer("max_calls", solver.max_calls)
