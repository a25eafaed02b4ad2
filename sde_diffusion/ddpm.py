r"""The discrete face: denoising diffusion in the letters of Ho et al. 2020.

Convention: an index i in 1 .. N, the time i/N of the `Discrete` process; x_0 is data. With
alpha_i = 1 - beta_i and abar_i = alpha_1 ... alpha_i,

    q(x_i | x_(i-1)) = N(sqrt(alpha_i) x_(i-1), beta_i)
    q(x_i | x_0) = N(sqrt(abar_i) x_0, 1 - abar_i)

Ho et al.'s alpha_i is the square of one kernel's scale, abar_i the square of the process's alpha.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import pi, sqrt
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.losses import L2, Penalty
from sde_diffusion.models import Clipped, Model, Prediction
from sde_diffusion.models.model import evaluating, finite, modules_of
from sde_diffusion.noise import Brownian, Generated, Noise
from sde_diffusion.processes import Discrete, Level
from sde_diffusion.processes.level import coordinates, per_sample
from sde_diffusion.sampling import chosen_noise, warn_of_divergence
from sde_diffusion.validate import FloatBatch

__all__ = ["DDPM", "BoundTerms", "Variance"]

Variance = Literal["beta", "posterior", "learned"]
Index = int | Tensor  # for the whole batch, or (B,) integers, in 1 .. N


class BoundTerms(NamedTuple):
    """-log p(x_0) <= L_N + ... + L_1 + L_0 (Ho et al. 2020, eq. 5), in nats per sample.

    Attributes:
        prior: L_N, (B,): the information about x_0 left in x_N.
        terms: L_(i-1) for i = 2 .. N, (B, N - 1), each with one draw of x_i.
        reconstruction: L_0, (B,), with one draw of x_1.
    """

    prior: Tensor
    terms: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """The bound, (B,)."""
        return self.prior + self.terms.sum(1) + self.reconstruction


@dataclass(frozen=True)
class DDPM:
    """A model of a `Discrete` process in the notation of Ho et al.; it shares the model's network.

    An index i is an integer for the whole batch, or (B,) integers, in 1 .. N.

    Args:
        model: a Denoiser on a Discrete process, or any other model of one.
    """

    model: Model

    def __post_init__(self) -> None:
        process = getattr(self.model, "process", None)
        if not hasattr(process, "posterior_variances"):
            got = f"{type(self.model).__name__} on {type(process).__name__}"
            raise ValueError(f"model must be on a Discrete process, as by `match`; got {got}")

    @property
    def process(self) -> Discrete:
        return self.model.process  # pyright: ignore[reportReturnType] (checked above)

    @property
    def num_steps(self) -> int:
        """N."""
        return self.process.num_steps

    @property
    def betas(self) -> Tensor:
        """beta_i for i = 1 .. N: (N,) float64, entry i - 1."""
        return self.process.beta_table

    @property
    def alphas(self) -> Tensor:
        """alpha_i = 1 - beta_i for i = 1 .. N."""
        return 1 - self.betas

    @property
    def alphas_bar(self) -> Tensor:
        """abar_i for i = 1 .. N."""
        return (2 * self.process.table[1:]).exp()

    # ---- forward -------------------------------------------------------------------------------

    @validate.arguments
    def q_sample(self, x0: FloatBatch, i: Index, eps: FloatBatch) -> Tensor:
        """x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) eps, in O(1) (Ho et al. 2020, eq. 4)."""
        same_shape("eps", eps, x0)
        return self.process.perturb(x0, self.level(i, x0), eps)

    @validate.arguments
    def q_chain(
        self,
        x0: FloatBatch,
        i: Index,
        *,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """x_i by i kernels one after the other (eq. 2): equal in law to `q_sample`, in O(i)."""
        source = chosen_noise(x0, generator, seeds, noise)
        i = self.index(i, x0)
        last, x = per_sample(i, x0), x0
        for j, beta in enumerate(self.process.betas[: int(i.max()) if len(x0) else 0], 1):
            z = source(j / self.num_steps, (j - 1) / self.num_steps, x)
            x = torch.where(j <= last, sqrt(1 - beta) * x + sqrt(beta) * z, x)
        return x

    @validate.arguments
    def q_posterior(self, x0: FloatBatch, x: FloatBatch, i: Index) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_(i-1) | x_i, x_0) (Ho et al. 2020, eq. 7).

            mean = sqrt(abar_(i-1)) beta_i / (1 - abar_i) x_0
                   + sqrt(alpha_i) (1 - abar_(i-1)) / (1 - abar_i) x_i
            variance = (1 - abar_(i-1)) / (1 - abar_i) beta_i

        Returns:
            the mean, shaped like x = x_i, and the variance, which broadcasts against it.
        """
        same_shape("x", x, x0)
        i = self.index(i, x)
        of_x0, of_x, variance = (entry(table, i, x) for table in self._posterior)
        return of_x0 * x0 + of_x * x, variance

    # ---- backward ------------------------------------------------------------------------------

    @validate.arguments
    def predict_x0(
        self, x: FloatBatch, i: Index, *, clamp: validate.Positive | None = None
    ) -> tuple[Tensor, Tensor]:
        """The model's x_0 and eps, with x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) eps.

        Args:
            clamp: clip x_0 to [-clamp, clamp]; eps is recomputed, so that both still belong to x_i.
        """
        prediction = self._predict(x, i, clamp)
        return prediction.x0, prediction.eps

    @validate.arguments
    def p_mean_variance(
        self,
        x: FloatBatch,
        i: Index,
        *,
        variance: Variance = "beta",
        clamp: validate.Positive | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(x_(i-1) | x_i): q's posterior at the model's x_0.

        variance "beta": beta_i. "posterior": that of `q_posterior`, 0 at i = 1. "learned":
        exp(v log beta_i + (1 - v) log posterior_i) with v = (extra + 1) / 2 from the second half of
        the network's output channels (Nichol & Dhariwal 2021, eq. 15); posterior_1 = 0 is replaced
        by posterior_2.

        Returns:
            the mean, shaped like x = x_i, and the variance, which broadcasts against it.
        """
        i = self.index(i, x)
        prediction = self._predict(x, i, clamp)
        mean, posterior = self.q_posterior(prediction.x0, x, i)
        if variance == "posterior":
            return mean, posterior
        return mean, self._model_variance(variance, prediction, x, i)

    @validate.arguments
    def p_sample(
        self,
        x: Annotated[FloatBatch, finite],
        i: Index,
        *,
        variance: Variance = "beta",
        clamp: validate.Positive | None = None,
        generator: torch.Generator | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """x_(i-1) from x_i; no noise is added at i = 1 (Ho et al. 2020, Algorithm 2).

        Seeds belong to whole paths: see `p_chain` and `sample`. For samples at different i, an
        injected noise is called with the interval of the largest. Networks run in eval mode.
        """
        source = chosen_noise(x, generator, None, noise)
        with evaluating(modules_of(self.model)):
            return self._drawn(x, i, variance, clamp, source)

    def _drawn(
        self, x: Tensor, i: Index, variance: Variance, clamp: float | None, source: Noise
    ) -> Tensor:
        """x_(i-1) of `p_sample`."""
        i = self.index(i, x)
        mean, of_step = self.p_mean_variance(x, i, variance=variance, clamp=clamp)
        last = float(i.max()) if i.numel() else 1.0
        z = source(last / self.num_steps, (last - 1) / self.num_steps, x)
        return torch.where(per_sample(i > 1, x), mean + of_step.sqrt() * z, mean)

    @validate.arguments
    def p_chain(
        self,
        x: Annotated[FloatBatch, finite],
        i: int,
        *,
        variance: Variance = "beta",
        clamp: validate.Positive | None = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        noise: Noise | None = None,
    ) -> Iterator[Tensor]:
        """Iterate over x_(i-1), ..., x_0 from x = x_i; networks run in eval mode.

        Warns:
            RuntimeWarning: if a sample is not finite at the end.
        """
        steps = range(validate.integer("i", i, 1, self.num_steps), 0, -1)
        times = [k / self.num_steps for k in (*steps, 0)]
        path = partial(Brownian, clock=self.process.u, times=times)
        source = chosen_noise(x, generator, seeds, noise, path)
        return self._chain(x, steps, variance, clamp, source)

    def _chain(
        self, x: Tensor, steps: range, variance: Variance, clamp: float | None, source: Noise
    ) -> Iterator[Tensor]:
        """Run the loop of `p_chain`."""
        modules = modules_of(self.model)
        for i in steps:
            with torch.no_grad(), evaluating(modules):
                x = self._drawn(x, i, variance, clamp, source)
            if i == 1:
                warn_of_divergence(x, "DDPM")
            yield x

    @validate.arguments
    def sample(
        self,
        shape: Sequence[int],
        *,
        variance: Variance = "beta",
        clamp: validate.Positive | None = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw a batch of this shape from x_N ~ N(0, I): Ho et al.'s Algorithm 2, all N steps.

        `sampling.sample` with `Ancestral` has the same law, on any sub-chain too.
        """
        x = self.process.prior(shape, generator=generator, seeds=seeds, dtype=dtype, device=device)
        path = self.p_chain(
            x, self.num_steps, variance=variance, clamp=clamp, generator=generator, seeds=seeds
        )
        return deque(path, maxlen=1).pop()  # one state at a time in memory

    # ---- losses --------------------------------------------------------------------------------

    def p_loss(
        self, x0: Tensor, i: Index, eps: Tensor, *, penalty: Penalty | None = None
    ) -> Tensor:
        """penalty(eps - eps_model(x_i, i)), the mean over a sample's coordinates: (B,).

        Args:
            penalty: L2(), the default, or L1(), that of the CMU sheet.
        """
        x = self.q_sample(x0, i, eps)
        error = self.model(x, self.level(i, x)).eps - eps
        return coordinates((penalty or L2())(error)).mean(1)

    @validate.arguments
    def negative_elbo(
        self,
        x0: Annotated[FloatBatch, finite],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """|eps - eps_model(x_i, i)|^2 at one i drawn from 1 .. N for each sample: (B,).

        The simplified bound of Ho et al. 2020, eq. 14, minimized in Algorithm 1: a sum over
        coordinates, each step with weight 1. `bound` has the weights of the bound itself.
        """
        source = Generated(generator)
        draw = source.generator
        i = torch.randint(1, self.num_steps + 1, (len(x0),), generator=draw, device=draw.device)
        eps = source(1.0, 0.0, x0)
        return self.p_loss(x0, i, eps) * x0[:1].numel()

    @validate.arguments
    def bound_term(
        self, x0: Tensor, i: Index, eps: Tensor, *, variance: Variance = "beta"
    ) -> Tensor:
        """L_(i-1) at x_i = q_sample(x0, i, eps), in nats, (B,) (Ho et al. 2020, eq. 5).

        i > 1:   KL(q(x_(i-1) | x_i, x_0) || p(x_(i-1) | x_i))
        i = 1:   -log p(x_0 | x_1), with the variance of i = 2 where it is "posterior"
        """
        x, i = self.q_sample(x0, i, eps), self.index(i, x0)
        prediction = self.model(x, self.level(i, x))
        of_p = self._model_variance(variance, prediction, x, i)
        gap, of_q = self.q_posterior(x0 - prediction.x0, torch.zeros_like(x), i)  # of the two means
        ratio, first = of_q / of_p, per_sample(i == 1, x)
        divergence = ratio - 1 - torch.where(first, 1, ratio).log()
        cost = gap**2 / of_p + torch.where(first, (2 * pi * of_p).log(), divergence)
        return coordinates(cost).sum(1) / 2

    @validate.arguments
    def prior_term(self, x0: FloatBatch) -> Tensor:
        """L_N = KL(q(x_N | x_0) || N(0, I)), in nats, (B,)."""
        abar = entry(self.alphas_bar, self.index(self.num_steps, x0), x0)
        return coordinates(abar * (x0**2 - 1) - torch.log1p(-abar)).sum(1) / 2

    @torch.no_grad()
    @validate.arguments
    def bound(
        self,
        x0: Annotated[FloatBatch, finite],
        *,
        variance: Variance = "beta",
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        noise: Noise | None = None,
    ) -> BoundTerms:
        """All terms of the variational bound, by N calls of the model: see `BoundTerms`.

        Networks run in eval mode.
        """
        source, n = chosen_noise(x0, generator, seeds, noise), self.num_steps
        term = partial(self.bound_term, x0, variance=variance)
        with evaluating(modules_of(self.model)):
            first, *terms = (term(i, source(i / n, 0.0, x0)) for i in range(1, n + 1))
        return BoundTerms(self.prior_term(x0), torch.stack([first, *terms], dim=1)[:, 1:], first)

    # ---- indices -------------------------------------------------------------------------------

    def index(self, i: Index, like: Tensor) -> Tensor:
        """Return i as a tensor of integers in 1 .. N, () or (B,)."""
        if not isinstance(i, Tensor):
            return torch.tensor(validate.integer("i", i, 1, self.num_steps))
        if i.is_floating_point() or i.is_complex() or i.dtype == torch.bool:
            raise TypeError(f"i must hold integers; got {i.dtype}")
        if i.ndim > 1 or (i.ndim == 1 and len(i) != len(like)):
            raise ValueError(f"i must have shape () or ({len(like)},); got {tuple(i.shape)}")
        i = i.detach().cpu().long()
        outside = (i < 1) | (i > self.num_steps)
        if bool(outside.any()):
            raise ValueError(f"i must lie in 1 .. {self.num_steps}; got {i[outside][0]}")
        return i

    def level(self, i: Index, like: Tensor) -> Level:
        """The level of index i for a batch shaped like `like`."""
        i = self.index(i, like)
        if i.ndim:
            return self.process.level(i.double() / self.num_steps, like)
        return self._levels[int(i) - 1]

    @cached_property
    def _levels(self) -> list[Level[float]]:
        """The levels of i = 1 .. N."""
        times = torch.arange(1, self.num_steps + 1, dtype=torch.float64) / self.num_steps
        return self.process.levels(times)

    @cached_property
    def _posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ho et al. 2020, eq. 7, for i = 1 .. N: coefficients of x_0 and x_i, and the variance."""
        root, noise = self.process.table.exp(), self.process.noise_table  # sqrt(abar), 1 - abar
        of_x0 = root[:-1] * self.betas / noise[1:]
        of_x = self.alphas.sqrt() * noise[:-1] / noise[1:]
        return of_x0, of_x, self.process.posterior_variances

    def _predict(self, x: Tensor, i: Index, clamp: float | None) -> Prediction:
        model = self.model if clamp is None else Clipped(self.model, -clamp, clamp)
        return model(x, self.level(i, x))

    def _model_variance(
        self, variance: Variance, prediction: Prediction, x: Tensor, i: Tensor
    ) -> Tensor:
        if variance != "learned":
            return entry(self.process.model_variances(variance), i, x)
        if prediction.extra is None:
            raise ValueError("variance 'learned' needs a network with twice the channels of x")
        low = entry(self.process.model_variances("posterior").log(), i, x)
        high = entry(self.betas.log(), i, x)
        return torch.lerp(low, high, (prediction.extra + 1) / 2).exp()


def entry(table: Tensor, i: Tensor, like: Tensor) -> Tensor:
    """table[i - 1] for a table over 1 .. N, broadcast against `like` and in its dtype."""
    return per_sample(table[i - 1], like).to(like.dtype)


def same_shape(name: str, given: Tensor, like: Tensor) -> None:
    """Refuse a batch of another shape than x0."""
    own, shape = tuple(like.shape), tuple(given.shape)
    if shape != own:
        raise ValueError(f"{name} must be shaped like x0, {own}; got {shape}")
