"""Exponential integrators: the published steps, what is exact, the law, and the path's noise."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import PROCESSES, gaussian
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.models.prediction import truth

EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
SAMPLERS = [
    sd.DPMSolver(2), sd.DPMSolver(3), sd.DPMSolver(2, eta=0.3), sd.DPMSolver(2, eta=1.0),
    sd.VelocityMultistep(0.0), sd.VelocityMultistep(0.3), sd.VelocityMultistep(),
]  # fmt: skip
STOCHASTIC = [sd.DPMSolver(2, eta=1.0), sd.VelocityMultistep()]


def none(t, s, like):
    raise AssertionError("it drew noise")


@dataclass
class Saying:
    """A model whose x0 is a function of the log-SNR alone: with a constant, data in one point."""

    process: sd.processes.Process
    x0: object

    def __call__(self, x: Tensor, level: sd.processes.Level) -> sd.models.Prediction:
        x0 = torch.full_like(x, self.x0(level.log_snr))
        eps = (x - level.alpha * x0) / level.sigma if level.sigma else torch.zeros_like(x)
        return truth(x0, eps, level)


def walk(sampler, model, times, x, noise=none):
    """The states at all times."""
    path = sd.trajectory(model, sampler, x, times=times, noise=noise)
    return [x, *(at.x for at in path)]


# ---- the published steps -------------------------------------------------------------------------


def test_the_second_step_is_the_published_one():
    """Lu et al. 2022b, Algorithm 2 (2M), and its SDE-DPM-Solver++(2M), typed in their letters."""
    process, z = sd.VP(), torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    times = [0.8, 0.55, 0.4]
    model, x = gaussian(process), torch.tensor([[0.3], [1.9]], dtype=torch.float64)
    for eta in (0.0, 1.0):
        sampler = sd.DPMSolver(2, eta=eta)
        _, first, made = walk(sampler, model, times, x, lambda t, s, like: z)
        l0, l1, l2 = process.levels(torch.tensor(times, dtype=torch.float64))
        lam = [level.log_snr / 2 for level in (l0, l1, l2)]
        h, h_before = lam[2] - lam[1], lam[1] - lam[0]
        r = h_before / h
        D = (1 + 1 / (2 * r)) * model(first, l1).x0 - 1 / (2 * r) * model(x, l0).x0
        if eta == 0:
            expected = l2.sigma / l1.sigma * first - l2.alpha * (math.exp(-h) - 1) * D
        else:
            expected = (
                l2.sigma / l1.sigma * math.exp(-h) * first
                + l2.alpha * (1 - math.exp(-2 * h)) * D
                + l2.sigma * math.sqrt(1 - math.exp(-2 * h)) * z
            )
        assert_close(made, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [[0.9, 0.6, 0.4, 0.1], [0.9, 0.4, 0.38, 0.01]])
def test_three_answers_integrate_a_quadratic_in_lambda_exactly(times):
    """x_s / sigma_s = x_t / sigma_t + int e^lambda x0 dlambda, by Gauss-Legendre with 60 nodes."""

    def x0(log_snr):
        return 0.4 - 0.3 * log_snr + 0.7 * log_snr**2

    process = sd.VP()
    x = torch.ones(1, 1, dtype=torch.float64)
    *_, before, made = walk(sd.DPMSolver(3), Saying(process, x0), times, x)
    t, s = process.levels(torch.tensor(times[-2:], dtype=torch.float64))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    half = (s.log_snr - t.log_snr) / 4
    lam = (s.log_snr + t.log_snr) / 4 + half * nodes
    integral = half * float((weights * np.exp(lam) * x0(2 * lam)).sum())
    expected = s.sigma * (before / t.sigma + integral)
    assert_close(made, expected, rtol=1e-11, atol=0)


def test_eta_0_is_the_solver_of_the_flow_and_draws_nothing():
    model, x = gaussian(sd.VP()), sd.VP().prior((5, 1), seeds=range(5))
    flow = sd.sample(model, sd.DPMSolver(2, 1.5), x, steps=9, noise=none)
    assert torch.equal(
        sd.sample(model, sd.DPMSolver(2, 1.5, eta=0.0), x, steps=9, noise=none), flow
    )
    sd.sample(model, sd.VelocityMultistep(0.0), x, steps=9, noise=none)


def test_the_first_velocity_step_is_straight_and_then_noise_back_up():
    """Constant eps - x0 to r' = r_s q^(eta^2), the forward kernel from there: alpha_s^2 (r_s^2 -
    r'^2). At eta = 1 that is DDPM's step."""
    process, z = sd.VP(), torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    model, x = gaussian(process), torch.tensor([[0.3], [1.9]], dtype=torch.float64)
    t, s = process.levels(torch.tensor([0.8, 0.5], dtype=torch.float64))
    said, r_t, r_s = model(x, t), t.sigma / t.alpha, s.sigma / s.alpha
    for eta in (0.4, 1.0):
        low = r_s * (r_s / r_t) ** eta**2
        down = said.x0 + low * said.eps
        expected = s.alpha * (down + math.sqrt(r_s**2 - low**2) * z)
        made = walk(sd.VelocityMultistep(eta), model, [0.8, 0.5], x, lambda t, s, like: z)[-1]
        assert_close(made, expected, rtol=1e-12, atol=1e-12)
    ddpm = walk(sd.Ancestral(), model, [0.8, 0.5], x, lambda t, s, like: z)[-1]
    assert_close(made, ddpm, rtol=1e-12, atol=1e-12)


# ---- what is exact -------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_data_in_one_point_are_exact_in_law_at_every_level_of_any_grid(sampler, process):
    """x0 = m for all x: mean alpha m, variance sigma^2. One row per start and per draw."""
    times, m, draws = [1.0, 0.9, 0.31, 0.3, 0.002, 1e-5, 0.0], 0.7, 5
    start, *levels = process.levels(torch.tensor(times, dtype=torch.float64))
    x = torch.zeros(2 + draws, 1, dtype=torch.float64)
    x[:, 0] = start.alpha * m
    x[1, 0] += start.sigma
    rows = iter(range(2, 2 + draws))

    def impulse(t, s, like):
        made = torch.zeros_like(like)
        made[next(rows)] = 1
        return made

    states = walk(sampler, Saying(process, lambda log_snr: m), times, x, impulse)[1:]
    for state, level in zip(states, levels, strict=True):
        mean, variance = float(state[0]), float((state[1:] - state[0]).square().sum())
        assert mean == pytest.approx(level.alpha * m, rel=1e-9)
        # alpha m cancels in a gain, so its rounding is relative to alpha m
        assert math.sqrt(variance) == pytest.approx(level.sigma, rel=1e-9, abs=1e-14)


@EVERY
@pytest.mark.parametrize("sampler", STOCHASTIC, ids=str)
def test_the_noise_of_the_reverse_sde_is_additive_on_the_clock_of_the_snr(sampler, process):
    """So one path W(1 / r^2) ends any number of steps in one place, while x0 stays as it is."""
    times = np.linspace(1.0, 0.05, 25)
    clock = np.exp(process.log_snr(torch.from_numpy(times)).numpy())
    rng = np.random.default_rng(0)
    path = np.cumsum([0.0, *(np.sqrt(np.diff(clock)) * rng.standard_normal(24))])
    at = dict(zip(times.tolist(), zip(clock, path, strict=True), strict=True))

    def increment(t, s, like):
        (k, w), (k_s, w_s) = at[t], at[s]
        return torch.full_like(like, (w_s - w) / math.sqrt(k_s - k))

    model, x = Saying(process, lambda log_snr: 0.7), torch.ones(1, 1, dtype=torch.float64)
    ends = [walk(sampler, model, times[::every].tolist(), x, increment)[-1] for every in (1, 3, 24)]
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("process", [sd.RectifiedFlow(), sd.Cosine()], ids=str)
def test_from_pure_noise_the_first_step_is_a_draw_about_x0(sampler, process):
    """alpha = 0 and r infinite: x_s = alpha_s x0 + sigma_s z, or eps = x for z if eta = 0."""
    z = torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    model, x = gaussian(process), torch.tensor([[0.3], [1.9]], dtype=torch.float64)
    t, s = process.levels(torch.tensor([1.0, 0.6], dtype=torch.float64))
    made = walk(sampler, model, [1.0, 0.6], x, lambda t, s, like: z)[-1]
    fresh = getattr(sampler, "eta", 0.0) > 0
    expected = s.alpha * model(x, t).x0 + s.sigma * (z if fresh else x)
    assert_close(made, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sampler", [sd.DPMSolver(2), sd.DPMSolver(3), sd.DPMSolver(2, eta=1.0)], ids=str
)
def test_answers_too_near_to_tell_apart_are_one(sampler):
    """Their difference is rounding, and an extrapolation would magnify it by 1e10."""
    model, x = gaussian(sd.VP()), torch.ones(1, 1)
    zero = lambda t, s, like: torch.zeros_like(like)  # noqa: E731
    close = walk(sampler, model, [1.0, 0.7, 0.7 - 1e-11, 0.25, 0.0], x, zero)[-1]
    assert_close(close, walk(sampler, model, [1.0, 0.7, 0.25, 0.0], x, zero)[-1])


# ---- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [sd.DPMSolver, sd.VelocityMultistep])
def test_the_law_is_of_second_order_on_steps_of_any_ratio_and_over_the_path(kind, eta):
    made = verify.local_order(kind(eta=eta), gaussian(sd.EDM()))
    assert made.declared[0] == 2
    assert made.holds, made
    whole = verify.order(kind(eta=eta), gaussian(sd.RectifiedFlow()), sizes=(128, 256, 512))
    assert whole.declared == 2
    assert whole.holds, whole


@pytest.mark.parametrize("p", [1.0, 1.25, 1.5])
def test_twenty_calls_of_the_multistep_leave_a_hundredth_of_the_deviation(p):
    """What its docstring says, on four processes; DDPM on the same grid leaves a tenth."""
    for process in (sd.VP(), sd.EDM(), sd.RectifiedFlow(), sd.Cosine()):
        sampler = sd.VelocityMultistep(p=p)
        times = sampler.grid(process, 20)
        for variance in (0.25, 1.0, 4.0):
            off = [
                abs(math.sqrt(float(made.covariance) / variance) - 1)
                for made in (
                    verify.law(each, gaussian(process, variance), times=times)
                    for each in (sampler, sd.Ancestral())
                )
            ]
            assert off[0] < 1e-2
            assert off[1] > 0.1


@pytest.mark.parametrize("variance", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("steps", [5, 20])
def test_directions_too_narrow_for_the_steps_do_not_blow_up(variance, steps):
    """Too long steps may lose some of their deviation; they add none to it."""
    made = verify.law(sd.VelocityMultistep(), gaussian(sd.VP(), variance), steps=steps)
    assert 0 < float(made.covariance) < 1.1 * variance


def mixture(process):
    """Three modes in the plane, each coordinate of deviation about 1."""
    means = torch.tensor([[-1.2, 0.8], [0.4, -1.2], [1.3, 0.6]], dtype=torch.float64)
    return sd.exact.GaussianMixture(process, [0.4, 0.35, 0.25], means, [0.05, 0.05, 0.05])


def test_twenty_calls_of_the_multistep_leave_the_weights_of_distant_modes_and_ddpm_does_not():
    """Modes 80 deviations apart: which of them a sample falls to is settled on the way."""
    means = torch.tensor([[5.6], [-5.6]], dtype=torch.float64)
    data = sd.exact.GaussianMixture(sd.VP(), [0.3, 0.7], means, [0.15**2] * 2)
    n, times = 20_000, sd.VelocityMultistep().grid(sd.VP(), 20)
    x = sd.VP().prior((n, 1), seeds=range(n), dtype=torch.float64)
    off = []
    for sampler in (sd.VelocityMultistep(), sd.Ancestral()):
        source = torch.Generator().manual_seed(0)
        made = sd.sample(data, sampler, x, times=times, generator=source)
        off.append(abs(float((made > 0).double().mean()) - 0.3) / math.sqrt(0.3 * 0.7 / n))
    assert off[0] < 4.5 < off[1]


@pytest.mark.parametrize("sampler", STOCHASTIC, ids=str)
def test_twenty_and_forty_steps_draw_the_same_sample(sampler):
    """RMS between them under 1/5 of that between two seeds (promises.md), on their own grids."""
    data, n = mixture(sd.VP()), 1000
    x = sd.VP().prior((n, 2), seeds=range(n), dtype=torch.float64)
    few, many = (sd.sample(data, sampler, x, steps=k, seeds=range(n)) for k in (20, 40))

    def rms(a, b):
        return float((a - b).square().mean().sqrt())

    assert rms(few, many) < rms(few, few.roll(1, 0)) / 5


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: sd.DPMSolver(1), "k must be at least 2; got 1"),
        (lambda: sd.DPMSolver(4), "k must be at most 3; got 4"),
        (lambda: sd.DPMSolver(2.0), "k must be an integer; got 2.0"),
        (lambda: sd.DPMSolver(2, 0.5), "p must lie in"),
        (lambda: sd.DPMSolver(eta=1.5), "eta must lie in"),
        (lambda: sd.DPMSolver(3, eta=0.5), "eta must be 0 with k = 3; got 0.5"),
        (lambda: sd.DPMSolver(p=math.nan, eta=1.0), "p must lie in"),
        (lambda: sd.VelocityMultistep(-0.1), "eta must lie in"),
        (lambda: sd.VelocityMultistep(p=0.9), "p must lie in"),
        (lambda: sd.VelocityMultistep().grid(sd.VP(), 0), "steps must be at least 1"),
        (lambda: sd.DPMSolver().grid(sd.VP(), None), "steps must be an integer"),
    ],
)
def test_a_bad_argument_is_refused_by_name(attempt, words):
    with pytest.raises((ValueError, TypeError), match=words):
        attempt()


@EVERY
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_grid_is_even_in_u_to_the_1_over_p(sampler, process):
    times = sampler.grid(process, 8)
    u = [level.u ** (1 / sampler.p) for level in process.levels(times)]
    assert (float(times[0]), u[-1]) == (1.0, 0.0)
    steps = [a - b for a, b in pairwise(u)]
    assert max(steps) - min(steps) < 1e-6
