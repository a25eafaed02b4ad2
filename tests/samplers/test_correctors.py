"""Langevin corrections: their law on Gaussian data is a recursion, and they forget errors by it."""

import math
from dataclasses import dataclass

import pytest
import torch
from cases import PROCESSES, Recorded, gaussian
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.samplers import Claims

EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
DDIM = sd.Ancestral(eta=0.0)


@dataclass(frozen=True)
class Exact:
    """A predictor that makes no error but the one asked for: the exact flow, scaled and shifted."""

    data: sd.exact.Gaussian
    scale: float = 1.0
    shift: float = 0.0
    claims = Claims(order=1)
    grid = sd.grids.Usual()

    def step(self, model, x, t, s, noise, memory):
        model(x, t)
        mean = s.alpha * self.data.mean.to(x)
        return mean + self.scale * (self.data.flow(x, t.t, s.t) - mean) + self.shift, None


def after(data, sampler, s):
    """Mean and variance at s, with the data's and sigma^2 there, of one step from t_max."""
    process = data.process
    law = verify.law(sampler, data, times=[process.t_max, s])
    (level,) = process.levels(torch.tensor([s], dtype=torch.float64))
    end = law.steps[-1]
    mean, variance = end.exact
    return float(end.mean), float(end.covariance), float(mean), float(variance), level.sigma**2


@EVERY
@pytest.mark.parametrize("snr", [0.05, 0.16, 2.0])
@pytest.mark.parametrize("n", [1, 4])
def test_the_variance_follows_the_recursion_of_a_linear_move(process, snr, n):
    """x - m by a = 1 - (1 - c) sigma^2 / P, and noise sigma^2 (1 - c^2), n times."""
    data, c = gaussian(process), math.exp(-2 * snr**2)
    sampler = sd.samplers.Langevin(Exact(data), n, snr)
    mean, variance, m, P, sigma2 = after(data, sampler, 0.3)
    a, expected = 1 - (1 - c) * sigma2 / P, P
    for _ in range(n):
        expected = a**2 * expected + sigma2 * (1 - c**2)
    assert mean == pytest.approx(m, rel=1e-9, abs=1e-12)
    assert variance == pytest.approx(expected, rel=1e-9)


@EVERY
def test_alone_a_move_keeps_a_variance_that_is_r2_too_little_at_most(process):
    """P (1 + c) / (2 - (1 - c) sigma^2 / P), the fixed point: 400 moves of rate 1 - a^2 > 0.1."""
    data, c = gaussian(process), math.exp(-2 * 0.5**2)
    _, variance, _, P, sigma2 = after(data, sd.samplers.Langevin(Exact(data), 400, 0.5), 0.6)
    assert variance == pytest.approx(P * (1 + c) / (2 - (1 - c) * sigma2 / P), rel=1e-9)
    assert (1 - 0.5**2) * P <= variance < P


@EVERY
def test_a_biased_predictors_errors_are_forgotten_move_by_move(process):
    """Of a shift the share a^n is left; of a variance a^(2 n) of its distance to the fixed one."""
    n, snr = 6, 0.3
    data, c = gaussian(process), math.exp(-2 * snr**2)
    mean, variance, m, P, sigma2 = after(
        data, sd.samplers.Langevin(Exact(data, 1.3, 0.4), n, snr), 0.6
    )
    a, fixed = 1 - (1 - c) * sigma2 / P, P * (1 + c) / (2 - (1 - c) * sigma2 / P)
    assert mean - m == pytest.approx(0.4 * a**n, rel=1e-8)
    assert variance - fixed == pytest.approx(a ** (2 * n) * (1.69 * P - fixed), rel=1e-7)


def test_moves_pay_where_the_predictors_error_is_the_larger_one_and_else_cost():
    """DDIM leaves too little deviation: at 20 steps more than moves do, at 200 steps less."""
    data = gaussian(sd.VP(), 1.0)

    def off(steps, *moves):
        mended = [sd.samplers.Langevin(DDIM, n) for n in moves]
        return [verify.law(sampler, data, steps=steps).w2() for sampler in (DDIM, *mended)]

    few, many = off(20, 1, 2, 4), off(200, 2)
    assert few == sorted(few, reverse=True)
    assert many[1] > many[0]


def test_the_move_is_the_ornstein_uhlenbeck_kernel_with_x0_held():
    """Over tau = 2 (r sigma)^2 of dx = -(x - alpha x0) / sigma^2 d tau + sqrt(2) dW."""
    process, r, z = sd.VP(), 0.4, torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    data, x = gaussian(process), torch.tensor([[0.3], [1.9]], dtype=torch.float64)
    _, s = process.levels(torch.tensor([0.7, 0.4], dtype=torch.float64))
    made = sd.sample(
        data, sd.samplers.Langevin(DDIM, 1, r), x, times=[0.7, 0.4], noise=lambda t, s, like: z
    )
    x = sd.sample(data, DDIM, x, times=[0.7, 0.4])
    tau, center = 2 * (r * s.sigma) ** 2, s.alpha * data(x, s).x0
    kept = math.exp(-tau / s.sigma**2)
    expected = center + kept * (x - center) + s.sigma * math.sqrt(1 - kept**2) * z
    assert_close(made, expected, rtol=1e-12, atol=1e-12)


def test_its_first_order_is_the_step_of_song_et_al():
    """x + eps score + sqrt(2 eps) z with eps = 2 (r |z| / |score|)^2, |score| = |z| / sigma.

    The two differ by eps^2 in the drift and eps^(3/2) in the noise: by 8 at least if r is halved.
    """
    process, z = sd.VP(), torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    data, x = gaussian(process), torch.tensor([[0.3], [1.9]], dtype=torch.float64)
    start = sd.sample(data, DDIM, x, times=[0.7, 0.4])
    (s,) = process.levels(torch.tensor([0.4], dtype=torch.float64))
    gaps = []
    for r in (0.08, 0.04, 0.02):
        made = sd.sample(
            data, sd.samplers.Langevin(DDIM, 1, r), x, times=[0.7, 0.4], noise=lambda t, s, like: z
        )
        eps = 2 * (r * s.sigma) ** 2
        euler = start + eps * data(start, s).score + math.sqrt(2 * eps) * z
        gaps.append(float((made - euler).norm()))
    assert gaps[0] > 7.5 * gaps[1] > 56 * gaps[2] > 0


def test_n_moves_cost_n_calls_at_the_level_come_to_and_none_where_sigma_is_0():
    model, times = Recorded(gaussian(sd.VP())), [0.9, 0.5, 0.2, 0.0]
    x = torch.ones(2, 1, dtype=torch.float64)
    sd.sample(model, sd.samplers.Langevin(DDIM, 2), x, times=times, generator=torch.Generator())
    assert [level.t for level in model.levels] == [0.9, 0.5, 0.5, 0.5, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    "sampler", [sd.Adams(3), sd.DPMSolver(3), sd.VelocityMultistep(0.0)], ids=str
)
def test_a_multistep_predictor_starts_afresh(sampler):
    """Its first step is DDIM's; a history from before the move would be of another path."""
    data, x = gaussian(sd.VP()), sd.VP().prior((4, 1), seeds=range(4), dtype=torch.float64)
    times = sampler.grid(sd.VP(), 9)
    made, expected = (
        sd.sample(data, sd.samplers.Langevin(each), x, times=times, seeds=range(4))
        for each in (sampler, DDIM)
    )
    assert_close(made, expected, rtol=1e-10, atol=1e-10)


def test_each_move_of_a_seeded_path_draws_anew():
    """Two moves with one and the same noise would add sqrt(2) of it: corr 1. 4.5 / sqrt(n)."""
    data, n = gaussian(sd.VP()), 4000
    drawn = []

    @dataclass(frozen=True)
    class Listening:
        inner: object
        claims = Claims(order=1)
        grid = sd.grids.Usual()

        def step(self, model, x, t, s, noise, memory):
            def listened(t, s, like):
                drawn.append(noise(t, s, like))
                return drawn[-1]

            return self.inner.step(model, x, t, s, listened, memory)

    x = sd.VP().prior((n, 1), seeds=range(n))
    sd.sample(
        data, Listening(sd.samplers.Langevin(DDIM, 3)), x, times=[0.9, 0.5, 0.2], seeds=range(n)
    )
    assert len(drawn) == 6
    made = torch.stack(drawn).flatten(1).double()
    products = made @ made.T / n - torch.eye(6)
    assert float(products.abs().max()) < 4.5 * math.sqrt(2 / n)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: sd.samplers.Langevin(0.1), r"sampler must be a sampler such as Heun\(\); got 0.1"),
        (lambda: sd.samplers.Langevin(sd.Heun), "sampler must be a sampler"),
        (lambda: sd.samplers.Langevin(DDIM, 0), "corrections must be at least 1; got 0"),
        (lambda: sd.samplers.Langevin(DDIM, 1.0), "corrections must be an integer; got 1.0"),
        (lambda: sd.samplers.Langevin(DDIM, 1, 0.0), "snr must lie in"),
        (lambda: sd.samplers.Langevin(DDIM, 1, math.inf), "snr must lie in"),
    ],
)
def test_a_bad_argument_is_refused_by_name(attempt, words):
    with pytest.raises((ValueError, TypeError), match=words):
        attempt()
