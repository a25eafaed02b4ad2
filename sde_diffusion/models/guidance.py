r"""Guidance: a model turned towards a condition. Model -> Model, so it works with every sampler.

Convention: with scale w every quantity of the guided model is

    unconditional + w (conditional - unconditional):

w = 1 is the conditional model, w = 0 the unconditional one, w > 1 goes beyond. (Ho & Salimans 2022
write 1 + w for this w.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.derivatives import leaf, ordinary, recorded
from sde_diffusion.models.model import Model
from sde_diffusion.models.parameterizations import X0
from sde_diffusion.models.prediction import Prediction, truth
from sde_diffusion.processes import Level, Process, Scalar
from sde_diffusion.processes.level import per_sample

__all__ = ["ClassifierFree", "ClassifierGuided", "Clipped", "Conditional", "get_context_mask"]


class Conditional(Protocol):
    """A model that is told a condition, such as a Denoiser of a network with a context."""

    @property
    def process(self) -> Process: ...

    def __call__(self, x: Tensor, level: Level, cond: Tensor) -> Prediction:
        """What it says of x (B, ...) given cond (B, width)."""
        ...


def get_context_mask(batch: int, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Which contexts a training step keeps, (batch, 1) float32: 0 drops, with probability p.

    Multiply the contexts (batch, width) by it: a dropped one is the zero vector, the null context.
    `training.Recipe(cond_dropout=p)` does so with masks that a resumed run draws again.
    """
    validate.integer("batch", batch, 0)
    validate.number("p", p, 0, 1)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return (torch.rand(batch, 1, generator=generator, device=generator.device) >= p).float()


@dataclass(frozen=True, eq=False)
class ClassifierFree:
    r"""Classifier-free guidance (Ho & Salimans 2022), one call of the network a step.

    With scale w every quantity is  null + w (cond - null): w = 1 is the conditional model, to the
    bit, and w = 0 that of the null context. Both are asked in one batch of 2 B; where w is 0 or 1,
    and outside the interval, only the one that counts is.

    With `null` the context of what is not wanted this is negative guidance; with `cond` between two
    contexts it goes from one to the other.

    Args:
        model: a Denoiser of a network with a context, or any `Conditional`.
        cond: the context, (width,) for all or (B, width), one per sample.
        null: what it is contrasted with, likewise; the zero vector by default, which is what
            context dropout trains as no context.
        scale: w; a number, or (B,), one per sample. At 2 nearly every sample is recognized as what
            was asked for, at less variety than at 1, the law that was trained.
        interval: of r = sigma / alpha, the noise in a unit of signal: outside of it w is 1
            (Kynkaanniemi et al. 2024).
    """

    model: Conditional
    cond: Tensor
    null: Tensor | None = None
    scale: float | Tensor = 2.0
    interval: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        validate.kind(
            "model", self.model, "a model with a condition, such as a Denoiser", "process"
        )
        contexts("cond", self.cond)
        if self.null is not None:
            contexts("null", self.null)
            if self.null.shape[-1] != self.cond.shape[-1]:
                raise ValueError(
                    f"null must be as wide as cond, {self.cond.shape[-1]}; "
                    f"got {self.null.shape[-1]}"
                )
        if isinstance(self.scale, Tensor):
            validate.batch("scale", self.scale)
            if self.scale.ndim != 1 or not bool(self.scale.isfinite().all()):
                raise ValueError("scale must be a finite number, or finite numbers (B,)")
        else:
            validate.number("scale", self.scale)
        if len(validate.kind("interval", self.interval, "(low, high)", "__len__")) != 2:
            raise ValueError(f"interval must be (low, high); got {self.interval!r}")
        low, high = self.interval
        if not validate.number("the low end of interval", low, 0) < high:
            raise ValueError(f"interval must be 0 <= low < high; got {self.interval}")

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        cond = self._rows_of("cond", self.cond, x)
        null = torch.zeros_like(cond) if self.null is None else self._rows_of("null", self.null, x)
        w = self.weight(level, x)
        if not isinstance(w, Tensor) and (w == 0 or w == 1):
            return self.model(x, level, cond if w else null)
        twice = torch.cat([x, x])
        both = self.model(twice, repeated(level), torch.cat([null, cond]))
        first = x if both.first is twice else interpolate(both.first, w)
        second = interpolate(both.second, w)
        extra = None if both.extra is None else both.extra.chunk(2)[1]
        return Prediction(first, second, level, both.meaning, extra)

    def rows(self, index: Tensor) -> "ClassifierFree":
        def part(value: Tensor, single: int) -> Tensor:
            return value if value.ndim == single else value[index.to(value.device)]

        return replace(
            self,
            cond=part(self.cond, 1),
            null=None if self.null is None else part(self.null, 1),
            scale=part(self.scale, 0) if isinstance(self.scale, Tensor) else self.scale,
        )

    def weight(self, level: Level, x: Tensor) -> Scalar:
        """w at this level, 1 outside the interval; per sample (B, 1, ..., 1) where need be."""
        w = self.scale
        if isinstance(w, Tensor):
            if len(w) != len(x):
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

    def _rows_of(self, name: str, context: Tensor, x: Tensor) -> Tensor:
        if context.ndim == 1:
            context = context.expand(len(x), -1)
        if len(context) != len(x):
            raise ValueError(
                f"{name} must hold one context per sample, {len(x)}; got {len(context)}"
            )
        return ordinary(context.to(x.device))


@dataclass(frozen=True, eq=False)
class ClassifierGuided:
    r"""Classifier guidance (Dhariwal & Nichol 2021): score + w grad_x log p(y | x, level).

    With the classifier of the noisy data and w = 1 it is the model of the data given y, by Bayes'
    rule. Where alpha = 0 the score does not know y, and E[x0 | y] is beyond a classifier of x: x0
    is left as it is. A path that begins there is better begun a little lower.

    Args:
        model: any.
        log_prob: log p(y | x, level), (B,) of (x, level, y); differentiable in x.
        y: what is wanted, (B, ...), one per sample.
        scale: w.
    """

    model: Model
    log_prob: Callable[[Tensor, Level, Tensor], Tensor]
    y: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        validate.kind("model", self.model, "a model", "process", "__call__")
        validate.kind("log_prob", self.log_prob, "a function of (x, level, y)", "__call__")
        validate.kind("y", self.y, "a tensor (B, ...)", "device", "__getitem__")
        validate.number("scale", self.scale)

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        found = self.model(x, level)
        if self.scale == 0:
            return found
        if len(self.y) != len(x):
            raise ValueError(f"y must hold one per sample, {len(x)}; got {len(self.y)}")
        with recorded():
            asked = leaf(x)
            value = self.log_prob(asked, Level(*map(ordinary, level)), ordinary(self.y))
            if value.shape != x.shape[:1]:
                raise ValueError(
                    f"log_prob must answer with shape {tuple(x.shape[:1])}; got "
                    f"{tuple(value.shape)}"
                )
            if not value.requires_grad:
                raise ValueError("log_prob must be differentiable in x")
            (gradient,) = torch.autograd.grad(value.sum(), asked)
        return turned(found, level, self.scale * gradient)

    def rows(self, index: Tensor) -> "ClassifierGuided":
        return replace(self, model=self.model.rows(index), y=self.y[index.to(self.y.device)])


@dataclass(frozen=True)
class Clipped:
    """A model whose x0 is held to [low, high]; eps is then that of this x0, so that both belong to
    x. Not a law's own model any more: for a chain that would leave the range of its data.

    Args:
        model: any.
        low, high: the range.
    """

    model: Model
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        validate.kind("model", self.model, "a model", "process", "__call__")
        validate.number("low", self.low)
        validate.number("high", self.high, self.low, strict=True)

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        found = self.model(x, level)
        return Prediction(x, found.x0.clamp(self.low, self.high), level, X0(), found.extra)

    def rows(self, index: Tensor) -> "Clipped":
        return replace(self, model=self.model.rows(index))


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
    return Level(*(torch.cat([f, f]) if isinstance(f, Tensor) and f.ndim else f for f in level))


def contexts(name: str, value: Tensor) -> None:
    """Refuse what is no context, (width,) or (B, width), of finite numbers."""
    validate.batch(name, value)
    if value.ndim > 2:
        raise ValueError(f"{name} must be (width,) or (B, width); got {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite")
