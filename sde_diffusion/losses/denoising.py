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
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.losses.weights import Weight
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.prediction import Parameterization, truth
from sde_diffusion.processes import Level, Scalar
from sde_diffusion.processes.level import coordinates

__all__ = ["L1", "L2", "Huber", "Penalty", "denoising_loss"]


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
        validate.number("delta", self.delta, 0, strict=True)

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
    validate.batch("x0", x0)
    validate.kind("denoiser", denoiser, "a Denoiser", "parameterization")
    for name, value, what, attribute in (
        ("space", space, "a parameterization such as Eps()", "target"),
        ("weight", weight, "a function of the level such as SNR()", "__call__"),
        ("penalty", penalty, "a function of the error such as L2()", "__call__"),
    ):
        if value is not None:
            validate.kind(name, value, what, attribute)
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
