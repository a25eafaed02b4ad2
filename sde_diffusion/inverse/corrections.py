r"""Samplers whose every step is corrected. Sampler -> Sampler.

A cost says how badly an x0 fits what is wanted. After each step of a sampler from t to s the
batch moves down the gradient of the cost of x0_hat, the model's E[x0 | x_t], by either of two ways:

    ThroughNetwork   d cost / d x_t           ToMean   d cost / d mean of x_s, without derivatives

The call that the step makes at x_t serves the correction too: none is added. (Where a sampler goes
up first, as Churn does, this call is about x there, and so is the derivative.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.grids import Grid
from sde_diffusion.models.derivatives import leaf, ordinary, recorded
from sde_diffusion.models.model import Model, evaluate
from sde_diffusion.models.prediction import Prediction
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level, Process
from sde_diffusion.processes.level import posterior_kernel
from sde_diffusion.samplers.sampler import IS_SAMPLER, Claims, Memory, Sampler
from sde_diffusion.validate import Checked, Cond, Kind, Number

__all__ = [
    "BackpropCorrection",
    "Corrected",
    "Descent",
    "Differentiable",
    "PosteriorMeanCorrection",
    "RecordingModel",
    "TracingModel",
]


@dataclass(frozen=True, eq=False)
class Corrected(Checked):
    """A sampler within a rule; what all such have in common.

    A sampler's memory is about the path that was left, so a multistep one starts afresh after each
    correction.

    Args:
        sampler: any that can begin anywhere on the way, as all but SMC do.
    """

    sampler: Annotated[Sampler, IS_SAMPLER]

    @property
    def claims(self) -> Claims:
        """Order 0: what is sampled is no law to which more steps come closer."""
        return replace(self.sampler.claims, order=0, step_order=None)

    @property
    def grid(self) -> Grid:
        """The sampler's."""
        return self.sampler.grid


@dataclass(frozen=True, eq=False)
class Descent(Corrected):
    """A correction that goes down a cost.

    Args:
        sampler: any whose steps ask about the whole batch.
        cost: how badly x0 (B, ...) fits, (B,); differentiable.
        scale: of the correction.
    """

    cost: Annotated[Callable[[Tensor], Tensor], Kind("a function of x0", "__call__")]
    scale: Annotated[float, Number()] = 1.0


@dataclass(frozen=True, eq=False)
class BackpropCorrection(Descent):
    r"""After each step of a sampler from t to s,  x_s - scale d/dx_t cost(x0_hat(x_t)).

    The derivative goes through the network, back-propagated from the call that the step makes at
    x_t.
    """

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        recorded_model = TracingModel(model)
        x_s, _ = self.sampler.step(recorded_model, x, t, s, noise, None)
        with recorded():
            cost = self.cost(recorded_model.first.x0)
            (gradient,) = torch.autograd.grad(cost.sum(), recorded_model.first.x)
        return x_s.sub(gradient, alpha=self.scale), None


@dataclass(frozen=True, eq=False)
class PosteriorMeanCorrection(Descent):
    r"""After each step of a sampler from t to s,  x_s - scale d/dmean cost(x0_hat).

    The mean of q(x_s | x_t, x0) is  c_0 x0 + c_t x_t  (Ho et al. 2020, eq. 7). With x_t held fixed
    x0_hat = (mean - c_t x_t) / c_0, so the derivative is d cost / d x0_hat / c_0: the network is
    not differentiated.

        c_0 = alpha_s b^2 / sigma_t^2,      b^2 the variance of the forward kernel from s to t
    """

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        recorded_model = RecordingModel(model)
        x_s, _ = self.sampler.step(recorded_model, x, t, s, noise, None)
        with recorded():
            x0 = leaf(recorded_model.first.x0)
            (gradient,) = torch.autograd.grad(self.cost(x0).sum(), x0)
        return x_s.sub(gradient, alpha=self.scale / posterior_kernel(s, t)[0]), None


@dataclass(eq=False)
class RecordingModel:
    """A model that keeps its first prediction."""

    model: Model
    kept: "Differentiable | None" = None

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        if self.kept is not None:
            return self.model(x, level)
        self.kept = self.record(x, level)
        return self.kept.found

    def record(self, x: Tensor, level: Level) -> "Differentiable":
        found = self.model(x, level)
        return Differentiable(found, x, found.x0)

    @property
    def first(self) -> "Differentiable":
        """That answer.

        Raises:
            ValueError: if the sampler never asked about the whole batch.
        """
        if self.kept is None:
            raise ValueError("the sampler made no call about the whole batch in this step")
        return self.kept


class TracingModel(RecordingModel):
    """A model that remembers its first answer and the way from x to it."""

    def record(self, x: Tensor, level: Level) -> "Differentiable":
        return Differentiable.of(self.model, x, level)


class Differentiable(NamedTuple):
    """What a model says of x, with the way back to x.

    Attributes:
        found: the prediction.
        x: what was asked about.
        x0: E[x0 | x].
    """

    found: Prediction
    x: Tensor
    x0: Tensor

    @staticmethod
    def of(model: Model, x: Tensor, level: Level, cond: Cond | None = None) -> "Differentiable":
        with recorded():
            point = leaf(x)
            found = evaluate(model, point, Level(*map(ordinary, level)), cond)
            x0 = found.x0
        if not x0.requires_grad:
            raise ValueError("the model's x0 carries no derivative with respect to x")
        extra = None if found.extra is None else found.extra.detach()
        first, second = found.first.detach(), found.second.detach()
        return Differentiable(Prediction(first, second, level, found.meaning, extra), point, x0)

    def back(self, pull: Tensor) -> Tensor:
        """J^T pull, with J = dx0 / dx."""
        return torch.autograd.grad(self.x0, self.x, pull)[0]
