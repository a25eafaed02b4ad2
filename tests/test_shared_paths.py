"""Samplers on one Brownian path per seed: strong convergence, and what can be built on it.

Statistical bounds are 4.5 standard errors of the estimate named in the test.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import gaussian

import sde_diffusion as sd
from sde_diffusion.noise.sources import Seeded

VP = sd.VP()
N = 1000
MEANS = torch.tensor([[-1.2, 0.8], [0.4, -1.2], [1.3, 0.6]], dtype=torch.float64)
MIXTURE = sd.exact.GaussianMixture(VP, [0.4, 0.35, 0.25], MEANS, [0.05] * 3)
START = VP.prior((N, 2), seeds=range(N), dtype=torch.float64)


def rms(x):
    return float(x.square().mean().sqrt())


# DDPM on VP is left out: it adds no noise in its last step, from sigma(1 / n) = O(n^-1/2).
STRONG = {
    "euler-maruyama on vp": (sd.EulerMaruyama(), sd.VP(), [32, 64, 128, 256]),
    "ancestral on ve": (sd.Ancestral(), sd.VE(), [32, 64, 128, 256]),
}


@pytest.mark.parametrize(("sampler", "process", "sizes"), STRONG.values(), ids=STRONG.keys())
def test_samples_converge_strongly_at_order_one(sampler, process, sizes):
    """Against 4,096 steps on the same paths: additive noise makes Euler's rule of order 1."""
    model, n = gaussian(process), 300
    x = process.prior((n, 1), seeds=range(n), dtype=torch.float64)
    exact = sd.sample(model, sampler, x, steps=4096, seeds=range(n))
    gaps = [rms(sd.sample(model, sampler, x, steps=k, seeds=range(n)) - exact) for k in sizes]
    slope = np.polyfit(np.log(sizes), np.log(gaps), 1)[0]
    assert -1.2 < slope < -0.8
    other = sd.sample(model, sampler, x, steps=sizes[0], seeds=range(n, 2 * n))
    assert gaps[0] < rms(other - exact) / 5


@pytest.mark.parametrize("sampler", [sd.Ancestral(), sd.EulerMaruyama()], ids=str)
def test_20_and_40_steps_draw_the_same_picture(sampler):
    """Half of the distances are below a tenth of that of two seeds; few end in another mode."""
    a, b = (sd.sample(MIXTURE, sampler, START, steps=n, seeds=range(N)) for n in (20, 40))
    other = sd.sample(MIXTURE, sampler, START, steps=20, seeds=range(N, 2 * N))
    same, different = (a - b).norm(dim=1), (a - other).norm(dim=1)
    assert same.median() < different.median() / 10
    # 1.2 is half of the distance between two modes, 0.22 the width of one.
    assert (same > 1.2).double().mean() < (different > 1.2).double().mean() / 10


@pytest.mark.parametrize("sampler", [sd.DPMSolver(2, eta=1.0), sd.VelocityMultistep()], ids=str)
def test_of_a_stochastic_multistep_method_20_and_40_steps_differ_by_a_fifth_of_two_seeds(sampler):
    """In root mean square, that is with the few that end in another mode, at eta = 1."""
    n = 4000
    x = VP.prior((n, 2), seeds=range(n), dtype=torch.float64)
    a, b = (sd.sample(MIXTURE, sampler, x, steps=k, seeds=range(n)) for k in (20, 40))
    other = sd.sample(MIXTURE, sampler, x, steps=20, seeds=range(n, 2 * n))
    assert rms(a - b) < rms(a - other) / 5


def squares(sizes, n):
    """x_0^2 of Euler-Maruyama on the same n paths, by the number of steps; and E x_0^2."""
    model = gaussian(VP)
    x = VP.prior((n, 1), seeds=range(n), dtype=torch.float64)
    made = {k: sd.sample(model, sd.EulerMaruyama(), x, steps=k, seeds=range(n)) for k in sizes}
    mean, covariance = model.reverse_sde()
    return {k: x**2 for k, x in made.items()}, float(mean**2 + covariance)


def test_a_richardson_estimate_is_one_line():
    """2 f_2n - f_n has no bias of first order, and hardly more variance than f: on paths of their
    own 4 + 1 times as much. The bias itself, f_2n - f_n, is seen where it would drown in noise."""
    n = 4000
    f, exact = squares((16, 32), n)
    estimate, bias = 2 * f[32] - f[16], f[32] - f[16]
    assert abs(estimate.mean() - exact) < 4.5 * estimate.std() / math.sqrt(n)
    assert abs(bias.mean()) > 4.5 * bias.std() / math.sqrt(n)
    assert estimate.var() < 1.5 * f[32].var()


def test_a_multilevel_estimate_is_one_line():
    """Var(f_2n - f_n) falls like n^-2 for the strong order 1 (Giles 2008), so the levels cost less
    and less: f_16 + (f_32 - f_16) + ..., each mean over fewer paths."""
    sizes = [16, 32, 64, 128, 256]
    f, exact = squares(sizes, 1500)
    corrections = [f[2 * n] - f[n] for n in sizes[:-1]]
    variances = [float(correction.var()) for correction in corrections]
    slope = np.polyfit(np.log(sizes[:-1]), np.log(variances), 1)[0]
    assert -2.4 < slope < -1.6
    ends = [0, 1000, 1300, 1400, 1450, 1500]  # each level on paths of its own
    paths = [slice(first, last) for first, last in pairwise(ends)]
    levels = [value[rows] for value, rows in zip([f[16], *corrections], paths, strict=True)]
    estimate = sum(level.mean() for level in levels)
    error = math.sqrt(sum(level.var() / len(level) for level in levels))
    assert abs(estimate - exact) < 4.5 * error
    # As good as 256 steps on 500 paths, for 69,000 calls instead of 128,000.
    assert error < float(f[256].std()) / math.sqrt(500)


def test_independent_noise_by_seed_is_still_to_be_had():
    """Injected: with it 20 and 40 steps have nothing in common but the start."""
    a, b = (
        sd.sample(MIXTURE, sd.Ancestral(), START, steps=n, noise=Seeded(range(N))) for n in (20, 40)
    )
    other = sd.sample(MIXTURE, sd.Ancestral(), START, steps=20, noise=Seeded(range(N, 2 * N)))
    assert (a - b).norm(dim=1).median() > (a - other).norm(dim=1).median() / 2
