r"""Decreasing grids: plain numbers that know no process, and the best times for a spectrum.

A grid of n steps has n + 1 entries, from noise to data; the last one is 0.
"""

import math

import numpy as np
import torch
from numpy.polynomial.chebyshev import chebvander
from torch import Tensor

from sde_diffusion import errors, frames
from sde_diffusion.exact import Gaussian
from sde_diffusion.processes import Process
from sde_diffusion.sampling import Sampler
from sde_diffusion.spacings import karras, power, uniform
from sde_diffusion.verify import spectra

__all__ = ["karras", "optimized", "power", "uniform"]

SHAPES = 6  # numbers that shape a grid: more fit the errors of one spectrum, on no other data
POWERS = (1.0, 1.25, 1.5, 2.0)
BEST = 2  # starts that are followed: from all of them the cost is less by 1 % at most
TRIALS = 12  # of the shapes, each with its gradient; by then it falls by 0.5 % at most
FURTHEST = 2.0  # |c|: twice that far in a logarithm, steps are as good as none
OCTAVE = 4  # variances to an octave


def optimized(
    sampler: Sampler, steps: int, covariance: Gaussian | Tensor, process: Process | None = None
) -> Tensor:
    r"""The times (n + 1,), float64, of the least W2 on Gaussian data of this spectrum.

    Errors of opposite sign cancel in a sum over the steps, at one eigenvalue or two for almost any
    grid: W2 alone has minima that are worth nothing on other data. So the least is sought of

        sum_i w_i (d_n(v_i)^2 + 1/n sum_(k < n) d_k(v_i)^2)

    d_k the exact W2 with which a run would end if the exact flow took over after step k, d_n that
    of the whole run, from the data's exact law at the first time; and v_i are all variances within
    an octave of an eigenvalue, weighed by their number. A grid is shaped by at most 6 numbers c,

        log(u_i - u_(i+1)) = that of the start + sum_k c_k T_k(2 i / (n - 1) - 1) + constant,

    T_k Chebyshev's polynomials, u = sigma / (alpha + sigma); least squares (Branch et al. 1999, in
    scipy) from the two best of: the sampler's own grid, u^(1/p) evenly spaced, the log-SNR evenly
    spaced, the levels of Karras et al. 2022. No network is asked, and no random number drawn.

    Args:
        sampler: with fixed steps, and alike in all coordinates: one in a Gaussian frame is not.
        steps: n.
        covariance: of the data (d, d), or its eigenvalues (d,), or an exact.Gaussian.
        process: a continuous one, by default the data's, or VP for a covariance; a chain has no
            levels between its times.
    Raises:
        NotAffine: naming the sampler, if it has no exact law.
    """
    from scipy.optimize import least_squares

    errors.integer("steps", steps)
    data = spectra.on_process(covariance, sampler, process)
    process = data.process
    if process.first_time > 0:
        raise ValueError(
            "a chain's grids stand on its own times; use equivalence.continuous(process)"
        )
    data, weights = blurred(spectra.spectrum(data)[1], process)
    spectra.check(sampler, data, steps)

    def residuals(times: Tensor) -> np.ndarray:
        way = weights.sqrt() * spectra.along(sampler, data, times=times).way
        way[:-1] /= steps**0.5
        return way.flatten().numpy()

    def cost(times: Tensor) -> float:
        return float(np.linalg.norm(residuals(times)))

    tried = sorted(starts(sampler, steps, process), key=cost)
    shapes = chebvander(np.linspace(-1, 1, steps), min(SHAPES, steps - 1))[:, 1:]
    for start in tried[:BEST] if steps > 1 else ():
        lengths = increments(start, process)

        def bent(c: np.ndarray, start: Tensor = start, lengths: Tensor = lengths) -> Tensor:
            return of_increments(lengths * torch.from_numpy(shapes @ c).exp(), start, process)

        found = least_squares(
            lambda c, bent=bent: residuals(bent(c)), np.zeros(shapes.shape[1]),
            bounds=(-FURTHEST, FURTHEST), diff_step=1e-4, max_nfev=TRIALS,
        )  # fmt: skip
        tried.append(bent(found.x))
    return min(tried, key=cost)


def starts(sampler: Sampler, steps: int, process: Process) -> list[Tensor]:
    """Grids of the shapes in use, from the level at which the sampler begins."""
    own = sampler.grid(process, steps)
    begin = own[0].item()
    made = [own, *(frames.grid(process, steps, p, begin=begin) for p in POWERS)]
    levels_of_karras = Process.times(process, steps, begin)
    made += [levels_of_karras, even_log_snr(levels_of_karras, process)]
    return [times for times in made if len(times) == steps + 1 and times[0] == begin]


def even_log_snr(times: Tensor, process: Process) -> Tensor:
    """The grid evenly spaced in the log-SNR between the first and the last level above 0.

    The first below pure noise, that is: sigma / alpha = 80 and 0.002 in the levels of Karras et al.
    """
    log_snr = process.log_snr(times[:-1])
    first = min(int(log_snr[0] < -2 * math.log(80.001)), len(log_snr) - 1)
    even = torch.linspace(
        log_snr[first].item(), log_snr[-1].item(), len(log_snr) - first, dtype=torch.float64
    )
    return torch.cat([times[:first], process.time(even), times[-1:]])


def increments(times: Tensor, process: Process) -> Tensor:
    """u_i - u_(i+1), (n,)."""
    u = torch.tensor([level.u for level in process.levels(times)], dtype=torch.float64)
    return -u.diff()


def of_increments(lengths: Tensor, start: Tensor, process: Process) -> Tensor:
    """Times whose steps in u are in these proportions, between the ends of another grid."""
    u = lengths.flip(0).cumsum(0).flip(0)  # summed from the data, where u is small
    (top,) = process.levels(start[:1])
    times = process.time(frames.Straight().log_snr(u / u[0] * top.u))
    times[0] = start[0]
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def blurred(variances: Tensor, process: Process) -> tuple[Gaussian, Tensor]:
    """Data with each variance up to an octave from one of these, and their shares, (d,)."""
    places = (OCTAVE * variances.log2()).round()[:, None]
    places = (places + torch.arange(-OCTAVE, OCTAVE + 1)).flatten()
    places, counts = places.unique(return_counts=True)
    return spectra.centred(2 ** (places / OCTAVE), process), counts.double() / counts.sum()
