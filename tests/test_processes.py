"""Processes: the published SDEs, their kernels, and the ends."""

import math
from dataclasses import dataclass

import pytest
import torch
from cases import PROCESSES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import EPS, vp_beta
from scipy.integrate import solve_ivp
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.processes import Process

TIMES = torch.tensor([1e-5, 1e-3, 0.01, 0.1, 0.3, 0.7, 0.999], dtype=torch.float64)
TO_ONE = torch.cat([TIMES, torch.ones(1, dtype=torch.float64)])
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@dataclass(frozen=True)
class OU(Process):
    """A user's process: two formulas, nothing else. dx = -2 x dt + 2 dW."""

    def log_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return -2.0 * t

    def variance(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.expm1(-4.0 * t)


def test_vp_drift_and_diffusion_are_the_published_ones():
    beta = vp_beta(TO_ONE)
    assert_close(sd.VP().diffusion(TO_ONE) ** 2, beta, rtol=1e-10, atol=0)
    assert_close(sd.VP().drift(TO_ONE), -beta / 2, rtol=1e-10, atol=0)


def test_rectified_flow_drift_and_diffusion_follow_from_the_straight_path():
    t = TIMES
    assert_close(sd.RectifiedFlow().drift(t), -1 / (1 - t), rtol=1e-10, atol=0)
    assert_close(sd.RectifiedFlow().diffusion(t) ** 2, 2 * t / (1 - t), rtol=1e-10, atol=0)


def test_a_users_two_formulas_give_the_ou_sde():
    assert_close(OU().drift(TIMES), torch.full_like(TIMES, -2), rtol=1e-12, atol=0)
    assert_close(OU().diffusion(TIMES), torch.full_like(TIMES, 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("process", "drift", "diffusion2"),
    [
        (sd.VP(), lambda t: -vp_beta(t) / 2, vp_beta),
        (sd.RectifiedFlow(), lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
    ],
    ids=["vp", "rectified"],
)
def test_marginals_solve_the_published_sde(process, drift, diffusion2):
    """d log alpha = f dt and d sigma^2 = (2 f sigma^2 + g^2) dt, integrated by DOP853 at 1e-13."""

    def slope(t, state):
        return [drift(t), 2 * drift(t) * state[1] + diffusion2(t)]

    for t in (1e-5, 1e-2, 0.3, 0.9):
        solved = solve_ivp(slope, (0, t), [0.0, 0.0], "DOP853", rtol=1e-13, atol=1e-18).y[:, -1]
        time = torch.tensor(t, dtype=torch.float64)
        assert_close(process.log_alpha(time).item(), float(solved[0]), rtol=1e-10, atol=0)
        assert_close(process.variance(time).item(), float(solved[1]), rtol=1e-10, atol=0)


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
    assert end.alpha < 7e-3
    assert end.sigma == pytest.approx(1, abs=3e-5)


@EVERY
def test_time_inverts_log_snr(process):
    """|dt| = |d log_snr| / |d log_snr / dt|, with a few ulp of log_snr's own terms."""
    t = torch.cat([TIMES, torch.tensor([1.0], dtype=torch.float64)])
    assert_close(process.time(process.log_snr(t)), t, rtol=1e-11, atol=1e-13)
    ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    assert process.time(ends).tolist() == pytest.approx([0.0, 1.0], abs=2 * EPS)


def test_bisection_finds_the_time_of_a_process_without_an_inverse():
    assert_close(OU().time(OU().log_snr(TIMES)), TIMES, rtol=1e-10, atol=1e-14)


@EVERY
def test_level_is_levels_with_the_batch_shape(process):
    t = torch.tensor([0.2, 0.9])
    x = torch.zeros(2, 3, 4, 4)
    level = process.level(t, x)
    for field, rows in zip(level, zip(*process.levels(t), strict=True), strict=True):
        assert field.shape == (2, 1, 1, 1)
        assert field.dtype == x.dtype
        assert_close(field.flatten(), torch.tensor(rows, dtype=x.dtype))


def test_discrete_is_the_chain_multiplied_out():
    """One kernel a step in plain Python floats; N roundings of 1 ulp each."""
    process = sd.Discrete.linear()
    scale, variance = 1.0, 0.0
    for i, beta in enumerate(process.betas, 1):
        scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
        t = torch.tensor(i / 1000, dtype=torch.float64)
        assert float(process.alpha(t)) == pytest.approx(scale, rel=4000 * EPS)
        assert float(process.variance(t)) == pytest.approx(variance, rel=4000 * EPS)


def test_discrete_linear_is_the_published_table():
    alpha_bar = sd.Discrete.linear().alpha(torch.ones((), dtype=torch.float64)) ** 2
    assert float(alpha_bar) == pytest.approx(4.0358297653756835e-05, rel=1e-9)


def test_transition_does_nothing_in_no_time_and_refuses_to_run_backward():
    t = torch.tensor(0.4, dtype=torch.float64)
    a, b = sd.VP().transition(t, t)
    assert (float(a), float(b)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="s <= t"):
        sd.VP().transition(t, t / 2)


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
        times = process.times(steps, start)
        assert len(times) == steps + 1
        assert times[0] <= start
        assert times[-1] == 0
        assert bool((times.diff() < 0).all())
    assert process.times(steps)[0] == 1


def test_a_chains_own_grids_stand_on_its_times():
    chain = sd.Discrete.linear(10)
    assert_close(chain.times(4) * 10, torch.tensor([10.0, 8, 5, 2, 0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"equivalence\.continuous"):
        chain.times(11)
    assert len(sd.continuous(chain).times(11)) == 12


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sd.VP(-0.1, 20), "beta_min"),
        (lambda: sd.VP(1.0, 0.5), "beta_min"),
        (lambda: sd.VP(0.1, math.nan), "beta_max"),
        (lambda: sd.VP("0.1", 20), "beta_min"),
        (lambda: sd.VP(True, 20), "beta_min"),
        (lambda: sd.Discrete(()), "betas"),
        (lambda: sd.Discrete((0.1, 1.5)), "betas"),
        (lambda: sd.Discrete((0.1, math.nan)), "betas"),
        (lambda: sd.Discrete(((0.1, 0.2),)), "betas"),
        (lambda: sd.Discrete((1, 2)), "betas"),
        (lambda: sd.Discrete.linear(0), "num_steps"),
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
class Backward(OU):
    """Two formulas whose noise shrinks: no SDE has them."""

    def variance(self, t: torch.Tensor) -> torch.Tensor:
        return t * (1 - t)


def test_formulas_whose_log_snr_rises_are_refused_by_name():
    with pytest.raises(ValueError, match="Backward: log_snr must decrease"):
        Backward().drift(torch.tensor(0.9, dtype=torch.float64))


def test_derivatives_work_inside_inference_mode_and_leave_no_graph():
    with torch.inference_mode():
        t = torch.tensor([0.5], dtype=torch.float64)
        assert_close(sd.VP().drift(t), torch.tensor([-10.05 / 2], dtype=torch.float64))
    assert not sd.VP().level(torch.rand(3), torch.zeros(3, 1)).drift.requires_grad


def test_processes_are_values():
    assert sd.VP() == sd.VP()
    assert sd.Discrete((0.1, 0.2)) == sd.Discrete(torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert repr(sd.Discrete((0.1, 0.2))) == "Discrete(betas=(0.1, 0.2))"
