"""The numbers that decide a training run, and the averages of its weights."""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, Protocol

from sde_diffusion import validate

__all__ = ["EMA", "Average", "PowerEMA", "Recipe"]


class Average(Protocol):
    """How an average of the weights follows them:  mean += (1 - decay) (weights - mean)."""

    def decay_at(self, updates: int) -> float:
        """What the mean keeps of itself when it has seen `updates` sets of weights; 0 at 0."""
        ...


@dataclass(frozen=True)
class EMA:
    """Exponential moving average whose decay grows from 0: min(decay, (1 + n) / (10 + n))."""

    decay: float = 0.9995

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1); got {self.decay}")

    def decay_at(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates)) if updates else 0.0


@dataclass(frozen=True)
class PowerEMA:
    r"""Power-function average: its profile scales with the length of the run.

    After n steps the weights of step j count in proportion to  j^(gamma + 1) - (j - 1)^(gamma + 1),
    about j^gamma:  decay = (1 - 1/n)^(gamma + 1)      (Karras et al. 2024 "Analyzing and improving
    the training dynamics of diffusion models", eq. 5 and App. C)

    Args:
        sigma_rel: width of the profile over the length of the run, in [0.001, 0.2886]; gamma
            follows from  sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """

    sigma_rel: float = 0.05

    def __post_init__(self) -> None:
        validate.number("sigma_rel", self.sigma_rel, 1e-3, 12**-0.5)

    @cached_property
    def gamma(self) -> float:
        """The positive root of  g^3 + 7 g^2 + (16 - r) g + 12 - r  with r = sigma_rel^-2."""
        import numpy as np

        r = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - r, 12 - r]).real.max())

    def decay_at(self, updates: int) -> float:
        return (updates / (updates + 1)) ** (self.gamma + 1)


@dataclass(frozen=True)
class Recipe:
    """The numbers that decide a training run; data, network and the law of t come beside it.

    Args:
        steps: optimizer steps of the whole run.
        batch_size: positions of the global batch, over all processes.
        learning_rate: its largest value.
        warmup: steps of linear growth of the learning rate.
        decay: how it falls to 0 over the whole run, if it does: "cosine", "linear", "constant".
        weight_decay: of AdamW.
        clip: largest norm of the gradient; inf clips nothing.
        ema: the average of the weights, EMA(0.9995) by default.
        seed: of data order, times, noise and dropout.
        cond_dropout: share of the conditions that a step replaces by the zero vector, so that
            the network learns the unconditional law too; see guidance.ClassifierFree.
        dtype: the network's arithmetic, "float32" or "bf16"; the weights stay as they are.
    """

    steps: int = 10_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 500
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: Average = EMA()
    seed: int = 0
    cond_dropout: float = 0.0
    dtype: Literal["float32", "bf16"] = "float32"

    def __post_init__(self) -> None:
        validate.integer("steps", self.steps)
        validate.integer("batch_size", self.batch_size)
        validate.integer("warmup", self.warmup, 0)
        validate.integer("seed", self.seed, 0)
        validate.number("cond_dropout", self.cond_dropout, 0, 1)
        validate.number("learning_rate", self.learning_rate, 0, strict=True)
        validate.number("weight_decay", self.weight_decay, 0)
        if isinstance(self.clip, bool) or not self.clip > 0:
            raise ValueError(f"clip must be a positive number; got {self.clip}")
        validate.kind("ema", self.ema, "an average such as EMA(0.9995)", "decay_at")
        validate.choice("decay", self.decay, ("cosine", "linear", "constant"))
        validate.choice("dtype", self.dtype, ("float32", "bf16"))

    def rate(self, step: int) -> float:
        """Learning rate of the step that starts after `step` steps."""
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = 1 - step / self.steps
        fall = {"cosine": math.sin(math.pi * left / 2) ** 2, "linear": left, "constant": 1.0}
        return self.learning_rate * ramp * fall[self.decay]

    @property
    def settings(self) -> dict[str, object]:
        """The fields as JSON can hold them."""
        plain: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["ema"] = repr(self.ema)
        return plain
