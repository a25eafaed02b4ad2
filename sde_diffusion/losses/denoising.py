r"""Losses: denoising, in any space, with any penalty and weight.

Convention: x = alpha x0 + sigma eps with eps drawn; a loss compares a prediction with (x0, eps).
The eps-loss |eps_hat - eps|^2 is sigma^2 |score_hat - grad log p(x | x0)|^2: denoising score
matching (Vincent 2011) weighted by the variance.

Errors in different spaces differ by a factor of the level alone. With e the error of eps:

    x0:  -sigma / alpha e,    score:  -1 / sigma e,    v:  (alpha + sigma^2 / alpha) e

so a published weight is defined only together with its space: `Weight` objects carry both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from sde_diffusion.losses.weights import Weight
from sde_diffusion.models.denoiser import IS_MEANING, Denoiser
from sde_diffusion.models.prediction import Parameterization, truth
from sde_diffusion.processes.level import Level, Scalar, coordinates, wide
from sde_diffusion.validate import Checked, Cond, FloatBatch, Kind, Positive, arguments, kind, shown

__all__ = ["L1", "L2", "Huber", "Penalty", "denoising_loss"]

WEIGHT = Kind("a function of the level such as SNR()", "__call__")
PENALTY = Kind("a function of the error such as L2()", "__call__")


class Penalty(Protocol):
    """Cost of an error, coordinate by coordinate."""

    def __call__(self, error: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class L2:
    """e^2; minimized by the posterior mean, which samplers need."""

    def __call__(self, error: Tensor) -> Tensor:
        return error**2


@dataclass(frozen=True)
class L1:
    """|e|; minimized by the posterior median."""

    def __call__(self, error: Tensor) -> Tensor:
        return error.abs()


@dataclass(frozen=True)
class Huber(Checked):
    """e^2 / 2 up to |e| = delta, and delta (|e| - delta / 2) beyond."""

    delta: Positive = 1.0

    def __call__(self, error: Tensor) -> Tensor:
        zero = torch.zeros_like(error)
        return torch.nn.functional.huber_loss(error, zero, reduction="none", delta=self.delta)


@arguments
def denoising_loss(
    denoiser: Annotated[Denoiser, Kind("a Denoiser", "parameterization")],
    x0: FloatBatch,
    t: Tensor,
    eps: FloatBatch,
    *,
    cond: Cond | None = None,
    keep: Tensor | None = None,
    mask: Tensor | None = None,
    space: Annotated[Parameterization, IS_MEANING] | None = None,
    penalty: Annotated[Penalty, PENALTY] | None = None,
    weight: Annotated[Weight | Callable[[Level], Scalar], WEIGHT] | None = None,
) -> Tensor:
    r"""w(level) penalty(target(prediction) - target(truth)), the mean over a sample's coordinates.

    Args:
        denoiser: the model in training.
        x0: clean data (B, ...).
        t: times in [0, 1], (B,).
        eps: standard normal noise, shaped like x0.
        cond: conditions of a conditional network, (B, ...), or several by name.
        keep: bool (B,); where False the sample's conditions are replaced by the denoiser's null.
        mask: bools shaped like x0, False where a coordinate is unknown: the network sees 0 plus
            noise there, whatever x0 holds, and the mean is over the known coordinates of each
            sample (nan if there are none).
        space: the quantity compared (Eps(), X0(), V(), Score(), ...); by default that of the
            weight, or else the network's own output.
        penalty: L2(), the default, L1(), Huber(delta) or any function of the error.
        weight: an object of `losses.weights`, or any function of the level; 1 by default.
    Returns:
        (B,) losses, at least float32; take the mean to train.
    Raises:
        ValueError: if `space` is not that of the weight, or shapes do not fit.
    """
    if eps.shape != x0.shape:
        raise ValueError(f"eps must be shaped like x0, {tuple(x0.shape)}; got {tuple(eps.shape)}")
    own: Parameterization | None = getattr(weight, "space", None)
    if space is not None and own is not None and space != own:
        raise ValueError(f"{weight} weighs errors of {own}; got space={space}: leave it out")
    if keep is not None:
        kind("keep", keep, "a tensor of bools (B,)", "dtype", "shape")
        if keep.shape != x0.shape[:1] or keep.dtype != torch.bool or cond is None:
            rule = f"a bool for each condition, ({len(x0)},), given with cond"
            raise ValueError(f"keep must be {rule}; got {shown(keep)}")
        cond = denoiser.with_null(cond, keep)
    if mask is not None:
        kind("mask", mask, "a tensor of bools", "dtype", "shape")
        if mask.shape != x0.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bools shaped like x0, {tuple(x0.shape)}; "
                             f"got {shown(mask)}")  # fmt: skip
        x0 = x0.masked_fill(~mask, 0)
    space = space or own or denoiser.parameterization
    x0, eps = wide(x0), wide(eps)
    level = denoiser.process.level(t, x0)
    prediction = denoiser(denoiser.process.perturb(x0, level, eps), level, cond)
    error = space.target(prediction) - space.target(truth(x0, eps, level))
    cost = (penalty or L2())(error)
    if weight is not None:
        scale = weight(level)
        if isinstance(scale, Tensor) and scale.ndim not in (0, cost.ndim):
            wanted = f"a number, or one per sample shaped like its level, {tuple(level.t.shape)}"
            raise ValueError(f"weight must return {wanted}; got shape {tuple(scale.shape)}")
        cost = scale * cost
    cost = coordinates(cost)
    if mask is None:
        return cost.mean(1)
    known = coordinates(mask)
    counts = known.sum(1, dtype=torch.promote_types(cost.dtype, torch.float32))
    return cost.masked_fill(~known, 0).mean(1) * (known.shape[1] / counts).to(cost.dtype)
