"""Solvers of the probability flow, all in the straight frame, dy/du = velocity (see frames.py)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import errors, frames
from sde_diffusion.denoiser import Model
from sde_diffusion.noise import Noise
from sde_diffusion.processes import Level, Process
from sde_diffusion.sampling import Memory, SolverError

__all__ = ["Heun", "Report", "ScipyODE", "TorchODE"]


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


class OwnSteps(ABC):
    """What the solvers that pick their own steps have in common."""

    # An embedded error estimate can vanish by chance where there are few, large steps (measured: an
    # error of 157 tolerances). With steps of at most 1/8 and 0.3 of the tolerance the worst of 72
    # Gaussian problems was 6.5.
    LARGEST_STEP: ClassVar = 0.125
    SAFETY: ClassVar = 0.3

    METHODS: ClassVar[tuple[str, ...]]
    method: str
    rtol: float
    atol: float
    max_calls: int

    def __post_init__(self) -> None:
        errors.choice("method", self.method, self.METHODS)
        errors.number("rtol", self.rtol, 0, strict=True)
        errors.number("atol", self.atol, 0, strict=True)
        errors.integer("max_calls", self.max_calls)

    @property
    def order(self) -> None:
        """None: the error follows the tolerances, not the grid."""
        return None

    def grid(self, process: Process, steps: int | None) -> Tensor:
        """(1, 0): the steps between are the solver's to choose."""
        if steps is not None:
            raise ValueError(f"{type(self).__name__} chooses its own steps; leave out steps")
        return torch.tensor([1.0, 0.0], dtype=torch.float64)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Report]:  # fmt: skip
        """From t to s in as many steps as it takes; the memory is a Report."""
        slope = Slope(self, model, t)
        if s.u == t.u or not x.numel():  # alpha has underflowed at both, or there is no sample
            return frames.leave(frames.enter(x, t), s), Report(0)
        y = frames.enter(x.to(torch.promote_types(x.dtype, torch.float32)), t)
        if s.u > 0:
            y = self._integrate(slope, y, t.u, s.u)
        else:
            # Stop a little short of sigma = 0, where no network has been trained and one that puts
            # out x0 cannot say eps, and finish by Euler's rule. Its error there is u^2 |y''| / 2:
            # for u = sqrt(tolerance) / 10 a two-hundredth of the tolerance times |y''|.
            end = min(0.1 * min(self.rtol, self.atol) ** 0.5, t.u / 2)
            y = self._integrate(slope, y, t.u, end)
            y = y - end * slope(end, y)
        return frames.leave(y, s).to(x), Report(slope.calls)

    @abstractmethod
    def _integrate(self, slope: "Slope", y: Tensor, start: float, end: float) -> Tensor:
        """The solution at u = end of dy/du = slope(u, y) from y at u = start."""


@dataclass(frozen=True)
class TorchODE(OwnSteps):
    """Any method of torchdiffeq. One error norm and one step size serve the whole batch.

    Args:
        method: adaptive ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"), or fixed-step
            ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"),
            which takes one step per interval of `times`.
        rtol, atol: tolerances of y.
        max_calls: network calls after which it gives up.
    """

    ADAPTIVE: ClassVar = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
    FIXED: ClassVar = (
        "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"
    )  # fmt: skip
    METHODS: ClassVar = ADAPTIVE + FIXED

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_calls: int = 10_000

    def _integrate(self, slope: "Slope", y: Tensor, start: float, end: float) -> Tensor:
        from torchdiffeq import odeint

        real = torch.float32 if y.device.type == "mps" else torch.float64
        span = torch.tensor([start, end], dtype=real, device=y.device)
        options = None
        if self.method in self.ADAPTIVE:  # which would overstep the end and interpolate
            options = {"step_t": span[1:], "max_step": self.LARGEST_STEP, "dtype": real}
        rtol, atol = self.SAFETY * self.rtol, self.SAFETY * self.atol
        try:
            path = odeint(slope, y, span, rtol=rtol, atol=atol, method=self.method, options=options)
        except AssertionError as error:  # torchdiffeq's way to say that a step underflowed
            raise SolverError(f"{self} failed at {slope.where}: {error}") from error
        return cast(Tensor, path)[-1]


@dataclass(frozen=True)
class ScipyODE(OwnSteps):
    """Any method of scipy.integrate.solve_ivp, in float64: an oracle, slow on purpose.

    Args:
        method: "RK45", "RK23", "DOP853", "Radau", "BDF" or "LSODA".
        rtol, atol: tolerances of y.
        max_calls: network calls after which it gives up.
    """

    METHODS: ClassVar = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")

    method: str = "DOP853"
    rtol: float = 1e-8
    atol: float = 1e-8
    max_calls: int = 100_000

    def _integrate(self, slope: "Slope", y: Tensor, start: float, end: float) -> Tensor:
        from scipy.integrate import solve_ivp

        def flat(u: float, state: np.ndarray) -> np.ndarray:
            here = torch.from_numpy(state).reshape(y.shape).to(y.device)
            return slope(u, here).flatten().cpu().numpy()

        begin = y.double().flatten().cpu().numpy()
        rtol, atol = max(self.SAFETY * self.rtol, 3e-14), self.SAFETY * self.atol  # 3e-14: scipy's
        span, step = (start, end), self.LARGEST_STEP
        path = solve_ivp(flat, span, begin, self.method, rtol=rtol, atol=atol, max_step=step)
        if not path.success:
            raise SolverError(f"{self} failed at {slope.where}: {path.message}")
        return torch.from_numpy(path.y[:, -1]).reshape(y.shape).to(y.device)


class Slope:
    """dy/du as a function of (u, y), counting its calls."""

    def __init__(self, solver: OwnSteps, model: Model, start: Level[float]) -> None:
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
