r"""Exponential integrators: the linear part of a step is solved exactly, the x0 is approximated.

With xbar = x / alpha and r = sigma / alpha, one family of SDEs has the data's law at every level:

    d xbar = (1 + eta^2) (xbar - x0) / r dr + eta sqrt(2 r) dW,     r running down

eta = 0 is the probability flow, 1 the reverse SDE (Song et al. 2021; Xue et al. 2023, with tau for
eta). For constant x0 its solution from level t to s is, with q = r_s / r_t,

    xbar_s = q^(1 + eta^2) xbar_t + (1 - q^(1 + eta^2)) x0 + r_s sqrt(1 - q^(2 eta^2)) z       (1)

exact for data in one point, at any step. The samplers here differ in the x0 that they insert. For
eta = 1 the noise of (1), divided by r_s^2, is the increment of a Brownian motion on the clock
1 / r^2 from t to s, so one path of that clock drives any number of steps.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from torch import Tensor

from sde_diffusion.grids import Grid, Power
from sde_diffusion.samplers.sampler import Claims, Level, Model, Noise, check_down, finest
from sde_diffusion.validate import Checked, Integer, Number, Share

__all__ = ["DPMSolver", "VelocityMultistep"]


class Estimates(NamedTuple):
    """Estimates of x0 at the last levels, newest first.

    Attributes:
        half_log_snr: log(alpha / sigma) of each level, lambda in Lu et al.
        x0: the estimate at each level.
    """

    half_log_snr: tuple[float, ...]
    x0: tuple[Tensor, ...]


@dataclass(frozen=True)
class DPMSolver(Checked):
    r"""DPM-Solver++(kM) of the flow, or SDE-DPM-Solver++(2M) of the SDE (Lu et al. 2022b).

    lambda = log(alpha / sigma), h = lambda_s - lambda_t; h_1, h_2 are the previous steps, x0_1,
    x0_2 the estimates at their starts:

        k = 2   x0 + h / (2 h_1) (x0 - x0_1)                                for x0 in (1), eta = 0
        k = 3   the quadratic through x0, x0_1, x0_2 in lambda, integrated exactly

    The authors' code for k = 3 weighs the second difference by half of the integral and is of
    second order; here it is of third. The first steps use the estimates that exist; the step to
    sigma = 0, which has no h, uses x0 itself.

    Steps even in u do not get shorter in lambda at the two ends of the path: the error of the first
    and the last few is N^-2 for N steps, so the order is 2 for either k; single steps have order k.

    With eta > 0 (App. E; SA-Solver, Xue et al. 2023) the x0 of k = 2 is used in (1) with noise. The
    difference then contains the noise between the two levels, one step late: summed over the path
    the response to the noise is complete, so the law is of second order.

    Args:
        k: predictions that a step uses, 2 or 3.
        p: the grid is even in u^(1/p); 1.25 was best on mixtures from 10 to 50 calls.
        eta: share of the reverse SDE's standard deviation, in [0, 1]; 0 is the flow. Above 0 with
            k = 2 only.
    """

    k: Annotated[int, Integer(2, 3)] = 2
    p: Annotated[float, Number(1)] = 1.25
    eta: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta and self.k != 2:
            raise ValueError(f"eta must be 0 with k = {self.k}; got {self.eta}; use k = 2")

    @property
    def claims(self) -> Claims:
        return Claims(order=2, step_order=self.k, noise=self.eta > 0)

    @property
    def grid(self) -> Grid:
        return Power(self.p)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Estimates | None,
    ) -> tuple[Tensor, Estimates]:  # fmt: skip
        if self.eta > 0:
            check_down(self, t, s)
        estimates = remembered(model(x, t).x0, t, memory, self.k)
        extrapolate = quadratic if self.k == 3 else linear
        return held(x, extrapolate(estimates, s), t, s, self.eta, noise), estimates


MU = 2 / 3  # minimizes the error in law of Gaussian data, see VelocityMultistep


class Held(NamedTuple):
    """The x0 that the last step used, and its length.

    Attributes:
        x0: used by that step.
        gap: s.log_snr - t.log_snr.
    """

    x0: Tensor
    gap: float


@dataclass(frozen=True)
class VelocityMultistep(Checked):
    r"""A stochastic multistep method of second order in law, one call a step.

    (1) is a step at constant velocity eps - x0 in the straight frame, to the level r_s q^(eta^2)
    below s, then noise by the forward kernel back up to s: with the exact velocity of the flow the
    law would be exact. A difference of estimates at two noisy levels is not a slope of the flow,
    but mostly the response to the noise between them. So it is not extrapolated; the error of a
    step is corrected once it is known, as in Adams-Moulton. With x0' the x0 that the last step
    used, before the next step

        delta = x0 - x0',      xbar + gamma delta  for xbar,      x0 + mu delta  for x0

        e = 1 - q^((1 + eta^2) / 2) of the last step, f of the next:
        mu = 2/3,              gamma = e - mu f (1 - f)

    For the reverse SDE x0 is a martingale (Tweedie) and delta the response to the noise alone. The
    next delta removes the share mu of it, so its total effect on xbar is gamma + mu (1 - (1 - f)^2)
    - mu f = e: half the weight (1 + eta^2) log(1 / q) of the drift, to leading order. That is the
    trapezoidal rule on steps of any size, of second order in law for additive noise.

    mu is free. 2/3 was chosen by verify.law: it minimizes the distance of the law to that of
    Gaussian data of any variance, on grids even in u^(1/p) of 20 steps and more. At eta = 1, 20
    steps and variances from 1/4 to 4 the relative error of the standard deviation is at most 1e-2,
    that of DDPM on the same grid 0.1. Data in one point stay exact at any step, so directions too
    narrow for the steps do not blow up.

    No noise is added in the step that ends at sigma = 0, which gives alpha x0.

    Args:
        eta: share of the reverse SDE's standard deviation, in [0, 1]; 0 draws no noise.
        p: the grid is even in u^(1/p). More suits narrow data, 1 modes far apart.
    """

    eta: Share = 1.0
    p: Annotated[float, Number(1)] = 1.25

    @property
    def claims(self) -> Claims:
        """A step ends before its correction, which is part of the next step."""
        return Claims(order=2, step_order=1, noise=self.eta > 0)

    @property
    def grid(self) -> Grid:
        return Power(self.p)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Held | None,
    ) -> tuple[Tensor, Held]:  # fmt: skip
        check_down(self, t, s)
        x0, gap = model(x, t).x0, log_snr_gap(t, s)
        if memory is not None:
            delta, power = x0 - memory.x0, (1 + self.eta**2) / 2
            e, f = fall(memory.gap, power), fall(gap, power)
            x = x.add(delta, alpha=t.alpha * (e - MU * f * (1 - f)))
            x0 = x0.add_(delta, alpha=MU)
        return held(x, x0, t, s, self.eta, noise), Held(x0, gap)


def held(
    x: Tensor, x0: Tensor, t: Level[float], s: Level[float], eta: float, noise: Noise
) -> Tensor:
    """Equation (1) times alpha_s, in a form without 1 / alpha_t: x0 is constant from t to s.

    At sigma_t = 0, where a path up begins, E[eps | x] = 0.
    """
    if s.sigma == 0 or t.sigma == 0:
        return x0 * s.alpha
    if s.t > t.t:  # without noise, and possibly up to alpha_s = 0
        kept = s.sigma / t.sigma
        return (x * kept).add_(x0, alpha=s.alpha - t.alpha * kept)
    gap = log_snr_gap(t, s)
    kept = s.sigma / t.sigma * (1 - fall(gap, eta**2))
    made = (x * kept).add_(x0, alpha=s.alpha * fall(gap, 1 + eta**2))
    std = s.sigma * math.sqrt(fall(gap, 2 * eta**2))
    return made.add_(noise(t.t, s.t, x), alpha=std) if std else made


def log_snr_gap(t: Level[float], s: Level[float]) -> float:
    """s.log_snr - t.log_snr = -2 log q; 0 where both are infinite, which is one level."""
    return 0.0 if t.log_snr == s.log_snr else s.log_snr - t.log_snr


def fall(gap: float, power: float) -> float:
    """1 - q^power, q = e^(-gap / 2), also where alpha = 0 at the start: q = 0."""
    return -math.expm1(-power * gap / 2) if power else 0.0


def remembered(x0: Tensor, t: Level[float], memory: Estimates | None, k: int) -> Estimates:
    """The last k estimates with the new one; of two at levels equal up to rounding, the newer."""
    here, nodes, estimates = t.log_snr / 2, (), ()
    if memory is not None:
        apart = abs(here - memory.half_log_snr[0]) > finest(x0.dtype)
        nodes, estimates = memory.half_log_snr[not apart :], memory.x0[not apart :]
    return Estimates((here, *nodes)[:k], (x0, *estimates)[:k])


def linear(estimates: Estimates, s: Level[float]) -> Tensor:
    """x0 + h / (2 h_1) (x0 - x0_1), Lu et al. 2022b, Algorithm 2; h_1 may be infinite."""
    x0, *before = estimates.x0
    if not before or s.sigma == 0 or s.alpha == 0:
        return x0
    here, last, *_ = estimates.half_log_snr
    share = (s.log_snr / 2 - here) / (2 * (here - last))
    return (x0 * (1 + share)).sub_(before[0], alpha=share)


def quadratic(estimates: Estimates, s: Level[float]) -> Tensor:
    r"""The constant x0 equivalent to the quadratic through the last three estimates.

    With tau = lambda - lambda_t and the weight e^(tau - h) of x0 in (1) at tau in [0, h],

        x0 + <tau> f_01 + <tau (tau + h_1)> f_012,       f the divided differences

        <tau> = (h - 1 + e^-h) / (1 - e^-h),             <tau^2> = h^2 / (1 - e^-h) - 2 <tau>
    """
    if len(estimates.x0) < 3 or s.sigma == 0 or s.alpha == 0:
        return linear(estimates, s)
    here, last, oldest = estimates.half_log_snr
    h, h_1, h_2 = s.log_snr / 2 - here, here - last, last - oldest
    if h == 0:  # two times with the same level
        return estimates.x0[0]
    weight = -math.expm1(-h)
    mean = (h - weight) / weight
    bent = (h**2 / weight - 2 * mean + h_1 * mean) / (h_1 + h_2)
    first, second = (mean + bent) / h_1, bent / h_2
    x0, x0_1, x0_2 = estimates.x0
    made = (x0 * (1 + first)).sub_(x0_1, alpha=first + second)
    return made.add_(x0_2, alpha=second)
