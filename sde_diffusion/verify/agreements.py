"""How far chains are from a process, and the rate at which they come nearer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sde_diffusion import validate
from sde_diffusion.models.exact import Gaussian
from sde_diffusion.processes import Process
from sde_diffusion.samplers import Ancestral
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.verify.laws import Law, law, measured

__all__ = ["Agreement", "agreement"]


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
    validate.kind("a", a, "a Process", "log_alpha", "variance")
    validate.number("variance", variance, 0, strict=True)
    validate.number("mean", mean)
    sampler = sampler or Ancestral("beta")
    validate.kind("sampler", sampler, "a Sampler", "grid", "step")
    family: Any = (lambda n: b) if hasattr(b, "log_alpha") else b
    validate.kind("b", family, "a Process or a function of N", "__call__")
    own = getattr(b, "num_steps", None) or getattr(a, "num_steps", None)
    sizes = validate.shape("sizes", [own] if own else sizes)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must hold different positive integers; got {sizes}")
    rows = [
        distances(
            a, family(n), n, mean, variance, sampler,
            law if n == min(sizes) else measured,  # one check of the sampler will do
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
    law_of: Callable[..., Law],
) -> tuple[float, float, float, float]:
    """The four distances of `Agreement` for one N."""
    validate.kind("b(N)", b, "a Process", "log_alpha", "variance")
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
    found = law_of(sampler, data_b, times=t.flip(0), shape=(1,))
    w2 = found.w2(*data_a.reverse_sde())
    return float(max(marginals)), float(max(transitions)), max(losses), w2
