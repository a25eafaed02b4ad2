r"""Samples of the posterior by sequential Monte Carlo: exact as the number of particles grows.

Twisted diffusion sampling (Wu et al. 2023). The chain p(x_s | x_t) = N(mean, v I) of the model is
followed by particles that are drawn towards y, weighted for it, and drawn again by their weights.
With any positive twist h(x), the ratio of what should have been drawn to what was,

    w = p(x_s | x_t) h(x_s) / (q(x_s | x_t) h(x_t)),      h(x_0) = p(y | x_0),

makes the weighted particles those of  p(x_0) p(y | x_0): of the chain's own law given y, for
whatever twist and proposal; good ones need fewer particles. Here the twist is the likelihood of
PiGDM, and q moves the mean by v times its gradient.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.grids import Grid
from sde_diffusion.inverse.corrections import Differentiable
from sde_diffusion.inverse.measurements import IS_OBSERVATION, Observation
from sde_diffusion.inverse.methods import posterior_variance
from sde_diffusion.models.model import Model
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level
from sde_diffusion.processes.level import coordinates, posterior_kernel
from sde_diffusion.samplers import Ancestral
from sde_diffusion.samplers.sampler import Claims, Memory
from sde_diffusion.validate import Checked, Integer, NonNegative, Positive, Share

__all__ = ["SMC", "Particles"]


class Particles(NamedTuple):
    """What SMC carries from step to step, and leaves at the end.

    Attributes:
        log_weight: of each particle, but for h where it stands, (B,) float64.
        effective: share of the particles that counted when a cloud was weighted, (clouds,).
    """

    log_weight: Tensor
    effective: Tensor


@dataclass(frozen=True, eq=False)
class SMC(Checked):
    r"""A sampler whose batch is clouds of particles, each the posterior of one measurement.

    Rows k P .. (k + 1) P - 1 are the cloud number k of P particles; y has one row per particle, or
    one for all. At the end each cloud is drawn by its weights: its particles count the same, some
    more than once. One call of the network a step, differentiated. The law is that of the chain's
    posterior: more steps bring it to the data's, as they bring the chain. With little noise, or y
    far out, few particles survive: `Particles.effective`, in the memory of a trajectory, tells. The
    path must end at t = 0, where the last weights are drawn by.

    Args:
        observation: a Measurement with noise_std > 0, or a LogLikelihood.
        particles: P; the batch must hold a multiple of it.
        variance: v of PiGDM's twist.
        kernel_variance: that of the data in the chain's kernels, v by default: for data N(m, v I)
            the chain is then theirs in any number of steps. 0 gives DDPM's small variance, and no
            noise in the last step.
        threshold: a cloud is drawn again by its weights when its effective number of particles
            falls below this share of P.
    """

    observation: Annotated[Observation, IS_OBSERVATION]
    particles: Annotated[int, Integer(2)]
    variance: Positive = 1.0
    kernel_variance: NonNegative | None = None
    threshold: Share = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.observation, "noise_std", 1.0) == 0:
            raise ValueError("noise_std must be above 0 for SMC; got 0: all weights but one vanish")

    @property
    def claims(self) -> Claims:
        """Those of Ancestral, whose chain this is."""
        return Ancestral().claims

    @property
    def grid(self) -> Grid:
        """That of Ancestral."""
        return Ancestral().grid

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Particles]:  # fmt: skip
        if len(x) % self.particles:
            raise ValueError(
                f"the batch must hold clouds of {self.particles} particles; got {len(x)} samples"
            )
        at = Differentiable.of(model, x, t)
        spread = posterior_variance(t, self.variance)
        log_twist, pull = self.observation.spread_likelihood(at.x0.detach(), spread)
        gradient = at.back(pull)

        # The chain's kernel, N(mean, std^2 I): DDPM's with the variance of x0 given x.
        of_x0, v = posterior_kernel(s, t)
        mean = at.found.combine(s.alpha, math.sqrt(max(s.sigma**2 - v, 0.0))).detach()
        of_data = self.variance if self.kernel_variance is None else self.kernel_variance
        std = math.sqrt(v + of_x0**2 * posterior_variance(t, of_data))

        # Clouds of poor weights are drawn again; the twist where they stand counts until they move.
        log_weight = log_twist.double() + (0.0 if memory is None else memory.log_weight)
        share = self.effective(log_weight)
        poor = (share < self.threshold).repeat_interleave(self.particles)
        own = torch.arange(len(x), device=x.device)
        kept = torch.where(poor, self.drawn(log_weight, noise(t.t, t.t, x)), own)
        log_weight = torch.where(poor, 0.0, log_weight[kept]) - log_twist[kept]

        # A step of q = N(mean + std^2 gradient, std^2 I).
        shift, z = std * gradient[kept], noise(t.t, s.t, x)
        log_weight = log_weight - coordinates(shift * (shift / 2 + z)).sum(1)  # log p - log q
        x_s = mean[kept] + std * (shift + z)

        if s.sigma == 0:  # the last twist is the likelihood itself
            log_weight = log_weight + self.observation.log_likelihood(x_s)
            share = self.effective(log_weight)
            x_s = x_s[self.drawn(log_weight, noise(s.t, s.t, x))]
            log_weight = torch.zeros_like(log_weight)
        return x_s, Particles(log_weight, share)

    def effective(self, log_weight: Tensor) -> Tensor:
        """1 / (P sum of squared weights), in each cloud."""
        weight = log_weight.reshape(-1, self.particles).softmax(1)
        return 1 / (self.particles * weight.square().sum(1))

    def drawn(self, log_weight: Tensor, noise: Tensor) -> Tensor:
        """Rows drawn by weight within each cloud, systematically: one uniform number a cloud."""
        weight = log_weight.reshape(-1, self.particles).softmax(1)
        uniform = torch.special.ndtr(coordinates(noise)[:: self.particles, :1].double())
        places = (torch.arange(self.particles, device=weight.device) + uniform) / self.particles
        chosen = torch.searchsorted(weight.cumsum(1), places).clamp(max=self.particles - 1)
        first = torch.arange(len(weight), device=weight.device)[:, None] * self.particles
        return (chosen + first).flatten()
