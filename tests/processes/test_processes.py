"""Processes: the published SDEs, their kernels, and the ends."""

import math
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch
from cases import PROCESSES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import EPS, EXACT_MARGINALS, SDES, marginal
from scipy.integrate import solve_ivp
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.processes import Process

TIMES = torch.tensor([1e-5, 1e-3, 0.01, 0.1, 0.25, 0.5, 0.75, 0.999], dtype=torch.float64)
TO_ONE = torch.cat([TIMES, torch.ones(1, dtype=torch.float64)])
PUBLISHED = pytest.mark.parametrize("name", SDES)
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@dataclass(frozen=True)
class Users(Process):
    """A user's process: two formulas, nothing else. dx = -2 x dt + 2 dW."""

    def log_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return -2.0 * t

    def variance(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.expm1(-4.0 * t)


@PUBLISHED
def test_drift_and_diffusion_are_the_published_ones(name):
    process, (drift, diffusion2) = PROCESSES[name], SDES[name]
    t = TO_ONE[process.t_max >= TO_ONE]
    rates = [[drift(u), diffusion2(u)] for u in t.tolist()]
    expected = torch.tensor(rates, dtype=torch.float64).T
    assert_close(process.drift(t), expected[0], rtol=1e-10, atol=0)
    assert_close(process.diffusion(t) ** 2, expected[1], rtol=1e-10, atol=0)


@PUBLISHED
@settings(max_examples=50, deadline=None)
@given(t=st.floats(1e-5, 0.999))
def test_rates_and_marginals_are_the_published_ones_at_any_time(name, t):
    process, (drift, diffusion2) = PROCESSES[name], SDES[name]
    alpha, variance = marginal(name)(t)
    assert float(process.drift(t)) == pytest.approx(drift(t), rel=1e-10)
    assert float(process.diffusion(t) ** 2) == pytest.approx(diffusion2(t), rel=1e-10)
    assert float(process.alpha(t)) == pytest.approx(alpha, rel=1e-10, abs=0)
    assert float(process.sigma(t) ** 2) == pytest.approx(variance, rel=1e-10, abs=0)


def test_a_users_two_formulas_give_the_ou_sde():
    assert_close(Users().drift(TIMES), torch.full_like(TIMES, -2), rtol=1e-12, atol=0)
    assert_close(Users().diffusion(TIMES), torch.full_like(TIMES, 2), rtol=1e-12, atol=0)


@PUBLISHED
def test_marginals_solve_the_published_sde(name):
    """d log alpha = f dt and d sigma^2 = (2 f sigma^2 + g^2) dt, integrated by DOP853 at 1e-13."""
    process, (drift, diffusion2) = PROCESSES[name], SDES[name]

    def slope(t, state):
        return [drift(t), 2 * drift(t) * state[1] + diffusion2(t)]

    for t in (1e-5, 1e-2, 0.3, 0.9):
        solved = solve_ivp(slope, (0, t), [0.0, 0.0], "DOP853", rtol=1e-13, atol=1e-18).y[:, -1]
        time = torch.tensor(t, dtype=torch.float64)
        assert_close(process.log_alpha(time).item(), float(solved[0]), rtol=1e-10, atol=0)
        assert_close(process.variance(time).item(), float(solved[1]), rtol=1e-10, atol=0)


@PUBLISHED
def test_drift_and_diffusion_are_refused_where_they_are_not_defined(name):
    process = PROCESSES[name]
    for bad in [-1e-3, math.nan] + ([1.0] if process.t_max < 1 else []):
        for rate in (process.drift, process.diffusion):
            with pytest.raises(ValueError, match=rf"of {type(process).__name__} are defined"):
                rate(bad)
    f, g2 = process.rates(torch.ones(1))
    assert bool(f.isnan()) == bool(g2.isnan()) == (process.t_max < 1)


def test_the_ou_kernel_is_exact_at_any_real_times():
    """w(t + dt) = e^(-dt) w(t) + sqrt(1 - e^(-2 dt)) eps (TTIC 31230), in plain Python floats."""
    for t in (0.0, 1e-5, 0.3, 1.0, 7.25):
        assert float(sd.OU(1.0).alpha(t)) == pytest.approx(math.exp(-t), rel=4 * EPS)
        assert float(sd.OU(1.0).sigma(t)) == pytest.approx(
            math.sqrt(-math.expm1(-2 * t)), rel=1e-15
        )
        for dt in (2.0**-40, 2.0**-10, 0.5, 3.0):  # t + dt is exact, or nearly
            a, b = sd.OU(1.0).transition(t, t + dt)
            elapsed = (t + dt) - t
            assert float(a) == pytest.approx(math.exp(-elapsed), rel=4 * EPS)
            assert float(b) == pytest.approx(math.sqrt(-math.expm1(-2 * elapsed)), rel=4 * EPS)


def test_a_constant_rate_vp_is_ou():
    s, t = TIMES[:-1], TIMES[1:]
    for ours, theirs in zip(
        sd.VP(3.0, 3.0).transition(s, t), sd.OU(1.5).transition(s, t), strict=True
    ):
        assert_close(ours, theirs, rtol=8 * EPS, atol=0)


@PUBLISHED
@pytest.mark.parametrize("share", [0.5, 2.0**-20, 2.0**-40])
def test_kernels_keep_their_digits_however_short(name, share):
    """a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2 with 40 digits, from the published
    marginals as elementary functions of exact binary times."""
    process, (alpha, variance) = PROCESSES[name], EXACT_MARGINALS[name]
    with mpmath.workdps(40):
        for t in (1e-5, 0.1, 0.5, 0.9):
            s = t * (1 - share)
            a, b = process.transition(s, t)
            ratio = alpha(mpmath.mpf(t)) / alpha(mpmath.mpf(s))
            b2 = variance(mpmath.mpf(t)) - ratio**2 * variance(mpmath.mpf(s))
            assert float(a) == pytest.approx(float(ratio), rel=1e-14)
            assert float(b) == pytest.approx(float(mpmath.sqrt(b2)), rel=2e-14)


@pytest.mark.parametrize("name", ["linear", "zero-snr"])
def test_float32_nodes_have_the_rates_of_the_interval_below(name):
    chain = sd.Discrete.linear() if name == "linear" else sd.Discrete.linear().zero_terminal_snr()
    i = torch.arange(1, 1000)
    betas = torch.tensor(chain.betas, dtype=torch.float64)[:999]
    rates = -1000 * torch.log1p(-betas)
    for t in (i / 1000, i.double() / 1000):
        assert_close((chain.diffusion(t) ** 2).double(), rates, rtol=1e-6, atol=0)


def test_a_half_precision_batch_is_told_its_time_in_full():
    x = torch.zeros(3, 2, dtype=torch.bfloat16)
    level = sd.Discrete.linear().level(torch.tensor([0.998, 0.999, 1.0]), x)
    assert level.alpha.dtype == torch.float32
    assert (level.t.flatten() * 1000).round().tolist() == [998, 999, 1000]
    assert level.log_snr.dtype == torch.float32


def test_schedules_take_python_floats_and_keep_the_dtype_of_tensors():
    process = sd.VP()
    for name in ("alpha", "sigma", "log_snr", "drift", "diffusion"):
        schedule = getattr(process, name)
        assert schedule(0.3).dtype == torch.float64
        assert schedule(torch.tensor([0.3])).dtype == torch.float32
        assert_close(schedule(torch.tensor([0.3])), schedule(0.3).float()[None], rtol=1e-6, atol=0)


def test_a_schedule_can_be_differentiated_in_t():
    t = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sd.Cosine().alpha(t).sum(), t)
    assert_close(slope, (sd.Cosine().drift(TIMES) * sd.Cosine().alpha(TIMES)), rtol=1e-10, atol=0)


@EVERY
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 0.999), min_size=3, max_size=3, unique=True))
def test_kernels_composed_over_a_split_equal_the_direct_one(process, times):
    """b^2 is a difference of variances: rounding leaves a few ulp of the variance, not of b^2."""
    s, r, t = (torch.tensor(time, dtype=torch.float64) for time in sorted(times))
    (a1, b1), (a2, b2), (a, b) = (process.transition(*pair) for pair in ((s, r), (r, t), (s, t)))
    assert_close(a2 * a1, a, rtol=32 * EPS, atol=0)
    bound = 32 * EPS * float(process.variance(t) + a**2)
    assert_close(b2**2 + a2**2 * b1**2, b**2, rtol=0, atol=bound)


@EVERY
def test_float32_schedules_keep_their_precision_near_data(process):
    t = TIMES.float()
    for name in ("alpha", "sigma", "drift", "diffusion"):
        ours, exact = (getattr(process, name)(value).double() for value in (t, t.double()))
        assert_close(ours, exact, rtol=1e-6, atol=0)


@EVERY
def test_a_path_starts_at_data_and_ends_at_noise(process):
    start, end = process.levels(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert (start.alpha, start.sigma, start.log_snr) == (1.0, 0.0, math.inf)
    assert end.alpha / end.sigma < 0.021  # VE's 1 / 50
    assert end.sigma == pytest.approx(process.prior_std, abs=5e-5)


@EVERY
def test_time_inverts_log_snr(process):
    """|dt| = |d log_snr| / |d log_snr / dt|, with a few ulp of log_snr's own terms."""
    t = torch.cat([TIMES, torch.tensor([1.0], dtype=torch.float64)])
    assert_close(process.time(process.log_snr(t)), t, rtol=1e-11, atol=1e-13)
    ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    assert process.time(ends).tolist() == pytest.approx([0.0, 1.0], abs=2 * EPS)


def test_bisection_finds_the_time_of_a_process_without_an_inverse():
    assert_close(Users().time(Users().log_snr(TIMES)), TIMES, rtol=1e-10, atol=1e-14)


@EVERY
def test_level_is_levels_with_the_batch_shape(process):
    t = torch.tensor([0.2, 0.9])
    x = torch.zeros(2, 3, 4, 4)
    level = process.level(t, x)
    floats = zip(*process.levels(t), strict=True)
    for field, rows in zip(level[:4], list(floats)[:4], strict=True):
        assert field.shape == (2, 1, 1, 1)
        assert field.dtype == x.dtype
        assert_close(field.flatten(), torch.tensor(rows, dtype=x.dtype))


@pytest.mark.parametrize("betas", [(0.1, 0.2, 0.3), (0.1, 0.4, 1.0)], ids=["open", "zero-snr"])
def test_an_interpolated_chain_goes_through_its_nodes_and_time_inverts_it(betas):
    process = sd.processes.Interpolated(betas)
    nodes = torch.arange(4, dtype=torch.float64) / 3
    alpha = torch.tensor([1.0, *(math.sqrt(1 - beta) for beta in betas)], dtype=torch.float64)
    assert_close(process.alpha(nodes), alpha.cumprod(0), rtol=8 * EPS, atol=0)
    t = torch.linspace(0, 1, 31, dtype=torch.float64)
    assert_close(process.time(process.log_snr(t)), t, rtol=1e-12, atol=1e-14)
    inside = t[t <= process.t_max]
    assert bool(process.drift(inside).isfinite().all() & process.diffusion(inside).isfinite().all())
    if betas[-1] == 1:  # alpha falls in a straight line over the last interval
        last = t[t >= 2 / 3]
        assert_close(process.alpha(last), 3 * (1 - last) * alpha[:3].prod(), rtol=1e-12, atol=1e-15)


def test_discrete_is_the_chain_multiplied_out():
    """One kernel a step in plain Python floats; N roundings of 1 ulp each."""
    process = sd.Discrete.linear()
    scale, variance = 1.0, 0.0
    for i, beta in enumerate(process.betas, 1):
        scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
        t = torch.tensor(i / 1000, dtype=torch.float64)
        assert float(process.alpha(t)) == pytest.approx(scale, rel=4000 * EPS)
        assert float(process.variance(t)) == pytest.approx(variance, rel=4000 * EPS)


def test_transition_does_nothing_in_no_time_and_refuses_to_run_backward():
    t = torch.tensor(0.4, dtype=torch.float64)
    a, b = sd.VP().transition(t, t)
    assert (float(a), float(b)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="s <= t"):
        sd.VP().transition(t, t / 2)
    with pytest.raises(ValueError, match="0 <= s"):
        sd.VP().transition(-0.1, 0.5)
    with pytest.raises(ValueError, match="s=nan"):
        sd.VP().transition(math.nan, 0.5)
    with pytest.raises(ValueError, match=r"alpha\(s\) > 0"):
        sd.RectifiedFlow().transition(1.0, 1.0)


def test_perturb_has_the_marginals_moments(generator):
    n, t = 20_000, torch.tensor(0.3, dtype=torch.float64)
    x0 = torch.full((n, 2), 1.5, dtype=torch.float64)
    eps = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x = sd.VP().perturb(x0, sd.VP().level(t, x0), eps)
    alpha, sigma = float(sd.VP().alpha(t)), float(sd.VP().sigma(t))
    assert abs(x.mean() - 1.5 * alpha) < 4.5 * sigma / math.sqrt(2 * n)
    assert abs(x.var() - sigma**2) < 4.5 * sigma**2 * math.sqrt(2 / (2 * n))


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_own_grids_decrease_to_exactly_zero(process, steps):
    for start in (1.0, process.t_max):
        times = sd.grids.Usual()(process, steps, start)
        assert len(times) == steps + 1
        assert times[0] <= start
        assert times[-1] == 0
        assert bool((times.diff() < 0).all())
    assert sd.grids.Usual()(process, steps)[0] == 1


def test_a_chains_own_grids_stand_on_its_times():
    chain = sd.Discrete.linear(10)
    assert_close(
        sd.grids.Usual()(chain, 4) * 10, torch.tensor([10.0, 8, 5, 2, 0], dtype=torch.float64)
    )
    with pytest.raises(ValueError, match=r"at most 10 on a chain of 10.*grids\.Uniform"):
        sd.grids.Usual()(chain, 11)
    assert len(sd.grids.Usual()(sd.processes.interpolate(chain), 11)) == 12


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sd.VP(-0.1, 20), "beta_min"),
        (lambda: sd.VP(1.0, 0.5), "beta_min"),
        (lambda: sd.VP(0.1, math.nan), "beta_max"),
        (lambda: sd.VP("0.1", 20), "beta_min"),
        (lambda: sd.VP(True, 20), "beta_min"),
        (lambda: sd.SubVP(0.0, 20), "beta_min"),
        (lambda: sd.VE(0.5, 0.1), "sigma_min"),
        (lambda: sd.VE(-1.0, 50), "sigma_min"),
        (lambda: sd.VE(0.01, math.inf), "sigma_max"),
        (lambda: sd.EDM(0), "sigma_max"),
        (lambda: sd.EDM(math.nan), "sigma_max"),
        (lambda: sd.OU(-1.0), "rate"),
        (lambda: sd.OU(False), "rate"),
        (lambda: sd.Cosine(-0.008), "s must"),
        (lambda: sd.Cosine(None), "s must"),
        (lambda: sd.Discrete(()), "betas"),
        (lambda: sd.Discrete((1.0, 0.1)), "beta_1 = 1"),
        (lambda: sd.Discrete((0.0, 0.1)), "beta_1 = 0"),
        (lambda: sd.Discrete((0.1, -0.1)), "beta_2 = -0.1"),
        (lambda: sd.Discrete((True, False)), "betas"),
        (lambda: sd.Discrete(np.array([1, 2])), "betas"),
        (lambda: sd.Discrete("linear"), "betas"),
        (lambda: sd.Discrete(0.1), "betas"),
        (lambda: sd.Discrete([[0.1], [0.1, 0.2]]), "betas"),
        (lambda: sd.Discrete.linear(10.0), "num_steps"),
        (lambda: sd.Discrete.linear(True), "num_steps"),
        (lambda: sd.Discrete.linear(10, 0.02, 1e-4), "beta_min <= beta_max"),
        (lambda: sd.Discrete.linear(10, -1e-4, 0.02), "beta_min"),
        (lambda: sd.Discrete.linear(10, 1e-4, math.nan), "beta_max"),
        (lambda: sd.Discrete.scaled_linear(10, -1e-4), "beta_min"),
        (lambda: sd.Discrete.scaled_linear(0), "num_steps"),
        (lambda: sd.Discrete.sigmoid(10, 0.1, 2.0), "beta_max"),
        (lambda: sd.Discrete.sigmoid(10, span=0), "span"),
        (lambda: sd.Discrete.cosine(0), "num_steps"),
        (lambda: sd.Discrete.cosine(10, s=-1), "s must"),
        (lambda: sd.Discrete.cosine(10, max_beta=1.5), "max_beta"),
        (lambda: sd.Discrete.constant(10, alpha=1.5), "alpha"),
        (lambda: sd.Discrete.constant(10, alpha=1.0), "alpha must lie in"),
        (lambda: sd.Discrete.constant(0), "num_steps"),
        (lambda: sd.Discrete((0.5,)).zero_terminal_snr(), "1 step"),
        (lambda: sd.Discrete((0.1, 1.5)), "betas"),
        (lambda: sd.Discrete((0.1, math.nan)), "betas"),
        (lambda: sd.Discrete(((0.1, 0.2),)), "betas"),
        (lambda: sd.Discrete((1, 2)), "betas"),
        (lambda: sd.Discrete.linear(0), "num_steps"),
        (lambda: sd.VP().alpha(-0.5), "t must lie in"),
        (lambda: sd.VP().sigma(torch.tensor([0.1, math.nan])), "got nan"),
        (lambda: sd.Cosine().log_snr(1.5), r"t must lie in \[0, 1\]; got 1.5"),
        (lambda: sd.RectifiedFlow().transition(0.5, 1.5), "got 1.5"),
        (lambda: sd.VP().alpha("half"), "t must be a number"),
        (lambda: sd.VP().time("half"), "log_snr must be a number"),
        (lambda: sd.VP().time(math.nan), "log_snr must be a number; got nan"),
        (lambda: sd.VP().level(None, torch.zeros(1)), "t must be a number"),
        (lambda: sd.VP().level(torch.rand(2), torch.zeros(2, dtype=torch.long)), "floating"),
        (lambda: sd.VP().prior(5), "shape"),
        (lambda: sd.VP().prior((2, 0.5)), "shape"),
        (lambda: sd.VP().levels(torch.tensor([1.5])), "times"),
        (lambda: sd.VP().levels(torch.tensor([math.nan])), "times"),
        (lambda: sd.VP().level(torch.rand(3), torch.zeros(2, 1)), "t must"),
        (lambda: sd.VP().prior((2,), seeds=[1]), "seeds"),
    ],
)
def test_bad_values_are_named(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


@dataclass(frozen=True)
class Backward(Users):
    """Two formulas whose noise shrinks: no SDE has them."""

    def variance(self, t: torch.Tensor) -> torch.Tensor:
        return t * (1 - t)


def test_formulas_whose_log_snr_rises_are_refused_by_name():
    with pytest.raises(ValueError, match="log_snr of Backward must decrease"):
        Backward().drift(torch.tensor(0.9, dtype=torch.float64))


def test_derivatives_work_inside_inference_mode_and_leave_no_graph():
    with torch.inference_mode():
        t = torch.tensor([0.5], dtype=torch.float64)
        assert_close(sd.VP().drift(t), torch.tensor([-10.05 / 2], dtype=torch.float64))
    t = torch.rand(3, requires_grad=True)
    assert not any(rate.requires_grad for rate in sd.VP().rates(t))


def test_processes_are_values():
    assert sd.VP() == sd.VP()
    assert sd.Discrete((0.1, 0.2)) == sd.Discrete(torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert repr(sd.Discrete((0.1, 0.2))) == "Discrete(betas=(0.1, 0.2))"


def test_the_noise_of_a_batch_is_not_broadcast():
    (level,) = sd.VP().levels(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"eps must be shaped like x0, \(3, 2\); got \(1, 2\)"):
        sd.VP().perturb(torch.zeros(3, 2), level, torch.ones(1, 2))
