r"""Solvers of the reverse SDE  dx = (f x - g^2 score) dt + g dW,  t running down to 0.

Anderson 1982; Song et al. 2021, eq. 6. They step in t and use drift and diffusion, so they start
at `process.t_max`.
"""

import math
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import errors
from sde_diffusion.denoiser import Model
from sde_diffusion.noise import Generated, Noise
from sde_diffusion.processes import Level, Process
from sde_diffusion.sampling import Memory, SolverError

__all__ = ["AdaptiveTorchSDE", "EulerMaruyama", "TorchSDE"]


@dataclass(frozen=True)
class EulerMaruyama:
    """x_s = x - (f x - g^2 score) (t - s) + g sqrt(t - s) z, in every step, the last included."""

    @property
    def order(self) -> int:
        return 1

    def grid(self, process: Process, steps: int | None) -> Tensor:
        """The process's own from t_max: evenly spaced on the variance-preserving family."""
        return process.times(errors.integer("steps", steps), process.t_max)

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        dt = t.t - s.t
        drift = reverse_drift(model, x, t)
        return x + drift.mul_(dt).add_(noise(t.t, s.t, x), alpha=sqrt(t.diffusion2 * dt)), None


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
        errors.choice("method", self.method, ("euler", "milstein", "srk"))

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
        errors.choice("method", self.method, ("srk", "euler"))
        errors.integer("max_calls", self.max_calls)
        for name in ("rtol", "atol", "dt_min"):
            errors.number(name, getattr(self, name), 0, strict=True)

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


def reverse_drift(model: Model, x: Tensor, t: Level[float]) -> Tensor:
    """-(f x - g^2 score), the rate at which x moves as t runs down."""
    if not t.t <= model.process.t_max:
        raise ValueError(
            f"{type(model.process).__name__} promises drift and diffusion on "
            f"[0, {model.process.t_max}]; got t={t.t}: start the grid there"
        )
    return model(x, t).score.mul_(t.diffusion2).sub_(x, alpha=t.drift)


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
