"""Ancestral sampling of the chain: DDPM, and DDIM at eta = 0."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

from torch import Tensor

from sde_diffusion.grids import Usual
from sde_diffusion.processes.level import Level, forward_kernel, posterior_kernel
from sde_diffusion.samplers.sampler import Claims, Memory, Model, Noise, check_down
from sde_diffusion.validate import Checked, Share

__all__ = ["Ancestral"]


@dataclass(frozen=True)
class Ancestral(Checked):
    r"""Draw x_s from q(x_s | x_t, x0) with the x0 of the model for the true one.

    With a = alpha_t / alpha_s,  b^2 = sigma_t^2 - a^2 sigma_s^2  and the posterior variance
    v = b^2 sigma_s^2 / sigma_t^2  (Ho et al. 2020, eq. 6-7; Song et al. 2021 "DDIM", eq. 12):

        x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 v) eps + std z

        variance "posterior":  std = eta sqrt(v);        eta = 1 is DDPM's small variance, 0 is DDIM
        variance "beta":       std = b with eta = 1;     DDPM's large variance, sigma_t^2 = beta_t

    No noise is added in the step that ends at sigma = 0. On the full grid of a Discrete process
    this is Ho et al.'s Algorithm 2; on any other grid it is the same chain on fewer levels.

    Args:
        variance: "posterior" or "beta".
        eta: share of the posterior standard deviation, in [0, 1]; 1 with variance "beta".
    """

    variance: Literal["posterior", "beta"] = "posterior"
    eta: Share = 1.0

    grid = Usual()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance == "beta" and self.eta != 1:
            raise ValueError(f"eta must be 1 with variance 'beta'; got {self.eta}")

    @property
    def claims(self) -> Claims:
        return Claims(order=1, noise=self.eta > 0)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        if self.eta > 0:
            check_down(self, t, s)
        b = forward_kernel(s, t)[1]
        v = self.eta**2 * posterior_kernel(s, t)[1]
        mean = model(x, t).combine(s.alpha, sqrt(max(s.sigma**2 - v, 0.0)))
        std = sqrt(v) if self.variance == "posterior" else b
        if s.sigma == 0 or std == 0:
            return mean, None
        return mean.add_(noise(t.t, s.t, x), alpha=std), None
