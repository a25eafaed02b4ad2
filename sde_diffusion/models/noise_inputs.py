"""Noise inputs: the number with which a network is conditioned on the noise level."""

from dataclasses import dataclass
from typing import Annotated, Protocol

from torch import Tensor

from sde_diffusion.processes.level import Level, Scalar, double, transformed
from sde_diffusion.validate import Checked, Count, Integer

__all__ = ["CNoise", "ContinuousTime", "LogSNR", "NoiseInput", "TimestepIndex", "WholeTimestep"]


class NoiseInput(Protocol):
    """Interface of a function of the level. Implementations are frozen dataclasses."""

    def __call__(self, level: Level) -> Scalar: ...


@dataclass(frozen=True)
class ContinuousTime:
    """The time t in [0, 1], finite at both ends; i/N on a Discrete process."""

    def __call__(self, level: Level) -> Scalar:
        return level.t


@dataclass(frozen=True)
class LogSNR:
    """log(alpha^2 / sigma^2), clamped to [-20, 20]; comparable between processes.

    Unclamped it is infinite at both ends. Beyond 20, x is pure signal or pure noise in float32.
    """

    def __call__(self, level: Level) -> Scalar:
        if isinstance(level.log_snr, Tensor):
            return level.log_snr.clamp(-20, 20)
        return min(max(level.log_snr, -20.0), 20.0)


@dataclass(frozen=True)
class CNoise:
    """c_noise = log(sigma / alpha) / 4 of Karras et al. 2022, Table 1: LogSNR / -8."""

    def __call__(self, level: Level) -> Scalar:
        return LogSNR()(level) / -8


@dataclass(frozen=True)
class TimestepIndex(Checked):
    """The index of a chain's step, t N - 1 + counts_from, a real number.

    Args:
        num_steps: N, the number of steps of the chain.
        counts_from: index of the first step, 0 (most libraries) or 1 (the papers).
    """

    num_steps: Count
    counts_from: Annotated[int, Integer(0, 1)] = 0

    def __call__(self, level: Level) -> Scalar:
        return level.t * self.num_steps - 1 + self.counts_from


@dataclass(frozen=True)
class WholeTimestep(TimestepIndex):
    """TimestepIndex, as int64 at the times of the chain, for networks with a table of steps.

    Between these times it is a real number. Below the first step it is not defined.
    """

    def __call__(self, level: Level) -> Scalar:
        step = double(super().__call__(level))
        if transformed(step):  # whole numbers cannot be found without reading
            return step.float()
        near = 1e-6 if isinstance(level.t, float) else 1e-3  # times of tensors may be float32
        if bool((step < self.counts_from - near).any()):
            first, got = 1 / self.num_steps, float(double(level.t).min())
            raise ValueError(f"t must be at least 1/N = {first:g}, the first step; got t={got:g}")
        whole = step.round()
        if bool(((step - whole).abs() <= near).all()):
            return whole.long()
        return step.float() if isinstance(level.t, Tensor) else float(step)
