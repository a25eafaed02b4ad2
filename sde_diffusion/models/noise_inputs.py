"""Noise inputs: the number by which a network is told the noise level."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.processes import Level, Scalar

__all__ = ["CNoise", "ContinuousTime", "LogSNR", "NoiseInput", "TimestepIndex"]


class NoiseInput(Protocol):
    """How a network is told the noise level."""

    def __call__(self, level: Level) -> Scalar: ...


@dataclass(frozen=True)
class ContinuousTime:
    """t in [0, 1]: finite at both ends. On a Discrete process it is i/N."""

    def __call__(self, level: Level) -> Scalar:
        return level.t


@dataclass(frozen=True)
class LogSNR:
    """log(alpha^2 / sigma^2), the same for every process; held to [-20, 20], as it is infinite at
    the ends, where no more can be told from a level with nothing but signal or noise."""

    def __call__(self, level: Level) -> Scalar:
        if isinstance(level.log_snr, Tensor):
            return level.log_snr.clamp(-20, 20)
        return min(max(level.log_snr, -20.0), 20.0)


@dataclass(frozen=True)
class CNoise:
    """c_noise = log(sigma / alpha) / 4 of Karras et al. 2022, Table 1: -1/8 of LogSNR."""

    def __call__(self, level: Level) -> Scalar:
        return LogSNR()(level) / -8


@dataclass(frozen=True)
class TimestepIndex:
    """t N - 1 + counts_from: the step of a chain as its network counts it, a real number.

    Args:
        num_steps: N.
        counts_from: the network's name of the first step, 0 (most libraries) or 1 (the papers).
    """

    num_steps: int
    counts_from: int = 0

    def __post_init__(self) -> None:
        validate.integer("num_steps", self.num_steps)
        validate.integer("counts_from", self.counts_from, 0, 1)

    def __call__(self, level: Level) -> Scalar:
        return level.t * self.num_steps - 1 + self.counts_from
