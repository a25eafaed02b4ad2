"""Identities: two formulations of one scheme, compared at every network call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.validate import NonNegative, arguments
from sde_diffusion.verify import probe
from sde_diffusion.verify.laws import on_process_of
from sde_diffusion.verify.probe import AModel, AProcess, ASampler, NotAffine, Trial
from sde_diffusion.verify.report import Page, Report, Table, thinned

__all__ = ["Identities", "identities"]


@dataclass(frozen=True, repr=False)
class Identities(Report):
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
        worst = max(self.differences)
        if self.calls[0] != self.calls[1]:
            return (
                f"NOT THE SAME SCHEME: {self.calls[0]} calls and {self.calls[1]}; the ends differ "
                f"by {worst:.1e}"
            )
        if self.holds:
            return f"equal to {worst:.1e} at all {self.calls[0]} calls and at the end"
        index = next(i for i, d in enumerate(self.differences) if not d <= self.tolerance)
        where = f"call {index + 1} of {self.calls[0]}" if index < self.calls[0] else "the end"
        return (
            f"DIFFERENT from {where} on, at t={self.times[index]:.4g}, there by "
            f"{self.differences[index]:.1e}"
        )

    def page(self) -> Page:
        shown = thinned(len(self.times), 12)
        rows = ((self.times[index], self.differences[index]) for index in shown)
        return Page(
            f"{self.first} against {self.second}",
            "that either is right; both may share a fault",
            Table({"t": ".4g", "difference": ".2e"}, rows),
        )


@arguments
def identities(
    first: ASampler,
    second: ASampler,
    data: AModel,
    process: AProcess | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    shape: Sequence[int] | None = None,
    tolerance: NonNegative = 1e-9,
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
            raise NotAffine(f"{sampler} chooses its own steps: it shares none with another")
    own = getattr(first, "process", None) or getattr(second, "process", None)
    data = on_process_of(data, None, process or own)
    shape = probe.sizes(data, shape)
    runs: list[probe.Run] = []
    for sampler in (first, second):
        if sampler.claims.adaptive:
            runs.append(probe.run(sampler, data, Trial((1, 2, 3)), shape))
        else:
            runs.append(probe.run(sampler, data, Trial((1, 2, 3)), shape, steps, times))
        tolerance = max(tolerance, sampler.claims.rounding)
    calls = len(runs[0].calls), len(runs[1].calls)
    last = 0.0 if times is None else float(times[-1])
    pairs = [(runs[0].end, runs[1].end)]
    at = [last]
    if calls[0] == calls[1]:
        together = list(zip(runs[0].calls, runs[1].calls, strict=True))
        pairs = [(a.x, b.x) for a, b in together] + pairs
        at = [a.level.t for a, _ in together] + at
    return Identities(
        probe.one_line(first), probe.one_line(second), tuple(at),
        tuple(apart(a, b) for a, b in pairs), calls, tolerance,
    )  # fmt: skip


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference of two batches, each row relative to its size."""
    sizes = 1 + torch.maximum(a.abs(), b.abs()).amax(1, keepdim=True)
    return float(((a - b).abs() / sizes).max())
