r"""Guidance: a model turned towards a condition. Model -> Model, so it works with every sampler.

Convention: with scale w every quantity of the guided model is

    unconditional + w (conditional - unconditional):

w = 1 is the conditional model, w = 0 the unconditional one, w > 1 goes beyond. (Ho & Salimans 2022
write 1 + w for this w.)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.derivatives import leaf, ordinary, recorded
from sde_diffusion.models.model import (
    IS_MODEL,
    LogSNRRange,
    evaluate,
    expanded,
    level_of,
    null_of,
    per_sample_field,
    takes_cond,
    trained_range,
)
from sde_diffusion.models.parameterizations import X0
from sde_diffusion.models.prediction import Prediction, truth
from sde_diffusion.processes import Level, Process, Scalar
from sde_diffusion.processes.level import per_sample
from sde_diffusion.validate import Checked, Cond, Integer, Kind, Number, Share, shown

__all__ = ["ClassifierFree", "ClassifierGuided", "Clipped", "Guided", "get_context_mask"]

Finite = Annotated[float, Number()]


@validate.arguments
def get_context_mask(
    batch: Annotated[int, Integer(0)], p: Share, generator: torch.Generator | None = None
) -> Tensor:
    """Which conditions a training step keeps, (batch, 1) float32: 0 drops, with probability p.

    Multiply float conditions (batch, width) by it: a dropped one is the zero vector.
    `training.Recipe(cond_dropout=p)` drops conditions of any kind, with masks that a resumed run
    draws again.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return (torch.rand(batch, 1, generator=generator, device=generator.device) >= p).float()


@dataclass(frozen=True, eq=False)
class Guided(Checked):
    """Base of models around another model.

    Args:
        model: the other one.
    """

    model: Annotated[Any, IS_MODEL]

    @property
    def process(self) -> Process:
        return self.model.process

    @property
    def trained(self) -> LogSNRRange:
        """The range of the model."""
        return trained_range(self.model)

    def null_like(self, cond: Cond) -> Cond:
        """The null of the model."""
        return null_of(self.model, cond)


@dataclass(frozen=True, eq=False)
class ClassifierFree(Guided):
    r"""Classifier-free guidance (Ho & Salimans 2022), one call of the network a step.

    With scale w every quantity is  null + w (cond - null): w = 1 is the conditional model, to the
    bit, and w = 0 that of the null. Both are evaluated in one batch of 2 B; where w is 0 or 1, and
    outside the interval, only the one that counts is. The condition comes with the call:

        sample(ClassifierFree(model, scale=2.0), sampler, x, steps=20, cond=labels)

    With `null` the condition of what is not wanted this is negative guidance; with another
    condition it goes from one to the other.

    Args:
        model: a Denoiser of a conditional network, or any model called as (x, level, cond).
        scale: w; a number, or (B,), one per sample.
        null: the condition in contrast, of the kind of cond, first axis B or 1; the model's own
            null by default, which condition dropout trains.
        interval: of r = sigma / alpha, the noise in a unit of signal: outside of it w is 1
            (Kynkaanniemi et al. 2024).
    """

    scale: float | Tensor = per_sample_field(default=2.0)
    null: Cond | None = per_sample_field(default=None)
    interval: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not takes_cond(self.model):
            raise TypeError(
                f"model must be called as model(x, level, cond); got {shown(self.model)}"
            )
        if isinstance(self.scale, Tensor):
            if self.scale.ndim != 1 or not bool(self.scale.isfinite().all()):
                raise ValueError(
                    f"scale must be a finite number, or finite numbers (B,); got {self.scale!r:.80}"
                )
        else:
            validate.number("scale", self.scale)
        if len(validate.kind("interval", self.interval, "(low, high)", "__len__")) != 2:
            raise ValueError(f"interval must be (low, high); got {self.interval!r}")
        low, high = self.interval
        if not validate.number("the low end of interval", low, 0) < high:
            raise ValueError(f"interval must be 0 <= low < high; got {self.interval}")

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        if cond is None:
            raise ValueError("cond must be given for ClassifierFree; got None; sample(..., cond=)")
        level = level_of(self.process, level, x)
        w, cond = self.weight(level, x), expanded(cond, len(x))
        if not isinstance(w, Tensor) and w == 1:
            return self.model(x, level, cond)
        null = null_of(self.model, cond) if self.null is None else expanded(self.null, len(x))
        if not isinstance(w, Tensor) and w == 0:
            return self.model(x, level, null)
        twice = torch.cat([x, x])
        both = self.model(twice, repeated(level), stacked(null, cond))
        first = x if both.first is twice else interpolate(both.first, w)
        second = interpolate(both.second, w)
        extra = None if both.extra is None else both.extra.chunk(2)[1]
        return Prediction(first, second, level, both.meaning, extra)

    def weight(self, level: Level, x: Tensor) -> Scalar:
        """w at this level, 1 outside the interval; per sample (B, 1, ..., 1) where need be."""
        w = self.scale
        if isinstance(w, Tensor):
            if len(w) not in (1, len(x)):
                raise ValueError(f"scale must hold one number per sample, {len(x)}; got {len(w)}")
            w = per_sample(w, x).to(x)
        low, high = self.interval
        if low == 0 and high == math.inf:
            return w
        if isinstance(level.alpha, Tensor):
            r = level.sigma / level.alpha
            return torch.where((low <= r) & (r <= high), w, 1.0).to(x)
        r = level.sigma / level.alpha if level.alpha else math.inf
        return w if low <= r <= high else 1.0


@dataclass(frozen=True, eq=False)
class ClassifierGuided(Guided):
    r"""Classifier guidance (Dhariwal & Nichol 2021): score + w grad_x log p(y | x, level).

    With the classifier of the noisy data and w = 1 it is the model of the data given y, by Bayes'
    rule. Where alpha = 0 the score does not depend on y, and x0 is left as it is: a path is
    better begun a little lower.

    Args:
        model: any.
        log_prob: log p(y | x, level), (B,) of (x, level, y); differentiable in x.
        y: the target, first axis B or 1.
        scale: w.
    """

    log_prob: Annotated[
        Callable[[Tensor, Level, Tensor], Tensor], Kind("a function of (x, level, y)", "__call__")
    ]
    y: Annotated[Tensor, Kind("a tensor (B, ...)", "device", "__getitem__")] = per_sample_field()
    scale: Finite = 1.0

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        level = level_of(self.process, level, x)
        found = evaluate(self.model, x, level, cond)
        if self.scale == 0:
            return found
        if len(self.y) not in (1, len(x)):
            raise ValueError(f"y must hold one per sample, {len(x)}; got {len(self.y)}")
        with recorded():
            point = leaf(x)
            value = self.log_prob(point, Level(*map(ordinary, level)), ordinary(self.y))
            if value.shape != x.shape[:1]:
                raise ValueError(
                    f"log_prob must return shape {tuple(x.shape[:1])}; got {tuple(value.shape)}"
                )
            if not value.requires_grad:
                raise ValueError("log_prob must be differentiable in x; got a constant")
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return turned(found, level, self.scale * gradient)


@dataclass(frozen=True, eq=False)
class Clipped(Guided):
    """A model whose x0 is clamped to [low, high]; eps is recomputed, so that both belong to x.

    It is no law's exact model: for chains that would leave the range of their data.

    Args:
        model: any.
        low, high: the range.
    """

    low: Finite = -1.0
    high: Finite = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.number("high", self.high, self.low, strict=True)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        level = level_of(self.process, level, x)
        found = evaluate(self.model, x, level, cond)
        return Prediction(x, found.x0.clamp(self.low, self.high), level, X0(), found.extra)


def turned(
    found: Prediction, level: Level, score: Tensor, at_noise: Tensor | float = 0.0
) -> Prediction:
    """The prediction whose score is larger by `score`: x0 + sigma^2 / alpha score, eps - sigma
    score. Where alpha = 0 no score moves x0, and `at_noise` does."""
    if isinstance(level.alpha, Tensor):
        alpha = level.alpha
        of_x0 = level.sigma**2 / torch.where(alpha > 0, alpha, 1)
        shift = torch.where(alpha > 0, of_x0 * score, at_noise)
    else:
        shift = level.sigma**2 / level.alpha * score if level.alpha else at_noise
    return truth(found.x0 + shift, found.eps - level.sigma * score, level)


def interpolate(pair: Tensor, w: Any) -> Tensor:
    """first + w (second - first) of two batches in one; each of them to the bit at w = 0 and 1."""
    first, second = pair.chunk(2)
    return torch.lerp(first, second, w)


def repeated(level: Level) -> Level:
    """The level of a batch that comes twice."""
    fields: Any = (torch.cat([f, f]) if isinstance(f, Tensor) and f.ndim else f for f in level)
    return Level(*fields)


def stacked(null: Cond, cond: Cond) -> Cond:
    """The two conditions of a batch that comes twice, null first."""
    if isinstance(cond, Mapping) and isinstance(null, Mapping):
        return {name: torch.cat(pair(name, null[name], value)) for name, value in cond.items()}
    if isinstance(cond, Tensor) and isinstance(null, Tensor):
        return torch.cat(pair("cond", null, cond))
    raise ValueError("null must be a tensor or a mapping as cond is; got the other")


def pair(name: str, null: Tensor, cond: Tensor) -> list[Tensor]:
    """null and cond, of one shape."""
    if null.shape != cond.shape:
        raise ValueError(
            f"null of {name} must be shaped like it, {tuple(cond.shape)}; got {tuple(null.shape)}"
        )
    return [ordinary(null.to(cond.device, cond.dtype)), ordinary(cond)]
