r"""Inverse problems: samples of x0 given a measurement y of it.

A measurement says how likely an x0 is. Methods turn a model, or a sampler, towards it:

    PiGDM, DiffPIR   Model -> Model       DPS   Sampler -> Sampler

(completion of images: inpainting.py; particles that converge to the posterior: particles.py).
x0_hat is the model's E[x0 | x]; r = y - A(x0_hat). Each makes one call of the network a step.
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.inverse.corrections import BackpropCorrection, Differentiable
from sde_diffusion.inverse.measurements import IS_OBSERVATION, Measurement, Observation
from sde_diffusion.models.guidance import Guided, with_added_score
from sde_diffusion.models.model import evaluate
from sde_diffusion.models.parameterizations import X0
from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import Level, Scalar
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.validate import Cond, Kind, Number, Positive

__all__ = ["DPS", "DiffPIR", "PiGDM"]


@dataclass(frozen=True, eq=False)
class PiGDM(Guided):
    r"""Pseudoinverse-guided diffusion (Song et al. 2023): the score of y in closed form.

    If x0 given x were N(x0_hat, s I), then y given x would be N(A x0_hat, s A A^T + noise_std^2 I),
    so  score + w J^T A^T (s A A^T + noise_std^2 I)^-1 r  with  J = dx0_hat / dx. For data of
    variance v in every direction

        s = sigma^2 v / (alpha^2 v + sigma^2),

    and for data N(m, v I) the result is the model of the posterior, exactly. J = alpha / sigma^2
    Cov[x0 | x] for an exact model; where alpha = 0 the covariance is taken to be s I, that is v I.
    Where alpha is small sigma^2 / alpha is large, and so is what it makes of a network's own J.
    With a `LogLikelihood`, which knows no spread, it is the score form of DPS.

    Args:
        model: any that can be differentiated; one forward and one backward pass a step.
        observation: a Measurement, or a LogLikelihood.
        scale: w, 1 for Bayes' rule with this spread. (Their Algorithm 1 weighs the gradient by a
            factor of the level instead.)
        variance: v.
    """

    observation: Annotated[Observation, IS_OBSERVATION]
    scale: Annotated[float, Number()] = 1.0
    variance: Positive = 1.0

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        at = Differentiable.of(self.model, x, level, cond)
        spread = posterior_variance(level, self.variance)
        _, pull = self.observation.spread_likelihood(at.x0.detach(), spread)
        pull = self.scale * pull
        return with_added_score(at.found, level, at.back(pull), spread * pull)


@dataclass(frozen=True, eq=False)
class DiffPIR(Guided):
    r"""Plug-and-play restoration (Zhu et al. 2023): x0_hat moved towards y, without derivatives.

        x0 = argmin |y - A x|^2 / noise_std^2 + |x - x0_hat|^2 / s,    s = sigma^2 / (lam alpha^2)
           = x0_hat + A^T (A A^T + noise_std^2 / s I)^-1 r

    and eps is that of this x0. Their zeta is the share of fresh noise in the sampler's step, as in
    Ancestral(eta=...). Without noise x0 is the nearest of those with A x0 = y (or with the least
    |y - A x0|, if none has), whatever lam is.

    Args:
        model: any.
        measurement: of which A must be linear.
        lam: lambda, the weight of the model against the measurement.
    """

    measurement: Annotated[Measurement, Kind("a Measurement", "solve")]
    lam: Positive = 1.0

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        found = evaluate(self.model, x, level, cond)
        x0, noise = found.x0, self.measurement.noise_std**2 * self.lam
        if noise:  # both sides times lam alpha^2: finite at both ends
            spread, ridge = level.sigma**2, noise * level.alpha**2
        else:
            spread, ridge = 1.0, 0.0
        d, _ = self.measurement.solve(x0, spread, ridge)
        return Prediction(x, x0 + spread * d, level, X0(), found.extra)


def DPS(sampler: Sampler, measurement: Measurement, scale: float = 1.0) -> BackpropCorrection:
    r"""Diffusion posterior sampling (Chung et al. 2023, Algorithm 1): x_s - scale d/dx_t |r|.

    The gradient of the norm: that of its square, which their algorithm takes with a step size
    zeta / |r|, is 2 |r| times this one, so scale = 2 zeta.
    """
    validate.kind("measurement", measurement, "a Measurement", "cost")
    return BackpropCorrection(sampler, measurement.cost, scale)


def posterior_variance(level: Level, variance: float) -> Scalar:
    """Variance of x0 given x for data of this variance in every direction."""
    return level.sigma**2 * variance / (level.alpha**2 * variance + level.sigma**2)
