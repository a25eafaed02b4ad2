r"""Posterior sampling by sequential Monte Carlo: exact in the limit of many particles.

Twisted diffusion sampling (Wu et al. 2023). Particles follow the chain p(x_s | x_t) = N(mean, v I)
of the model, with a proposal q that is shifted towards y. They are weighted to correct for the
shift, and resampled by their weights. For any positive twist h(x), the weights

    w = p(x_s | x_t) h(x_s) / (q(x_s | x_t) h(x_t)),      h(x_0) = p(y | x_0),

make the weighted particles samples of  p(x_0) p(y | x_0), the chain's own distribution given y.
This holds for every twist and proposal; good ones need fewer particles. Here the twist is the
likelihood of PiGDM, and q shifts the mean by v times its gradient.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.grids import Grid
from sde_diffusion.inverse.corrections import Differentiable
from sde_diffusion.inverse.measurements import IS_OBSERVATION, Observation
from sde_diffusion.models.model import Model
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes.level import Level, coordinates, posterior_kernel, posterior_variance
from sde_diffusion.samplers import Ancestral, Claims, Memory
from sde_diffusion.samplers.sampler import check_down
from sde_diffusion.validate import Checked, Integer, NonNegative, Positive, Share

__all__ = ["SMC", "Particles"]

FEW = 5  # effective particles, below which their mean and spread are not the posterior's


class Particles(NamedTuple):
    """Memory of SMC between steps, and its report at the end.

    Attributes:
        log_weight: of each particle, without the factor h at its place, (B,) float64.
        effective: effective number of particles, as a share of P, in each cloud, (clouds,).
        least: the smallest such share in the run so far, (clouds,).
    """

    log_weight: Tensor
    effective: Tensor
    least: Tensor


@dataclass(frozen=True, eq=False)
class SMC(Checked):
    r"""A sampler of the posterior, whose batch consists of clouds of particles.

    Rows k P .. (k + 1) P - 1 are cloud number k of P particles; y has one row per particle, or one
    for all. At the end each cloud is resampled, so that its particles have equal weight and some
    occur more than once. Each step calls the network once and differentiates it. The samples are
    from the posterior of the chain, which tends to the posterior of the data with more steps. If
    noise_std is small, y improbable or x0 of many coordinates, few particles remain: see
    `Particles`, in the memory of a trajectory. The path must end at t = 0, where the last
    resampling is done.

    Args:
        observation: a Measurement with noise_std > 0, or a LogLikelihood.
        particles: P; the size of the batch must be a multiple of it.
        variance: v of PiGDM's likelihood.
        kernel_variance: the variance of the data in the kernels of the chain, v by default: for
            data N(m, v I) the chain is then exact in any number of steps. 0 is the smaller variance
            of DDPM, without noise in the last step.
        threshold: a cloud is resampled when its effective number of particles is below this share
            of P.
    Warns:
        RuntimeWarning: at t = 0, if fewer than five particles of a cloud were effective at a step:
            its samples are nearly copies of each other, and their spread is too small.
    """

    observation: Annotated[Observation, IS_OBSERVATION]
    particles: Annotated[int, Integer(2)]
    variance: Positive = 1.0
    kernel_variance: NonNegative | None = None
    threshold: Share = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.observation, "noiseless", False):
            raise ValueError("noise_std must be above 0 for SMC; got 0: all weights but one vanish")

    @property
    def claims(self) -> Claims:
        """The claims of Ancestral, whose chain this is; resampling has no derivative."""
        return replace(Ancestral().claims, differentiable=False)

    @property
    def grid(self) -> Grid:
        """The grid of Ancestral."""
        return Ancestral().grid

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Particles]:  # fmt: skip
        check_down(self, t, s)
        if len(x) % self.particles:
            clouds = f"clouds of {self.particles} particles"
            raise ValueError(f"the batch must hold {clouds}; got {len(x)} samples")
        at = Differentiable.of(model, x, t)
        spread = posterior_variance(self.variance, t.alpha, t.sigma)
        log_twist, pull = self.observation.spread_likelihood(at.x0.detach(), spread)
        gradient = at.back(pull)

        # The chain's kernel, N(mean, std^2 I): DDPM's with the variance of x0 given x.
        of_x0, v = posterior_kernel(s, t)
        mean = at.found.combine(s.alpha, math.sqrt(max(s.sigma**2 - v, 0.0))).detach()
        of_data = self.variance if self.kernel_variance is None else self.kernel_variance
        std = math.sqrt(v + of_x0**2 * posterior_variance(of_data, t.alpha, t.sigma))

        # Resample clouds of low effective number; the weights include h of the present places.
        log_weight = log_twist.double() + (0.0 if memory is None else memory.log_weight)
        share = self.effective(log_weight)
        least = share if memory is None else torch.minimum(memory.least, share)
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
            least = torch.minimum(least, share)
            self.warn_of_few(least * self.particles)
            x_s = x_s[self.drawn(log_weight, noise(s.t, s.t, x))]
            log_weight = torch.zeros_like(log_weight)
        return x_s, Particles(log_weight, share, least)

    def warn_of_few(self, effective: Tensor) -> None:
        """Warn of clouds in which fewer than FEW particles were effective, (clouds,)."""
        poor = int((effective < FEW).sum())
        if poor:
            validate.warn(
                f"{poor} of {len(effective)} clouds of {self.particles} particles are degenerate: "
                f"at a step {float(effective.min()):.1f} were effective, fewer than {FEW}; use "
                "more particles",
                RuntimeWarning,
            )

    def effective(self, log_weight: Tensor) -> Tensor:
        """Return 1 / (P sum of squared weights) of each cloud."""
        weight = log_weight.reshape(-1, self.particles).softmax(1)
        return 1 / (self.particles * weight.square().sum(1))

    def drawn(self, log_weight: Tensor, noise: Tensor) -> Tensor:
        """Resample each cloud by weight: rows of a systematic draw, one uniform number a cloud."""
        weight = log_weight.reshape(-1, self.particles).softmax(1)
        uniform = torch.special.ndtr(coordinates(noise)[:: self.particles, :1].double())
        places = (torch.arange(self.particles, device=weight.device) + uniform) / self.particles
        chosen = torch.searchsorted(weight.cumsum(1), places).clamp(max=self.particles - 1)
        first = torch.arange(len(weight), device=weight.device)[:, None] * self.particles
        return (chosen + first).flatten()
