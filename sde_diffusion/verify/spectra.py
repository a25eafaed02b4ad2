r"""The exact law of a sampler's output along the eigenvectors of a Gaussian's covariance.

A sampler with the same coefficients for all coordinates treats each eigenvector of the data's
covariance separately. The law of d coordinates, for which `law` needs 1 + d + d draws rows, then
follows from 2 + draws: zero; a unit start along all eigenvectors at once; a unit impulse along all
of them in each draw. So the least number of steps for a tolerance can be searched for, without a
network.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion import sampling, validate
from sde_diffusion.models.exact import Gaussian
from sde_diffusion.noise import Purpose, stream
from sde_diffusion.processes import VP, Process
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers import Sampler
from sde_diffusion.verify import convergence, laws, probe, report

__all__ = ["Guarantee", "steps_for"]


@dataclass(frozen=True, eq=False)
class Along:
    """A sampler's output along each eigenvector of the data's covariance, (d,).

        output = offset + start x + sum_k noises_k z_k,      x the start, z_k standard normal

    Attributes:
        times: its grid (n + 1,).
        calls: network calls.
        offset: output for a start of 0 and no noise.
        start: output per unit of start.
        noises: (draws, d), output per unit of each draw.
        data: mean and variance of the data's exact law at the last time.
        prior_std: of the prior.
        way: (n, d), after each step of a run that starts from the data's exact law at the first
            time: the final W2 if the exact flow continued from there, or, where noise is drawn, the
            exact reverse SDE. Its sign is that of std - exact std.
    """

    times: Tensor
    calls: int
    offset: Tensor
    start: Tensor
    noises: Tensor
    data: tuple[Tensor, Tensor]
    prior_std: float
    way: Tensor

    @property
    def errors(self) -> Tensor:
        r"""W2 to the data along each eigenvector, of a run that starts from the prior.

        W2^2 = (m - m')^2 + (s - s')^2
        """
        variance = self.prior_std**2 * self.start.square() + self.noises.square().sum(0)
        return torch.hypot(self.offset - self.data[0], variance.sqrt() - self.data[1].sqrt())

    @property
    def departures(self) -> Tensor:
        """`errors` of a run that starts from the data's exact law at the first time."""
        return self.way[-1].abs()


@torch.no_grad()
def along(
    sampler: Sampler,
    data: Gaussian,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    units: Tensor | None = None,
) -> Along:
    """Compute the exact law along each eigenvector, in one run, or two where noise is drawn.

    The sampler is not checked: see `check_along`.

    Args:
        units: (d,), the start and the impulses along each eigenvector; ones by default. The result
            is the output per unit of each.
    """
    mean, _, axes = spectrum(data)
    units = torch.ones_like(mean) if units is None else units
    block = (units if axes is None else (axes * units).sum(1))[None]
    shape = probe.sizes(data, None)
    grid = sampling.path_of(data, sampler, steps, None, times)
    levels = data.process.levels(grid)
    exact = [spectrum(data.marginal(level))[:2] for level in levels]
    last, (_, target) = levels[-1], exact[-1]

    def run(draws: int) -> Along:
        made, way = probe.Probe(data, probe.basis(block, draws), keep=False), []
        start = end = made.inputs.draw(-1, len(mean)).reshape(2 + draws, *shape)
        path = sampling.trajectory(made, sampler, start, times=grid, noise=made.noise)
        for state, level, (m, v) in zip(path, levels[1:], exact[1:], strict=True):
            end = coordinates(state.x) if axes is None else coordinates(state.x) @ axes
            gains = (end[1:] - end[0]) / units
            shift = end[0] + gains[0] * exact[0][0] - m
            spread = gains[0].square() * exact[0][1] + gains[1:].square().sum(0) - v
            gain = level.alpha / last.alpha * target / v if draws else (target / v).sqrt()
            off = (target + gain.square() * spread).clamp(min=0).sqrt() - target.sqrt()
            way.append(torch.copysign(torch.hypot(gain * shift, off), off))
        gains, drawn = (end[1:] - end[0]) / units, len(made.draws)
        if drawn > draws:  # once more, with impulses in each
            laws.check_size((2 + drawn) * len(mean), f"{len(mean)} eigenvectors, {drawn} draws")
            return run(drawn)
        return Along(
            grid, len(made.calls), end[0], gains[0], gains[1:], exact[-1], data.process.prior_std,
            torch.stack(way),
        )  # fmt: skip

    return run(0)


def check_along(
    sampler: Sampler,
    data: Gaussian,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
) -> Along:
    """`along`, with trial runs that check the sampler.

    Raises:
        NotAffine: naming the sampler, if it is no affine map of each row (see `probe.check_affine`)
            or mixes eigenvectors.
    """
    probe.check_affine(sampler, data, probe.sizes(data, None), steps, times)
    found = along(sampler, data, steps, times)
    numbers = torch.from_numpy(stream(1, Purpose.PATH).standard_normal(len(found.offset)))
    other = along(sampler, data, steps, times, units=numbers + 0.5 * numbers.sign())
    gains, others = (torch.stack([each.start, *each.noises]) for each in (found, other))
    if not probe.near(gains, others, sampler.claims.rounding or 1e-9):
        why = "it mixes coordinates, as a frame with other axes does; use verify.law"
        raise probe.NotAffine(f"{sampler} does not treat each eigenvector by itself: {why}")
    return found


def on_process(data: Gaussian | Tensor, sampler: Sampler, process: Process | None) -> Gaussian:
    """Gaussian data, or N(0, S) for a covariance S, on `process` or else the sampler's own.

    A covariance alone is on VP.

    Args:
        data: exact.Gaussian; or S, (d, d), or its eigenvalues (d,).
    """
    if not isinstance(data, Tensor):
        validate.kind("data", data, "an exact.Gaussian or a covariance", "mean", "covariance", "on")
        return probe.on_process_of(data, sampler, process)
    return centred(data, process or getattr(sampler, "process", None) or VP())


def centred(covariance: Tensor, process: Process) -> Gaussian:
    """N(0, S), S (d, d) or its eigenvalues (d,)."""
    S = covariance.double()
    if S.ndim not in (1, 2) or not S.numel() or (S.ndim == 2 and S.shape[0] != S.shape[1]):
        got = tuple(S.shape)
        raise ValueError(f"a covariance must be (d, d), or (d,) of eigenvalues; got shape {got}")
    return Gaussian(process, torch.zeros(len(S), dtype=torch.float64), S)


def band(low: float, high: float) -> Tensor:
    """Variances from low to high, evenly spaced in their logarithm by at most a factor 2^(1/4)."""
    intervals = math.ceil(4 * math.log2(high / low))
    return torch.logspace(math.log10(low), math.log10(high), intervals + 1, dtype=torch.float64)


def spectrum(data: Gaussian) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and variances along the axes, (d,) each, and the axes, (d, d), None for coordinates."""
    variances = data.variances[0].expand(len(data.mean))
    if data.axes is None:
        return data.mean, variances, None
    return data.mean @ data.axes[0], variances, data.axes[0]


# ---- steps for a tolerance -----------------------------------------------------------------------


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
    sampler: convergence.Family,
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
    some, _ = convergence.member(sampler, 1)
    there = on_process(data, some, process)
    between = [] if narrowest is None else [banded(there, narrowest)]
    most = min(most, there.process.chain_steps or most)  # a chain has no more
    tried: dict[int, float] = {}

    def runs(n: int, law_of: Callable[..., Along] = along) -> tuple[Sampler, list[Along]]:
        some, steps = convergence.member(sampler, n)
        own = law_of(some, on_process(data, some, process), steps)
        return some, [own, *(along(some, each, steps) for each in between)]

    def meets(n: int) -> bool:
        tried[n] = worst([found.errors for found in runs(n)[1]])
        return tried[n] <= tol

    runs(1, check_along)
    low, high = 0, most  # largest number that fails; one that meets tol, or `most`
    for n in [*(2**k for k in range((most - 1).bit_length())), most]:
        if not meets(n):
            low, high = n, most
        elif high < n:
            break
        else:
            high = n
    steps = bisect_left(range(high), True, min(low + 1, high), key=meets)
    some, found = runs(steps, check_along)
    departure = worst([each.departures for each in found])
    name, on, own = convergence.of_family(some), type(there.process).__name__, found[0]
    return Guarantee(
        name, on, len(own.offset), tol, dict(sorted(tried.items())), steps, own.times, own.calls,
        departure, narrowest,
    )  # fmt: skip


def banded(data: Gaussian, narrowest: float) -> Gaussian:
    """Data whose coordinates have variances from narrowest^2 to the largest of `data`."""
    largest = float(data.variances.max())
    validate.number("narrowest", narrowest, 0, largest**0.5, strict=True)
    return centred(band(narrowest**2, largest), data.process)


def worst(errors: list[Tensor]) -> float:
    """W2 over the coordinates of the first; if there are more, as if all had the largest error."""
    own, *others = errors
    return float(torch.cat(errors).max()) * len(own) ** 0.5 if others else float(own.norm())
