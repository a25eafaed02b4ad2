r"""The number of steps for a tolerance, computed without a network.

The W2 between a sampler's output and Gaussian data is known exactly from one or two runs on the
data's spectrum (see spectra.py), so the least number of steps can be searched for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.exact import Gaussian
from sde_diffusion.processes import Process
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.validate import Count, Positive, arguments
from sde_diffusion.verify import spectra
from sde_diffusion.verify.ladders import Family, made_from, of_family
from sde_diffusion.verify.probe import AProcess
from sde_diffusion.verify.report import Page, Report, Table

__all__ = ["Guarantee", "steps_for"]


@dataclass(frozen=True, repr=False)
class Guarantee(Report):
    """The number of steps with which a sampler reaches a tolerance on Gaussian data.

    Every W2 is in the units of the data and over all coordinates: W2^2 is the sum of theirs.

    Attributes:
        sampler, process: their names.
        d: coordinates.
        tol: the largest W2 allowed.
        tried: W2 to the data of a run from the prior, by number of steps, ascending.
        steps: the least number such that it and every larger one tried meet `tol`; the largest
            number tried, if that does not.
        times: its grid.
        calls: its network calls.
        departure: W2 at `steps` of a run that starts from the data's own law at the first time: the
            error of the steps. The rest of `w2` is that of the prior, at any number of steps.
        narrowest: argument of `steps_for`; if given, every W2 is the worst of its Gaussians.
    """

    sampler: str
    process: str
    d: int
    tol: float
    tried: dict[int, float]
    steps: int
    times: Tensor
    calls: int
    departure: float
    narrowest: float | None = None

    @property
    def w2(self) -> float:
        """W2 at `steps`."""
        return self.tried[self.steps]

    @property
    def rms(self) -> float:
        """W2 at `steps` per coordinate: the root of its mean square over them."""
        return self.w2 / self.d**0.5

    @property
    def holds(self) -> bool:
        return self.w2 <= self.tol

    @property
    def verdict(self) -> str:
        if self.holds:
            return f"{self.steps} steps reach W2 {self.tol:g} ({self.calls} calls)"
        floor = "; the prior alone leaves more" if self.departure <= self.tol else ""
        return f"NOT REACHED by {self.steps} steps{floor}"

    def page(self) -> Page:
        facts = [f"W2 if started from the data's own law {self.departure:.3e}"]
        if self.narrowest is not None:
            facts.append(f"worst of the Gaussians with no std below {self.narrowest:g}")
        rows = (
            (n, w2, w2 / self.d**0.5, "<-" if n == self.steps else None)
            for n, w2 in self.tried.items()
        )
        return Page(
            f"steps of {self.sampler} on {self.process} for W2 {self.tol:g}, d = {self.d}",
            "anything of data that are not Gaussian, mixtures took up to six times the steps (see "
            "verify.steps_for); nor of the network's own error, or of steps that were not tried",
            Table({"steps": "d", "W2": ".3e", "per coordinate": ".3e", "": ""}, rows),
            facts,
        )


@arguments
def steps_for(
    tol: Positive,
    data: Gaussian | Tensor,
    sampler: Family,
    process: AProcess | None = None,
    *,
    narrowest: float | None = None,
    most: Count = 1024,
) -> Guarantee:
    """Find the least number of steps whose exact W2 to Gaussian data is at most `tol`.

    Runs start from the prior. Steps are doubled until two numbers in a row meet the tolerance,
    since W2 may pass through a low point, and then bisected.

    Data that are not Gaussian need more: of 36 mixtures at 5 to 50 steps, all took at most six
    times the steps given here for their RMS; with `narrowest` five times, nine in ten twice. The
    script experiments/benchmarks/optimized_grids.py --cases-only --seeds 0 1 2 3 measures this.

    Args:
        tol: W2, in the units of the data, over all coordinates: `rms * d**0.5` for an RMS per
            coordinate.
        data: exact.Gaussian; or a covariance (d, d), or its eigenvalues (d,), of mean 0.
        sampler: a Sampler, on its own grid; or a function of the number of steps that makes one.
        process: as in `law`; VP for a covariance.
        narrowest: least standard deviation of any part of the data, such as a mode, at most the
            largest of the covariance. The W2 is then the worst of all Gaussians of d coordinates
            with standard deviations between that and the largest.
        most: the largest number of steps to try.
    Raises:
        NotAffine: naming the sampler, if it is no affine map of each row, or mixes eigenvectors.
    """
    some, there, steps = sampler_and_data(sampler, data, process, 1)
    between = None if narrowest is None else banded(there, narrowest)
    spectra.check_along(some, there, steps)
    most = min(most, there.process.chain_steps or most)  # a chain has no more
    tried: dict[int, float] = {}

    def meets(n: int) -> bool:
        some, there, steps = sampler_and_data(sampler, data, process, n)
        found = spectra.along(some, there, steps)
        tried[n] = float(found.errors.norm())
        if between is not None:
            rest = spectra.along(some, between, steps)
            tried[n] = worst(found.errors, rest.errors)
        return tried[n] <= tol

    low, high = 0, most  # largest number that fails; one that meets tol, or `most`
    for n in powers_of_two(most):
        if not meets(n):
            low, high = n, most
        elif high < n:
            break
        else:
            high = n
    while high - low > 1:
        middle = (low + high) // 2
        if meets(middle):
            high = middle
        else:
            low = middle
    some, there, steps = sampler_and_data(sampler, data, process, high)
    found = spectra.check_along(some, there, steps)
    departure = float(found.departures.norm())
    if between is not None:
        departure = worst(found.departures, spectra.along(some, between, steps).departures)
    return Guarantee(
        of_family(some), type(there.process).__name__, len(found.offset), tol,
        dict(sorted(tried.items())), high, found.times, found.calls, departure, narrowest,
    )  # fmt: skip


def banded(data: Gaussian, narrowest: float) -> Gaussian:
    """Data whose coordinates have variances from narrowest^2 to the largest of `data`."""
    largest = float(data.variances.max())
    validate.number("narrowest", narrowest, 0, largest**0.5, strict=True)
    return spectra.centred(spectra.band(narrowest**2, largest), data.process)


def worst(own: Tensor, between: Tensor) -> float:
    """W2 over as many coordinates as `own` has, if all had the largest error."""
    return float(torch.cat([own, between]).max()) * len(own) ** 0.5


def powers_of_two(most: int) -> Iterator[int]:
    """1, 2, 4, ... and `most`."""
    n = 1
    while n < most:
        yield n
        n *= 2
    yield most


def sampler_and_data(
    sampler: Any, data: Gaussian | Tensor, process: Process | None, n: int
) -> tuple[Sampler, Gaussian, int | None]:
    """The sampler for n steps, the data on its process, and the argument `steps` of its run."""
    some: Sampler = sampler if hasattr(sampler, "step") else made_from(sampler, n)
    steps = None if some.claims.adaptive else n  # a peer in an adapter has its levels
    return some, spectra.on_process(data, some, process), steps
