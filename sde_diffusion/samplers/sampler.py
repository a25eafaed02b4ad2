"""The sampler: a rule for one step, and what a solver with steps of its own reports.

Convention: a sampler moves a batch from time t to an earlier time s < t.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sde_diffusion.models.model import Model
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level, Process

__all__ = ["Memory", "SampleReport", "Sampler", "SolverError"]

Memory = Any  # what a sampler carries from step to step: None before the first


class SolverError(RuntimeError):
    """A solver with steps of its own gave up; the message says where and why."""


class Sampler(Protocol):
    """A rule for one step. Implementations are frozen dataclasses of their hyper-parameters."""

    @property
    def order(self) -> int | None:
        """Order of convergence to the flow (or in law to the SDE) as the steps shrink.

        None for a solver whose error follows its tolerances.
        """
        ...

    def grid(self, process: Process, steps: int | None) -> Tensor:
        """The sampler's own n + 1 times, decreasing to 0; float64."""
        ...

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        """x at level t to x at level s. Pure: changes neither x nor memory."""
        ...


class SampleReport(NamedTuple):
    """What became of each sample of a solver that gives each its own steps, all (B,).

    Attributes:
        calls: how often the model was asked about it.
        rejections: how many of these calls were for steps that were made again.
        error: the solver's estimate of the errors of its predictions, before they were corrected.
        finished: False where it was given up, and the rest of its way only predicted.
    """

    calls: Tensor
    rejections: Tensor
    error: Tensor
    finished: Tensor

    @staticmethod
    def unmoved(x: Tensor) -> "SampleReport":
        """That of a batch which need not move."""
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return SampleReport(none, none.clone(), none.double(), none == 0)
