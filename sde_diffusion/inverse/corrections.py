r"""Samplers with a correction after each step. Sampler -> Sampler.

A cost measures the misfit of an x0. After each step of a sampler from t to s the batch moves down
a gradient of the cost of x0_hat, the model's E[x0 | x_t]:

    BackpropCorrection         d cost / d x_t
    PosteriorMeanCorrection    d cost / d mean of x_s, without derivatives of the network

The correction uses the call that the step makes at x_t and adds none. (Samplers such as Churn first
move up to a higher level; their first call, and so the derivative, is there.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.grids import Grid
from sde_diffusion.models import Model, Prediction, conditions, derivatives
from sde_diffusion.models.model import Wrapper
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes.level import Level, posterior_kernel
from sde_diffusion.samplers.sampler import IS_SAMPLER, Claims, Memory, Sampler, check_down
from sde_diffusion.validate import Checked, Cond, Kind, Number

__all__ = ["BackpropCorrection", "Corrected", "Differentiable", "PosteriorMeanCorrection"]


@dataclass(frozen=True, eq=False)
class Corrected(Checked):
    """Base of samplers around another sampler.

    A correction leaves the sampler's path, so its memory is discarded: a multistep sampler starts
    anew after each correction.

    Args:
        sampler: any that can start at every level, that is, all but SMC.
    """

    sampler: Annotated[Sampler, IS_SAMPLER]

    @property
    def claims(self) -> Claims:
        """Order 0: more steps do not bring the samples closer to a known distribution."""
        return replace(self.sampler.claims, order=0, step_order=None)

    @property
    def grid(self) -> Grid:
        """The grid of the inner sampler."""
        return self.sampler.grid


@dataclass(frozen=True, eq=False)
class Descent(Corrected):
    """A correction by the gradient of a cost.

    Args:
        sampler: any whose steps call the model with the whole batch.
        cost: a function of x0 (B, ...) that returns its misfit, (B,); differentiable.
        scale: factor of the gradient.
    """

    through_network: ClassVar[bool]  # True if the derivative is back-propagated to x_t

    cost: Annotated[Callable[[Tensor], Tensor], Kind("a function of x0", "__call__")]
    scale: Annotated[float, Number()] = 1.0

    def before_run(self, x: Tensor) -> None:
        """Refuse a cost without a derivative in x."""
        if not hasattr(getattr(self.cost, "__self__", None), "before_run"):  # it checks itself
            derivatives.check_differentiable("cost", self.cost, x)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        check_down(self, t, s)
        recorded_model = RecordingModel(model, self.through_network)
        x_s, _ = self.sampler.step(recorded_model, x, t, s, noise, None)
        first = recorded_model.first
        _, slope = derivatives.gradient("cost", self.cost, first.x0)
        if self.through_network:
            return x_s.sub(first.back(slope), alpha=self.scale), None
        return x_s.sub(slope, alpha=self.scale / posterior_kernel(s, t)[0]), None


@dataclass(frozen=True, eq=False)
class BackpropCorrection(Descent):
    r"""The correction  x_s - scale d/dx_t cost(x0_hat(x_t))  after each step from t to s.

    The derivative is back-propagated through the network, from the call that the step makes at x_t.
    """

    through_network = True


@dataclass(frozen=True, eq=False)
class PosteriorMeanCorrection(Descent):
    r"""The correction  x_s - scale d/dmean cost(x0_hat)  after each step from t to s.

    The mean of q(x_s | x_t, x0) is  c_0 x0 + c_t x_t  (Ho et al. 2020, eq. 7). With x_t held fixed
    x0_hat = (mean - c_t x_t) / c_0, so the derivative is d cost / d x0_hat / c_0: the network is
    not differentiated.

        c_0 = alpha_s b^2 / sigma_t^2,      b^2 the variance of the forward kernel from s to t
    """

    through_network = False


@dataclass(eq=False)
class RecordingModel(Wrapper):
    """A model that stores its first prediction, and the graph from x to it if `traced`."""

    model: Any
    traced: bool
    kept: "Differentiable | None" = None

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        if self.kept is None and self.traced:
            self.kept = Differentiable.of(self.model, x, level)
            return self.kept.found
        found = self.model(x, level)
        self.kept = self.kept or Differentiable(found, x, found.x0)
        return found

    @property
    def first(self) -> "Differentiable":
        """The first prediction.

        Raises:
            ValueError: if the sampler has not called the model with the whole batch.
        """
        if self.kept is None:
            raise ValueError("sampler must call the model with the whole batch; got no such call")
        return self.kept


class Differentiable(NamedTuple):
    """A prediction at x, with the graph from x to x0.

    Attributes:
        found: the prediction.
        x: the batch.
        x0: E[x0 | x].
    """

    found: Prediction
    x: Tensor
    x0: Tensor

    @staticmethod
    def of(model: Model, x: Tensor, level: Level, cond: Cond | None = None) -> "Differentiable":
        """Evaluate the model; `found` has a graph only where the caller records one of x."""
        graph = derivatives.in_graph(x)
        with derivatives.recorded():
            point = derivatives.point_of(x, graph)
            fixed = Level(*map(derivatives.ordinary, level))
            found = conditions.evaluate(model, point, fixed, cond)
            x0 = found.x0
        if not x0.requires_grad:
            raise ValueError("model must be differentiable in x; got an x0 with no derivative")
        if graph:
            return Differentiable(found, point, x0)
        extra = None if found.extra is None else found.extra.detach()
        first, second = found.first.detach(), found.second.detach()
        return Differentiable(Prediction(first, second, level, found.meaning, extra), point, x0)

    def back(self, pull: Tensor) -> Tensor:
        """Return J^T pull, with J = dx0 / dx."""
        graph = derivatives.in_graph(self.x) and not self.x.is_leaf
        return torch.autograd.grad(self.x0, self.x, pull, create_graph=graph)[0]
