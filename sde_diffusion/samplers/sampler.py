"""The sampler protocol: a rule for one step, its claims, and the report of an adaptive solver.

Convention: a sampler moves a batch from time t to an earlier time s < t. Those that can also step
up, from data to noise, do so with the same code and s > t; the others refuse (`check_down`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sde_diffusion.grids import Grid
from sde_diffusion.models.model import Model
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level
from sde_diffusion.processes.level import home, onto
from sde_diffusion.validate import Kind

__all__ = ["IS_SAMPLER", "Claims", "Memory", "SampleReport", "Sampler", "SolverError"]

Memory = Any  # the state a sampler carries from step to step: None before the first
IS_SAMPLER = Kind("a sampler such as Heun()", "claims", "grid", "step")


class SolverError(RuntimeError):
    """A solver with its own steps failed; the message names the place and the reason."""


@dataclass(frozen=True)
class Claims:
    """Properties that a sampler claims; `verify` checks them.

    Attributes:
        order: of convergence to the flow, or in law to the SDE, as the steps shrink. None for a
            solver whose error follows its tolerances.
        step_order: order of a single step; `order` unless a correction comes with the next step.
        noise: True if it draws noise.
        adaptive: True if it chooses its own levels, and takes no `steps`.
        rates: True if it needs the rates f and g^2: its steps then start at a RatedLevel.
        rounding: relative rounding error of its own arithmetic, where it is not float64's.
        differentiable: False if its steps cannot be differentiated, so that grad=True is refused.
    """

    order: int | None
    step_order: int | None = None
    noise: bool = False
    adaptive: bool = False
    rates: bool = False
    rounding: float = 0.0
    differentiable: bool = True

    @property
    def of_one_step(self) -> int | None:
        """The order of a single step."""
        return self.order if self.step_order is None else self.step_order


class Sampler(Protocol):
    """A rule for one step. Implementations are frozen dataclasses of their hyper-parameters."""

    @property
    def claims(self) -> Claims:
        """Its properties."""
        ...

    @property
    def grid(self) -> Grid:
        """Its own grid, the default of `sample`."""
        ...

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        """Move x from level t to level s. Pure: changes neither x nor memory."""
        ...


class SampleReport(NamedTuple):
    """Record of a solver that gives each sample its own steps, all (B,).

    Attributes:
        calls: model evaluations of each sample.
        rejections: number of these calls that belong to rejected steps.
        error: estimated error of the predictions, before their correction.
        finished: False where the limit of calls was reached and the rest was extrapolated.
    """

    calls: Tensor
    rejections: Tensor
    error: Tensor
    finished: Tensor

    def record(self, index: Tensor, *values: Tensor | float) -> None:
        """Set the fields, in their order, for some of the samples."""
        for field, value in zip(self, values, strict=True):
            field[index] = value

    @staticmethod
    def unmoved(x: Tensor) -> "SampleReport":
        """The record of a batch that does not move."""
        none = torch.zeros(len(x), dtype=torch.int64, device=home(x.device))
        return SampleReport(none, none.clone(), none.double(), none == 0)


def check_down(sampler: Any, t: Level[float], s: Level[float]) -> None:
    """Refuse a step up to a higher noise level, for samplers that only step down."""
    if s.t > t.t:
        got, name = f"t={t.t + 0:.4g}, then {s.t:.4g}", type(sampler).__name__  # 0, not -0
        raise ValueError(f"times must decrease for {name}; got {got}; Heun steps both ways")


def finest(dtype: torch.dtype) -> float:
    """Smallest step between two different levels; for half precision that of float32."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def over(field: Tensor, like: Tensor) -> Tensor:
    """A field (n, ...), broadcast against the batch of n samples; floats get its dtype."""
    field = field.reshape(field.shape + (1,) * (like.ndim - field.ndim))
    return onto(field, like, like.dtype if field.is_floating_point() else field.dtype)
