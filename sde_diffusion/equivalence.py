r"""Discrete and continuous as one: chains of an SDE, SDEs through a chain, models moved between.

What a model knows at a noise-to-signal ratio sigma / alpha does not depend on the process that
led there: x / (alpha + sigma) has one law, and x0 and eps are the same. So a network trained on one
process serves any other, by a change of time (log-SNR) and a rescaling of x.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import errors, frames, verify
from sde_diffusion.denoiser import Index, Model
from sde_diffusion.exact import Gaussian
from sde_diffusion.prediction import Eps, Parameterization, Prediction, Row, read
from sde_diffusion.processes import (
    Discrete,
    Interpolated,
    Level,
    Process,
    double,
    kernel_variances,
)
from sde_diffusion.samplers import Ancestral
from sde_diffusion.sampling import Sampler

__all__ = [
    "Adopted",
    "Agreement",
    "Matched",
    "adopt",
    "agreement",
    "continuous",
    "discretize",
    "match",
]


def discretize(
    process: Process, num_steps: int, rule: Literal["euler", "exact"] = "euler"
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
    errors.kind("process", process, "a Process", "log_alpha", "variance")
    errors.integer("num_steps", num_steps)
    errors.choice("rule", rule, ("euler", "exact"))
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    log_alpha = process.log_alpha(t)
    total = torch.exp(2 * log_alpha) + process.variance(t)
    if not torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12):
        raise ValueError(
            f"{type(process).__name__} is not variance-preserving, so no DDPM chain tends to it"
        )
    if rule == "euler" and process.t_max < 1:
        raise ValueError(
            f"rule 'euler' reads the drift up to t = 1, and {type(process).__name__} promises it "
            f"on [0, {process.t_max}]: take rule='exact'"
        )
    if rule == "euler":
        betas = -2 * process.drift(t[1:]) / num_steps
    else:
        betas = kernel_variances(log_alpha)
    if bool((betas[:-1] >= 1).any()) or bool(betas[-1] > 1):
        raise ValueError(
            f"rule {rule!r} gives beta = {betas.max():.3g} >= 1 with num_steps={num_steps}; "
            f"take more steps"
        )
    return Discrete(tuple(betas.tolist()))


def continuous(discrete: Discrete) -> Interpolated:
    """The SDE with piecewise constant beta(t) and the chain's marginals and transitions at i/N.

    It is the same path, but its own grids go anywhere between the chain's times.
    """
    return Interpolated(errors.kind("discrete", discrete, "a Discrete process", "betas").betas)


# ---- models from elsewhere ---------------------------------------------------------------------


def adopt(
    network: Callable[[Tensor, Tensor], Any],
    process: Discrete,
    parameterization: Parameterization | None = None,
    counts_from: int = 0,
) -> "Adopted":
    """The model of a network that was trained on a chain elsewhere.

    Args:
        network: called as network(x, step), step (B,). It answers with a tensor, or with a tuple
            or a record that has it first or as `sample`, as diffusers' `UNet2DModel` does.
        process: the chain it was trained on, such as `Discrete(scheduler.betas)`.
        parameterization: the meaning of its output, Eps() by default.
        counts_from: its name of the first step: 0 for steps 0 .. N - 1, our index less 1, as most
            libraries count; 1 for 1 .. N.
    """
    errors.kind("network", network, "a function network(x, step)", "__call__")
    errors.kind("process", process, "a Discrete process", "betas")
    errors.integer("counts_from", counts_from, 0, 1)
    return Adopted(network, process, parameterization or Eps(), counts_from)


@dataclass(frozen=True)
class Adopted:
    """See `adopt`. A step is fed as an integer at the chain's times, as a real number between."""

    network: Callable[[Tensor, Tensor], Any]
    process: Discrete
    parameterization: Parameterization
    counts_from: int

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        step = double(Index(self.process.num_steps, self.counts_from)(level))
        near = 1e-6 if isinstance(level.t, float) else 1e-3  # float32 times have fewer digits
        if bool((step < self.counts_from - near).any()):
            raise ValueError(
                f"the network was trained from t = 1/N = {1 / self.process.num_steps:g} on; got "
                f"t={float(double(level.t).min()):g}: let the grid go from there to 0, as the "
                f"chain's own do"
            )
        whole = step.round().long()
        step = whole if bool(((step - whole).abs() <= near).all()) else step.to(torch.float32)
        out = self.network(x, step.reshape(-1).expand(len(x)).to(x.device))
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        return read(x, out, level, self.parameterization)

    def rows(self, index: Tensor) -> "Adopted":
        return self


def match(model: Model, process: Process) -> "Matched":
    r"""The same model on another process, by log-SNR time change and rescaling.

    At a level of `process` the model is asked at its own level of equal log-SNR about

        x (alpha' + sigma') / (alpha + sigma),        the primed ones its own,

    and its x0 and eps are the answer. Where `process` starts noisier than the model was trained,
    the result's process is `process.until(...)` there: sampling starts at the largest common noise.

    Args:
        model: a Denoiser, an `Adopted` network, an exact model, ...
        process: where it is to go.
    Raises:
        ValueError: from the result, at levels less noisy than the model was trained on, which a
            chain's model is from i = 1 on; `Matched.times` gives grids that keep to it.
    """
    errors.kind("model", model, "a model, such as a Denoiser", "process", "__call__")
    errors.kind("process", process, "a Process", "log_alpha", "variance")
    most = model.process.log_snr(1.0)
    if not bool(process.log_snr(1.0) < most - 1e-9 * (1 + most.abs())):
        return Matched(model, process)
    end = process.time(most)
    (own,), (to,) = model.process.levels(torch.ones(1)), process.levels(end.reshape(1))
    std = model.process.prior_std * (to.alpha + to.sigma) / (own.alpha + own.sigma)
    return Matched(model, process.until(end.item(), std))


@dataclass(frozen=True)
class Matched:
    """See `match`."""

    model: Model
    process: Process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        own = self._own_level(x, level)
        prediction = self.model(frames.leave(frames.enter(x, level), own), own)
        meaning = Elsewhere(prediction.meaning, own)
        return Prediction(prediction.first, prediction.second, level, meaning, prediction.extra)

    def rows(self, index: Tensor) -> "Matched":
        return Matched(self.model.rows(index), self.process)

    def times(self, steps: int, start: float = 1.0) -> Tensor:
        """The model's own grid of n steps, carried over, from `start` (1, or t_max) on.

        For a chain's model all times between the start and 0 are the chain's. There are fewer than
        n + 1 if this process starts less noisy than the model's.
        """
        log_snr = self.model.process.log_snr(self.model.process.times(steps))
        times = self.process.time(log_snr[log_snr > self.process.log_snr(start) + 1e-6])
        return torch.cat([torch.tensor([start], dtype=torch.float64), times])

    def _own_level(self, x: Tensor, level: Level) -> Level:
        """The level of the model's process at the same log-SNR, if the model was trained there."""
        own, slack = self.model.process, 1e-9
        log_snr = double(level.log_snr)
        if isinstance(level.log_snr, Tensor):
            slack = 8 * torch.finfo(level.log_snr.dtype).eps
        low, high = own.log_snr(1.0).item(), own.log_snr(own.first_time).item()
        outside = (log_snr < low - slack * (1 + abs(low))) | (
            log_snr > high + slack * (1 + abs(high))
        )
        if log_snr.device.type == "cpu" and bool(outside.any()):
            raise ValueError(
                f"the model was trained at log_snr from {low:.4g} to {high:.4g}, t = 1 to "
                f"{own.first_time:g} of its {type(own).__name__}; got "
                f"{log_snr[outside].flatten()[0]:.4g}: let a grid of steps keep between them and "
                f"then go to 0, as that of times(steps) does, and a solver with steps of its own "
                f"end at t = {self.process.time(high).item():.4g}"
            )
        t = own.time(log_snr).clamp(min=own.first_time)
        if isinstance(level.log_snr, Tensor):
            return own.level(t.flatten() if t.numel() == len(x) else t.reshape(()), x)
        return own.levels(t.reshape(1))[0]


@dataclass(frozen=True)
class Elsewhere(Parameterization):
    """A meaning at the level where its network was asked, which is not that of the prediction."""

    meaning: Parameterization
    level: Level

    def x0(self, level: Level) -> Row:
        return self.meaning.x0(self.level)

    def eps(self, level: Level) -> Row:
        return self.meaning.eps(self.level)

    def target(self, prediction: Prediction) -> Tensor:
        raise TypeError("a matched model is trained on its own process: train that")


# ---- how far apart -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far chains are from a process; print it. Distances are 0 up to rounding where they agree.

    Attributes:
        sizes: N of each chain.
        marginals: largest |difference| of alpha and sigma over the chain's times.
        transitions: largest |difference| of the kernels' scales and variances from i-1 to i.
        losses: largest |difference| of the least eps-loss that a model of the data can have.
        laws: W2 between the sampler's exact output law on the chain and that of the reverse SDE,
            which is the sampler's own error where the processes agree.
    """

    sizes: tuple[int, ...]
    marginals: tuple[float, ...]
    transitions: tuple[float, ...]
    losses: tuple[float, ...]
    laws: tuple[float, ...]

    @property
    def rates(self) -> dict[str, float | None]:
        """Fitted p of distance ~ N^-p; None where it is rounding, or there is one size only."""
        return {name: self._rate(getattr(self, name), floor) for name, floor in FLOORS.items()}

    def _rate(self, distances: Sequence[float], floor: float) -> float | None:
        if len(self.sizes) < 2 or min(distances) < floor:
            return None
        return -float(np.polyfit(np.log(self.sizes), np.log(distances), 1)[0])

    def __str__(self) -> str:
        rows = [f"{'N':>6}" + "".join(f"{name:>14}" for name in FLOORS)]
        for k, size in enumerate(self.sizes):
            rows.append(f"{size:6d}" + "".join(f"{getattr(self, q)[k]:14.2e}" for q in FLOORS))
        cells = ["-" if rate is None else f"{rate:.3f}" for rate in self.rates.values()]
        return "\n".join([*rows, f"{'rate':>6}" + "".join(f"{cell:>14}" for cell in cells)])


# Rounding of each quantity; W2 is the root of a difference of variances.
FLOORS = {"marginals": 1e-12, "transitions": 1e-12, "losses": 1e-12, "laws": 1e-7}


def agreement(
    a: Process,
    b: Process | Callable[[int], Process],
    *,
    sizes: Sequence[int] = (1024, 2048, 4096),
    mean: float = 1.0,
    variance: float = 0.25,
    sampler: Sampler | None = None,
) -> Agreement:
    """How far b is from a on the grids i/N, and the rate at which it comes nearer.

    Laws and losses are those of data N(mean, variance) and its exact model, computed and not
    estimated: no random numbers.

    Args:
        a: the process.
        b: another; or a family of them, N -> process, such as `partial(discretize, VP())`.
        sizes: the N; a single Discrete, a or b, has its own.
        mean, variance: of the data.
        sampler: whose law on b is compared with the reverse SDE's on a; Ancestral("beta").
    """
    errors.kind("a", a, "a Process", "log_alpha", "variance")
    errors.number("variance", variance, 0, strict=True)
    errors.number("mean", mean)
    sampler = sampler or Ancestral("beta")
    errors.kind("sampler", sampler, "a Sampler", "grid", "step")
    family: Any = (lambda n: b) if hasattr(b, "log_alpha") else b
    errors.kind("b", family, "a Process or a function of N", "__call__")
    own = getattr(b, "num_steps", None) or getattr(a, "num_steps", None)
    sizes = errors.shape("sizes", [own] if own else sizes)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must hold different positive integers; got {sizes}")
    rows = [
        distances(
            a, family(n), n, mean, variance, sampler,
            verify.law if n == min(sizes) else verify.measured,  # one check of the sampler will do
        )
        for n in sizes
    ]  # fmt: skip
    return Agreement(tuple(sizes), *zip(*rows, strict=True))


def distances(
    a: Process,
    b: Process,
    n: int,
    mean: float,
    variance: float,
    sampler: Sampler,
    law_of: Callable[..., verify.Law],
) -> tuple[float, float, float, float]:
    """The four distances of `Agreement` for one N."""
    errors.kind("b(N)", b, "a Process", "log_alpha", "variance")
    steps = getattr(b, "num_steps", n)
    if steps != n:
        raise ValueError(f"b(N) must be a chain of N steps; got {steps} for N = {n}")
    t = torch.arange(n + 1, dtype=torch.float64) / n
    marginals = [(a.alpha(t) - b.alpha(t)).abs().max(), (a.sigma(t) - b.sigma(t)).abs().max()]
    (scale_a, std_a), (scale_b, std_b) = (p.transition(t[:-1], t[1:]) for p in (a, b))
    transitions = [(scale_a - scale_b).abs().max(), (std_a**2 - std_b**2).abs().max()]
    center = torch.tensor([mean], dtype=torch.float64)
    data_a, data_b = (Gaussian(p, center, variance) for p in (a, b))
    losses = [
        abs(data_a.eps_loss(level_a) - data_b.eps_loss(level_b))
        for level_a, level_b in zip(a.levels(t[1:]), b.levels(t[1:]), strict=True)
    ]
    law = law_of(sampler, data_b, times=t.flip(0), shape=(1,))
    w2 = law.w2(*data_a.reverse_sde())
    return float(max(marginals)), float(max(transitions)), max(losses), w2
