r"""Guidance: a model modified by a condition. Model -> Model, so it works with every sampler.

Convention: with scale w every quantity of the guided model is

    unconditional + w (conditional - unconditional):

w = 1 is the conditional model, w = 0 the unconditional one, w > 1 goes beyond. (Ho & Salimans 2022
write 1 + w for this w.)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models import conditions
from sde_diffusion.models.derivatives import (
    check_differentiable,
    gradient,
    one_per_sample,
    ordinary,
)
from sde_diffusion.models.model import IS_MODEL, Wrapper, finite, level_of, per_sample_field
from sde_diffusion.models.parameterizations import X0
from sde_diffusion.models.prediction import Prediction, truth
from sde_diffusion.noise.sources import Generated
from sde_diffusion.processes.level import Level, Scalar, per_sample
from sde_diffusion.validate import Checked, Cond, Each, Integer, Kind, Number, Share, shown

__all__ = ["ClassifierFree", "ClassifierGuided", "Clipped", "Guided", "get_context_mask"]

Finite = Annotated[float, Number()]
Interval = Annotated[tuple[float, float], Each(Kind("a number", "__float__"), 2, 2)]


@validate.arguments
def get_context_mask(
    batch: Annotated[int, Integer(0)], p: Share, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a mask (batch, 1) for condition dropout in training: 0 with probability p, else 1.

    Multiply float conditions (batch, width) by it: a dropped condition becomes the zero vector.
    `training.Recipe(cond_dropout=p)` drops conditions of any kind, and a resumed run draws the
    same masks again.
    """
    generator = Generated(generator).generator
    return (torch.rand(batch, 1, generator=generator, device=generator.device) >= p).float()


def check_scale(name: str, value: Any) -> None:
    """Refuse a guidance scale that is neither a finite number nor finite numbers (B,)."""
    if not isinstance(value, Tensor):
        validate.number(name, value)
    elif finite(name, value).ndim != 1:
        raise ValueError(f"{name} must be a number, or numbers (B,); got {shown(value)}")


@dataclass(frozen=True, eq=False)
class Guided(Checked, Wrapper):
    """Base of models around another model.

    Args:
        model: the inner model.
    """

    model: Annotated[Any, IS_MODEL]


@dataclass(frozen=True, eq=False)
class ClassifierFree(Guided):
    r"""Classifier-free guidance (Ho & Salimans 2022), one call of the network a step.

    With scale w every quantity is  null + w (cond - null): w = 1 is bit-equal to the conditional
    model, and w = 0 to the model with the null condition. Both are evaluated in one batch of 2 B.
    Where one number w is 0 or 1, as outside the interval, only the model that counts is evaluated.
    The condition comes with the call:

        sample(ClassifierFree(model, scale=2.0), sampler, x, steps=20, cond=labels)

    If `null` is an undesired condition, this is negative guidance. If it is any other condition,
    the scale interpolates between the two conditions.

    Args:
        model: a Denoiser of a conditional network, or any model called as (x, level, cond).
        scale: w; a number, or (B,), one per sample.
        null: the condition at w = 0, of the same type as cond, first axis B or 1; the model's own
            null by default, which condition dropout trains.
        interval: the range of the noise-to-signal ratio sigma / alpha in which the scale is w;
            outside it is 1 (Kynkaanniemi et al. 2024).
    """

    scale: Annotated[float | Tensor, check_scale] = per_sample_field(default=2.0)
    null: Cond | None = per_sample_field(default=None)
    interval: Interval = (0.0, math.inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not conditions.takes_cond(self.model):
            got = shown(self.model)
            raise TypeError(f"model must be called as model(x, level, cond); got {got}")
        for name, value in conditions.entries({} if self.null is None else self.null).items():
            if not getattr(value, "ndim", 0):
                got = f"{shown(value)} for {name}; e.g. torch.tensor([10])"
                raise ValueError(f"null must be a tensor of first axis B or 1; got {got}")
        low, high = self.interval
        if not 0 <= low < high:
            raise ValueError(f"interval must be 0 <= low < high; got {self.interval}")

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        if cond is None:
            raise ValueError("cond must be given for ClassifierFree; got None; sample(..., cond=)")
        level = level_of(self.process, level, x)
        w, cond = self.weight(level, x), conditions.expanded(cond, len(x))
        if not isinstance(w, Tensor) and w == 1:
            return self.model(x, level, cond)
        null = conditions.null_of(self.model, cond) if self.null is None else self.null
        null = conditions.expanded(null, len(x))
        if not isinstance(w, Tensor) and w == 0:
            return self.model(x, level, null)
        twice = torch.cat([x, x])
        both = self.model(twice, repeated(level), stacked(null, cond))
        if isinstance(level.alpha, Tensor):  # a matched model's meaning holds levels of 2 B rows
            return truth(lerp_halves(both.x0, w), lerp_halves(both.eps, w), level)
        first = x if both.first is twice else lerp_halves(both.first, w)
        second = lerp_halves(both.second, w)
        extra = None if both.extra is None else both.extra.chunk(2)[1]
        return Prediction(first, second, level, both.meaning, extra)

    def weight(self, level: Level, x: Tensor) -> Scalar:
        """Return w at this level, 1 outside the interval; a number, or (B, 1, ..., 1)."""
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
            return torch.where((low <= r) & (r <= high), w, x.new_ones(())).to(x)
        r = level.sigma / level.alpha if level.alpha else math.inf
        return w if low <= r <= high else 1.0


@dataclass(frozen=True, eq=False)
class ClassifierGuided(Guided):
    r"""Classifier guidance (Dhariwal & Nichol 2021): score + w grad_x log p(y | x, level).

    With an exact classifier of noisy data and w = 1 it is the model of the data given y, by Bayes'
    rule. Where alpha = 0 the score does not depend on y and x0 is unchanged; it is better to start
    a path at a slightly lower level.

    Args:
        model: any.
        log_prob: a function of (x, level, y) that returns log p(y | x, level), (B,);
            differentiable in x.
        y: the target, first axis B or 1.
        scale: w.
    """

    conditioned: ClassVar = True  # on evidence: the data are not those of the inner model

    log_prob: Annotated[
        Callable[[Tensor, Level, Tensor], Tensor], Kind("a function of (x, level, y)", "__call__")
    ]
    y: Annotated[Tensor, Kind("a tensor (B, ...)", "device", "__getitem__")] = per_sample_field()
    scale: Finite = 1.0

    def before_run(self, x: Tensor) -> None:
        """Refuse a log_prob without a derivative in x."""
        level, y = level_of(self.process, 0.5, x), ordinary(self.y)
        check_differentiable("log_prob", lambda point: self.log_prob(point, level, y), x)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        level = level_of(self.process, level, x)
        found = conditions.evaluate(self.model, x, level, cond)
        if self.scale == 0:
            return found
        if len(self.y) not in (1, len(x)):
            raise ValueError(f"y must hold one entry per sample, {len(x)}; got {len(self.y)}")
        fixed = Level(*map(ordinary, level)), ordinary(self.y)
        _, slope = gradient(
            "log_prob", lambda point: one_per_sample("log_prob", self.log_prob(point, *fixed), x), x
        )
        return with_added_score(found, level, self.scale * slope)


@dataclass(frozen=True, eq=False)
class Clipped(Guided):
    """A model whose x0 is clamped to [low, high]; eps is recomputed to be consistent with x.

    It is the exact model of no distribution; use it for chains that leave the range of the data.

    Args:
        model: any.
        low, high: the range of the data.
    """

    low: Finite = -1.0
    high: Finite = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.number("high", self.high, self.low, strict=True)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        level = level_of(self.process, level, x)
        found = conditions.evaluate(self.model, x, level, cond)
        return Prediction(x, found.x0.clamp(self.low, self.high), level, X0(), found.extra)


def with_added_score(
    found: Prediction, level: Level, score: Tensor, at_noise: Tensor | float = 0.0
) -> Prediction:
    """Return a prediction with `score` added to its score.

    x0 grows by sigma^2 / alpha score and eps by -sigma score. Where alpha = 0 the score does not
    change x0, and `at_noise` is added to it.
    """
    if isinstance(level.alpha, Tensor):
        alpha = level.alpha
        of_x0 = level.sigma**2 / torch.where(alpha > 0, alpha, 1)
        shift = torch.where(alpha > 0, of_x0 * score, at_noise)
    else:
        shift = level.sigma**2 / level.alpha * score if level.alpha else at_noise
    return truth(found.x0 + shift, found.eps - level.sigma * score, level)


def lerp_halves(both: Tensor, w: Any) -> Tensor:
    """Interpolate between the halves of a batch; bit-equal to one half at w = 0 and w = 1."""
    first, second = both.chunk(2)
    return torch.lerp(first, second, w)


def repeated(level: Level) -> Level:
    """Return the level of a batch that is concatenated with itself."""
    fields: Any = (
        torch.cat([f, f]) if isinstance(f, Tensor) and f.ndim and len(f) > 1 else f for f in level
    )
    return Level(*fields)


def stacked(null: Cond, cond: Cond) -> Cond:
    """Concatenate null and condition, entry by entry, null first."""
    if isinstance(null, Mapping) != isinstance(cond, Mapping):
        raise ValueError("null must be a tensor or a mapping as cond is; got the other")
    names = [list(conditions.entries(part)) for part in (cond, null)]
    if set(names[0]) != set(names[1]):
        raise ValueError(f"null must have the entries of cond, {names[0]}; got {names[1]}")

    def both(name: str, value: Tensor) -> Tensor:
        other = null[name] if isinstance(null, Mapping) else null
        if other.shape != value.shape:
            wanted, got = tuple(value.shape), tuple(other.shape)
            raise ValueError(f"null of {name} must be shaped like it, {wanted}; got {got}")
        return torch.cat([ordinary(other.to(value.device, value.dtype)), ordinary(value)])

    return conditions.map_entries(both, cond)
