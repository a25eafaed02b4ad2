"""Samplers: exact laws, limits and orders on Gaussian data, where everything is known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import FIXED_STEP, MEAN, PROCESSES, Recorded, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    SDES,
    ddim_moments,
    ddpm_moments,
    euler_maruyama_moments,
    fitted_order,
    marginal,
    w2,
)
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.models.prediction import truth
from sde_diffusion.processes import Process


def moments(law):
    return float(law.mean), float(law.covariance)


# ---- ancestral: Ho et al.'s chain -------------------------------------------------------------


@pytest.mark.parametrize("i", [1, 2, 500, 1000])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_one_ancestral_step_is_the_published_posterior(i, variance):
    """Ho et al. 2020, eq. 7, in their letters."""
    process = sd.Discrete.linear()
    beta = torch.tensor(process.betas, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    before = abar[i - 2] if i > 1 else torch.ones((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(i)
    x, x0, z = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    mean = before.sqrt() * beta[i - 1] / (1 - abar[i - 1]) * x0
    mean += (1 - beta[i - 1]).sqrt() * (1 - before) / (1 - abar[i - 1]) * x
    var = beta[i - 1] if variance == "beta" else (1 - before) / (1 - abar[i - 1]) * beta[i - 1]
    expected = mean + (var.sqrt() * z if i > 1 else 0)

    class Knows:
        def __init__(self):
            self.process = process

        def __call__(self, x, level):
            return truth(x0, (x - level.alpha * x0) / level.sigma, level)

    times = torch.tensor([i, i - 1], dtype=torch.float64) / 1000
    step = sd.sample(Knows(), sd.Ancestral(variance), x, times=times, noise=lambda t, s, like: z)
    assert_close(step, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", [0.25, 1e-3])
@pytest.mark.parametrize("kind", ["beta", "posterior"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_the_whole_chain_has_the_exact_moments_of_ho_et_al(steps, kind, variance):
    chain = sd.processes.discretize(sd.VP(), steps, rule="exact")
    law = sd.verify.law(sd.Ancestral(kind), gaussian(chain, variance), steps=steps)
    assert moments(law) == pytest.approx(ddpm_moments(chain.betas, MEAN, variance, kind), rel=1e-8)


@pytest.mark.parametrize("steps", [7, 300, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_any_sub_chain_has_the_exact_moments_of_ddim(steps, eta):
    chain = sd.Discrete.linear()
    times = sd.grids.Usual()(chain, steps)
    abar = np.concatenate([[1.0], np.cumprod(1 - np.asarray(chain.betas))])
    abar = abar[(times * 1000).round().long().flip(0).numpy()]
    law = sd.verify.law(sd.Ancestral(eta=eta), gaussian(chain), times=times)
    assert moments(law) == pytest.approx(ddim_moments(abar, MEAN, 0.25, eta), rel=1e-8)


def test_eta_goes_with_the_posterior_variance():
    with pytest.raises(ValueError, match="eta"):
        sd.Ancestral("beta", eta=0.5)


# ---- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "sub-vp", "ve", "ou", "cosine", "edm", "rectified-flow",
                                  "interpolated"])  # fmt: skip
def test_euler_maruyama_tends_to_the_reverse_sde_at_order_one(name):
    """On each process's own grid; VE's two errors cancel in part up to some 500 steps. The limit
    is the law of x_0 given x_1, averaged over the prior (`exact.Gaussian.reverse_sde`)."""
    sizes = (512, 1024, 2048) if name == "ve" else (128, 256, 512)
    model = gaussian(PROCESSES[name])
    limit = model.reverse_sde()
    laws = [sd.verify.law(sd.EulerMaruyama(), model, steps=n) for n in sizes]
    order = fitted_order(sizes, [law.w2(*limit) for law in laws])
    assert order == pytest.approx(1, abs=0.1)


def test_ancestral_and_euler_maruyama_approach_each_other_at_order_one():
    sizes = (128, 256, 512)
    gaps = []
    for n in sizes:
        laws = [
            moments(sd.verify.law(sampler, gaussian(sd.VP()), steps=n))
            for sampler in (sd.Ancestral("beta"), sd.EulerMaruyama())
        ]
        gaps.append(w2(*laws))
    assert fitted_order(sizes, gaps) > 0.9


@pytest.mark.parametrize(
    "sampler", [sd.EulerMaruyama(), sd.samplers.TorchSDE()], ids=["own", "torchsde"]
)
@pytest.mark.parametrize("name", SDES)
def test_reverse_sde_solvers_have_the_exact_moments_of_euler_maruyama(sampler, name):
    """The recursion with the published drift and diffusion, and the published marginals."""
    process = PROCESSES[name]
    times = sampler.grid(process, 60)
    law = sd.verify.law(sampler, gaussian(process), times=times)
    expected = euler_maruyama_moments(
        times.tolist(), *SDES[name], marginal(name), MEAN, 0.25, process.prior_std**2
    )
    assert moments(law) == pytest.approx(expected, rel=1e-8, abs=0)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("method", ["euler", "milstein"])
def test_torchsde_on_our_brownian_path_is_euler_maruyama(process, method):
    """g does not depend on x, so Milstein's correction is zero."""
    x = process.prior((5, 2, 3), seeds=range(5), dtype=torch.float64)
    model = sd.exact.Gaussian(process, 0.3, 0.5)
    ours = sd.sample(model, sd.EulerMaruyama(), x, steps=40, seeds=range(5))
    theirs = sd.sample(model, sd.samplers.TorchSDE(method), x, steps=40, seeds=range(5))
    assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sampler", "arguments"),
    [(sd.samplers.TorchSDE("srk"), {"steps": 200}), (sd.AdaptiveSDE(), {})],
    ids=["srk", "adaptive"],
)
def test_paths_that_a_generator_gives_end_in_the_data_and_repeat_with_it(sampler, arguments):
    """4,000 samples: 4.5 standard errors, and as much again for the steps.

    Euler-Maruyama, the coarsest of them, has an exact error of 0.0035 in W2 at 200 steps.
    """
    n, model = 4000, gaussian(sd.VP())
    x = sd.VP().prior((n, 1), seeds=range(n), dtype=torch.float64)
    made = [
        sd.sample(model, sampler, x, generator=torch.Generator().manual_seed(1), **arguments)
        for _ in range(2)
    ]
    assert torch.equal(*made)
    assert abs(made[0].mean() - MEAN) < 4.5 * 0.5 / math.sqrt(n) + 0.005
    assert abs(made[0].var() - 0.25) < 4.5 * 0.25 * math.sqrt(2 / n) + 0.005


def test_torchsdes_own_paths_refuse_seeds_and_injected_noise_by_name():
    sampler, x = sd.samplers.TorchSDE("srk"), torch.zeros(2, 1)
    for source in ({"seeds": [0, 1]}, {"noise": lambda t, s, like: torch.zeros_like(like)}):
        with pytest.raises(ValueError, match="generator="):
            sd.sample(gaussian(sd.VP()), sampler, x, steps=4, **source)


def test_torchsde_makes_one_call_a_step():
    model = Recorded(gaussian(sd.VP()))
    sd.sample(model, sd.samplers.TorchSDE(), torch.zeros(2, 1), steps=9)
    assert len(model.levels) == 9


@dataclasses.dataclass(frozen=True)
class Scaled(Process):
    """x_t = (1 - t) x_0 + k t eps: a user's two formulas, not variance-preserving."""

    k: float = 1.0

    def log_alpha(self, t):
        return torch.log1p(-t)

    def variance(self, t):
        return (self.k * t) ** 2


@settings(deadline=None)
@given(st.floats(0.1, 10))
def test_ancestral_takes_a_users_process_whatever_its_rounding(k):
    """From alpha = 0 the posterior is N(alpha_s x0, sigma_s^2): no root of a negative residue."""
    model = sd.exact.Gaussian(Scaled(k), torch.tensor([0.5], dtype=torch.float64), 0.25)
    x = torch.ones(3, 1, dtype=torch.float64)
    for sampler in (sd.Ancestral(), sd.Ancestral(eta=0.0)):
        made = sd.sample(model, sampler, x, times=[1, 0.37, 0.1, 0], seeds=range(3))
        assert made.isfinite().all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sd.Adams(0), "k must"),
        (lambda: sd.Adams(6), "k must"),
        (lambda: sd.Adams(2, p=0), "p must"),
        (lambda: sd.Ancestral("small"), "variance"),
        (lambda: sd.Ancestral(eta=1.5), "eta"),
        (lambda: sd.TorchODE("dopri6"), "method"),
        (lambda: sd.TorchODE(rtol=0), "rtol"),
        (lambda: sd.TorchODE(max_calls=0), "max_calls"),
        (lambda: sd.samplers.ScipyODE("rk45"), "method"),
        (lambda: sd.samplers.TorchSDE("heun"), "method"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


def test_samplers_are_values():
    for sampler in FIXED_STEP.values():
        values = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)}
        assert type(sampler)(**values) == sampler
        assert hash(sampler) is not None
