r"""Ladders: a sampler's exact law at a growing number of steps.

Every error here is the W2 distance between the exact law of a run that starts from the data's exact
law at its first level, and the data's exact law at its last. It tends to 0 for a consistent
sampler, whether of the flow, the reverse SDE or anything between: all have the data's marginals.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models import Model
from sde_diffusion.processes import Process
from sde_diffusion.samplers import Sampler
from sde_diffusion.verify import probe, report
from sde_diffusion.verify.laws import Law, measured

ROUNDING = 1e-12  # W2 below this is 0, times the scale of the data

Family = Annotated[
    Sampler | Callable[[int], Sampler],
    probe.OrMaker("a Sampler, or a function of the number of steps", "step", "grid"),
]


def member(family: Any, given: Any) -> tuple[Sampler, Any]:
    """The sampler for a number of steps or for times, and the argument of its run.

    Args:
        family: a Sampler, whose run takes `given`; or a function that makes one from it. One with
            levels of its own, as an adapter has, then takes no argument.
        given: the number of steps, or the times.
    """
    if hasattr(family, "step"):
        return family, given
    some = family(given)
    validate.kind("what the function makes", some, "a Sampler", "claims", "grid", "step")
    return some, None if some.claims.adaptive else given


def ladder(
    sampler: Any, data: Model, process: Process | None, runs: Sequence[Any]
) -> tuple[Sampler, list[Law]]:
    """The last sampler and the laws of all; the first is checked for affinity.

    Args:
        runs: numbers of steps, or the times of each run.
    """
    some, shape, laws = sampler, probe.sizes(data, None), list[Law]()
    for given in runs:
        some, left = member(sampler, given)
        there = probe.on_process_of(data, some, process)
        steps, times = (None, left) if isinstance(given, Tensor) else (left, None)
        if not laws:
            probe.check_affine(some, there, shape, steps, times)
        laws.append(measured(some, there, shape, steps, times))
    return some, laws


def of_family(some: Any) -> str:
    """The name of a sampler at any number of steps."""
    return getattr(some, "name", "") or probe.one_line(some)


def checked_sizes(sizes: Sequence[int], least: int) -> tuple[int, ...]:
    """Return `sizes` if they are integers that grow."""
    sizes = tuple(validate.integer("each of sizes", n) for n in validate.shape("sizes", sizes))
    if len(sizes) < least or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes must hold {least} or more growing integers; got {sizes}")
    return sizes


def rounding(data: Any, sampler: Any) -> float:
    """The distance below which two laws of this data are equal."""
    scale = float(data.covariance.trace().sqrt() + data.mean.norm())
    return max(ROUNDING, 0.1 * sampler.claims.rounding) * scale


def logs(values: Sequence[float]) -> Any:
    """Natural logarithms; of 0, that of the least number."""
    return np.log(np.maximum(values, np.finfo(np.float64).tiny))


def slope(sizes: Sequence[float], distances: Sequence[float]) -> float:
    """Least-squares slope of log distance against log size."""
    return float(np.polyfit(np.log(sizes), logs(distances), 1)[0])


def slopes(sizes: Sequence[float], distances: Sequence[float]) -> list[float]:
    """Orders between neighbouring sizes."""
    found = logs(distances)
    return ((found[:-1] - found[1:]) / np.diff(np.log(sizes))).tolist()


def errors_table(sizes: Sequence[int], distances: Sequence[float]) -> report.Table:
    """The error at each number of steps, with the rate since the one before."""
    rates = [None, *slopes(sizes, distances)]
    columns = {"steps": "d", "W2": ".3e", "rate": ".2f"}
    return report.Table(columns, zip(sizes, distances, rates, strict=True))
