"""Comparisons: of two samplers, at every network call; of chains with a process, as N grows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.exact import Gaussian
from sde_diffusion.processes import Process
from sde_diffusion.samplers import Ancestral, Sampler
from sde_diffusion.verify import convergence, probe, report
from sde_diffusion.verify.laws import Law, law, measured

__all__ = ["Agreement", "Identities", "agreement", "identities"]


@dataclass(frozen=True, repr=False)
class Identities(report.Report):
    """Differences between two samplers at each network call and at the end.

    Attributes:
        first, second: their names.
        times: of the compared states.
        differences: largest |difference| at each, relative to 1 + the largest |state|.
        calls: numbers of network calls of both.
        tolerance: differences up to this are rounding.
    """

    first: str
    second: str
    times: tuple[float, ...]
    differences: tuple[float, ...]
    calls: tuple[int, int]
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.calls[0] == self.calls[1] and all(d <= self.tolerance for d in self.differences)

    @property
    def verdict(self) -> str:
        first, second = self.calls
        worst = f"{max(self.differences):.1e}"
        if first != second:
            return f"NOT THE SAME SCHEME: {first} calls and {second}; the ends differ by {worst}"
        if self.holds:
            return f"equal to {worst} at all {first} calls and at the end"
        index = next(i for i, d in enumerate(self.differences) if not d <= self.tolerance)
        where = f"call {index + 1} of {first}" if index < first else "the end"
        t, by = self.times[index], self.differences[index]
        return f"DIFFERENT from {where} on, at t={t:.4g}, there by {by:.1e}"

    def page(self) -> report.Page:
        shown = report.thinned(len(self.times), 12)
        rows = ((self.times[index], self.differences[index]) for index in shown)
        return report.Page(
            f"{self.first} against {self.second}",
            "that either is right; both may share a fault",
            report.Table({"t": ".4g", "difference": ".2e"}, rows),
        )


@validate.arguments
def identities(
    first: probe.ASampler,
    second: probe.ASampler,
    data: probe.AModel,
    process: probe.AProcess | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    shape: Sequence[int] | None = None,
    tolerance: validate.NonNegative = 1e-9,
) -> Identities:
    """Compare two samplers at every network call, far outside the data as well.

    Both run from the same starts with the same noise, draw by draw, and with the same additions to
    the network's outputs, which move x0 by up to some hundreds: a clipped x0 shows, though the law
    of a clipped sampler may look right.

    Args:
        first, second: the samplers; an adapter keeps its own levels, without `times` or `steps`.
        data: any model.
        process, shape: as in `law`.
        times, steps: as in `sample`, for samplers that take them.
        tolerance: differences up to this are rounding; an adapter in float32 raises it.
    Raises:
        NotAffine: if a sampler chooses its own steps, or its noise cannot be injected.
    """
    for sampler in (first, second):
        if sampler.claims.order is None:
            raise probe.NotAffine(f"{sampler} chooses its own steps: it shares none with another")
    own = getattr(first, "process", None) or getattr(second, "process", None)
    data = probe.on_process_of(data, None, process or own)
    shape, inputs = probe.sizes(data, shape), probe.trial(1, 2, 3)

    def made(sampler: Sampler) -> probe.Probe:
        given = (None, None) if sampler.claims.adaptive else (steps, times)
        return probe.run(sampler, data, inputs, shape, *given)

    a, b = made(first), made(second)
    calls = len(a.calls), len(b.calls)
    same = calls[0] == calls[1]
    pairs = zip(a.states, b.states, strict=True) if same else [(a.end, b.end)]
    at = [call.level.t for call in a.calls] if same else []
    return Identities(
        probe.one_line(first), probe.one_line(second),
        (*at, 0.0 if times is None else float(times[-1])), tuple(apart(*pair) for pair in pairs),
        calls, max(tolerance, first.claims.rounding, second.claims.rounding),
    )  # fmt: skip


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference of two batches, each row relative to its size."""
    sizes = 1 + torch.maximum(a.abs(), b.abs()).amax(1, keepdim=True)
    return float(((a - b).abs() / sizes).max())


# ---- of chains with a process ------------------------------------------------------------------


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
        return {name: self._rate(name, floor) for name, floor in FLOORS.items()}

    def _rate(self, name: str, floor: float) -> float | None:
        found: tuple[float, ...] = getattr(self, name)
        seen = len(self.sizes) > 1 and min(found) >= floor
        return -convergence.slope(self.sizes, found) if seen else None

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
        pairs = zip(a.levels(t[1:]), b.levels(t[1:]), strict=True)
        losses = [abs(data_a.eps_loss(ours) - data_b.eps_loss(theirs)) for ours, theirs in pairs]
        w2 = law_of(sampler, data_b, times=t.flip(0), shape=(1,)).w2(*data_a.reverse_sde())
        return float(max(marginals)), float(max(transitions)), max(losses), w2

    # The sampler is checked once, at the smallest N.
    rows = [distances(n, law if n == min(sizes) else measured) for n in sizes]
    return Agreement(sizes, *zip(*rows, strict=True))
