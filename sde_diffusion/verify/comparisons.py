"""Identities: two formulations of one scheme, compared at every network call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.validate import NonNegative, arguments
from sde_diffusion.verify import probe, report

__all__ = ["Identities", "identities"]


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


@arguments
def identities(
    first: probe.ASampler,
    second: probe.ASampler,
    data: probe.AModel,
    process: probe.AProcess | None = None,
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
            raise probe.NotAffine(f"{sampler} chooses its own steps: it shares none with another")
    own = getattr(first, "process", None) or getattr(second, "process", None)
    data = probe.on_process_of(data, None, process or own)
    shape, inputs = probe.sizes(data, shape), probe.Trial((1, 2, 3))
    given: dict[str, Any] = {"steps": steps, "times": times}
    runs = [
        probe.run(each, data, inputs, shape, **({} if each.claims.adaptive else given))
        for each in (first, second)
    ]
    (a, b), calls = runs, (len(runs[0].calls), len(runs[1].calls))
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
