"""Churn: Algorithm 2 of Karras et al. 2022 on EDM, and its way up on every process."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from cases import PROCESSES, Recorded, gaussian
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.samplers import Claims

EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def noises(n, shape):
    """A source of n fixed draws, in order, and the draws."""
    drawn = torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = iter(drawn)
    return (lambda t, s, like: next(left)), drawn


@pytest.mark.parametrize("s_churn", [5.0, 40.0])
@pytest.mark.parametrize("s_noise", [1.0, 1.007])
def test_on_edm_the_levels_and_the_noise_are_those_of_algorithm_2_of_karras_et_al(s_churn, s_noise):
    """Typed in their letters, Euler's rule alone: the trapezoid of Heun is in another frame here.

    t_0 = 80 has no level above it on our EDM, and is above S_tmax.
    """
    N, s_tmin, s_tmax = 18, 0.05, 50.0
    data, x = gaussian(sd.EDM()), 80 * torch.tensor([[0.3], [-1.2]], dtype=torch.float64)

    def D(x, t):
        (level,) = sd.EDM().levels(torch.tensor([t / 80], dtype=torch.float64))
        return data(x, level).x0

    i = torch.arange(N, dtype=torch.float64)
    t = (80 ** (1 / 7) + i / (N - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = [*t.tolist(), 0.0]
    source, eps = noises(N, x.shape)
    z, here = iter(eps), x
    for t_i, t_next in pairwise(t):
        gamma = min(s_churn / N, math.sqrt(2) - 1) if s_tmin <= t_i <= s_tmax else 0.0
        t_hat = t_i + gamma * t_i
        x_hat = here + (math.sqrt(t_hat**2 - t_i**2) * s_noise * next(z) if gamma else 0)
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        here = x_hat + (t_next - t_hat) * d
    sampler = sd.samplers.Churn(sd.Ancestral(eta=0.0), s_churn, s_tmin, s_tmax, s_noise)
    made = sd.sample(data, sampler, x, times=sd.Heun().grid(sd.EDM(), N), noise=source)
    assert_close(made, here, rtol=1e-9, atol=1e-9)


@EVERY
@pytest.mark.parametrize("sampler", [sd.Heun(), sd.Adams(3)], ids=str)
def test_without_churn_it_is_the_sampler_bit_for_bit(process, sampler):
    data, x = gaussian(process), process.prior((5, 1), seeds=range(5))
    plain = sd.sample(data, sampler, x, steps=9)
    for none in (sd.samplers.Churn(sampler, 0.0), sd.samplers.Churn(sampler, 40.0, 1e8, 1e9)):
        assert torch.equal(sd.sample(data, none, x, steps=9, seeds=range(5)), plain)


@dataclass(frozen=True)
class Exact:
    """The exact flow of Gaussian data, whatever the model says."""

    data: sd.exact.Gaussian
    claims = Claims(order=1)
    grid = sd.grids.Karras()

    def step(self, model, x, t, s, noise, memory):
        model(x, t)
        return self.data.flow(x, t.t, s.t), None


@EVERY
def test_the_way_up_is_exact_in_law(process):
    """With the exact flow for the way down every state has the data's law, and noise was added."""
    data = gaussian(process)
    law = verify.law(sd.samplers.Churn(Exact(data), 40.0, 0.0, 1e9), data, steps=12)
    assert len(law.draws) >= 10
    # To rounding of the ratio of variances over 12 maps; levels found by bisection have 1e-12.
    assert max(step.departure for step in law.steps) < 1e-8
    other = verify.law(sd.samplers.Churn(Exact(data), 40.0, 0.0, 1e9, 1.01), data, steps=12)
    assert max(step.departure for step in other.steps) > 1e-3


@EVERY
def test_no_step_begins_above_the_end_of_the_process(process):
    model = Recorded(gaussian(process))
    x, churn = process.prior((2, 1), seeds=range(2)), sd.samplers.Churn(sd.Heun(), 1e3, 0.0, 1e9)
    sd.sample(model, churn, x, times=[1.0, 0.999, 0.99, 0.5, 0.0], seeds=range(2))
    assert max(level.t for level in model.levels) <= 1.0
    assert all(math.isfinite(level.sigma) for level in model.levels)
    above = [b for a, b in pairwise(model.levels) if b.t > a.t]
    assert len(above) >= 2


def test_the_amount_over_the_whole_way_does_not_depend_on_the_steps():
    """sum gamma / (1 - gamma / S_churn) is S_churn on any grid from 80 to 0.002, if none is capped.

    gamma = S_churn d / (1 + d) with the d of all steps adding up to 1.
    """
    process, churn = sd.EDM(), sd.samplers.Churn(sd.Heun(), 2.0, 0.0, 1e9)
    for r in (
        sd.grids.Karras().ratios(40)[:-1],
        torch.logspace(math.log10(80), math.log10(0.002), 60),
    ):
        levels = process.levels(process.time(-2 * r.double().log()))
        gammas = [churn.gamma(t, s) for t, s in pairwise(levels)]
        assert max(gammas) < math.sqrt(2) - 1
        assert sum(g / (1 - g / 2.0) for g in gammas) == pytest.approx(2.0, rel=1e-6)


def test_the_order_is_the_samplers():
    made = verify.order(sd.samplers.Churn(sd.Heun(), 10.0), gaussian(sd.VP()), sizes=(64, 128, 256))
    assert made.declared == 2
    assert made.holds, made


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: sd.samplers.Churn(3.0), r"sampler must be a sampler such as Heun\(\); got 3.0"),
        (lambda: sd.samplers.Churn(sd.Heun(), -1.0), "s_churn must lie in"),
        (lambda: sd.samplers.Churn(sd.Heun(), 1.0, -0.1), "s_tmin must lie in"),
        (lambda: sd.samplers.Churn(sd.Heun(), 1.0, 2.0, 1.0), "s_tmax must lie in"),
        (lambda: sd.samplers.Churn(sd.Heun(), 1.0, 0.0, 1.0, 0.0), "s_noise must lie in"),
    ],
)
def test_a_bad_argument_is_refused_by_name(attempt, words):
    with pytest.raises((ValueError, TypeError), match=words):
        attempt()
