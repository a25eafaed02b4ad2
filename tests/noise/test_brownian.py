"""The path behind `seeds=`: its numbers, its law, and that every sampler follows it.

Statistical bounds are 4.5 standard errors of the estimate named in the test.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import PROCESSES
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.noise import brownian, counter
from sde_diffusion.noise.brownian import Brownian, rotated, share, span
from sde_diffusion.noise.counter import mixed, mixed_, normals, signed

VP = sd.VP()
GRID = [1.0, 0.93, 0.9, 0.6, 0.35, 0.34, 0.2, 0.1, 0.03, 0.01, 1e-4, 0.0]


def source(seeds, times=GRID, process=VP):
    return Brownian(seeds, process.u, list(times))


def walked(seeds, times=GRID, process=VP, shape=(), dtype=torch.float64, known=None):
    """The noise of every interval of a grid, (n, B, ...)."""
    like = torch.empty(len(seeds), *shape, dtype=dtype)
    path = source(seeds, times if known is None else known, process)
    return torch.stack([path(t, s, like) for t, s in pairwise(times)])


def levels_of(times, process=VP):
    return [level.u for level in process.levels(torch.tensor(times, dtype=torch.float64))]


def correlations(z):
    """Of the rows of z (k, n), in units of their standard error 1 / sqrt(n)."""
    return (torch.corrcoef(z) - torch.eye(len(z))) * math.sqrt(z.shape[1])


# ---- numbers by counting -------------------------------------------------------------------------


def test_the_words_are_those_of_splitmix64():
    """The first five of seed 1234567, as published with the reference implementation (Vigna)."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    words = [(1234567 + k * counter.GAMMA) % 2**64 for k in range(1, 6)]
    assert [mixed(word) for word in words] == published
    tensor = torch.tensor([signed(word) for word in words])
    assert mixed_(tensor).tolist() == [signed(word) for word in published]


def test_the_sine_is_the_sine():
    """Chebyshev interpolation of the series: 1e-8 with 5 terms, 2e-15 with 9; then rounding."""
    v = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    exact = math.sqrt(2) * torch.sin(math.pi / 2 * v)
    for dtype, bound in ((torch.float64, 5e-15), (torch.float32, 1e-8 + 6 * 2**-24)):
        assert (counter.quarter_sine(v.to(dtype)).double() - exact).abs().max() < bound


def drawn(n, dtype=torch.float32, first=0, width=64):
    keys = torch.arange(first, first + n // width) * signed(0xD1B54A32D192ED03)
    return normals(keys, torch.empty(n // width, width, dtype=dtype)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_normals_are_normal_to_the_tails(dtype):
    """Moments to the eighth, the share in 20 equal parts, and the share beyond 3, 4 and 5."""
    n = 2**22
    z = drawn(n, dtype).flatten()
    for power, mean in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15), (8, 105)):
        variance = math.prod(range(1, 2 * power, 2)) - mean**2  # E z^2p = (2 p - 1)!!
        assert abs((z**power).mean() - mean) < 4.5 * math.sqrt(variance / n)
    law = torch.distributions.Normal(0.0, 1.0)
    shares = torch.histc(law.cdf(z), 20, 0, 1) / n
    assert ((shares - 1 / 20).abs() < 4.5 * math.sqrt(0.05 * 0.95 / n)).all()
    for end in (3.0, 4.0, 5.0):
        p = math.erfc(end / math.sqrt(2))
        count = float((z.abs() > end).sum())
        assert abs(count - n * p) < 4.5 * math.sqrt(n * p) + 4.5
    assert z.abs().max() < 6.7  # sqrt(2 log 2^32)


def test_the_two_normals_of_a_word_are_independent():
    """Their angle is uniform in 16 parts and independent of whether their radius is large."""
    n = 2**20
    z = drawn(2 * n)
    first, second = z[:, :32].flatten(), z[:, 32:].flatten()
    far = first**2 + second**2 > 2 * math.log(2)  # the median
    angle = (torch.atan2(first, second) / math.pi + 1) * 8
    for group in (far, ~far):
        shares = torch.histc(angle[group], 16, 0, 16) / n
        assert ((shares - 1 / 32).abs() < 4.5 * math.sqrt(1 / 32 / n)).all()


def test_coordinates_rows_and_codes_are_uncorrelated_and_so_are_their_squares():
    n = 2**14
    keys = brownian.path_keys(range(n))
    like = torch.empty(n, 6)
    z = torch.cat([normals(keys + signed(mixed(code)), like) for code in range(8)], dim=1).double()
    for values in (z.T, z.T**2, z.reshape(-1, n)):
        assert correlations(values).abs().max() < 5.5  # 1,128 pairs: 4.5, and 1 for their number


def test_a_float64_batch_has_the_numbers_of_a_float32_one_and_more_digits():
    """z = r s: float32 rounds u, and so r^2 / 2, by 2^-24 of itself and s by a few; and it does
    without the bits of u = e^(-r^2 / 2) below 2^-31."""
    z32, z64 = drawn(2**20, torch.float32), drawn(2**20, torch.float64)
    r = (z64[:, :32] ** 2 + z64[:, 32:] ** 2).sqrt().repeat(1, 2)
    bound = 2**-24 * (1 / r + 8 * r) + 2**-31 * (r**2 / 2).exp() / r
    assert ((z32 - z64).abs() <= bound).all()
    digits = z64.flatten()[:1000].float().double() != z64.flatten()[:1000]
    assert digits.double().mean() > 0.99


# ---- the law of the path -------------------------------------------------------------------------


def test_a_rotation_keeps_what_it_splits():
    """sqrt(r) noise + sqrt(1 - r) data = z, and both are as large as z and n together."""
    z, n = drawn(256, torch.float64, first=1), drawn(256, torch.float64, first=9)
    for r in (0.0, 1e-9, 0.3, 1.0):
        noise, data = rotated(z, n.clone(), r, 1 - r)
        assert_close(math.sqrt(r) * noise + math.sqrt(1 - r) * data, z)
        assert_close(noise**2 + data**2, z**2 + n**2)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_the_length_of_an_interval_is_the_change_of_the_share_of_signal(process):
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    kappa = process.alpha(t) ** 2 / (process.alpha(t) ** 2 + process.sigma(t) ** 2)
    u = levels_of(t.tolist(), process)
    for i, j in ((8, 7), (7, 3), (5, 4), (8, 0)):
        assert_close(span(u[i], u[j]), float(kappa[j] - kappa[i]), rtol=1e-9, atol=1e-14)
        assert_close(share(u[i], u[j], u[8], u[0]), span(u[i], u[j]) / span(u[8], u[0]))


@pytest.mark.parametrize("known", [GRID, [1.0, 0.0], [1.0, 0.5, 0.0]], ids=["all", "none", "other"])
def test_increments_are_standard_normal_and_independent_whatever_the_grid(known):
    """Also if the times are not known in advance: mean, variance, pairs."""
    n = 20_000
    z = walked(range(n), known=known)
    assert (z.mean(1).abs() < 4.5 / math.sqrt(n)).all()
    assert ((z.var(1) - 1).abs() < 4.5 * math.sqrt(2 / n)).all()
    assert correlations(z).abs().max() < 4.5
    assert correlations(z**2).abs().max() < 4.5


def test_the_start_and_the_path_of_one_seed_are_independent():
    n = 20_000
    start = VP.prior((n,), seeds=range(n), dtype=torch.float64)
    z = torch.cat([start[None], walked(range(n))])
    assert correlations(z)[0].abs().max() < 4.5


def increments(seeds, times, process=VP, **how):
    """What is walked over each interval: noise times the root of its length."""
    u = levels_of(times, process)
    lengths = torch.tensor([span(high, low) for high, low in pairwise(u)], dtype=torch.float64)
    return lengths.sqrt()[:, None] * walked(seeds, times, process, **how)


def test_increments_add_up():
    """Over the same grid, one interval at a time or several in one."""
    parts = increments(range(50), GRID)
    for first, last in ((0, 2), (1, 5), (4, 11), (0, 11)):
        whole = increments(range(50), [GRID[first], GRID[last]], known=GRID)
        assert_close(parts[first:last].sum(0), whole[0], rtol=1e-12, atol=1e-12)


def test_any_interval_alone_is_the_one_of_the_walk():
    z, like = walked(range(9)), torch.empty(9, dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(GRID)):
        assert torch.equal(source(range(9))(t, s, like), z[i])


def at_dyadic_u(n, process):
    """Times at which u is k / n, k = n .. 0."""
    u = torch.arange(n, 0, -1, dtype=torch.float64) / n
    times = process.time(2 * ((1 - u) / u).log())
    return [*times.tolist(), 0.0]


def test_grids_of_dyadic_levels_see_one_path():
    """Of rectified flow, whose u is t: the same numbers, however many steps."""
    flow = sd.RectifiedFlow()
    fine = increments(range(20), at_dyadic_u(64, flow), flow).cumsum(0)
    for n in (4, 8, 16, 32):
        coarse = increments(range(20), at_dyadic_u(n, flow), flow).cumsum(0)
        shared = fine[64 // n - 1 :: 64 // n]
        assert_close(coarse, shared, rtol=1e-11, atol=1e-11)


def test_two_grids_see_the_path_differently_only_within_a_step():
    """E |W - W'|^2 at shared times falls like the step: slope 1, on five pairs of grids."""
    sizes, gaps = [12, 24, 48, 96, 192], []
    flow = sd.RectifiedFlow()
    for n in sizes:
        grids = ([k / m for k in range(m, -1, -1)] for m in (n, 2 * n))
        coarse, fine = (increments(range(500), grid, flow).cumsum(0) for grid in grids)
        gaps.append(float((coarse - fine[1::2])[:-1].square().mean()))
    slope = np.polyfit(np.log(sizes), np.log(gaps), 1)[0]
    assert -1.3 < slope < -0.7


def test_processes_share_the_path():
    """At the same levels the noise is the same, to the rounding of the inverse of log-SNR."""
    u = torch.tensor([0.95, 0.8, 0.5, 0.3, 0.1, 0.01], dtype=torch.float64)
    made = []
    for name in ("vp", "ve", "cosine", "rectified-flow", "edm"):
        process = PROCESSES[name]
        times = [*process.time(2 * ((1 - u) / u).log()).tolist(), 0.0]
        made.append(walked(range(8), times, process))
    for other in made[1:]:
        assert_close(other, made[0], rtol=1e-6, atol=1e-6)


# ---- who sees which numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (1, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_noise_is_bit_equal_at_any_batch_size_split_and_place(shape, dtype):
    seeds = [7 * k for k in range(64)]
    whole = walked(seeds, shape=shape, dtype=dtype)
    assert whole.dtype == dtype
    for size in (16, 5, 1):
        parts = [walked(seeds[k : k + size], shape=shape, dtype=dtype) for k in range(0, 64, size)]
        assert torch.equal(whole, torch.cat(parts, dim=1))
    assert torch.equal(whole.flip(1), walked(seeds[::-1], shape=shape, dtype=dtype))


def test_seeds_purposes_intervals_and_coordinates_are_all_different_numbers():
    z = walked(range(8), shape=(4,)).flatten()
    assert len(z.unique()) == z.numel()


def test_a_source_asked_again_about_the_same_times_draws_anew():
    """As a corrector or resampling does; and so are intervals without length."""
    n = 20_000
    like = torch.empty(n, dtype=torch.float64)
    path, other = source(range(n)), source(range(n))
    again = [path(t, s, like) for t, s in ((0.9, 0.2), (0.9, 0.2), (1.0, 0.0), (0.35, 0.1))]
    here = [path(0.1, 0.1, like) for _ in range(3)]
    z = torch.stack([*again, *here])
    assert ((z.var(1) - 1).abs() < 4.5 * math.sqrt(2 / n)).all()
    assert correlations(z).abs().max() < 4.5
    assert torch.equal(other(0.9, 0.2, like), again[0])  # the first path is the seeds' own


def test_another_type_or_shape_is_another_view_of_the_same_path():
    like = torch.empty(3, 2, dtype=torch.float64)
    path, plain = source(range(3)), walked(range(3), shape=(2,))
    first = path(1.0, 0.93, like.float())
    assert_close(first.double(), plain[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(path(0.93, 0.9, like), plain[1])


@pytest.mark.parametrize(
    ("process", "times"),
    [
        (sd.VP(), [1.0, 1e-170, 0.0]),
        (sd.EDM(), [1.0, 1e-170, 1e-180, 0.0]),
        (sd.OU(rate=1000.0), [1.0, 0.9, 0.8, 0.3, 1e-3, 0.0]),
        (sd.Discrete.linear().zero_terminal_snr(), [1.0, 0.9995, 0.999, 0.5, 0.0]),
    ],
    ids=["vp", "edm", "ou", "zero-snr"],
)
def test_the_ends_where_levels_underflow_have_independent_noise_too(process, times):
    n = 5000
    z = walked(range(n), times, process)
    assert ((z.var(1) - 1).abs() < 4.5 * math.sqrt(2 / n)).all()
    assert correlations(z).abs().max() < 4.5


def test_what_lies_ahead_does_not_grow_with_the_steps():
    """One interval for each halving of [0, 1], at most two more."""
    like = torch.empty(1)
    for n in (100, 4000):
        times, most = torch.linspace(1, 0, n + 1, dtype=torch.float64).tolist(), 0
        path = source([0], times, sd.RectifiedFlow())
        for t, s in pairwise(times):
            path(t, s, like)
            most = max(most, len(path.ahead))
        assert most <= math.log2(n) + 2


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_a_wrong_number_of_seeds_is_refused(seeds):
    with pytest.raises(ValueError, match=f"one seed per sample; got {len(seeds)} for a batch of 2"):
        source(seeds)(1.0, 0.0, torch.empty(2, 3))


def test_batches_without_samples_or_coordinates():
    assert source([])(1.0, 0.0, torch.empty(0, 3)).shape == (0, 3)
    assert source([1, 2])(1.0, 0.0, torch.empty(2, 0)).shape == (2, 0)


def test_the_global_generators_are_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    walked(range(3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


@pytest.mark.gpu
def test_the_noise_of_a_gpu_is_that_of_the_cpu_and_makes_it_wait_for_nothing():
    """Logarithm, root and polynomial round otherwise there, by a few units."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        like = torch.empty(64, 3, dtype=dtype, device="cuda")
        path = source(range(64))
        try:
            torch.cuda.set_sync_debug_mode("error")
            there = [path(t, s, like) for t, s in pairwise(GRID)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        here = walked(range(64), shape=(3,), dtype=dtype)
        assert_close(torch.stack(there).cpu(), here, rtol=bound, atol=bound)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_an_empty_batch_draws_nothing(shape, dtype):
    drawn = source(range(shape[0]))(1.0, 0.5, torch.empty(shape, dtype=dtype))
    assert drawn.shape == shape
    assert drawn.dtype == dtype


@pytest.mark.parametrize("grid", [sd.grids.Uniform(), sd.grids.Power(1.25)], ids=str)
@pytest.mark.parametrize("n", [8, 32])
def test_the_whole_increment_is_exact_and_its_parts_nearly_so_on_any_number_of_steps(n, grid):
    """An increment over one of N steps, and the sum over the two of 2 N steps in its place.

    The whole is compared where a path begins at u = 1. VP begins at u = 0.993, so that the rest
    above it is cut off at a node of each grid.
    """
    seeds = range(2000)

    def both(process):
        times, made = grid(process, 2 * n).tolist(), []
        for nodes in (times[::2], times):
            u = levels_of(nodes, process)
            lengths = torch.tensor([span(a, b) for a, b in pairwise(u)], dtype=torch.float64)
            made.append(walked(seeds, nodes, process) * lengths.sqrt()[:, None])
        return made[0], made[1].reshape(n, 2, -1).sum(1)

    coarse, fine = both(sd.RectifiedFlow())
    assert_close(coarse.sum(0), fine.sum(0), rtol=0, atol=1e-12)
    pairs = zip(*both(VP), strict=True)
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    error = (1 - 0.8**2) / math.sqrt(len(seeds))
    assert 0.8 - 4.5 * error < r.median() < 0.9 + 4.5 * error
    assert r.min() > 0.3
