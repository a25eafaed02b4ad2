r"""Ladders: a sampler's exact law at a growing number of steps.

Every error here is the W2 distance between the exact law of a run that starts from the data's exact
law at its first level, and the data's exact law at its last. It tends to 0 for a consistent
sampler, whether of the flow, the reverse SDE or anything between: all have the data's marginals.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import numpy as np

from sde_diffusion import validate
from sde_diffusion.models.model import Model
from sde_diffusion.processes import Process
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.verify import probe
from sde_diffusion.verify.laws import Law, measured, on_process_of
from sde_diffusion.verify.probe import OrMaker
from sde_diffusion.verify.report import Table

__all__ = [
    "Family",
    "checked_sizes",
    "errors_table",
    "ladder",
    "made_from",
    "of_family",
    "rounding",
    "slope",
    "slopes",
]

ROUNDING = 1e-12  # W2 below this is 0, times the scale of the data

Family = Annotated[
    Sampler | Callable[[int], Sampler],
    OrMaker("a Sampler, or a function of the number of steps", "step", "grid"),
]


def made_from(family: Any, what: Any) -> Sampler:
    """The sampler that a function makes from a number of steps, or from times."""
    return validate.kind(
        "what the function makes", family(what), "a Sampler", "claims", "grid", "step"
    )


def ladder(
    sampler: Any, data: Model, process: Process | None, sizes: Sequence[int]
) -> tuple[Sampler, list[Law]]:
    """The sampler at its finest and its laws at all sizes; the coarsest is checked for affinity."""
    shape = probe.sizes(data, None)
    laws: list[Law] = []
    some = sampler
    for n in sizes:
        count: int | None = n
        if not hasattr(sampler, "step"):
            some, count = made_from(sampler, n), None
        there = on_process_of(data, some, process)
        if not laws:
            probe.check_affine(some, there, shape, count)
        laws.append(measured(some, there, shape, count))
    return some, laws


def of_family(some: Any) -> str:
    """The name of a sampler at any number of steps."""
    return getattr(some, "name", "") or probe.one_line(some)


def checked_sizes(sizes: Sequence[int], least: int) -> tuple[int, ...]:
    sizes = tuple(validate.integer("each of sizes", n) for n in validate.shape("sizes", sizes))
    if len(sizes) < least or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"sizes must hold {least} or more growing integers; got {sizes}")
    return sizes


def rounding(data: Any, sampler: Any) -> float:
    """The distance below which two laws of this data are equal."""
    scale = float(data.covariance.trace().sqrt() + data.mean.norm())
    return max(ROUNDING, 0.1 * sampler.claims.rounding) * scale


def slope(sizes: Sequence[float], distances: Sequence[float]) -> float:
    """Least-squares slope of log distance against log size."""
    tiny = np.finfo(np.float64).tiny
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(distances, tiny)), 1)[0])


def slopes(sizes: Sequence[float], distances: Sequence[float]) -> list[float]:
    """Orders between neighbouring sizes."""
    pairs = zip(pairwise(sizes), pairwise(distances), strict=True)
    return [math.log(max(a, 1e-300) / max(b, 1e-300)) / math.log(n / m) for (m, n), (a, b) in pairs]


def errors_table(sizes: Sequence[int], distances: Sequence[float]) -> Table:
    """The error at each number of steps, with the rate since the one before."""
    rates = [None, *slopes(sizes, distances)]
    columns = {"steps": "d", "W2": ".3e", "rate": ".2f"}
    return Table(columns, zip(sizes, distances, rates, strict=True))
