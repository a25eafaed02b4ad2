"""Independent statements of what the package must reproduce: published formulas, typed here.

Nothing in this file calls the package's own schedules, kernels or samplers.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import mpmath
import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def normal(*shape: int) -> Tensor:
    """The same standard normal numbers every time, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def vp_beta(t: Tensor | float, low: float = 0.1, high: float = 20.0) -> Tensor | float:
    """beta(t) of Song et al. 2021, eq. 32."""
    return low + t * (high - low)


def cosine_angle(t: float, s: float = 0.008) -> float:
    return math.pi / 2 * (t + s) / (1 + s)


def vp_integral(t: float) -> float:
    """The integral of beta from 0 to t."""
    return 0.1 * t + 19.9 * t**2 / 2


# Drift and squared diffusion of dx = f x dt + g dW, as published, at the parameters of cases.py.
SDES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    # Song et al. 2021, eq. 11, 12, 9
    "vp": (lambda t: -vp_beta(t) / 2, vp_beta),
    "sub-vp": (
        lambda t: -vp_beta(t) / 2, lambda t: vp_beta(t) * -math.expm1(-2 * vp_integral(t))
    ),
    "ve": (
        lambda t: 0.0,
        lambda t: (0.01 * 5000.0**t) ** 2 * 2 * math.log(5000.0),
    ),
    "ou": (lambda t: -5.0, lambda t: 10.0),
    # Nichol & Dhariwal 2021, eq. 17: beta = -2 d/dt log cos(angle) = 2 tan(angle) angle'
    "cosine": (
        lambda t: -math.tan(cosine_angle(t)) * math.pi / 2 / 1.008,
        lambda t: 2 * math.tan(cosine_angle(t)) * math.pi / 2 / 1.008,
    ),
    "edm": (lambda t: 0.0, lambda t: 2 * 80.0**2 * t),  # Karras et al. 2022: g^2 = 2 sigma sigma'
    "rectified-flow": (lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
}  # fmt: skip


# Their alpha and sigma^2, with as many digits as mpmath is asked for.
EXACT_MARGINALS: dict[str, tuple[Callable, Callable]] = {
    "vp": (
        lambda t: mpmath.exp(-exact_integral(t) / 2),
        lambda t: -mpmath.expm1(-exact_integral(t)),
    ),
    "sub-vp": (
        lambda t: mpmath.exp(-exact_integral(t) / 2),
        lambda t: mpmath.expm1(-exact_integral(t)) ** 2,
    ),
    "ve": (lambda t: 1, lambda t: mpmath.expm1(2 * t * mpmath.log(5000)) / 10000),
    "ou": (lambda t: mpmath.exp(-5 * t), lambda t: -mpmath.expm1(-10 * t)),
    "cosine": (lambda t: exact_cosine(t), lambda t: 1 - exact_cosine(t) ** 2),
    "edm": (lambda t: 1, lambda t: 6400 * t**2),
    "rectified-flow": (lambda t: 1 - t, lambda t: t**2),
}


def exact_integral(t: mpmath.mpf) -> mpmath.mpf:
    return (t + 199 * t**2 / 2) / 10


def marginal(name: str) -> Callable[[float], tuple[float, float]]:
    """alpha and sigma^2 at t, correctly rounded."""

    def rounded(t: float) -> tuple[float, float]:
        with mpmath.workdps(40):
            alpha, variance = (formula(mpmath.mpf(t)) for formula in EXACT_MARGINALS[name])
            return float(alpha), float(variance)

    return rounded


def exact_cosine(t: mpmath.mpf) -> mpmath.mpf:
    angles = (mpmath.pi / 2 * (1000 * at + 8) / 1008 for at in (t, 0))
    return mpmath.cos(next(angles)) / mpmath.cos(next(angles))


def ddpm_moments(
    betas: Sequence[float], mean: float, variance: float, kind: str
) -> tuple[float, float]:
    """Mean and variance of Ho et al.'s Algorithm 2 on N(mean, variance) data with the exact eps.

    x_(i-1) = (x_i - beta / sqrt(1 - abar) eps) / sqrt(1 - beta) + s z,   z = 0 at i = 1.
    """
    betas = np.asarray(betas, dtype=np.float64)
    abar = np.cumprod(1 - betas)
    m, v = 0.0, 1.0
    for i in range(len(betas) - 1, -1, -1):
        beta, a = betas[i], abar[i]
        total = a * variance + 1 - a
        gain = (1 - beta / total) / np.sqrt(1 - beta)
        m = gain * m + beta * np.sqrt(a) * mean / total / np.sqrt(1 - beta)
        before = abar[i - 1] if i else 1.0
        added = beta if kind == "beta" else (1 - before) / (1 - a) * beta
        v = gain**2 * v + (added if i else 0.0)
    return float(m), float(v)


def ddim_moments(
    abar: Sequence[float], mean: float, variance: float, eta: float
) -> tuple[float, float]:
    """The same for Song et al. 2021 (DDIM), eq. 12 and 16, on levels abar[0] = 1 > abar[1] > ..."""
    m, v = 0.0, 1.0
    for i in range(len(abar) - 1, 0, -1):
        now, to = abar[i], abar[i - 1]
        std = eta * np.sqrt((1 - to) / (1 - now)) * np.sqrt(1 - now / to)
        total = now * variance + 1 - now
        eps = np.sqrt(1 - now) / total  # eps_hat = eps (x - sqrt(now) mean)
        x0 = (1 - np.sqrt(1 - now) * eps) / np.sqrt(now)
        gain = np.sqrt(to) * x0 + np.sqrt(1 - to - std**2) * eps
        shift = np.sqrt(to) * mean - gain * np.sqrt(now) * mean
        m, v = gain * m + shift, gain**2 * v + std**2
    return float(m), float(v)


def euler_maruyama_moments(
    times: Sequence[float], drift: Callable, diffusion2: Callable, marginal: Callable,
    mean: float, variance: float, start: float = 1.0,
) -> tuple[float, float]:  # fmt: skip
    """Euler-Maruyama of the reverse SDE from N(0, start); marginal(t) = (alpha, sigma^2)."""
    m, v = 0.0, start
    for t, s in pairwise(times):
        dt, g2 = t - s, diffusion2(t)
        alpha, noise = marginal(t)
        total = alpha**2 * variance + noise
        gain = 1 - dt * (drift(t) + g2 / total)
        m = gain * m + dt * g2 * alpha * mean / total
        v = gain**2 * v + g2 * dt
    return m, v


def reverse_sde_moments(mean: float, variance: float) -> tuple[float, float]:
    """The law at t = 0 of the reverse VP SDE started from N(0, 1) at t = 1, by solving its moments.

    dm/dt = f m + g^2 (m - alpha mean) / C,   dv/dt = 2 (f + g^2 / C) v - g^2,   t from 1 down to 0.
    """

    def slope(t: float, state: np.ndarray) -> list[float]:
        beta = vp_beta(t)
        alpha2 = np.exp(-0.1 * t - 19.9 * t**2 / 2)
        total = alpha2 * variance + 1 - alpha2
        m, v = state
        return [
            -beta / 2 * m + beta * (m - np.sqrt(alpha2) * mean) / total,
            2 * (-beta / 2 + beta / total) * v - beta,
        ]

    solution = solve_ivp(slope, (1.0, 0.0), [0.0, 1.0], "DOP853", rtol=1e-11, atol=1e-13)
    return float(solution.y[0, -1]), float(solution.y[1, -1])


def w2(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Wasserstein-2 between N(mean, variance) pairs in one dimension."""
    return float(np.hypot(a[0] - b[0], np.sqrt(a[1]) - np.sqrt(b[1])))


def fitted_order(sizes: Sequence[int], errors: Sequence[float]) -> float:
    """Minus the least-squares slope of log error against log size."""
    return float(-np.polyfit(np.log(sizes), np.log(errors), 1)[0])
