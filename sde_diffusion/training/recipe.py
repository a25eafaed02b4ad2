"""Settings of a training run, and the averages of its weights."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol

from sde_diffusion import validate

__all__ = ["EMA", "Average", "PowerEMA", "Recipe"]

Decay = Literal["cosine", "linear", "constant"]


def below_one(name: str, value: Any) -> None:
    """Rule of a number in [0, 1], less 1."""
    if value == 1:
        raise ValueError(f"{name} must be below 1; got {value}")


def positive(name: str, value: Any) -> None:
    """Rule of a number above 0; inf is allowed."""
    if value != math.inf:
        validate.number(name, value, 0, strict=True)


class Average(Protocol):
    """A rule for averaging the weights:  mean += (1 - decay) (weights - mean)."""

    def decay_at(self, updates: int) -> float:
        """The decay after `updates` sets of weights; 0 at 0."""
        ...


@dataclass(frozen=True)
class EMA(validate.Checked):
    """Exponential moving average whose decay grows from 0: min(decay, (1 + n) / (10 + n))."""

    decay: Annotated[float, validate.Number(0, 1), below_one] = 0.9995

    def decay_at(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates)) if updates else 0.0


@dataclass(frozen=True)
class PowerEMA(validate.Checked):
    r"""Power-function average: its profile scales with the length of the run.

    After n steps the weights of step j count in proportion to  j^(gamma + 1) - (j - 1)^(gamma + 1),
    about j^gamma:  decay = (1 - 1/n)^(gamma + 1)      (Karras et al. 2024 "Analyzing and improving
    the training dynamics of diffusion models", eq. 5 and App. C)

    Args:
        sigma_rel: width of the profile over the length of the run, in [0.001, 0.2886]; gamma
            follows from  sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """

    sigma_rel: Annotated[float, validate.Number(1e-3, 12**-0.5)] = 0.05

    @cached_property
    def gamma(self) -> float:
        """The positive root of  g^3 + 7 g^2 + (16 - r) g + 12 - r  with r = sigma_rel^-2."""
        import numpy as np

        r = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - r, 12 - r]).real.max())

    def decay_at(self, updates: int) -> float:
        return (updates / (updates + 1)) ** (self.gamma + 1)


@dataclass(frozen=True)
class Recipe(validate.Checked):
    """Settings of a training run; data, network and the law of t are separate arguments.

    Args:
        steps: optimizer steps of the whole run.
        batch_size: positions of the global batch, over all processes.
        learning_rate: largest rate of the default optimizer.
        warmup: steps of linear growth of the learning rate; by default 500, or a tenth of a run of
            fewer than 5,000 steps. The field holds the number used.
        decay: shape of its fall to 0 over the whole run: "cosine", "linear", or "constant": none.
        weight_decay: of the default optimizer, AdamW.
        clip: largest norm of the gradient; inf for no clipping.
        ema: the average of the weights, EMA(0.9995) by default. Its decay grows with the number
            of steps, so that at any length the first tenth of a run has no weight in it.
        seed: of data order, times, noise and dropout.
        cond_dropout: share of the samples whose conditions are replaced by the denoiser's null, so
            that the network learns the unconditional law too; see guidance.ClassifierFree.
        dtype: the network's arithmetic, "float32" or "bf16"; the weights keep their dtype.
    """

    steps: validate.Count = 10_000
    batch_size: validate.Count = 128
    learning_rate: validate.Positive = 1e-3
    warmup: Annotated[int, validate.Integer(0)] | None = None
    decay: Decay = "cosine"
    weight_decay: validate.NonNegative = 0.0
    clip: Annotated[float, positive] = 1.0
    ema: Annotated[Average, validate.Kind("an average such as EMA(0.9995)", "decay_at")] = EMA()
    seed: Annotated[int, validate.Integer(0)] = 0
    cond_dropout: validate.Share = 0.0
    dtype: Literal["float32", "bf16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        warmup = min(500, self.steps // 10) if self.warmup is None else self.warmup
        if warmup > self.steps:
            got = f"{warmup}; None takes a tenth of them"
            raise ValueError(f"warmup must be at most steps, {self.steps}; got {got}")
        object.__setattr__(self, "warmup", warmup)

    def factor(self, step: int) -> float:
        """Share of the largest learning rate for the step that starts after `step` steps.

        Raises:
            ValueError: at the end of the run, beyond which the fall has no meaning.
        """
        if step >= self.steps:
            advice = "give a recipe of more steps"
            raise ValueError(f"step must be below steps, {self.steps}; got {step}; {advice}")
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = 1 - step / self.steps
        fall = {"cosine": math.sin(math.pi * left / 2) ** 2, "linear": left, "constant": 1.0}
        return ramp * fall[self.decay]

    def rate(self, step: int) -> float:
        """Learning rate of the default optimizer for the step that starts after `step` steps."""
        return self.learning_rate * self.factor(step)

    @property
    def settings(self) -> dict[str, object]:
        """The fields in a form for JSON."""
        return {**vars(self), "ema": repr(self.ema)}
