r"""Correctors, Sampler -> Sampler: fresh noise reduces the errors of another sampler.

After a step, moves that preserve the law of its level (Song et al. 2021, Algorithms 4, 5); before a
step, noise by the forward kernel up to a higher level (Karras et al. 2022, Algorithm 2). Both leave
the path to which the memory of the sampler belongs, so a multistep sampler restarts after them.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.grids import Grid
from sde_diffusion.processes.level import Level, forward_kernel
from sde_diffusion.samplers.sampler import (
    IS_SAMPLER,
    Claims,
    Memory,
    Model,
    Noise,
    Sampler,
    check_down,
)
from sde_diffusion.validate import Checked, Count, NonNegative, Number, Positive

__all__ = ["Churn", "Langevin"]


@dataclass(frozen=True)
class Langevin(Checked):
    r"""A sampler with n Langevin moves after each of its steps except the one to sigma = 0.

    Langevin dynamics  dx = score d tau + sqrt(2) dW  with  score = -(x - alpha x0) / sigma^2  and
    constant x0 for the time tau = 2 (r sigma)^2 is solved exactly:

        x = alpha x0 + sigma (c eps + sqrt(1 - c^2) z),      c = e^(-2 r^2)

    Song et al. use the step 2 (r |z| / |score|)^2, with norms of the whole batch, and Euler's rule.
    Apart from the signal the norm of the score is |z| / sigma: with it tau is a number, samples do
    not depend on the rest of the batch, and the move is linear with signal-to-noise ratio r. The
    exact solution is stable for any r, and exact for data in one point.

    Constant x0 leaves a bias: for data of variance v repeated moves keep the variance
    P (1 + c) / (2 - (1 - c) sigma^2 / P) instead of P = alpha^2 v + sigma^2, too small by at most a
    share r^2. The bias does not vanish with more steps, hence order 0. Each move multiplies an
    error of the predictor by 1 - (1 - c) sigma^2 / P, so moves help if that error is the larger
    one. n moves cost n calls.

    Args:
        sampler: the predictor.
        corrections: n.
        snr: r.
    """

    sampler: Annotated[Sampler, IS_SAMPLER]
    corrections: Count = 1
    snr: Positive = 0.16

    @property
    def claims(self) -> Claims:
        """Order 0: the bias of the moves does not vanish with more steps."""
        return replace(self.sampler.claims, order=0, step_order=None, noise=True)

    @property
    def grid(self) -> Grid:
        """The grid of the predictor."""
        return self.sampler.grid

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        check_down(self, t, s)
        x, memory = self.sampler.step(model, x, t, s, noise, memory)
        if s.sigma == 0:
            return x, memory
        kept, renewed = math.exp(-2 * self.snr**2), math.sqrt(-math.expm1(-4 * self.snr**2))
        for _ in range(self.corrections):
            mean = model(x, s).combine(s.alpha, s.sigma * kept)
            x = mean.add_(noise(s.t, s.t, x), alpha=s.sigma * renewed)
        return x, None


@dataclass(frozen=True)
class Churn(Checked):
    r"""A sampler whose steps begin at a higher level, as in Karras et al. 2022, Algorithm 2.

    With r = sigma / alpha, the sigma of the paper, a step from t to s first goes up to a level t^,

        r^ = (1 + gamma) r,     x^ = a x + b S_noise z,     gamma = min(S_churn / N, sqrt(2) - 1)

    where a, b are those of the forward kernel from t to t^ (a = 1 on EDM), then makes a step of the
    sampler from t^ to s. With S_noise = 1 the way up is exact in law, so the order is that of the
    sampler; with S_churn = 0 the result is that of the sampler.

    A step does not contain N. On the levels of the paper, even in r^(1/7), a step from t to s is
    1 / (N - 1) of the distance d from 80 to 0.002, so N = 1 + d / (r_t^(1/7) - r_s^(1/7)). On these
    levels, the grid of Heun, gamma equals that of the paper; on others S_churn is the total amount.
    For any S_tmin and S_tmax two steps have gamma = 0: the one to sigma = 0, and one that starts at
    the end of the process. Other steps go up to that end at most.

    Args:
        sampler: the steps down; Heun() for Algorithm 2 of the paper.
        s_churn: total amount of noise.
        s_tmin, s_tmax: range of r in which noise is added.
        s_noise: factor of the standard deviation of the noise; the law is exact for 1 alone.
    """

    sampler: Annotated[Sampler, IS_SAMPLER]
    s_churn: NonNegative = 40.0
    s_tmin: NonNegative = 0.05
    s_tmax: Annotated[float, Number()] = 50.0
    s_noise: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.number("s_tmax", self.s_tmax, self.s_tmin)

    @property
    def claims(self) -> Claims:
        """Order 1 for a single step: the way up makes the state at s that of Euler's rule."""
        return replace(self.sampler.claims, step_order=1, noise=True)

    @property
    def grid(self) -> Grid:
        """The grid of the sampler."""
        return self.sampler.grid

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        check_down(self, t, s)
        up = 1 + self.gamma(t, s)
        above = t if up == 1 else model.process.level_at(up * t.sigma / (t.alpha + up * t.sigma))
        if above.log_snr >= t.log_snr:  # no noise is added here, or the process ends here
            return self.sampler.step(model, x, t, s, noise, memory)
        a, b = forward_kernel(t, above)
        higher = (x * a).add_(noise(above.t, t.t, x), alpha=b * self.s_noise)
        return self.sampler.step(model, higher, above, s, noise, None)

    def gamma(self, t: Level[float], s: Level[float]) -> float:
        """r^ / r - 1 of the step from t to s."""
        if s.sigma == 0 or t.alpha == 0 or not self.s_tmin <= t.sigma / t.alpha <= self.s_tmax:
            return 0.0
        down = (t.sigma / t.alpha) ** (1 / 7) - (s.sigma / s.alpha) ** (1 / 7)
        steps = 1 + (80 ** (1 / 7) - 0.002 ** (1 / 7)) / down
        return min(self.s_churn / steps, math.sqrt(2) - 1)
