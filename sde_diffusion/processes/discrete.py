r"""Chains: the DDPM's table of betas as a process, and the SDE that passes through it.

Convention: index i in 1 .. N is the time t = i/N; x_i = sqrt(1 - beta_i) x_(i-1) + sqrt(beta_i) z.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sde_diffusion.processes.continuous import Cosine
from sde_diffusion.processes.level import onto
from sde_diffusion.processes.process import IS_PROCESS, Process, VariancePreserving
from sde_diffusion.validate import Count, Kind, Number, Positive, arguments

__all__ = ["Discrete", "Interpolated", "discretize", "interpolate"]

Beta = Annotated[float, Number(0, 1, strict=True)]
Variance = Literal["beta", "posterior"]
IS_CHAIN = Kind("a Discrete process", "betas")


@dataclass(frozen=True)
class Interpolated(VariancePreserving):
    """The SDE that passes through a discrete chain: beta(t) constant between the chain's times i/N.

    log alpha(i/N) = 1/2 sum_(j <= i) log(1 - beta_j), linear in between. Its marginals and
    transitions at the times i/N are those of the chain; drift and diffusion there are those of the
    interval below. If beta_N = 1 (zero terminal SNR), alpha falls linearly to 0 over the last
    interval and t_max is (N - 1) / N.

    Args:
        betas: (N,) variances of the chain's kernels, each in (0, 1), the last one in (0, 1].
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas(self.betas))

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.betas)

    @property
    def t_max(self) -> float:
        return 1.0 if self.betas[-1] < 1 else 1 - 1 / self.num_steps

    @cached_property
    def beta_table(self) -> Tensor:
        """beta_i, i = 1 .. N, float64."""
        return torch.tensor(self.betas, dtype=torch.float64)

    @cached_property
    def table(self) -> Tensor:
        """log alpha at i/N, i = 0 .. N, float64."""
        return torch.nn.functional.pad(torch.log1p(-self.beta_table).cumsum(0) / 2, (1, 0))

    @cached_property
    def noise_table(self) -> Tensor:
        """sigma^2 = 1 - abar_i at i/N, i = 0 .. N, float64."""
        return 0.0 - torch.expm1(2 * self.table)

    def log_alpha(self, t: Tensor) -> Tensor:
        table, last = onto(self.table, t), self.num_steps - 1
        left = self._interval(t)
        fraction = t * self.num_steps - left
        if self.betas[-1] < 1:
            return table[left] + fraction * (table[left + 1] - table[left])
        rise = torch.cat([table[1:-1], table[-2:-1]]) - table[:-1]  # 0 over the last interval
        return table[left] + fraction * rise[left] + torch.log1p(-fraction * (left == last))

    def _interval(self, t: Tensor) -> Tensor:
        """The interval of t, 0 .. N - 1.

        Node i belongs to the interval that ends there: a step down from i needs its rate. In
        float32 i/N may lie above the node, by a relative 2^-24.
        """
        position, n = t.detach() * self.num_steps, self.num_steps
        return (position - n * 2.0**-22).ceil().sub(1).clamp(0, n - 1).long()

    def _log_ratio(self, s: Tensor, t: Tensor) -> Tensor:
        """Within an interval the rate times t - s: no nearly equal numbers are subtracted."""
        left, table, steps = self._interval(t), onto(self.table, t), (t - s) * self.num_steps
        within = steps * (table[left + 1] - table[left])
        if self.betas[-1] == 1:
            fall = torch.log1p(-steps / (1 - (s * self.num_steps - left)))
            within = torch.where(left == self.num_steps - 1, fall, within)
        return torch.where(self._interval(s) == left, within, super()._log_ratio(s, t))

    def inverse(self, log_snr: Tensor) -> Tensor:
        """Inverse interpolation in the table; alpha^2 = sigmoid(log_snr)."""
        table = self.table.to(log_snr.device)
        target = logsigmoid(log_snr) / 2
        right = torch.searchsorted(-table, -target.contiguous()).clamp(1, self.num_steps)
        fraction = (target - table[right - 1]) / (table[right] - table[right - 1])
        if self.betas[-1] == 1:
            fall = -torch.expm1(target - table[-2])
            fraction = torch.where(right == self.num_steps, fall, fraction)
        return (right - 1 + fraction) / self.num_steps


@dataclass(frozen=True)
class Discrete(Interpolated):
    """The DDPM chain of Ho et al. 2020 as a process: index i in 1 .. N is the time i/N.

    Its usual grids consist of the chain's times, at which a network was trained; a grid of n < N
    steps is the nearest sub-chain. `processes.interpolate` gives the SDE between the times.

    Args:
        betas: (N,) variances of the chain's kernels, each in (0, 1), the last one in (0, 1].
    """

    @classmethod
    @arguments
    def linear(
        cls, num_steps: Count = 1000, beta_min: Beta = 1e-4, beta_max: Beta = 0.02
    ) -> "Discrete":
        """beta_i evenly spaced from beta_min to beta_max (Ho et al. 2020, sec. 4)."""
        return cls(tuple(rising(num_steps, beta_min, beta_max).tolist()))

    @classmethod
    @arguments
    def scaled_linear(
        cls, num_steps: Count = 1000, beta_min: Beta = 0.00085, beta_max: Beta = 0.012
    ) -> "Discrete":
        """sqrt(beta_i) evenly spaced (Rombach et al. 2022; the table of Stable Diffusion)."""
        return cls(tuple(rising(num_steps, beta_min, beta_max, 2).tolist()))

    @classmethod
    @arguments
    def sigmoid(
        cls,
        num_steps: Count = 1000,
        beta_min: Beta = 1e-4,
        beta_max: Beta = 0.02,
        span: Positive = 6.0,
    ) -> "Discrete":
        """beta_i = beta_min + (beta_max - beta_min) / (1 + e^(-z_i)), z_i even in [-span, span].

        Xu et al. 2022 (GeoDiff); in diffusers, beta_schedule="sigmoid".
        """
        rising(num_steps, beta_min, beta_max)  # checks the order of the two
        z = torch.linspace(-span, span, num_steps, dtype=torch.float64)
        return cls(tuple((beta_min + (beta_max - beta_min) * torch.sigmoid(z)).tolist()))

    @classmethod
    @arguments
    def cosine(
        cls,
        num_steps: Count = 1000,
        s: float = 0.008,
        max_beta: Annotated[float, Number(0, 1, strict=True)] = 0.999,
    ) -> "Discrete":
        """beta_i = min(1 - abar(i/N) / abar((i-1)/N), max_beta) of `Cosine(s)`.

        Nichol & Dhariwal 2021, eq. 17; equal to clipping alpha_i to [0.001, 1].
        """
        betas = discretize(Cosine(s), num_steps, "exact").beta_table
        return cls(tuple(betas.clamp(max=max_beta).tolist()))

    @classmethod
    @arguments
    def constant(
        cls,
        num_steps: Count = 1000,
        alpha: Annotated[float, Number(0, 1, strict=True)] | None = None,
    ) -> "Discrete":
        """z_i = alpha z_(i-1) + sqrt(1 - alpha^2) eps, with the same alpha in every step.

        beta = 1 - alpha^2: alpha of TTIC 31230 is the square root of that of Ho et al. 2020.

        Args:
            num_steps: N.
            alpha: in (0, 1); by default e^(-1/N), the exact discretization of OU(1.0).
        """
        beta = -math.expm1(-2 / num_steps) if alpha is None else 1 - alpha**2
        if beta == 0:
            raise ValueError(f"alpha must lie in (0, 1) so that noise is added; got {alpha}")
        return cls((beta,) * num_steps)

    def zero_terminal_snr(self) -> "Discrete":
        """The chain rescaled so that alpha(1) = 0 exactly (Lin et al. 2024, Alg. 1).

        sqrt(abar_i) is shifted by -sqrt(abar_N) and scaled to keep sqrt(abar_1). At t = 1 Eps and
        Score do not determine x0: train V or X0.
        """
        if self.num_steps == 1:
            raise ValueError("num_steps must be at least 2 for zero terminal SNR; got 1 step")
        alpha = self.table.exp()
        scale = alpha[1] / (alpha[1] - alpha[-1])
        alpha = torch.cat([alpha[:1], (alpha[1:] - alpha[-1]) * scale])
        return Discrete(tuple((1 - (alpha[1:] / alpha[:-1]) ** 2).tolist()))

    @property
    def chain_steps(self) -> int:
        return self.num_steps

    def nearest(self, times: Tensor) -> Tensor:
        n = self.num_steps
        found = (times * n).round() / n
        if len(found.unique()) < len(times):
            most = f"{round(float(times[0]) * n)} on a chain of {n} from t={float(times[0]):g}"
            advice = "use grid=grids.Uniform() to go between its times"
            raise ValueError(f"steps must be at most {most}; got {len(times) - 1}; {advice}")
        return found

    @cached_property
    def posterior_variances(self) -> Tensor:
        """Variance of q(x_(i-1) | x_i, x_0) for i = 1 .. N: (N,) float64 (Ho et al. 2020, eq. 7).

        beta_i (1 - abar_(i-1)) / (1 - abar_i), which is 0 at i = 1.
        """
        return self.beta_table * self.noise_table[:-1] / self.noise_table[1:]

    @arguments
    def model_variances(self, variance: Variance) -> Tensor:
        """sigma_i^2 of the model's kernels p(x_(i-1) | x_i), i = 1 .. N: (N,) float64, positive.

        beta_i, or the variance of the posterior (Ho et al. 2020, sec. 3.2). The latter is 0 at
        i = 1; the value of i = 2 replaces it, as in the authors' code, so that a density exists.
        """
        if variance == "beta":
            return self.beta_table
        variances = self.posterior_variances.clone()
        variances[0] = variances[1] if self.num_steps > 1 else self.betas[0]
        return variances


def checked_betas(given: Sequence[float] | np.ndarray | Tensor) -> tuple[float, ...]:
    """Return a table of betas as Python floats, or raise a ValueError that names the fault."""
    try:
        betas = torch.as_tensor(given if isinstance(given, Tensor) else np.asarray(given)).cpu()
    except (TypeError, ValueError):
        raise ValueError(f"betas must be a 1-D sequence of floats; got {given!r:.80}") from None
    if betas.ndim != 1 or not len(betas) or not betas.is_floating_point():
        got = f"shape {tuple(betas.shape)}, {betas.dtype}"
        raise ValueError(f"betas must be a non-empty 1-D sequence of floats; got {got}")
    betas = betas.to(torch.float64)
    allowed = (betas > 0) & (betas < 1)
    allowed[-1] |= betas[-1] == 1
    if not bool(allowed.all()):
        i = int((~allowed).nonzero()[0])
        got = f"beta_{i + 1} = {betas[i]:g}"
        raise ValueError(f"betas must lie in (0, 1), the last one in (0, 1]; got {got}")
    return tuple(betas.tolist())


def rising(num_steps: int, low: float, high: float, power: int = 1) -> Tensor:
    """num_steps betas whose roots of order `power` are evenly spaced."""
    if not low <= high < 1:
        raise ValueError(f"betas must keep 0 < beta_min <= beta_max < 1; got {low} and {high}")
    ends = low ** (1 / power), high ** (1 / power)
    return torch.linspace(*ends, num_steps, dtype=torch.float64) ** power


@arguments
def discretize(
    process: Annotated[Process, IS_PROCESS],
    num_steps: Count,
    rule: Literal["euler", "exact"] = "euler",
) -> Discrete:
    r"""The DDPM chain of N steps whose limit is a variance-preserving process.

        euler:  beta_i = beta(i/N) / N,  beta = -2 f             (Song et al. 2021, App. B)
        exact:  beta_i = 1 - (alpha(i/N) / alpha((i-1)/N))^2     the process's own marginals at i/N

    Args:
        process: variance-preserving, alpha^2 + sigma^2 = 1.
        num_steps: N.
        rule: "euler" or "exact".
    Raises:
        ValueError: if the process is not variance-preserving, or a beta exceeds 1.
    """
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    log_alpha = process.log_alpha(t)
    total = torch.exp(2 * log_alpha) + process.variance(t)
    if not torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12):
        raise ValueError(f"process must be variance-preserving; got {process!r:.80}")
    if rule == "exact":
        betas = -torch.expm1(2 * log_alpha.diff())
    elif process.t_max < 1:
        drift = f"{type(process).__name__}, whose drift is defined on [0, {process.t_max}]"
        raise ValueError(f"rule must be 'exact' for {drift}; got 'euler'")
    else:
        betas = -2 * process.drift(t[1:]) / num_steps
    if bool((betas[:-1] >= 1).any()) or bool(betas[-1] > 1):
        got = f"{num_steps}, where beta = {betas.max():.3g}"
        raise ValueError(f"num_steps must be so large that beta < 1; got {got}; take more steps")
    return Discrete(tuple(betas.tolist()))


@arguments
def interpolate(discrete: Annotated[Discrete, IS_CHAIN]) -> Interpolated:
    """The SDE with piecewise constant beta(t) and the chain's marginals and transitions at i/N.

    The path is the same; its usual grids are not limited to the chain's times.
    """
    return Interpolated(discrete.betas)
