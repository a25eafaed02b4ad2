"""Solvers of torchdiffeq, scipy and torchsde as samplers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.grids import Ends
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes.level import Level, coordinates, double, enter, home, leave
from sde_diffusion.samplers.euler_maruyama import EulerMaruyama, rates_at, reverse_drift
from sde_diffusion.samplers.sampler import Claims, Memory, Model, SolverError, check_down
from sde_diffusion.validate import Checked, Choice, Count, Positive

__all__ = ["CallCount", "ScipyODE", "TorchODE", "TorchSDE"]


class CallCount(NamedTuple):
    """Record of a solver with its own steps."""

    calls: int


class AdaptiveSolver(Checked, ABC):
    """Base of the solvers with their own steps."""

    # An embedded error estimate can vanish by chance on few, large steps (measured: an error of 157
    # tolerances). With steps of at most 1/8 and 0.3 of the tolerance, the worst of 72 Gaussian
    # problems is 6.5.
    LARGEST_STEP: ClassVar = 0.125
    SAFETY: ClassVar = 0.3

    rtol: float
    atol: float
    max_calls: int

    claims = Claims(order=None, adaptive=True)
    grid = Ends()

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, CallCount]:  # fmt: skip
        """From t to s in steps of the solver's choice; the memory is a CallCount."""
        slope = Slope(self, model, t)
        if s.u == t.u or not x.numel():  # alpha underflows at both, or there is no sample
            return leave(enter(x, t), s), CallCount(0)
        y = enter(x.to(torch.promote_types(x.dtype, torch.float32)), t)
        # Stop a little above sigma = 0, where networks are not trained and x0 does not fix eps, and
        # finish by Euler's rule; or start by it. Its error is u^2 |y''| / 2: for
        # u = sqrt(tolerance) / 10 it is 1/200 of the tolerance times |y''|.
        near = min(0.1 * min(self.rtol, self.atol) ** 0.5, max(t.u, s.u) / 2)
        if t.u == 0:
            y = self._integrate(slope, y + near * slope(0.0, y), near, s.u)
        elif s.u > 0:
            y = self._integrate(slope, y, t.u, s.u)
        else:
            y = self._integrate(slope, y, t.u, near)
            y = y - near * slope(near, y)
        return leave(y, s).to(x), CallCount(slope.calls)

    @abstractmethod
    def _integrate(self, slope: "Slope", y: Tensor, start: float, end: float) -> Tensor:
        """The solution at u = end of dy/du = slope(u, y) from y at u = start."""


@dataclass(frozen=True)
class TorchODE(AdaptiveSolver):
    """Any method of torchdiffeq. One error norm and one step size serve the whole batch.

    Derivatives are those of the steps that it has chosen.

    Args:
        method: adaptive ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"), or fixed-step
            ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams"),
            which takes one step per interval of `times`.
        rtol, atol: tolerances of y.
        max_calls: limit of network calls.
    """

    ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
    FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
    METHODS = ADAPTIVE + FIXED

    method: Annotated[str, Choice(*METHODS)] = "dopri5"
    rtol: Positive = 1e-5
    atol: Positive = 1e-5
    max_calls: Count = 10_000

    def _integrate(self, slope: "Slope", y: Tensor, start: float, end: float) -> Tensor:
        from torchdiffeq import odeint

        real = torch.float64 if home(y.device) == y.device else torch.float32
        span = torch.tensor([start, end], dtype=real, device=y.device)
        options = None
        if self.method in self.ADAPTIVE:  # otherwise they overstep the end and interpolate
            options = {"step_t": span[1:], "max_step": self.LARGEST_STEP, "dtype": real}
            options["norm"] = detached_norm
        rtol, atol = self.SAFETY * self.rtol, self.SAFETY * self.atol
        try:
            path = odeint(slope, y, span, rtol=rtol, atol=atol, method=self.method, options=options)
        except AssertionError as error:  # torchdiffeq signals an underflowed step by it
            raise SolverError(f"{self} failed at {slope.where}: {error}") from error
        return cast(Tensor, path)[-1]


def detached_norm(y: Tensor) -> Tensor:
    """The norm of torchdiffeq, a constant in derivatives: they are those of the chosen steps."""
    return y.detach().abs().pow(2).mean().sqrt()


@dataclass(frozen=True)
class ScipyODE(AdaptiveSolver):
    """Any method of scipy.integrate.solve_ivp, in float64: an accurate, slow reference.

    It has no derivatives.

    Args:
        method: "RK45", "RK23", "DOP853", "Radau", "BDF" or "LSODA".
        rtol, atol: tolerances of y.
        max_calls: limit of network calls.
    """

    METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")

    method: Annotated[str, Choice(*METHODS)] = "DOP853"
    rtol: Positive = 1e-8
    atol: Positive = 1e-8
    max_calls: Count = 100_000

    claims = replace(AdaptiveSolver.claims, differentiable=False)

    def _integrate(self, slope: "Slope", y: Tensor, start: float, end: float) -> Tensor:
        from scipy.integrate import solve_ivp

        def flat(u: float, state: np.ndarray) -> np.ndarray:
            here = torch.from_numpy(state).reshape(y.shape).to(real).to(y.device)
            return slope(u, here).flatten().cpu().numpy()

        begin = double(y).flatten().cpu().numpy()
        real = torch.float64 if home(y.device) == y.device else torch.float32
        rtol, atol = max(self.SAFETY * self.rtol, 3e-14), self.SAFETY * self.atol  # 3e-14: scipy's
        span, step = (start, end), self.LARGEST_STEP
        path = solve_ivp(flat, span, begin, self.method, rtol=rtol, atol=atol, max_step=step)
        if not path.success:
            raise SolverError(f"{self} failed at {slope.where}: {path.message}")
        return torch.from_numpy(path.y[:, -1]).reshape(y.shape).to(real).to(y.device)


class Slope:
    """dy/du as a function of (u, y), counting its calls."""

    def __init__(self, solver: AdaptiveSolver, model: Model, start: Level[float]) -> None:
        self.solver, self.model, self.calls = solver, model, 0
        self.start = self.level = start

    @property
    def where(self) -> str:
        return f"t={self.level.t:.3g} (u={self.level.u:.3g}) after {self.calls} calls"

    def __call__(self, u: Tensor | float, y: Tensor) -> Tensor:
        if self.calls >= self.solver.max_calls:
            raise SolverError(f"{self.solver} reached max_calls at {self.where}")
        u = float(u)
        if abs(u - self.start.u) <= 1e-7 * self.start.u:  # torchdiffeq rounds u to float32
            self.level = self.start
        elif u != self.level.u:
            self.level = self.model.process.level_at(u)
        self.calls += 1
        velocity = self.model(leave(y, self.level), self.level).velocity
        if not bool(torch.isfinite(velocity).all()):
            raise SolverError(f"{self.solver}: the model is not finite at {self.where}")
        return velocity


@dataclass(frozen=True)
class TorchSDE(Checked):
    """One step of a torchsde method per interval of the grid.

    euler and milstein use the noise of the sampler as Brownian increments, so `seeds=` and injected
    noise work. srk needs more of the path than increments and uses the BrownianInterval of
    torchsde, with entropy drawn from `generator=`.

    Args:
        method: "euler", "milstein" or "srk".
    """

    method: Literal["euler", "milstein", "srk"] = "euler"

    claims, grid = EulerMaruyama.claims, EulerMaruyama.grid

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        from torchsde import sdeint

        check_down(self, t, s)
        if not x.numel():
            return x.clone(), None
        srk = self.method == "srk"
        sde = ReverseSDE(model, x, t, "additive" if srk else "diagonal")
        brownian: Any = torchsde_path(self, noise, x, t, s) if srk else Increment(noise, x, t, s)
        y, ts = coordinates(x), torch.tensor([-t.t, -s.t], dtype=torch.float64)
        path = sdeint(sde, y, ts, bm=brownian, method=self.method, dt=t.t - s.t)
        return path[-1].reshape(x.shape), None


class ReverseSDE:
    """The reverse SDE in the interface of torchsde: state (B, d), time tau = -t increasing.

    noise_type "diagonal" returns g as (B, d). "additive" returns a (B, d, d) view of one g I: for
    srk g is then independent of the state, and no stage needs a score at sigma = 0.
    """

    sde_type = "ito"

    def __init__(self, model: Model, x: Tensor, start: Level[float], noise_type: str) -> None:
        self.model, self.shape, self.noise_type = model, x.shape, noise_type
        self.last: tuple[float, Tensor, Tensor] | None = None
        self.levels = {start.t: (start, rates_at(model.process, start))}

    def level(self, tau: Tensor | float) -> tuple[Level[float], Sequence[float]]:
        """The level at time -tau, and f and g^2 there."""
        t = max(-float(tau), 0.0)
        if t not in self.levels:
            (level,) = self.model.process.rated_levels(torch.tensor([t], dtype=torch.float64))
            self.levels[t] = level, level.rates
        return self.levels[t]

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        if self.last is not None and self.last[0] == float(tau) and self.last[1] is y:
            return self.last[2]  # torchsde evaluates once for the shape and once more to step
        level, rates = self.level(tau)
        drift = reverse_drift(self.model, y.reshape(self.shape), level, rates).reshape(y.shape)
        self.last = (float(tau), y, drift)
        return drift

    def g(self, tau: Tensor, y: Tensor) -> Tensor:
        g = sqrt(self.level(tau)[1][1])
        if self.noise_type == "diagonal":
            return y.new_full((1, 1), g).expand_as(y)
        return (g * torch.eye(y.shape[1], dtype=y.dtype, device=y.device)).expand(len(y), -1, -1)


class Increment:
    """The Brownian increment of one interval, in the interface of torchsde."""

    levy_area_approximation = "none"

    def __init__(self, noise: Noise, x: Tensor, t: Level[float], s: Level[float]) -> None:
        self.dw = sqrt(t.t - s.t) * coordinates(noise(t.t, s.t, x))
        self.shape = self.dw.shape

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        return self.dw


def torchsde_path(sampler: Any, noise: Noise, x: Tensor, t: Level[float], s: Level[float]) -> Any:
    """A BrownianInterval of torchsde with entropy from the generator of the run."""
    from torchsde import BrownianInterval

    entropy_of = getattr(noise, "entropy", None)
    if entropy_of is None:
        advice = "its path is drawn by torchsde; give generator="
        raise ValueError(f"seeds and noise must be left out for {sampler}; {advice}")
    size, entropy, area = coordinates(x).shape, entropy_of(), "space-time"
    return BrownianInterval(
        -t.t, -s.t, size, x.dtype, x.device, entropy, levy_area_approximation=area
    )
