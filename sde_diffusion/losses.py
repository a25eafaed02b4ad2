r"""Losses: denoising, in any space, with any penalty and weight.

Convention: x = alpha x0 + sigma eps with eps drawn; a loss compares a prediction with that truth.
The eps-loss |eps_hat - eps|^2 is sigma^2 |score_hat - grad log p(x | x0)|^2: denoising score
matching (Vincent 2011) weighted by the variance.

Errors in different spaces differ by a factor of the level alone. With e that of eps:

    x0:  -sigma / alpha e,    score:  -1 / sigma e,    v:  (alpha + sigma^2 / alpha) e

so a published weight means something only together with the space it was published for: `Weight`
objects carry theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from sde_diffusion import errors
from sde_diffusion.denoiser import Denoiser
from sde_diffusion.prediction import (
    X0,
    Eps,
    Parameterization,
    Score,
    coordinates,
    nonzero,
    truth,
)
from sde_diffusion.processes import Discrete, Level, Scalar, double

__all__ = [
    "L1",
    "L2",
    "SNR",
    "VLB",
    "EDMWeight",
    "Huber",
    "Likelihood",
    "MinSNR",
    "Penalty",
    "Simple",
    "Weight",
    "denoising_loss",
]


class Weight(Protocol):
    """w as a function of the level, and the space of the errors that it weighs."""

    space: ClassVar[Parameterization]

    def __call__(self, level: Level) -> Scalar: ...


class Penalty(Protocol):
    """What an error costs, coordinate by coordinate."""

    def __call__(self, error: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class L2:
    """e^2. Its best prediction is the posterior mean, which is what samplers need."""

    def __call__(self, error: Tensor) -> Tensor:
        return error**2


@dataclass(frozen=True)
class L1:
    """|e|. Its best prediction is the posterior median."""

    def __call__(self, error: Tensor) -> Tensor:
        return error.abs()


@dataclass(frozen=True)
class Huber:
    """e^2 / 2 up to |e| = delta, and delta (|e| - delta / 2) beyond."""

    delta: float = 1.0

    def __post_init__(self) -> None:
        errors.number("delta", self.delta, 0, strict=True)

    def __call__(self, error: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(
            error, torch.zeros_like(error), reduction="none", delta=self.delta
        )


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    cond: Tensor | None = None,
    space: Parameterization | None = None,
    penalty: Penalty | None = None,
    weight: Weight | Callable[[Level], Scalar] | None = None,
) -> Tensor:
    r"""w(level) penalty(target(prediction) - target(truth)), the mean over a sample's coordinates.

    Args:
        denoiser: the model that is trained.
        x0: clean data (B, ...).
        t: times in [0, 1], (B,).
        eps: standard normal noise, shaped like x0.
        cond: condition (B, width) for a conditional network.
        space: what is compared (Eps(), X0(), V(), Score(), ...); by default that of the weight, or
            else the network's own output.
        penalty: L2(), the default, L1(), Huber(delta) or any function of the error.
        weight: one of those below, or any function of the level; 1 by default.
    Returns:
        (B,) losses; take the mean to train.
    Raises:
        ValueError: if `space` is not that of the weight, or shapes do not fit.
    """
    errors.batch("x0", x0)
    errors.kind("denoiser", denoiser, "a Denoiser", "parameterization")
    for name, value, what, attribute in (
        ("space", space, "a parameterization such as Eps()", "target"),
        ("weight", weight, "a function of the level such as SNR()", "__call__"),
        ("penalty", penalty, "a function of the error such as L2()", "__call__"),
    ):
        if value is not None:
            errors.kind(name, value, what, attribute)
    if eps.shape != x0.shape:
        raise ValueError(f"eps must be shaped like x0, {tuple(x0.shape)}; got {tuple(eps.shape)}")
    own: Parameterization | None = getattr(weight, "space", None)
    if space is not None and own is not None and space != own:
        raise ValueError(f"{weight} weighs errors of {own}; got space={space}: leave it out")
    space = space or own or denoiser.parameterization
    level = denoiser.process.level(t, x0)
    prediction = denoiser(denoiser.process.perturb(x0, level, eps), level, cond)
    error = space.target(prediction) - space.target(truth(x0, eps, level))
    cost = (penalty or L2())(error)
    return coordinates(cost if weight is None else weight(level) * cost).mean(1)


# ---- weights -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simple:
    """1, on errors of eps: L_simple (Ho et al. 2020, eq. 14)."""

    space: ClassVar[Parameterization] = Eps()

    def __call__(self, level: Level) -> Scalar:
        return 1.0


@dataclass(frozen=True)
class Likelihood:
    """g^2, on errors of the score (Song et al. 2021 "Maximum likelihood training", Theorem 1).

    Half its integral over t bounds the negative log-likelihood up to a constant.
    """

    space: ClassVar[Parameterization] = Score()

    def __call__(self, level: Level) -> Scalar:
        t = double(level.t)
        unknown = double(level.diffusion2).isnan()
        if t.device.type == "cpu" and bool(unknown.any()):
            raise ValueError(
                f"g^2 is not promised at t={t[unknown].flatten()[0]:g}, above the process's t_max: "
                f"draw times below it, as LikelihoodTimes or UniformTimes(t_max=...) do"
            )
        return level.diffusion2


@dataclass(frozen=True)
class SNR:
    """alpha^2 / sigma^2, on errors of x0: the same loss as `Simple` (Salimans & Ho 2022)."""

    space: ClassVar[Parameterization] = X0()

    def __call__(self, level: Level) -> Scalar:
        return level.alpha**2 / nonzero(level.sigma, "the weight SNR", "sigma") ** 2


@dataclass(frozen=True)
class MinSNR:
    """min(alpha^2 / sigma^2, gamma), on errors of x0 (Hang et al. 2023)."""

    space: ClassVar[Parameterization] = X0()
    gamma: float = 5.0

    def __post_init__(self) -> None:
        errors.number("gamma", self.gamma, 0, strict=True)

    def __call__(self, level: Level) -> Scalar:
        signal, noise = level.alpha**2, level.sigma**2
        if isinstance(noise, Tensor):
            return signal / torch.maximum(noise, signal / self.gamma)
        return signal / max(noise, signal / self.gamma)


@dataclass(frozen=True)
class EDMWeight:
    """(r^2 + s^2) / (r s)^2 with r = sigma / alpha, s = sigma_data, on errors of x0.

    Karras et al. 2022, Table 1: 1 on errors of their network's output (space=Karras(sigma_data)).
    """

    space: ClassVar[Parameterization] = X0()
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        errors.number("sigma_data", self.sigma_data, 0, strict=True)

    def __call__(self, level: Level) -> Scalar:
        return SNR()(level) + 1 / self.sigma_data**2


@dataclass(frozen=True)
class VLB:
    """beta_i^2 / (2 sigma_i^2 alpha_i (1 - abar_i)), on errors of eps (Ho et al. 2020, eq. 12).

    The loss at t = i/N is then the part of L_(i-1) that depends on the model, in nats per
    coordinate. At i = 1 the posterior's variance is 0 and that of i = 2 stands in, as in the code
    of Ho et al.

    Args:
        process: the chain.
        variance: sigma_i^2 of the reverse kernels, "beta" or "posterior".
    """

    space: ClassVar[Parameterization] = Eps()
    process: Discrete
    variance: Literal["beta", "posterior"] = "beta"

    def __post_init__(self) -> None:
        errors.kind("process", self.process, "a Discrete process", "model_variances")
        self.process.model_variances(self.variance)
        if self.process.betas[-1] == 1:
            raise ValueError(
                "VLB weighs errors of eps, which say nothing of x0 where alpha = 0: a chain with "
                "zero terminal SNR has no such weight at i = N (DDPM.bound_term is the term itself)"
            )

    def __call__(self, level: Level) -> Scalar:
        n = self.process.num_steps
        t, sigma = double(level.t), double(level.sigma)
        i = (t * n).round().clamp(1, n).long()
        if t.device.type == "cpu":  # a GPU would stall
            slack = min(0.25, 1e-6 + n * 2.0**-22)  # float32 times
            theirs = self.process.noise_table[i].sqrt()  # bfloat16 has two digits of it
            strange = ((t * n - i).abs() > slack) | ((sigma / theirs - 1).abs() > 0.02)
            if bool(strange.any()):
                raise ValueError(
                    f"VLB weighs its own chain's levels at t = i/N alone; got "
                    f"t={t[strange].flatten()[0]:g}, sigma={sigma[strange].flatten()[0]:g}"
                )
        weight = self._weights.to(i.device)[i - 1]
        if isinstance(level.sigma, Tensor):
            return weight.to(level.sigma) / level.sigma**2
        return weight.item() / level.sigma**2

    @cached_property
    def _weights(self) -> Tensor:
        betas = self.process.beta_table
        return betas**2 / (2 * self.process.model_variances(self.variance) * (1 - betas))
