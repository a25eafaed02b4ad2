r"""Convergence: a sampler's exact law at a growing number of steps, its order and its limit.

Every error here is the W2 distance between the exact law of a run that starts from the data's exact
law at its first level, and the data's exact law at its last. It tends to 0 for a consistent
sampler, whether of the flow, the reverse SDE or anything between: all have the data's marginals.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models import Model
from sde_diffusion.processes import Process
from sde_diffusion.samplers import Sampler
from sde_diffusion.verify import gaussians, probe, report
from sde_diffusion.verify.laws import Law, measured

__all__ = ["Limit", "Order", "limit", "order"]

ROUNDING = 1e-12  # W2 below this is 0, times the scale of the data
SLACK = 0.2  # a fitted order may be lower than the declared one by this
STALLS = 0.5  # a lower rate is no convergence
SETTLED = 0.6  # a larger gain from one rate to the next allows no extrapolation
FAR = 4.0  # times the uncertainty: a limit further off is not the data's
SLOWEST = 0.45  # a lower rate allows no extrapolation

IS_FAMILY = probe.OrMaker("a Sampler, or a function of the number of steps", "step", "grid")
Family = Annotated[Sampler | Callable[[int], Sampler], IS_FAMILY]


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


# ---- order -----------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Order(report.Report):
    """Errors at a growing number of steps, and the order fitted to them.

    Attributes:
        sampler: its name.
        declared: its claimed order.
        sizes: numbers of steps.
        distances: the error of each.
        rounding: distances below this are rounding.
        left: W2 that an Euler step from its last level to sigma = 0 leaves (`Law.left`).
        remark: a warning of an adapter.
    """

    sampler: str
    declared: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]
    rounding: float
    left: float = 0.0
    remark: str = ""

    @property
    def rates(self) -> list[float]:
        """log2 of the ratio of neighbouring errors, for a doubling of steps."""
        return slopes(self.sizes, self.distances)

    @property
    def fitted(self) -> float:
        """Minus the least-squares slope of log error against log steps; inf if it is rounding."""
        exact = max(self.distances) <= self.rounding
        return math.inf if exact else -slope(self.sizes, self.distances)

    @property
    def tends(self) -> float:
        """The limit of the rates, if they settle: the last one plus its last gain.

        The rate of an error C N^-p (1 + c / N) is p + c' / N: a doubling of N halves c' / N.
        """
        last = self.rates[-1]
        gain = last - self.rates[-2] if len(self.rates) > 1 else 0.0
        return last + gain if 0 < gain < SETTLED else last

    @property
    def floor(self) -> float | None:
        """The value at which the error stops shrinking, if it does: it rises, or hardly falls."""
        for index, rate in enumerate(self.rates):
            after = max(self.distances[index + 1 :])
            last = index == len(self.rates) - 1
            if (rate < 0 or (last and self.tends < STALLS)) and after > self.rounding:
                return after
        return None

    @property
    def holds(self) -> bool:
        rates = self.rates
        falling = len(rates) > 1 and rates[-1] < rates[-2] - SLACK / 2
        reached = self.tends if falling else max(self.fitted, self.tends)
        return self.floor is None and reached >= self.declared - SLACK

    @property
    def verdict(self) -> str:
        if self.fitted == math.inf:
            return "exact up to rounding at every number of steps"
        text = f"order {self.fitted:.2f}, declared {self.declared:g}"
        if self.floor is not None:
            text += f": THE ERROR STOPS SHRINKING at {self.floor:.1e}"
            if self.floor <= 3 * self.left:
                text += f", as an Euler step from its last level leaves {self.left:.1e}"
        else:
            low = "" if self.holds else ": LOWER THAN DECLARED"
            text += f", the rates tend to {self.tends:.2f}{low}"
        return f"{text}; {self.remark}" if self.remark else text

    def page(self) -> report.Page:
        return report.Page(
            f"order of {self.sampler}",
            "the order on grids of another shape, where a multistep formula may be wrong and still "
            "pass (local_order); nor that each step is the published one",
            errors_table(self.sizes, self.distances),
        )


@validate.arguments
def order(
    sampler: Family,
    data: probe.AModel,
    process: probe.AProcess | None = None,
    *,
    sizes: Sequence[int] = (64, 128, 256),
    declared: validate.NonNegative | None = None,
) -> Order:
    """Fit the order at which a sampler's law approaches the data's, on the sampler's own grids.

    Args:
        sampler: a Sampler; or a function of the number of steps that makes one, as for an adapter:
            `partial(verify.Diffusers, scheduler)`.
        data: exact.Gaussian, or another affine model with mean, covariance, marginal.
        process: the process to use, if not the model's own.
        sizes: two or more numbers of steps.
        declared: the expected order; by default the sampler's own claim.
    """
    sizes = checked_sizes(sizes, 2)
    some, laws = ladder(sampler, data, process, sizes)
    return fitted(some, data, sizes, laws, declared)


def fitted(
    some: Sampler, data: Model, sizes: tuple[int, ...], laws: Sequence[Law],
    declared: float | None = None,
) -> Order:  # fmt: skip
    """`order` from laws already computed."""
    claimed: Any = some.claims.order if declared is None else declared
    distances, last = tuple(each.departure for each in laws), laws[-1]
    found = of_family(some), claimed, sizes, distances, rounding(data, some)
    return Order(*found, last.left, last.remark)


# ---- limit -----------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Limit(report.Report):
    """The law that a sampler's law tends to as its steps shrink, by Richardson extrapolation.

    Attributes:
        sampler: its name.
        sizes: numbers of steps, each twice the one before.
        distances: W2 to the data at each.
        mean, covariance: of the limit.
        data: mean and covariance of the data.
        rate: order at which the laws approach each other.
        uncertainty: distance between the last two extrapolations.
        rounding: distances below this are rounding.
        left: W2 that an Euler step from its last level to sigma = 0 leaves (`Law.left`).
    """

    sampler: str
    sizes: tuple[int, ...]
    distances: tuple[float, ...]
    mean: Tensor
    covariance: Tensor
    data: tuple[Tensor, Tensor]
    rate: float
    uncertainty: float
    rounding: float
    left: float = 0.0

    @property
    def distance(self) -> float:
        """W2 between the limit and the data."""
        return gaussians.w2((self.mean, self.covariance), self.data)

    @property
    def shown(self) -> bool:
        """True if these sizes show a limit: the laws come nearer, as a power of N."""
        if max(self.distances) <= self.rounding:
            return True
        nearer = self.distances[-1] < self.distances[0] and self.rate >= SLOWEST
        return nearer and self.uncertainty <= self.distances[0] + self.rounding

    @property
    def near(self) -> bool:
        """True if the limit is the data's law, or misses it by the error of the last step."""
        allowed = max(FAR * self.uncertainty, self.rounding)
        off = abs(self.distance - self.left)
        return self.distance <= allowed or off <= max(allowed, 0.1 * self.left)

    @property
    def holds(self) -> bool:
        return self.shown and self.near

    @property
    def verdict(self) -> str:
        distance, error = f"{self.distance:.1e}", f"{self.uncertainty:.1e}"
        text = f"W2 of the limit to the data {distance} (uncertainty {error})"
        if not self.near:
            return f"TENDS TO ANOTHER LAW: {text}"
        if not self.shown:
            return f"THESE SIZES SHOW NO LIMIT: {text}"
        known = self.left > self.rounding and self.distance > FAR * self.uncertainty
        left = f", as an Euler step from its last level leaves {self.left:.1e}" if known else ""
        return f"tends to the data: {text}{left}"

    def page(self) -> report.Page:
        found = report.moments(self.mean, self.covariance)
        return report.Page(
            f"limit of {self.sampler}",
            "the error at a finite number of steps, or a limit at a rate that these sizes do not "
            "show yet",
            errors_table(self.sizes, self.distances),
            [f"limit: {found}", f"data:  {report.moments(*self.data)}"],
        )


@validate.arguments
def limit(
    sampler: Family,
    data: probe.AModel,
    process: probe.AProcess | None = None,
    *,
    sizes: Sequence[int] = (64, 128, 256, 512),
) -> Limit:
    r"""Extrapolate a sampler's law to N -> infinity, and compare it with the data's.

    With theta_N the mean and the root of the covariance, and the rate p of |theta_2N - theta_N|,

        theta = theta_2N + (theta_2N - theta_N) / (2^p - 1)

    extrapolated from the last sizes and, for its uncertainty, once more from those before.

    Args:
        sampler, data, process: as in `order`.
        sizes: four or more numbers of steps, each twice the one before.
    """
    sizes = checked_sizes(sizes, 4)
    some, laws = ladder(sampler, data, process, sizes)
    return extrapolated(some, data, sizes, laws)


def extrapolated(some: Sampler, data: Model, sizes: tuple[int, ...], laws: Sequence[Law]) -> Limit:
    """`limit` from laws already computed."""
    if any(n != sizes[0] * 2**k for k, n in enumerate(sizes)):
        raise ValueError(f"sizes must double from one to the next; got {sizes}")
    distances = tuple(each.departure for each in laws)
    target = laws[-1].data
    assert target is not None  # departure has refused models that know no law
    ends = [each.steps[-1] for each in laws]
    theta = [torch.cat([end.mean[None], gaussians.matrix_root(end.covariance)]) for end in ends]
    (last, rate), (before, _) = richardson(theta[-3:]), richardson(theta[-4:-1])
    return Limit(
        of_family(some), sizes, distances, last[0], last[1:] @ last[1:].T, target, rate,
        float((last - before).norm()), rounding(data, some), laws[-1].left,
    )  # fmt: skip


def richardson(theta: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The limit of three values at N, 2 N, 4 N, and their rate."""
    first, second, third = theta
    change = third - second
    if not bool(change.any()):
        return third, math.inf
    rate = math.log2(max(float((second - first).norm() / change.norm()), 1e-300))
    near = rate >= SLOWEST  # they come nearer as a power of N
    return third + change / (2**rate - 1) if near else third, rate
