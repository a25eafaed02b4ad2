r"""Parameterizations: the meaning of a network's output, eps, x0, v, score or velocity.

Convention: x = alpha x0 + sigma eps, and `out` is the output. x0 and eps are linear in (x, out).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.models.prediction import Parameterization, Prediction, Row, nonzero
from sde_diffusion.processes import Level, Scalar
from sde_diffusion.validate import Checked, Positive

__all__ = ["X0", "Eps", "Preconditioned", "Score", "V", "Velocity"]


@dataclass(frozen=True)
class Eps(Parameterization):
    """out = eps (Ho et al. 2020). It does not determine x0 where alpha = 0."""

    def x0(self, level: Level) -> Row:
        alpha = nonzero(level.alpha, "x0 from eps (use V, X0 or Velocity)", "alpha")
        return 1 / alpha, -level.sigma / alpha

    def eps(self, level: Level) -> Row:
        return 0.0, 1.0

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.eps


@dataclass(frozen=True)
class X0(Parameterization):
    """out = x0. Where sigma = 0, eps is set to 0, the limit for data that have a density."""

    def x0(self, level: Level) -> Row:
        return 0.0, 1.0

    def eps(self, level: Level) -> Row:
        if isinstance(level.sigma, Tensor):
            inverse: Scalar = torch.where(level.sigma == 0, 0, 1 / level.sigma)
        else:
            inverse = 1 / level.sigma if level.sigma else 0.0
        return inverse, -level.alpha * inverse

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.x0


@dataclass(frozen=True)
class V(Parameterization):
    """out = v = alpha eps - sigma x0 (Salimans & Ho 2022). Well posed at both ends."""

    def x0(self, level: Level) -> Row:
        power = level.alpha**2 + level.sigma**2  # 1 for variance-preserving processes only
        return level.alpha / power, -level.sigma / power

    def eps(self, level: Level) -> Row:
        power = level.alpha**2 + level.sigma**2
        return level.sigma / power, level.alpha / power

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.v


@dataclass(frozen=True)
class Score(Parameterization):
    """out = grad log p_t(x) = -eps / sigma (Song et al. 2021)."""

    def x0(self, level: Level) -> Row:
        alpha = nonzero(level.alpha, "x0 from the score (use V, X0 or Velocity)", "alpha")
        return 1 / alpha, level.sigma**2 / alpha

    def eps(self, level: Level) -> Row:
        return 0.0, -level.sigma

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.score


@dataclass(frozen=True)
class Velocity(Parameterization):
    """out = eps - x0, the slope in the straight frame and the regression target of flow matching.

    Lipman et al. 2023; Liu et al. 2023. Well posed at both ends, on every process.
    """

    def x0(self, level: Level) -> Row:
        total = level.alpha + level.sigma
        return 1 / total, -level.sigma / total

    def eps(self, level: Level) -> Row:
        total = level.alpha + level.sigma
        return 1 / total, level.alpha / total

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.velocity


@dataclass(frozen=True)
class Preconditioned(Checked, Parameterization):
    r"""The preconditioning of Karras et al. 2022, eq. 7 and Table 1, for any process.

    With s = sigma_data and power = alpha^2 s^2 + sigma^2, the variance of x:

        x0 = alpha s^2 / power x + sigma s / sqrt(power) out,    network input x / sqrt(power)

    For alpha = 1 the three factors are c_skip, c_out and c_in of the paper. Input and target have
    unit variance at every level. Well posed at both ends. On a variance-preserving process with
    s = 1, out = -v.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: Positive = 0.5

    def power(self, level: Level) -> Scalar:
        """The variance of x_t for data of variance sigma_data^2."""
        return level.alpha**2 * self.sigma_data**2 + level.sigma**2

    def input_scale(self, level: Level) -> Scalar:
        return self.power(level) ** -0.5

    def x0(self, level: Level) -> Row:
        power = self.power(level)
        return level.alpha * self.sigma_data**2 / power, level.sigma * self.sigma_data / power**0.5

    def eps(self, level: Level) -> Row:
        power = self.power(level)
        return level.sigma / power, -level.alpha * self.sigma_data / power**0.5

    def target(self, prediction: Prediction) -> Tensor:
        level = prediction.level
        root = self.power(level) ** 0.5
        return prediction.combine(
            level.sigma / (self.sigma_data * root), -level.alpha * self.sigma_data / root
        )
