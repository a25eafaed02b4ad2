"""Distances of chains from a process, and the rate in N at which they shrink."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from sde_diffusion import validate
from sde_diffusion.models.exact import Gaussian
from sde_diffusion.processes import Process
from sde_diffusion.samplers import Ancestral
from sde_diffusion.verify import probe, report
from sde_diffusion.verify.ladders import slope
from sde_diffusion.verify.laws import Law, law, measured

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True, repr=False)
class Agreement(report.Report):
    """Distances of chains from a process; 0 up to rounding where they agree.

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
        many, found = len(self.sizes) > 1, {name: getattr(self, name) for name in FLOORS}
        return {
            name: -slope(self.sizes, found[name]) if many and min(found[name]) >= floor else None
            for name, floor in FLOORS.items()
        }

    def page(self) -> report.Page:
        rows = zip(self.sizes, *(getattr(self, name) for name in FLOORS), strict=True)
        return report.Page(
            "distances of two processes on the grids i / N",
            "anything of other data, or of times between those of the grids",
            report.Table({"N": "d", **dict.fromkeys(FLOORS, ".2e")}, rows),
        )

    @property
    def verdict(self) -> str:
        rates = [f"{name} {'-' if p is None else f'{p:.3f}'}" for name, p in self.rates.items()]
        return f"p of distance ~ N^-p: {', '.join(rates)} (- for rounding, or a single N)"


# Rounding of each quantity; W2 is the root of a difference of variances.
FLOORS = {"marginals": 1e-12, "transitions": 1e-12, "losses": 1e-12, "laws": 1e-7}


@validate.arguments
def agreement(
    a: probe.AProcess,
    b: Annotated[
        Process | Callable[[int], Process],
        probe.OrMaker("a Process or a function of N", "log_alpha", "variance"),
    ],
    *,
    sizes: Sequence[int] = (1024, 2048, 4096),
    mean: Annotated[float, validate.Number()] = 1.0,
    variance: validate.Positive = 0.25,
    sampler: probe.ASampler | None = None,
) -> Agreement:
    """Distances of b from a on the grids i/N, and the rate at which they shrink.

    Laws and losses belong to data N(mean, variance) and its exact model, in closed form: no random
    numbers are drawn.

    Args:
        a: the process.
        b: another; or a family of them, N -> process, such as `partial(discretize, VP())`.
        sizes: the N; a single Discrete, a or b, has its own.
        mean, variance: of the data.
        sampler: its law on b is compared with that of the reverse SDE on a; Ancestral("beta").
    """
    sampler = sampler or Ancestral("beta")
    family: Any = (lambda n: b) if hasattr(b, "log_alpha") else b
    own = getattr(b, "num_steps", None) or getattr(a, "num_steps", None)
    sizes = validate.shape("sizes", [own] if own else sizes)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must hold different positive integers; got {sizes}")

    def distances(n: int, law_of: Callable[..., Law]) -> tuple[float, float, float, float]:
        b = validate.kind("b(N)", family(n), "a Process", "log_alpha", "variance")
        steps = getattr(b, "num_steps", n)
        if steps != n:
            raise ValueError(f"b(N) must be a chain of N steps; got {steps} for N = {n}")
        t = torch.arange(n + 1, dtype=torch.float64) / n
        marginals = [(a.alpha(t) - b.alpha(t)).abs().max(), (a.sigma(t) - b.sigma(t)).abs().max()]
        (scale_a, std_a), (scale_b, std_b) = (p.transition(t[:-1], t[1:]) for p in (a, b))
        transitions = [(scale_a - scale_b).abs().max(), (std_a**2 - std_b**2).abs().max()]
        data_a = Gaussian(a, torch.tensor([mean], dtype=torch.float64), variance)
        data_b = data_a.on(b)
        losses = [
            abs(data_a.eps_loss(level_a) - data_b.eps_loss(level_b))
            for level_a, level_b in zip(a.levels(t[1:]), b.levels(t[1:]), strict=True)
        ]
        w2 = law_of(sampler, data_b, times=t.flip(0), shape=(1,)).w2(*data_a.reverse_sde())
        return float(max(marginals)), float(max(transitions)), max(losses), w2

    # The sampler is checked once, at the smallest N.
    rows = [distances(n, law if n == min(sizes) else measured) for n in sizes]
    return Agreement(sizes, *zip(*rows, strict=True))
