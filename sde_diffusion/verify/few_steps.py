r"""The number of steps for a tolerance, computed without a network.

The W2 between a sampler's output and Gaussian data is known exactly from one or two runs on the
data's spectrum (see spectra.py), so the least number of steps can be searched for.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.exact import Gaussian
from sde_diffusion.samplers import Sampler
from sde_diffusion.verify import ladders, probe, report, spectra

__all__ = ["Guarantee", "steps_for"]

Along = Callable[[Sampler, Gaussian, int | None], spectra.Along]


@dataclass(frozen=True, repr=False)
class Guarantee(report.Report):
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

    def page(self) -> report.Page:
        facts = [f"W2 if started from the data's own law {self.departure:.3e}"]
        if self.narrowest is not None:
            facts.append(f"worst of the Gaussians with no std below {self.narrowest:g}")
        marks = {self.steps: "<-"}
        rows = ((n, w2, w2 / self.d**0.5, marks.get(n)) for n, w2 in self.tried.items())
        return report.Page(
            f"steps of {self.sampler} on {self.process} for W2 {self.tol:g}, d = {self.d}",
            "anything of data that are not Gaussian, mixtures took up to six times the steps (see "
            "verify.steps_for); nor of the network's own error, or of steps that were not tried",
            report.Table({"steps": "d", "W2": ".3e", "per coordinate": ".3e", "": ""}, rows),
            facts,
        )


@validate.arguments
def steps_for(
    tol: validate.Positive,
    data: Gaussian | Tensor,
    sampler: ladders.Family,
    process: probe.AProcess | None = None,
    *,
    narrowest: float | None = None,
    most: validate.Count = 1024,
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
    some, _ = ladders.member(sampler, 1)
    there = spectra.on_process(data, some, process)
    between = [] if narrowest is None else [banded(there, narrowest)]
    most = min(most, there.process.chain_steps or most)  # a chain has no more
    tried: dict[int, float] = {}

    def runs(n: int, along: Along = spectra.along) -> tuple[Sampler, list[spectra.Along]]:
        some, steps = ladders.member(sampler, n)
        own = along(some, spectra.on_process(data, some, process), steps)
        return some, [own, *(spectra.along(some, each, steps) for each in between)]

    def meets(n: int) -> bool:
        tried[n] = worst([found.errors for found in runs(n)[1]])
        return tried[n] <= tol

    runs(1, spectra.check_along)
    low, high = 0, most  # largest number that fails; one that meets tol, or `most`
    for n in [*(2**k for k in range((most - 1).bit_length())), most]:
        if not meets(n):
            low, high = n, most
        elif high < n:
            break
        else:
            high = n
    steps = bisect_left(range(high), True, min(low + 1, high), key=meets)
    some, found = runs(steps, spectra.check_along)
    departure = worst([each.departures for each in found])
    name, on, own = ladders.of_family(some), type(there.process).__name__, found[0]
    return Guarantee(
        name, on, len(own.offset), tol, dict(sorted(tried.items())), steps, own.times, own.calls,
        departure, narrowest,
    )  # fmt: skip


def banded(data: Gaussian, narrowest: float) -> Gaussian:
    """Data whose coordinates have variances from narrowest^2 to the largest of `data`."""
    largest = float(data.variances.max())
    validate.number("narrowest", narrowest, 0, largest**0.5, strict=True)
    return spectra.centred(spectra.band(narrowest**2, largest), data.process)


def worst(errors: list[Tensor]) -> float:
    """W2 over the coordinates of the first; if there are more, as if all had the largest error."""
    own, *others = errors
    return float(torch.cat(errors).max()) * len(own) ** 0.5 if others else float(own.norm())
