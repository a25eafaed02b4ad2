r"""Inverse problems: samples of x0 given a measurement y of it.

A measurement defines the likelihood of an x0. Methods change a model, or a sampler, accordingly:

    PiGDM, DiffPIR   Model -> Model       DPS   Sampler -> Sampler

(completion of images: inpainting.py; particles that converge to the posterior: smc.py). x0_hat is
the model's E[x0 | x], and r = y - A(x0_hat). Each method calls the network once per step.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sde_diffusion.inverse.corrections import BackpropCorrection, Differentiable
from sde_diffusion.inverse.measurements import IS_OBSERVATION, Measurement, Observation
from sde_diffusion.models import X0, Prediction, conditions
from sde_diffusion.models.guidance import Guided, with_added_score
from sde_diffusion.processes import Level, Scalar
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.validate import Cond, Kind, Number, Positive, arguments

__all__ = ["DPS", "DiffPIR", "PiGDM"]


@dataclass(frozen=True, eq=False)
class PiGDM(Guided):
    r"""Pseudoinverse-guided diffusion (Song et al. 2023): adds the score of y in closed form.

    If x0 given x were N(x0_hat, s I), then y given x would be N(A x0_hat, s A A^T + noise_std^2 I),
    so  score + w J^T A^T (s A A^T + noise_std^2 I)^-1 r  with  J = dx0_hat / dx. For data of
    variance v in every direction

        s = sigma^2 v / (alpha^2 v + sigma^2),

    and for data N(m, v I) the result is the exact model of the posterior. For an exact model
    J = alpha / sigma^2 Cov[x0 | x]; where alpha = 0 this covariance is set to s I = v I. Where
    alpha is small, sigma^2 / alpha is large and amplifies errors of a network's J. With a
    `LogLikelihood`, which ignores s, it is the score form of DPS.

    Args:
        model: any differentiable model; one forward and one backward pass per step. A model with
            other evidence (ClassifierGuided, PiGDM, DiffPIR) is refused: given two measurements of
            correlated coordinates no single s is right. Stack the measurements in one operator.
        observation: a Measurement, or a LogLikelihood.
        scale: w, 1 for Bayes' rule with this s. (Algorithm 1 of the paper uses a weight that
            depends on the level.)
        variance: v.
    """

    conditioned: ClassVar = True

    observation: Annotated[Observation, IS_OBSERVATION]
    scale: Annotated[float, Number()] = 1.0
    variance: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.model
        while inner is not None:
            if getattr(inner, "conditioned", False):
                rule = "not be conditioned on other evidence: the variance is then another"
                got = f"{type(inner).__name__}; stack both measurements in one operator"
                raise ValueError(f"model must {rule}; got {got}")
            inner = getattr(inner, "model", None)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        at = Differentiable.of(self.model, x, level, cond)
        spread = posterior_variance(level, self.variance)
        _, pull = self.observation.spread_likelihood(at.x0, spread)
        pull = self.scale * pull
        return with_added_score(at.found, level, at.back(pull), spread * pull)


@dataclass(frozen=True, eq=False)
class DiffPIR(Guided):
    r"""Plug-and-play restoration (Zhu et al. 2023): moves x0_hat towards y, without derivatives.

        x0 = argmin |y - A x|^2 / noise_std^2 + |x - x0_hat|^2 / s,    s = sigma^2 / (lam alpha^2)
           = x0_hat + A^T (A A^T + noise_std^2 / s I)^-1 r

    and eps is recomputed from this x0. The paper's zeta is the share of fresh noise in the
    sampler's step, as in Ancestral(eta=...). For noise_std = 0, x0 is the nearest point with the
    smallest |y - A x0|, for every lam.

    Args:
        model: any.
        measurement: one with a linear operator A.
        lam: lambda, the weight of the model against the measurement.
    """

    conditioned: ClassVar = True

    measurement: Annotated[Measurement, Kind("a Measurement", "solve")]
    lam: Positive = 1.0

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        found = conditions.evaluate(self.model, x, level, cond)
        x0, noise = found.x0, self.measurement.noise_std**2 * self.lam
        if noise:  # both sides times lam alpha^2: finite at both ends
            spread, ridge = level.sigma**2, noise * level.alpha**2
        else:
            spread, ridge = 1.0, 0.0
        d, _ = self.measurement.solve(x0, spread, ridge)
        return Prediction(x, x0 + spread * d, level, X0(), found.extra)


@arguments
def DPS(
    sampler: Sampler,
    measurement: Annotated[Measurement, Kind("a Measurement", "cost")],
    scale: float = 1.0,
) -> BackpropCorrection:
    r"""Make a sampler of diffusion posterior sampling (Chung et al. 2023): x_s - scale d/dx_t |r|.

    Algorithm 1 of the paper uses the gradient of |r|^2 with step size zeta / |r|. This gradient is
    2 |r| times the gradient of |r|, so scale = 2 zeta.
    """
    return BackpropCorrection(sampler, measurement.cost, scale)


def posterior_variance(level: Level, variance: float) -> Scalar:
    """Return the variance of x0 given x for data of this variance in every direction."""
    return level.sigma**2 * variance / (level.alpha**2 * variance + level.sigma**2)
