"""Heun's method in the straight frame."""

from dataclasses import dataclass

from torch import Tensor

from sde_diffusion.grids import Karras
from sde_diffusion.processes.level import Level, enter, leave
from sde_diffusion.samplers.sampler import Claims, Memory, Model, Noise

__all__ = ["Heun"]


@dataclass(frozen=True)
class Heun:
    """The trapezoidal rule with an Euler predictor, two calls a step (Karras et al. 2022, Alg. 1).

    y' = y + h velocity(y, t),    y_s = y + h/2 (velocity(y, t) + velocity(y', s)),    h = u_s - u_t

    The step that ends at sigma = 0 is an Euler step: n steps make 2 n - 1 calls.
    """

    claims = Claims(order=2)
    grid = Karras()

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        y, h = enter(x, t), s.u - t.u
        slope = model(x, t).velocity
        x_s = leave(y + h * slope, s)
        if s.sigma == 0:
            return x_s, None
        slope = slope + model(x_s, s).velocity
        return leave(y + h / 2 * slope, s), None
