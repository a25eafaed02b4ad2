"""Identities: two formulations of one scheme, compared at every step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.model import Model
from sde_diffusion.processes import Process
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.verify import probe
from sde_diffusion.verify.gaussians import ending, thinned
from sde_diffusion.verify.laws import on_process_of
from sde_diffusion.verify.probe import NotAffine, Trial

__all__ = ["Identities", "identities"]


@dataclass(frozen=True, repr=False)
class Identities:
    """How far two samplers are apart at each network call and at the end; print it.

    Attributes:
        first, second: their names.
        times: of the states that are compared.
        differences: largest |difference| at each, relative to 1 + the largest |state|.
        calls: how many network calls each made.
        tolerance: what counts as rounding.
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

    def __str__(self) -> str:
        rows = [f"{self.first} against {self.second}", f"  {'t':>10}{'difference':>14}"]
        for index in thinned(len(self.times), 12):
            rows.append(f"  {self.times[index]:10.4g}{self.differences[index]:14.2e}")
        return "\n".join(
            [*rows, *ending(self.verdict, "that either is right; both may share a fault")]
        )

    __repr__ = __str__


def identities(
    first: Sampler,
    second: Sampler,
    data: Model,
    process: Process | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    shape: Sequence[int] | None = None,
    tolerance: float = 1e-9,
) -> Identities:
    """Whether two samplers do the same at every step, far outside the data as well.

    Both run from the same starts with the same noise, draw by draw, and hear the same additions to
    the network's answers, which move x0 by up to some hundreds: a clipped x0 shows, though the law
    of a clipped sampler may look right.

    Args:
        first, second: the samplers; whichever has levels of its own, as an adapter has, is not told
            `times` or `steps`.
        data: any model.
        process, shape: as in `law`.
        times, steps: as in `sample`, for those that take them.
        tolerance: what counts as rounding; an adapter in float32 brings a larger one.
    Raises:
        NotAffine: if a sampler chooses its own steps, or its noise cannot be injected.
    """
    for name, sampler in (("first", first), ("second", second)):
        validate.kind(name, sampler, "a Sampler", "grid", "step")
        if sampler.claims.order is None:
            raise NotAffine(f"{sampler} chooses its own steps: it shares none with another")
    validate.kind("data", data, "a Model, such as exact.Gaussian", "process", "__call__")
    validate.number("tolerance", tolerance, 0)
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
    calls = len(runs[0].asked), len(runs[1].asked)
    last = 0.0 if times is None else float(times[-1])
    pairs = [(runs[0].end, runs[1].end)]
    at = [last]
    if calls[0] == calls[1]:
        together = list(zip(runs[0].asked, runs[1].asked, strict=True))
        pairs = [(a.x, b.x) for a, b in together] + pairs
        at = [a.level.t for a, _ in together] + at
    return Identities(
        probe.one_line(first), probe.one_line(second), tuple(at),
        tuple(apart(a, b) for a, b in pairs), calls, tolerance,
    )  # fmt: skip


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference of two batches, each row by its own size."""
    sizes = 1 + torch.maximum(a.abs(), b.abs()).amax(1, keepdim=True)
    return float(((a - b).abs() / sizes).max())
