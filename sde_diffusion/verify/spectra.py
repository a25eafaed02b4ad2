r"""The exact law of a sampler's output along the eigenvectors of a Gaussian's covariance.

A sampler with the same coefficients for all coordinates treats each eigenvector of the data's
covariance separately. The law of d coordinates, for which `law` needs 1 + d + d draws rows, then
follows from 2 + draws: zero; a unit start along all eigenvectors at once; a unit impulse along all
of them in each draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.exact import Gaussian
from sde_diffusion.noise import Purpose, stream
from sde_diffusion.processes import VP, Process
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers import Sampler
from sde_diffusion.sampling import path_of, trajectory
from sde_diffusion.verify import probe
from sde_diffusion.verify.laws import check_size


@dataclass(frozen=True, eq=False)
class Mixed(probe.Inputs):
    """One row: different numbers along each eigenvector, in the start and in each draw.

    Args:
        axes: (d, d), the eigenvectors in columns; None for the coordinates.
    """

    axes: Tensor | None

    @property
    def rows(self) -> int:
        return 1

    def draw(self, index: int, d: int) -> Tensor:
        amounts = self.amounts(1 + index, d)
        return (amounts if self.axes is None else self.axes @ amounts)[None]

    def amounts(self, index: int, d: int) -> Tensor:
        return torch.from_numpy(stream(1, Purpose.PATH, step=index).standard_normal(d))


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
) -> Along:
    """Compute the exact law along each eigenvector, in one run, or two where noise is drawn.

    The sampler is not checked: see `check_along`.
    """
    mean, _, axes = spectrum(data)
    direction = torch.ones_like(mean) if axes is None else axes.sum(1)
    shape = probe.sizes(data, None)
    grid = path_of(data, sampler, steps, None, times)
    levels = data.process.levels(grid)
    exact = [spectrum(data.marginal(level))[:2] for level in levels]
    last, (_, target) = levels[-1], exact[-1]

    def run(draws: int) -> tuple[probe.Probe, list[Tensor], Tensor]:
        made, way = probe.Probe(data, probe.Basis(direction[None], draws), keep=False), []
        start = end = made.inputs.draw(-1, len(mean)).reshape(2 + draws, *shape)
        path = trajectory(made, sampler, start, times=grid, noise=made.noise)
        for state, level, (m, v) in zip(path, levels[1:], exact[1:], strict=True):
            end = coordinates(state.x) if axes is None else coordinates(state.x) @ axes
            gains = end[1:] - end[0]
            shift = end[0] + gains[0] * exact[0][0] - m
            spread = gains[0].square() * exact[0][1] + gains[1:].square().sum(0) - v
            gain = level.alpha / last.alpha * target / v if draws else (target / v).sqrt()
            off = (target + gain.square() * spread).clamp(min=0).sqrt() - target.sqrt()
            way.append(torch.copysign(torch.hypot(gain * shift, off), off))
        return made, way, end

    made, way, end = run(0)
    if made.draws:
        d, draws = len(mean), len(made.draws)
        check_size((2 + draws) * d, f"{d} eigenvectors, {draws} draws")
        made, way, end = run(draws)
    gains = end[1:] - end[0]
    return Along(
        grid, len(made.calls), end[0], gains[0], gains[1:], exact[-1], data.process.prior_std,
        torch.stack(way),
    )  # fmt: skip


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
    shape, axes = probe.sizes(data, None), spectrum(data)[2]
    probe.check_affine(sampler, data, shape, steps, times)
    found = along(sampler, data, steps, times)
    inputs, d = Mixed(axes), len(found.offset)
    made = probe.run(sampler, data, inputs, shape, steps, times).end[0]
    made = made if axes is None else made @ axes
    expected = found.offset + found.start * inputs.amounts(0, d)
    for index, gain in enumerate(found.noises, 1):
        expected = expected + gain * inputs.amounts(index, d)
    if not probe.near(made, expected, sampler.claims.rounding or 1e-9):
        raise probe.NotAffine(
            f"{sampler} does not treat each eigenvector of the covariance by itself: it mixes "
            f"coordinates, as a frame with other axes does; use verify.law"
        )
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
        raise ValueError(
            f"a covariance must be (d, d), or (d,) for its eigenvalues; got shape {tuple(S.shape)}"
        )
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
