"""Limits: the law that a sampler's exact law tends to, compared with the data's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.models import Model
from sde_diffusion.samplers import Sampler
from sde_diffusion.validate import arguments
from sde_diffusion.verify import ladders, probe, report
from sde_diffusion.verify.gaussians import gaussian_w2, matrix_root
from sde_diffusion.verify.laws import Law

__all__ = ["Limit", "limit"]

FAR = 4.0  # times the uncertainty: a limit further off is not the data's
SLOWEST = 0.45  # a lower rate allows no extrapolation


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
        return gaussian_w2((self.mean, self.covariance), self.data)

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
            ladders.errors_table(self.sizes, self.distances),
            [f"limit: {found}", f"data:  {report.moments(*self.data)}"],
        )


@arguments
def limit(
    sampler: ladders.Family,
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
    sizes = ladders.checked_sizes(sizes, 4)
    some, laws = ladders.ladder(sampler, data, process, sizes)
    return extrapolated(some, data, sizes, laws)


def extrapolated(some: Sampler, data: Model, sizes: tuple[int, ...], laws: Sequence[Law]) -> Limit:
    """`limit` from laws already computed."""
    if any(n != sizes[0] * 2**k for k, n in enumerate(sizes)):
        raise ValueError(f"sizes must double from one to the next; got {sizes}")
    distances = tuple(each.departure for each in laws)
    target = laws[-1].data
    assert target is not None  # departure has refused models that know no law
    ends = [each.steps[-1] for each in laws]
    theta = [torch.cat([end.mean[None], matrix_root(end.covariance)]) for end in ends]
    (last, rate), (before, _) = richardson(theta[-3:]), richardson(theta[-4:-1])
    return Limit(
        ladders.of_family(some), sizes, distances, last[0], last[1:] @ last[1:].T, target, rate,
        float((last - before).norm()), ladders.rounding(data, some), laws[-1].left,
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
