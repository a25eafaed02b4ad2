r"""Correctors: what makes another sampler forget its errors by fresh noise. Sampler -> Sampler.

After a step, moves that leave the law of its level as it is (Song et al. 2021, Algorithms 4, 5);
before a step, noise by the forward kernel up to a higher level (Karras et al. 2022, Algorithm 2).
Both leave the path that the sampler's memory is about, so a multistep one starts afresh after them,
as it does at its first step.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.grids import Grid
from sde_diffusion.models.model import Model
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level
from sde_diffusion.processes.level import forward_kernel
from sde_diffusion.samplers.sampler import IS_SAMPLER, Claims, Memory, Sampler
from sde_diffusion.validate import Checked, Count, NonNegative, Number, Positive

__all__ = ["Churn", "Langevin"]


@dataclass(frozen=True)
class Langevin(Checked):
    r"""A sampler with n Langevin moves after each of its steps but the one to sigma = 0.

    Langevin dynamics  dx = score d tau + sqrt(2) dW  with  score = -(x - alpha x0) / sigma^2  and
    x0 held for the time tau = 2 (r sigma)^2 is solved exactly:

        x = alpha x0 + sigma (c eps + sqrt(1 - c^2) z),      c = e^(-2 r^2)

    Song et al. step by 2 (r |z| / |score|)^2, norms of the whole batch, and by Euler's rule. The
    score's norm is |z| / sigma but for the signal in it: with that tau is a number, no sample
    depends on its batch mates, and the move is a linear one of signal-to-noise ratio r. Solved
    exactly it is stable for any r, and right for data in one point.

    Held x0 leaves a bias: of data of variance v a move alone keeps the variance
    P (1 + c) / (2 - (1 - c) sigma^2 / P) where it should keep P = alpha^2 v + sigma^2, r^2 too
    little at most. This does not vanish with more steps, hence order 0; an error that the predictor
    makes is reduced by 1 - (1 - c) sigma^2 / P in each move, so a move pays where the predictor's
    is the larger error. n moves cost n calls.

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
        """Order 0: the bias of the moves stays at any number of steps."""
        return replace(self.sampler.claims, order=0, step_order=None, noise=True)

    @property
    def grid(self) -> Grid:
        """The predictor's."""
        return self.sampler.grid

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
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
    r"""A sampler whose steps begin higher up, as those of Karras et al. 2022, Algorithm 2, do.

    With r = sigma / alpha, which is their sigma, a step from t to s goes up to a level t^ first,

        r^ = (1 + gamma) r,     x^ = a x + b S_noise z,     gamma = min(S_churn / N, sqrt(2) - 1)

    where a, b are those of the forward kernel from t to t^ (a = 1 on EDM), and takes the sampler's
    step from t^ to s. With S_noise = 1 the way up is exact in law, so the order is the sampler's;
    with S_churn = 0 it is the sampler.

    No step knows N. On the levels of Karras et al., even in r^(1/7), one from t to s is 1 / (N - 1)
    of the way d from 80 to 0.002, so N = 1 + d / (r_t^(1/7) - r_s^(1/7)): on their levels, which
    are those of Heun, this gamma is theirs, and on any others S_churn is what the whole way gets.
    Two steps have gamma = 0 whatever S_tmin and S_tmax are: the one to sigma = 0, and one that
    starts where the process ends. Nor does any other go above that end: gamma is held to it.

    Args:
        sampler: what steps down; Heun() for their Algorithm 2.
        s_churn: amount of noise in all.
        s_tmin, s_tmax: r at which it is added.
        s_noise: factor of the noise's standard deviation; the law is right for 1 alone.
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
        """Of a step the order is 1: on the way up the state at s is Euler's."""
        return replace(self.sampler.claims, step_order=1, noise=True)

    @property
    def grid(self) -> Grid:
        """The sampler's."""
        return self.sampler.grid

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        up = 1 + self.gamma(t, s)
        if up == 1:
            return self.sampler.step(model, x, t, s, noise, memory)
        above = model.process.level_at(up * t.sigma / (t.alpha + up * t.sigma))
        if above.log_snr >= t.log_snr:  # the process ends here
            return self.sampler.step(model, x, t, s, noise, memory)
        a, b = forward_kernel(t, above)
        higher = (x * a).add_(noise(above.t, t.t, x), alpha=b * self.s_noise)
        return self.sampler.step(model, higher, above, s, noise, None)

    def gamma(self, t: Level[float], s: Level[float]) -> float:
        """How much higher the step from t to s begins: r^ / r - 1."""
        if s.sigma == 0 or t.alpha == 0 or not self.s_tmin <= t.sigma / t.alpha <= self.s_tmax:
            return 0.0
        down = (t.sigma / t.alpha) ** (1 / 7) - (s.sigma / s.alpha) ** (1 / 7)
        steps = 1 + (80 ** (1 / 7) - 0.002 ** (1 / 7)) / down
        return min(self.s_churn / steps, math.sqrt(2) - 1)
