r"""Losses: denoising, in any space, with any penalty and weight; and where on the path to train.

Convention: x = alpha x0 + sigma eps with eps drawn; a loss compares a prediction with that truth.
The eps-loss |eps_hat - eps|^2 is sigma^2 |score_hat - grad log p(x | x0)|^2: denoising score
matching (Vincent 2011) weighted by the variance.

Errors in different spaces differ by a factor of the level alone. With e that of eps:

    x0:  -sigma / alpha e,    score:  -1 / sigma e,    v:  (alpha + sigma^2 / alpha) e

so a published weight means something only together with the space it was published for: `Weight`
objects carry theirs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from sde_diffusion import errors
from sde_diffusion.denoiser import Denoiser
from sde_diffusion.prediction import X0, Eps, Parameterization, Score, coordinates, truth
from sde_diffusion.processes import Discrete, Level, Process, Scalar, double

__all__ = [
    "L1",
    "L2",
    "SNR",
    "VLB",
    "DiscreteTimes",
    "EDMWeight",
    "Huber",
    "Likelihood",
    "LikelihoodTimes",
    "MinSNR",
    "NormalLogSNR",
    "Penalty",
    "Simple",
    "TimeDistribution",
    "UniformTimes",
    "Weight",
    "denoising_loss",
    "stratified",
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
    """g^2, on errors of the score (Song et al. 2021 "Maximum likelihood training", eq. 7).

    Half its integral over t bounds the negative log-likelihood up to a constant.
    """

    space: ClassVar[Parameterization] = Score()

    def __call__(self, level: Level) -> Scalar:
        return level.diffusion2


@dataclass(frozen=True)
class SNR:
    """alpha^2 / sigma^2, on errors of x0: the same loss as `Simple` (Salimans & Ho 2022)."""

    space: ClassVar[Parameterization] = X0()

    def __call__(self, level: Level) -> Scalar:
        return level.alpha**2 / level.sigma**2


@dataclass(frozen=True)
class MinSNR:
    """min(alpha^2 / sigma^2, gamma), on errors of x0 (Hang et al. 2023, eq. 8)."""

    space: ClassVar[Parameterization] = X0()
    gamma: float = 5.0

    def __post_init__(self) -> None:
        errors.number("gamma", self.gamma, 0, strict=True)

    def __call__(self, level: Level) -> Scalar:
        snr = SNR()(level)
        return snr.clamp(max=self.gamma) if isinstance(snr, Tensor) else min(snr, self.gamma)


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
        return level.alpha**2 / level.sigma**2 + 1 / self.sigma_data**2


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
        t = double(level.t)
        i = (t * self.process.num_steps).round().long().cpu()
        dtype = level.t.dtype if isinstance(level.t, Tensor) else torch.float64
        slack = min(0.25, 1e-6 + 2 * self.process.num_steps * torch.finfo(dtype).eps)
        if t.device.type == "cpu" and bool(((t * self.process.num_steps - i).abs() > slack).any()):
            raise ValueError(f"VLB weighs the chain's times i / N alone; got t={t.flatten()}")
        betas = torch.tensor(self.process.betas, dtype=torch.float64)
        weights = betas**2 / (2 * self.process.model_variances(self.variance) * (1 - betas))
        weight = weights[i - 1]
        if isinstance(level.sigma, Tensor):
            return weight.to(level.sigma) / level.sigma**2
        return weight.item() / level.sigma**2


# ---- laws of t ---------------------------------------------------------------------------------


class TimeDistribution(Protocol):
    """A law of t in (0, 1], given by its quantile function, so that strata pass through it."""

    def __call__(self, quantile: Tensor) -> Tensor:
        """The t below which this share of the law lies; shaped like `quantile`, in (0, 1)."""
        ...


@dataclass(frozen=True)
class UniformTimes:
    """t uniform in (0, 1)."""

    def __call__(self, quantile: Tensor) -> Tensor:
        return quantile


@dataclass(frozen=True)
class DiscreteTimes:
    """t = i/N with i uniform in 1 .. N: training the discrete chain."""

    num_steps: int

    def __post_init__(self) -> None:
        errors.integer("num_steps", self.num_steps)

    def __call__(self, quantile: Tensor) -> Tensor:
        return (quantile * self.num_steps).ceil().clamp(1, self.num_steps) / self.num_steps


@dataclass(frozen=True)
class LikelihoodTimes:
    r"""Times in proportion to g^2 / sigma^2, importance sampling for the likelihood weight.

    Since d log_snr / dt = -g^2 / sigma^2, this law is uniform in log-SNR, and

        integral of g^2 |score error|^2 dt = total E[ |eps error|^2 ],   total = log_snr(t_min) -
                                                                           log_snr(t_max)

    so `Simple` with these times is `Likelihood` with uniform ones, at a fraction of the variance
    (Song et al. 2021 "Maximum likelihood training", sec. 5; Kingma et al. 2021, sec. 5).

    Args:
        process: whose path it is.
        t_min: where the path is cut, since log_snr(0) is infinite; its end is process.t_max.
    """

    process: Process
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        errors.kind("process", self.process, "a Process", "log_alpha", "variance")
        errors.number("t_min", self.t_min, 0, self.process.t_max, strict=True)
        if not self.t_min < self.process.t_max:
            raise ValueError(f"t_min must be below t_max={self.process.t_max}; got {self.t_min}")

    @property
    def total(self) -> float:
        """The integral of g^2 / sigma^2 over [t_min, t_max]."""
        first, last = self.process.log_snr(
            torch.tensor([self.t_min, self.process.t_max], dtype=torch.float64)
        ).tolist()
        return first - last

    def __call__(self, quantile: Tensor) -> Tensor:
        first = self.process.log_snr(self.t_min)
        return self.process.time(first - self.total * quantile)


@dataclass(frozen=True)
class NormalLogSNR:
    """log-SNR normal(mean, std^2), cut to the process's range: more work at the middle levels.

    With -log_snr / 2 = log(sigma / alpha) this is the log-normal noise law of Karras et al. 2022,
    sec. 5, for any process; their P_mean = -1.2, P_std = 1.2 are mean = 2.4, std = 2.4 here.
    """

    process: Process
    mean: float = 0.0
    std: float = 2.0

    def __post_init__(self) -> None:
        errors.kind("process", self.process, "a Process", "log_alpha", "variance")
        errors.number("mean", self.mean)
        errors.number("std", self.std, 0, strict=True)

    def __call__(self, quantile: Tensor) -> Tensor:
        lowest = self.process.log_snr(torch.ones((), dtype=torch.float64)).item()
        above = 0.5 * math.erfc((lowest - self.mean) / (self.std * math.sqrt(2)))
        return self.process.time(self.mean - self.std * torch.special.ndtri(quantile * above))


def stratified(offset: float, positions: Tensor, batch_size: int) -> Tensor:
    """One quantile in each of batch_size equal strata, shifted together by `offset` in [0, 1).

    (position + offset) / batch_size: the low-discrepancy draw of Kingma et al. 2021, App. I.1.
    """
    return (positions.to(torch.float64) + offset) / batch_size
