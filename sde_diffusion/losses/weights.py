r"""Weights of the denoising loss, each with the space of its errors."""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from sde_diffusion.models.parameterizations import X0, Eps, Score
from sde_diffusion.models.prediction import Parameterization, nonzero
from sde_diffusion.processes import Discrete, Level, Process, Scalar
from sde_diffusion.processes.level import double, onto, readable
from sde_diffusion.processes.process import IS_PROCESS
from sde_diffusion.validate import Checked, Kind, Positive

__all__ = ["SNR", "VLB", "EDMWeight", "Likelihood", "MinSNR", "Simple", "Weight"]


class Weight(Protocol):
    """w as a function of the level, and the space of the errors."""

    space: ClassVar[Parameterization]

    def __call__(self, level: Level) -> Scalar: ...


@dataclass(frozen=True)
class Simple:
    """1, on errors of eps: L_simple (Ho et al. 2020, eq. 14)."""

    space: ClassVar[Parameterization] = Eps()

    def __call__(self, level: Level) -> Scalar:
        return 1.0


@dataclass(frozen=True)
class Likelihood(Checked):
    """g^2, on errors of the score (Song et al. 2021 "Maximum likelihood training", Theorem 1).

    Half its integral over t bounds the negative log-likelihood up to a constant.
    """

    space: ClassVar[Parameterization] = Score()

    process: Annotated[Process, IS_PROCESS]

    def __call__(self, level: Level) -> Scalar:
        t = double(level.t)
        g2 = self.process.rates(t)[1]
        unknown = g2.isnan()
        if readable(t) and bool(unknown.any()):
            got = f"{t[unknown][0]:g}; use LikelihoodTimes or UniformTimes(t_max=...)"
            raise ValueError(f"t must be at most t_max, where g^2 is defined; got {got}")
        return like(g2, level.sigma)


@dataclass(frozen=True)
class SNR:
    """alpha^2 / sigma^2, on errors of x0: the same loss as `Simple` (Salimans & Ho 2022)."""

    space: ClassVar[Parameterization] = X0()

    def __call__(self, level: Level) -> Scalar:
        return level.alpha**2 / nonzero(level.sigma, "the weight SNR", "sigma") ** 2


@dataclass(frozen=True)
class MinSNR(Checked):
    """min(alpha^2 / sigma^2, gamma), on errors of x0 (Hang et al. 2023)."""

    space: ClassVar[Parameterization] = X0()
    gamma: Positive = 5.0

    def __call__(self, level: Level) -> Scalar:
        signal, noise = level.alpha**2, level.sigma**2
        larger = torch.maximum if isinstance(noise, Tensor) else max
        return signal / larger(noise, signal / self.gamma)


@dataclass(frozen=True)
class EDMWeight(Checked):
    """(r^2 + s^2) / (r s)^2 with r = sigma / alpha, s = sigma_data, on errors of x0.

    Karras et al. 2022, Table 1: 1 on errors of their network's output, which is the space
    Preconditioned(sigma_data).
    """

    space: ClassVar[Parameterization] = X0()
    sigma_data: Positive = 0.5

    def __call__(self, level: Level) -> Scalar:
        return SNR()(level) + 1 / self.sigma_data**2


@dataclass(frozen=True)
class VLB(Checked):
    """beta_i^2 / (2 sigma_i^2 alpha_i (1 - abar_i)), on errors of eps (Ho et al. 2020, eq. 12).

    The loss at t = i/N is then the part of L_(i-1) that depends on the model, in nats per
    coordinate. At i = 1 the posterior's variance is 0 and is replaced by that of i = 2, as in the
    code of Ho et al.

    Args:
        process: the chain.
        variance: sigma_i^2 of the reverse kernels, "beta" or "posterior".
    """

    space: ClassVar[Parameterization] = Eps()
    process: Annotated[Discrete, Kind("a Discrete process", "model_variances")]
    variance: Literal["beta", "posterior"] = "beta"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.process.betas[-1] == 1:
            got = "zero terminal SNR; use DDPM.bound_term"
            raise ValueError(f"process must have alpha > 0 at i = N; got {got}")

    def __call__(self, level: Level) -> Scalar:
        n = self.process.num_steps
        t, sigma = (v if isinstance(v, Tensor) else double(v) for v in (level.t, level.sigma))
        i = (t * n).round().clamp(1, n).long()
        if readable(t):
            slack = min(0.25, 1e-6 + n * 2.0**-22)  # float32 times
            theirs = self.process.noise_table[i].sqrt()  # bfloat16 has two digits of it
            strange = ((t * n - i).abs() > slack) | ((sigma / theirs - 1).abs() > 0.02)
            if bool(strange.any()):
                rule = "one of its own chain's levels at t = i/N alone"
                found = f"t={t[strange][0]:g}, sigma={sigma[strange][0]:g}"
                raise ValueError(f"level of VLB must be {rule}; got {found}")
        table = onto(self._weights, level.sigma if isinstance(level.sigma, Tensor) else sigma)
        return like(table[i - 1], level.sigma) / level.sigma**2

    @cached_property
    def _weights(self) -> Tensor:
        betas = self.process.beta_table
        return betas**2 / (2 * self.process.model_variances(self.variance) * (1 - betas))


def like(value: Tensor, sigma: Scalar) -> Scalar:
    """Convert a float64 result to the kind of `sigma`: its dtype and device, or a float."""
    return onto(value, sigma) if isinstance(sigma, Tensor) else value.item()
