"""Solvers of torchdiffeq, scipy and torchsde as samplers."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.grids import frames
from sde_diffusion.models.model import Model
from sde_diffusion.noise.sources import Generated, Noise
from sde_diffusion.processes import Level, Process
from sde_diffusion.processes.level import enter, leave
from sde_diffusion.samplers.euler_maruyama import EulerMaruyama, reverse_drift
from sde_diffusion.samplers.sampler import Memory, SolverError

__all__ = ["AdaptiveTorchSDE", "CallCount", "ScipyODE", "TorchODE", "TorchSDE"]


class CallCount(NamedTuple):
    """What a solver that picks its own steps leaves in the memory."""

    calls: int


class AdaptiveSolver(ABC):
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
        validate.choice("method", self.method, self.METHODS)
        validate.number("rtol", self.rtol, 0, strict=True)
        validate.number("atol", self.atol, 0, strict=True)
        validate.integer("max_calls", self.max_calls)

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
    ) -> tuple[Tensor, CallCount]:  # fmt: skip
        """From t to s in as many steps as it takes; the memory is a Report."""
        slope = Slope(self, model, t)
        if s.u == t.u or not x.numel():  # alpha has underflowed at both, or there is no sample
            return leave(enter(x, t), s), CallCount(0)
        y = enter(x.to(torch.promote_types(x.dtype, torch.float32)), t)
        if s.u > 0:
            y = self._integrate(slope, y, t.u, s.u)
        else:
            # Stop a little short of sigma = 0, where no network has been trained and one that puts
            # out x0 cannot say eps, and finish by Euler's rule. Its error there is u^2 |y''| / 2:
            # for u = sqrt(tolerance) / 10 a two-hundredth of the tolerance times |y''|.
            end = min(0.1 * min(self.rtol, self.atol) ** 0.5, t.u / 2)
            y = self._integrate(slope, y, t.u, end)
            y = y - end * slope(end, y)
        return leave(y, s).to(x), CallCount(slope.calls)

    @abstractmethod
    def _integrate(self, slope: "Slope", y: Tensor, start: float, end: float) -> Tensor:
        """The solution at u = end of dy/du = slope(u, y) from y at u = start."""


@dataclass(frozen=True)
class TorchODE(AdaptiveSolver):
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
class ScipyODE(AdaptiveSolver):
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

    def __init__(self, solver: AdaptiveSolver, model: Model, start: Level[float]) -> None:
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
        velocity = self.model(leave(y, self.level), self.level).velocity
        if not bool(torch.isfinite(velocity).all()):
            raise SolverError(f"{self.solver}: the model is not finite at {self.where}")
        return velocity


@dataclass(frozen=True)
class TorchSDE:
    """One step of a torchsde method per interval of the grid.

    euler and milstein take their Brownian increments from the sampler's own noise, so `seeds=` and
    injected noise work. srk needs more of the path than its increments and takes torchsde's
    BrownianInterval, its entropy drawn from `generator=`.

    Args:
        method: "euler", "milstein" or "srk".
    """

    method: str = "euler"

    def __post_init__(self) -> None:
        validate.choice("method", self.method, ("euler", "milstein", "srk"))

    @property
    def order(self) -> int:
        return 1

    def grid(self, process: Process, steps: int | None) -> Tensor:
        """That of EulerMaruyama."""
        return EulerMaruyama().grid(process, steps)

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        if not x.numel():
            return x.clone(), 0
        if self.method == "srk":
            brownian = torchsde_path(self, noise, x, t, s)
            sde = ReverseSDE(model, x, t, "additive")
        else:
            brownian = Increment(noise, x, t, s)
            sde = ReverseSDE(model, x, t, "diagonal")
        return integrate(sde, x, t, s, brownian, self.method, dt=t.t - s.t), sde.calls


@dataclass(frozen=True)
class AdaptiveTorchSDE:
    """torchsde's adaptive stepping: one error norm and one step size for the whole batch.

    The path is torchsde's BrownianInterval, which remembers it when a step is rejected.

    Args:
        method: "srk" or "euler".
        rtol, atol: tolerances of a step.
        dt_min: smallest step in t; torchsde warns and accepts when it gets there.
        max_calls: network calls after which it gives up.
    """

    method: str = "srk"
    rtol: float = 1e-3
    atol: float = 1e-3
    dt_min: float = 1e-5
    max_calls: int = 100_000

    def __post_init__(self) -> None:
        validate.choice("method", self.method, ("srk", "euler"))
        validate.integer("max_calls", self.max_calls)
        for name in ("rtol", "atol", "dt_min"):
            validate.number(name, getattr(self, name), 0, strict=True)

    @property
    def order(self) -> None:
        """None: the error follows the tolerances."""
        return None

    def grid(self, process: Process, steps: int | None) -> Tensor:
        """(t_max, 0): the steps between are torchsde's to choose."""
        if steps is not None:
            raise ValueError("AdaptiveTorchSDE chooses its own steps; leave out steps")
        return torch.tensor([process.t_max, 0.0], dtype=torch.float64)

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        if not x.numel():
            return x.clone(), 0
        y = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision cannot be controlled
        sde = ReverseSDE(model, y, t, "additive", self.max_calls)
        brownian = torchsde_path(self, noise, y, t, s)
        first = (t.t - s.t) / 100
        return integrate(sde, y, t, s, brownian, self.method, first, self).to(x), sde.calls


class ReverseSDE:
    """The reverse SDE as torchsde wants it: state (B, d), time tau = -t increasing.

    noise_type "diagonal" returns g as (B, d). "additive", a (B, d, d) view of one g I, tells srk
    that g does not depend on the state, and then no stage asks for a score at sigma = 0.
    """

    sde_type = "ito"

    def __init__(
        self,
        model: Model,
        x: Tensor,
        start: Level[float],
        noise_type: str,
        max_calls: float = math.inf,
    ) -> None:
        self.model, self.shape, self.noise_type = model, x.shape, noise_type
        self.max_calls = max_calls
        self.last: tuple[Any, Any, Tensor] | None = None
        self.start, self.calls = start, 0

    def level(self, tau: Tensor | float) -> Level[float]:
        t = -float(tau)
        if t == self.start.t:
            return self.start
        return self.model.process.levels(torch.tensor([max(t, 0.0)], dtype=torch.float64))[0]

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        if self.last is not None and self.last[0] == float(tau) and self.last[1] is y:
            return self.last[2]  # torchsde asks once to learn the shape and once more to step
        if self.calls >= self.max_calls:
            raise SolverError(f"torchsde reached max_calls={self.calls} at t={-float(tau):.3g}")
        self.calls += 1
        drift = reverse_drift(self.model, y.reshape(self.shape), self.level(tau)).reshape(y.shape)
        self.last = (float(tau), y, drift)
        return drift

    def g(self, tau: Tensor, y: Tensor) -> Tensor:
        g = sqrt(self.level(tau).diffusion2)
        if self.noise_type == "diagonal":
            return y.new_full((1, 1), g).expand_as(y)
        return (g * torch.eye(y.shape[1], dtype=y.dtype, device=y.device)).expand(len(y), -1, -1)


class Increment:
    """The Brownian increment of one interval, in the form that torchsde asks for."""

    levy_area_approximation = "none"

    def __init__(self, noise: Noise, x: Tensor, t: Level[float], s: Level[float]) -> None:
        self.shape = (len(x), x.shape[1:].numel())
        self.dw = sqrt(t.t - s.t) * noise(t.t, s.t, x).reshape(self.shape)

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        return self.dw


def torchsde_path(sampler: Any, noise: Noise, x: Tensor, t: Level[float], s: Level[float]) -> Any:
    """A BrownianInterval of torchsde, which draws its entropy from our generator."""
    from torchsde import BrownianInterval

    if not isinstance(noise, Generated):
        raise ValueError(
            f"{sampler} draws its path from torchsde's BrownianInterval: give generator=, "
            f"not seeds= or noise="
        )
    return BrownianInterval(
        -t.t,
        -s.t,
        size=(len(x), x.shape[1:].numel()),
        dtype=x.dtype,
        device=x.device,
        entropy=noise.entropy(),
        levy_area_approximation="space-time",
    )


def integrate(
    sde: ReverseSDE,
    x: Tensor,
    t: Level[float],
    s: Level[float],
    brownian: Any,
    method: str,
    dt: float,
    adaptive: AdaptiveTorchSDE | None = None,
) -> Tensor:
    """torchsde's sdeint from t down to s, x of any shape."""
    from torchsde import sdeint

    y = x.reshape(len(x), x.shape[1:].numel())
    ts = torch.tensor([-t.t, -s.t], dtype=torch.float64)
    control = {} if adaptive is None else {
        "adaptive": True, "rtol": adaptive.rtol, "atol": adaptive.atol, "dt_min": adaptive.dt_min
    }  # fmt: skip
    try:
        path = sdeint(sde, y, ts, bm=brownian, method=method, dt=dt, **control)
    except AssertionError as error:  # torchsde's way to say that an error estimate is not finite
        raise SolverError(f"torchsde failed after {sde.calls} calls: {error}") from error
    return path[-1].reshape(x.shape)
