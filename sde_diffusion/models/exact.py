r"""Exact models in closed form: the reference for networks and samplers.

If x0 is a mixture of N(m_k, S_k), then x_t is a mixture of N(alpha m_k, alpha^2 S_k + sigma^2 I),
and the posterior means of x0 and eps have a closed form. Data of any shape are flattened to d
coordinates.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.model import LogSNRRange, finite, level_of
from sde_diffusion.models.prediction import Prediction, truth
from sde_diffusion.noise.sources import Generated
from sde_diffusion.processes import Level, Process
from sde_diffusion.processes.level import onto, per_sample, posterior_variance, wide
from sde_diffusion.processes.process import IS_PROCESS

__all__ = ["Gaussian", "GaussianMixture"]


class GaussianMixture:
    r"""The exact model of data drawn from  sum_k w_k N(m_k, S_k).

    Args:
        process: the process that noises the data.
        weights: (K,), positive; normalized to sum to 1.
        means: (K, *shape). With shape () the coordinates of x are independent draws.
        covariances: (K,) isotropic, (K, d) diagonal or (K, d, d) full; positive definite.
    """

    trained: LogSNRRange | None = None

    def __init__(
        self,
        process: Process,
        weights: Tensor | Sequence[float],
        means: Tensor | Sequence[float],
        covariances: Tensor | Sequence[float],
    ) -> None:
        IS_PROCESS("process", process)
        weights = finite("weights", torch.as_tensor(weights, dtype=torch.float64))
        means = finite("means", torch.as_tensor(means, dtype=torch.float64))
        covariances = finite("covariances", torch.as_tensor(covariances, dtype=torch.float64))
        if weights.ndim != 1 or not 0 < len(weights) == len(means) == len(covariances):
            got = [tuple(value.shape) for value in (weights, means, covariances)]
            wanted = "agree in their first dimension, at least 1"
            raise ValueError(f"weights, means and covariances must {wanted}; got shapes {got}")
        if not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive; got {weights.tolist()}")
        if covariances.ndim == 3 and not torch.allclose(covariances, covariances.mT):
            raise ValueError("covariances must be symmetric; got one that is not")
        self.process = process
        self.shape = means.shape[1:]
        self.log_weights = (weights / weights.sum()).log()
        self.means = means.reshape(len(means), -1)  # (K, d)
        self.axes: Tensor | None = None  # (K, d, d), eigenvectors in columns
        if covariances.ndim == 3:
            self.variances, self.axes = torch.linalg.eigh(covariances)
        else:
            self.variances = covariances.reshape(len(means), -1)  # (K, d) or (K, 1)
        if self.variances.shape[1] not in (1, self.means.shape[1]):
            got = tuple(covariances.shape)
            raise ValueError(f"covariances must fit means {tuple(means.shape)}; got shape {got}")
        if not bool((self.variances > 0).all()):
            least = float(self.variances.min())
            raise ValueError(f"covariances must be positive definite; got eigenvalue {least:g}")

    def __call__(self, x: Tensor, level: Level | float) -> Prediction:
        """E[x0 | x] and E[eps | x] at a level, or at a time in [0, 1]; x (B, *shape)."""
        validate.batch("x", x)
        given, x = x, wide(x)
        level = level_of(self.process, level, x)
        z, variances = self._standardize(x, level)
        weight = self._log_joint(z, variances).softmax(1)[:, :, None]
        pull = z / variances  # minus the score of each component, in its own axes
        noise = per_sample(level.sigma, z) * pull
        signal = per_sample(level.alpha, z) * onto(self.variances, x) * pull
        eps = (weight * self._from_axes(noise)).sum(1)
        x0 = (weight * (onto(self.means, x) + self._from_axes(signal))).sum(1)
        x0, eps = (value.reshape(x.shape).to(given.dtype) for value in (x0, eps))
        return truth(x0, eps, level)

    def on(self, process: Process) -> Self:
        """Return the model of this data on another process."""
        return self._with(process=process)

    def ranged(self, trained: LogSNRRange) -> Self:
        """Return a copy with this trained range, for tests of partly trained models."""
        return self._with(trained=trained)

    def _with(self, **changes: Any) -> Self:
        """Return a copy with other attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    @property
    def covariances(self) -> Tensor:
        """S_k, (K, d, d)."""
        axes = self._all_axes()
        return axes * self.variances.expand(self.means.shape)[:, None, :] @ axes.mT

    def given(
        self, matrix: Tensor, y: Tensor, noise_std: float, onto: Tensor | None = None
    ) -> "GaussianMixture":
        r"""The posterior of x0 given  y = A x0 + noise_std eps,  a mixture (Bishop 2006, 2.116).

        With S_y = A S A^T + noise_std^2 I and K = S A^T S_y^-1, each component becomes
        N(m + K (y - A m), (I - K A) S), its weight times N(y; A m, S_y).

        Args:
            matrix: A, (m, d), on the flat coordinates of a sample.
            y: (m,).
            noise_std: above 0; may be 0 if `onto` is given and the rows of A are independent.
            onto: (d, k); the result is then the posterior of onto^T x0, of shape (k,). The
                posterior of a measurement without noise has a density only in directions
                orthogonal to the rows of A.
        """
        validate.number("noise_std", noise_std, 0, strict=onto is None)
        matrix, y = finite("matrix", matrix).double(), finite("y", y).double()
        d, shapes = self.means.shape[1], (tuple(matrix.shape), tuple(y.shape))
        if y.ndim != 1 or not len(y) or matrix.shape != (len(y), d):
            raise ValueError(f"matrix must be (m, {d}) and y (m,), m >= 1; got {shapes}")
        covariances = self.covariances
        of_y = matrix @ covariances @ matrix.T
        of_y.diagonal(dim1=1, dim2=2).add_(noise_std**2)
        if noise_std == 0 and torch.linalg.matrix_rank(matrix) < len(matrix):
            rule = "have independent rows for noise_std=0"
            raise ValueError(f"matrix must {rule}; got dependent ones")
        root = torch.linalg.cholesky(of_y)
        gain = torch.cholesky_solve(matrix @ covariances, root).mT  # (K, d, m)
        off = y - self.means @ matrix.T
        means = self.means + torch.einsum("kdm,km->kd", gain, off)
        # (I - K A) S (I - K A)^T + noise^2 K K^T: symmetric and positive to rounding.
        rest = torch.eye(d, dtype=torch.float64) - gain @ matrix
        covariances = rest @ covariances @ rest.mT + noise_std**2 * gain @ gain.mT
        z = torch.linalg.solve_triangular(root, off[:, :, None], upper=False)[..., 0]
        half_log_det = root.diagonal(dim1=1, dim2=2).log().sum(1)
        weights = (self.log_weights - z.square().sum(1) / 2 - half_log_det).softmax(0)
        shape = self.shape
        if onto is not None:
            onto = onto.double()
            means, covariances = means @ onto, onto.T @ covariances @ onto
            shape = means.shape[1:]
        kept = weights > 0  # components whose weight underflows are dropped
        means, covariances = means[kept].reshape(-1, *shape), covariances[kept]
        symmetric = (covariances + covariances.mT) / 2
        return GaussianMixture(self.process, weights[kept], means, symmetric)

    def log_prob(self, x: Tensor, t: float = 0.0) -> Tensor:
        """log p_t(x) in nats, (B,), at least float32; x (B, *shape)."""
        validate.batch("x", x)
        x = wide(x)
        level = level_of(self.process, t, x)
        return self._log_joint(*self._standardize(x, level)).logsumexp(1)

    def sample(
        self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Draw n samples of x0, (n, *shape)."""
        generator = Generated(generator).generator
        k = self.log_weights.exp().multinomial(n, replacement=True, generator=generator)
        eps = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        eps = eps * self.variances[k].sqrt()
        if self.axes is not None:
            eps = torch.einsum("bij,bj->bi", self.axes[k], eps)
        return (self.means[k] + eps).reshape(n, *self.shape).to(dtype)

    def _standardize(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """x - alpha m_k in the axes of component k, (B, K, d), and its variances there."""
        z = self._flat(x)
        alpha, sigma = per_sample(level.alpha, z), per_sample(level.sigma, z)
        z = z - alpha * onto(self.means, x)
        if self.axes is not None:
            z = torch.einsum("bki,kij->bkj", z, onto(self.axes, x))
        return z, (alpha**2 * onto(self.variances, x) + sigma**2).expand_as(z)

    def _flat(self, x: Tensor) -> Tensor:
        """Return a batch of samples of the data's shape as (B, 1, d)."""
        validate.batch("x", x)
        wanted, got = tuple(self.shape), tuple(x.shape[1:])
        if wanted and got != wanted:
            raise ValueError(f"x must have samples of shape {wanted}; got {got}")
        return x.reshape(len(x), 1, x.shape[1:].numel())

    def _from_axes(self, z: Tensor) -> Tensor:
        """z (B, K, d), from the axes of each component back to the coordinates of x."""
        return z if self.axes is None else torch.einsum("bkj,kij->bki", z, onto(self.axes, z))

    def _all_axes(self) -> Tensor:
        """The axes of each component, (K, d, d)."""
        k, d = self.means.shape
        return torch.eye(d).double().expand(k, d, d) if self.axes is None else self.axes

    def _log_joint(self, z: Tensor, variances: Tensor) -> Tensor:
        """log(w_k N(x; component k)), (B, K)."""
        log_density = -(z**2 / variances + variances.log() + math.log(2 * math.pi)).sum(2) / 2
        return onto(self.log_weights, z) + log_density


class Gaussian(GaussianMixture):
    r"""The exact model of data drawn from N(m, S). Its sampling steps and its flow are affine.

    Args:
        process: the process that noises the data.
        mean: (*shape,); with shape () the coordinates of x are independent draws from N(m, S).
        covariance: () isotropic, (d,) diagonal or (d, d) full; positive definite.
    """

    def __init__(
        self, process: Process, mean: Tensor | float = 0.0, covariance: Tensor | float = 1.0
    ) -> None:
        mean, covariance = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, covariance))
        super().__init__(process, [1.0], mean[None], covariance[None])

    @property
    def mean(self) -> Tensor:
        """m, (d,)."""
        return self.means[0]

    @property
    def covariance(self) -> Tensor:
        """S, (d, d)."""
        return self.covariances[0]

    def marginal(self, level: Level[float]) -> Self:
        """The distribution of x_t at a level, N(alpha m, alpha^2 S + sigma^2 I)."""
        variances = level.alpha**2 * self.variances + level.sigma**2
        return self._with(means=level.alpha * self.means, variances=variances)

    def eps_loss(self, level: Level[float]) -> float:
        """E |eps - E[eps | x]|^2 per coordinate: the minimum of the eps-loss over all models."""
        noised = self.marginal(level).variances[0]
        return float((level.alpha**2 * self.variances[0] / noised).mean())

    def posterior_root(self, v: Tensor, level: Level) -> Tensor:
        """Return L v with L L = Cov[x0 | x] = sigma^2 S (alpha^2 S + sigma^2 I)^-1; v (B, ...)."""
        z = self._flat(v)
        z = z if self.axes is None else torch.einsum("bki,kij->bkj", z, self.axes.to(z))
        alpha, sigma = per_sample(level.alpha, z), per_sample(level.sigma, z)
        z = posterior_variance(self.variances.to(z), alpha, sigma) ** 0.5 * z
        return self._from_axes(z).reshape(v.shape)

    def reverse_sde(self, t: float = 1.0) -> tuple[Tensor, Tensor]:
        r"""Mean (d,) and covariance (d, d) at t = 0 of the reverse SDE started from the prior at t.

        The SDE maps x_t to a draw of x_0 given x_t, so with K = alpha S (alpha^2 S + sigma^2)^-1

            mean = m - K alpha m,   covariance = (1 - K alpha) S + prior_std^2 K^2
        """
        level = self.process.levels(torch.tensor([t], dtype=torch.float64))[0]
        variances = self.variances[0].expand(self.means.shape[1])
        gain = level.alpha * variances / self.marginal(level).variances[0]
        spread = (1 - gain * level.alpha) * variances + (self.process.prior_std * gain) ** 2
        axes = self._all_axes()[0]
        mean = self.mean - axes * (gain * level.alpha) @ axes.T @ self.mean
        return mean, axes * spread @ axes.T

    def flow(self, x: Tensor, t: float, s: float) -> Tensor:
        r"""The exact probability-flow map from time t to time s, in either direction.

        x_s = alpha_s m + (C_s / C_t)^(1/2) (x - alpha_t m),    C = alpha^2 S + sigma^2 I

        Args:
            x: (B, *shape).
        """
        validate.batch("x", x)
        given, x = x, wide(x)
        start, end = self.process.levels(torch.tensor([t, s], dtype=torch.float64))
        z, before = self._standardize(x, start)
        after = end.alpha**2 * onto(self.variances, x) + end.sigma**2
        z = self._from_axes((after / before).sqrt() * z)
        return (end.alpha * onto(self.means, x) + z[:, 0]).reshape(x.shape).to(given.dtype)
