"""The best times for a spectrum."""

import numpy as np
import torch
from numpy.polynomial.chebyshev import chebvander
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.grids import Power, frames
from sde_diffusion.models.exact import Gaussian
from sde_diffusion.processes import Process
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.verify import spectra

__all__ = ["optimized"]

SHAPES = 6  # numbers that shape a grid: more fit the errors of one spectrum, on no other data
POWERS = (1.0, 1.25, 1.5, 2.0)
BEST = 2  # starts that are followed: from all of them the cost is less by 1 % at most
TRIALS = 12  # of the shapes, each with its gradient; by then it falls by 0.5 % at most
FURTHEST = 2.0  # |c|: twice that far in a logarithm, steps are as good as none
OCTAVE = 4  # variances to an octave


def optimized(
    sampler: Sampler, steps: int, covariance: Gaussian | Tensor, process: Process | None = None
) -> Tensor:
    r"""Return the times (n + 1,), float64, of the least W2 on Gaussian data of this spectrum.

    Errors of opposite sign cancel in a sum over the steps, and almost any grid can be bent until
    they do so at a few eigenvalues: with 5 steps of Adams, W2 alone fell a million times, while on
    mixtures of that covariance the error rose by 1.7. So the least is sought of

        sum_i w_i (d_n(v_i)^2 + 1/n sum_(k < n) d_k(v_i)^2)

    d_k the exact W2 with which a run would end if the exact flow (where noise is drawn, the exact
    reverse SDE) took over after step k, d_n that of the whole run, from the data's exact law at the
    first time; v_i are all variances within an octave of an eigenvalue, weighed by their number. A
    grid is shaped by at most 6 numbers c,

        log(u_i - u_(i+1)) = that of the start + sum_k c_k T_k(2 i / (n - 1) - 1) + constant,

    T_k Chebyshev's polynomials, u = sigma / (alpha + sigma); least squares (Branch et al. 1999, in
    scipy) from the two best of the sampler's own grid and those even in u^(1/p). No network is
    called, and no random number drawn.

    It is a grid for Gaussians. Other data have modes that part at some level, which no eigenvalue
    shows: with 50 steps of Adams the log-SNR in even steps is as good for Gaussians as any grid,
    and on mixtures 18 times worse than Adams' own. So the search begins at no such grid. On nine
    mixtures (experiments/benchmarks/optimized_grids.py, seed 0) the RMS of the end, optimized for
    their covariance, by that on the best of five grids in use was, at 5, 10, 20 and 50 steps,

        Ancestral(eta=0)    0.86  0.81  0.81  0.78
        Heun                0.61  0.52  0.55  0.55
        Adams.auto          1.21  0.84  1.47  0.98

    and on the twelve of seeds 1 and 2 with d = 2 and 8 0.67 to 0.88, 0.68 to 1.11 and 1.0 to 3.8:
    it pays for the first two, and not for Adams, whose own grid was found on mixtures.

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

    validate.integer("steps", steps)
    data = spectra.on_process(covariance, sampler, process)
    process = data.process
    if process.chain_steps is not None:
        raise ValueError(
            "a chain's grids stand on its own times; use equivalence.continuous(process)"
        )
    data, weights = blurred(spectra.spectrum(data)[1], process)
    spectra.check_along(sampler, data, steps)

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
    """Return the sampler's own grid and those even in u^(1/p) from its first level."""
    own = sampler.grid(process, steps)
    even = [Power(p)(process, steps, own[0].item()) for p in POWERS]
    return [own, *even] if len(own) == steps + 1 else even


def increments(times: Tensor, process: Process) -> Tensor:
    """u_i - u_(i+1), (n,)."""
    u = torch.tensor([level.u for level in process.levels(times)], dtype=torch.float64)
    return -u.diff()


def of_increments(lengths: Tensor, start: Tensor, process: Process) -> Tensor:
    """Return times with steps in u of these proportions, between the ends of another grid."""
    u = lengths.flip(0).cumsum(0).flip(0)  # summed from the data, where u is small
    (top,) = process.levels(start[:1])
    times = process.time(frames.Straight().log_snr(u / u[0] * top.u))
    times[0] = start[0]
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def blurred(variances: Tensor, process: Process) -> tuple[Gaussian, Tensor]:
    """Return data with each variance up to an octave from one of these, and shares, (d,)."""
    places = (OCTAVE * variances.log2()).round()[:, None]
    places = (places + torch.arange(-OCTAVE, OCTAVE + 1)).flatten()
    places, counts = places.unique(return_counts=True)
    return spectra.centred(2 ** (places / OCTAVE), process), counts.double() / counts.sum()
