r"""Inverse problems: samples of x0 given a measurement y of it.

A measurement defines the likelihood of an x0. Methods change a model, or a sampler, accordingly:

    PiGDM, MMPS, Kalman, DiffPIR   Model -> Model       DPS   Sampler -> Sampler

(completion of images: inpainting.py; particles that converge to the posterior: smc.py). x0_hat is
the model's E[x0 | x], and r = y - A(x0_hat). Each method calls the network once per step. With
x0 given x ~ N(x0_hat, C) the posterior's x0 is  x0_hat + C A^T (A C A^T + noise_std^2 I)^-1 r:

    PiGDM     C = s I in the inverse, sigma^2 / alpha J outside    for data N(m, v I)
    Kalman    C of data N(m, S)                                    a covariance is known
    MMPS      C = sigma^2 / alpha J,  J = dx0_hat / dx             the model's own covariance
    DiffPIR   C = sigma^2 / (lam alpha^2) I
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import torch
from torch import Tensor

from sde_diffusion.inverse.corrections import BackpropCorrection, Differentiable
from sde_diffusion.inverse.least_squares import Linearized, conjugate_gradients, least_squares
from sde_diffusion.inverse.measurements import IS_OBSERVATION, Measurement, Observation
from sde_diffusion.models import X0, Prediction, conditions
from sde_diffusion.models.derivatives import in_graph
from sde_diffusion.models.guidance import Guided, with_added_score
from sde_diffusion.processes import Level
from sde_diffusion.processes.level import per_sample, posterior_variance
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.validate import Cond, Count, Kind, Number, Positive, arguments

__all__ = ["DPS", "MMPS", "DiffPIR", "GaussianData", "Kalman", "PiGDM"]


def check_unconditioned(model: object) -> None:
    """Refuse a model with other evidence, whose variance is another."""
    while model is not None:
        if getattr(model, "conditioned", False):
            rule = "not be conditioned on other evidence: the variance is then another"
            got = f"{type(model).__name__}; stack both measurements in one operator"
            raise ValueError(f"model must {rule}; got {got}")
        model = getattr(model, "model", None)


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
        check_unconditioned(self.model)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        at = Differentiable.of(self.model, x, level, cond)
        spread = posterior_variance(self.variance, level.alpha, level.sigma)
        _, pull = self.observation.spread_likelihood(at.x0, spread)
        pull = self.scale * pull
        return with_added_score(at.found, level, at.back(pull), spread * pull)


class GaussianData(Protocol):
    """Interface of data N(m, S): `exact.Gaussian` and `GaussianFrame`."""

    def posterior_root(self, v: Tensor, level: Level) -> Tensor:
        """Return L v with L L = Cov[x0 | x] = sigma^2 S (alpha^2 S + sigma^2 I)^-1; v (B, ...)."""
        ...


@dataclass(frozen=True, eq=False)
class Kalman(Guided):
    r"""The Kalman update of x0_hat with the covariance of the data, without derivatives.

        x0 = argmin |y - A x|^2 / noise_std^2 + (x - x0_hat)^T C^-1 (x - x0_hat)
           = x0_hat + C A^T (A C A^T + noise_std^2 I)^-1 r
        C = sigma^2 S (alpha^2 S + sigma^2 I)^-1

    and eps is recomputed from this x0. C is Cov[x0 | x] for data N(m, S), and for these data, with
    any S, the result is the exact model of the posterior. For other data S is their covariance.
    With C = L L the equation is solved for the operator A L.

    Args:
        model: any.
        measurement: y; its operator is linearized at x0_hat.
        data: S, from an `exact.Gaussian` or a `GaussianFrame`, such as
            GaussianFrame.of(mean, covariance) or GaussianFrame.pretrained("mnist").
    """

    conditioned: ClassVar = True

    measurement: Annotated[Measurement, Kind("a Measurement", "solve")]
    data: Annotated[GaussianData, Kind("an exact.Gaussian or GaussianFrame", "posterior_root")]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unconditioned(self.model)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        found, root = conditions.evaluate(self.model, x, level, cond), self.data.posterior_root
        x0, given = found.x0, self.measurement
        given.check_constant(x0)
        scaled, _ = least_squares(
            lambda u: given(x0 + root(u, level)), torch.zeros_like(x0), given.residual(x0), 1.0,
            given.noise_variance(x0),
        )  # fmt: skip  # L A^T z
        return Prediction(x, x0 + root(scaled, level), level, X0(), found.extra)


@dataclass(frozen=True, eq=False)
class MMPS(Guided):
    r"""Moment matching posterior sampling (Rozet et al. 2024; Boys et al. 2023).

    Cov[x0 | x] = sigma^2 / alpha J is exact for an exact model of any data (Tweedie's second-order
    formula), so the mean and covariance of x0 given x are right, and for data N(m, S) the result is
    the exact model of the posterior. (A C A^T + noise_std^2 I) z = r is solved by conjugate
    gradients, with one back-propagation through the network per round. Where alpha = 0, J is 0
    and C is set to v I.

    Args:
        model: any differentiable model.
        measurement: y; its operator is linearized at x0_hat.
        rounds: of conjugate gradients, at most; m rounds are exact for an exact model and m
            measured numbers. Fewer rounds leave out the directions in which y tells least.
        variance: v, where alpha = 0.
    """

    conditioned: ClassVar = True

    measurement: Annotated[Measurement, Kind("a Measurement", "solve")]
    rounds: Count = 10
    variance: Positive = 1.0

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        if in_graph(x):
            advice = "no method around it may need one"
            raise ValueError(f"grad must be False for MMPS, which has no derivative; {advice}")
        at = Differentiable.of(self.model, x, level, cond)
        x0, scale = at.x0.detach(), level.sigma**2
        operator, ridge = Linearized(self.measurement, x0), self.measurement.noise_variance(x0)

        def covariance(v: Tensor) -> Tensor:
            if not isinstance(level.alpha, Tensor):
                return scale / level.alpha * back(v) if level.alpha else self.variance * v
            alpha = level.alpha.where(level.alpha > 0, 1)
            return torch.where(level.alpha > 0, scale / alpha * back(v), self.variance * v)

        def back(v: Tensor) -> Tensor:
            return torch.autograd.grad(at.x0, at.x, v, retain_graph=True)[0]

        def matrix(z: Tensor) -> Tensor:
            spread = operator.applied(covariance(operator.transposed(z)))
            return spread + per_sample(ridge, z) * z

        r = self.measurement.residual(x0).detach()
        if self.measurement.noiseless:  # the part outside the range of A has no solution
            r = operator.applied(self.measurement.solve(x0, 1.0, 0.0)[0])
        pull = operator.transposed(conjugate_gradients(matrix, r, self.rounds))
        return with_added_score(at.found, level, back(pull), self.variance * pull)


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

    def before_run(self, x: Tensor) -> None:
        """Refuse an operator that is not linear."""
        self.measurement.check_linear(x, "DiffPIR")

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        found = conditions.evaluate(self.model, x, level, cond)
        x0, noise = found.x0, self.measurement.noise_variance(x) * self.lam
        if isinstance(noise, Tensor):
            spread = torch.where(noise > 0, level.sigma**2, torch.ones_like(noise))
            ridge = noise * level.alpha**2
        elif noise:  # both sides times lam alpha^2: finite at both ends
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
