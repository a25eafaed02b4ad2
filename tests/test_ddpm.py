"""The discrete face: Ho et al. 2020 in their letters, against Bayes' theorem and torch's KL.

Rounding. A product of N = 1000 factors is off by N eps = 2e-13. Where 1 - abar = 1e-4 is taken from
it, that is 50 times as much in the root and 1e4 times as much (of the few eps of one factor) in the
quotient: 1e-10 has room for both, and is a millionth of what any other index would give.
"""

import math

import numpy as np
import pytest
import torch
from chains import (
    CHAINS,
    TIGHT,
    at,
    bayes,
    both,
    ddpm,
    every_chain,
    output_of,
    places,
    reverse_variance,
)
from oracles import EPS, normal
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.noise.brownian import Brownian

# ---- forward ---------------------------------------------------------------------------------


@every_chain
def test_the_tables_are_the_betas_and_their_products(chain):
    model, betas = ddpm(chain), torch.tensor(chain.betas, dtype=torch.float64)
    abar = torch.from_numpy(np.cumprod(1 - betas.numpy()))
    assert torch.equal(model.betas, betas)
    assert torch.equal(model.alphas, 1 - betas)
    # a product is off by N eps; a sum of N logarithms by N eps of the sum
    n, log = len(betas), abar.log().nan_to_num(neginf=0).abs().max()
    assert_close(model.alphas_bar, abar, rtol=float(n * EPS * (1 + log)), atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3)])
@every_chain
def test_q_sample_is_ho_et_als_equation_4(chain, shape):
    x0, eps = normal(2, 4, *shape)
    for i in (*places(chain), torch.tensor(places(chain)), torch.tensor(2), np.int64(2)):
        _, abar, _ = at(chain, i, x0)
        expected = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        assert_close(ddpm(chain).q_sample(x0, i, eps), expected, **TIGHT)


@every_chain
def test_q_chain_has_exactly_the_law_of_q_sample(chain):
    """Row 0 starts at 1 with no noise, row j at 0 with a unit impulse in draw j.

    A kernel rounds a gain by 1.25 eps at most: 3e-13 of it in 1000, twice that in its square.
    """
    for i in places(chain):
        intervals = []

        def impulse(t, s, like, intervals=intervals):
            intervals.append((t, s))
            return (torch.arange(len(like)) == len(intervals)).to(like)

        x0 = (torch.arange(i + 1) == 0).double()
        gains = ddpm(chain).q_chain(x0, i, noise=impulse)
        _, abar, _ = at(chain, i, gains[0])
        assert_close(gains[0], abar.sqrt(), rtol=0, atol=1e-12)
        assert_close(gains[1:].square().sum(), 1 - abar, rtol=0, atol=1e-12)
        n = chain.num_steps
        assert intervals == [(j / n, (j - 1) / n) for j in range(1, i + 1)]


@every_chain
def test_each_sample_of_q_chain_stops_at_its_own_index(chain):
    x0, model = normal(4, 2, 3), ddpm(chain)

    def noise(t, s, like):
        return torch.full_like(like, math.sin(1000 * t))

    together = model.q_chain(x0, torch.tensor(places(chain)), noise=noise)
    for row, i in enumerate(places(chain)):
        assert torch.equal(together[row], model.q_chain(x0, i, noise=noise)[row])


def test_q_chain_with_drawn_noise_has_the_mean_and_variance_of_equation_4(generator):
    chain, n = CHAINS["cosine"], 20_000
    x = ddpm(chain).q_chain(torch.full((n, 1), 2.0), 25, generator=generator)
    _, abar, _ = at(chain, 25, torch.zeros(()))
    assert abs(x.mean() - 2 * abar.sqrt()) < 4.5 * ((1 - abar) / n).sqrt()
    assert abs(x.var() - (1 - abar)) < 4.5 * (1 - abar) * math.sqrt(2 / n)


@every_chain
def test_q_posterior_is_bayes_theorem(chain):
    x0, x = normal(2, 4, 2, 3)
    for i in (*places(chain), torch.tensor(places(chain))):
        mean, variance = ddpm(chain).q_posterior(x0, x, i)
        expected = bayes(chain, i, x0, x)
        assert_close(mean, expected[0], **TIGHT)
        assert_close(variance.expand_as(x), expected[1].expand_as(x), rtol=1e-10, atol=0)


# ---- backward --------------------------------------------------------------------------------


@every_chain
def test_x0_and_eps_belong_to_x_with_and_without_the_clamp(chain):
    x, i = 3 * normal(4, 3), torch.tensor(places(chain))
    model, (_, abar, _) = ddpm(chain), at(chain, i, x)
    free, eps = model.predict_x0(x, i)
    assert_close(free, abar.sqrt() * x - (1 - abar).sqrt() * output_of(model, i, x), **TIGHT)
    assert_close(abar.sqrt() * free + (1 - abar).sqrt() * eps, x, **TIGHT)
    x0, eps = model.predict_x0(x, i, clamp=1.0)
    assert bool((free.abs() > 1).any())
    assert_close(x0, free.clamp(-1, 1), rtol=0, atol=0)
    assert_close(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, x, **TIGHT)


@both
@every_chain
def test_p_mean_variance_is_the_posterior_at_the_models_x0(chain, kind):
    x = normal(4, 3)
    for i in (*places(chain), torch.tensor(places(chain))):
        model, (beta, abar, _) = ddpm(chain), at(chain, i, x)
        x0 = abar.sqrt() * x - (1 - abar).sqrt() * output_of(model, i, x)
        expected, posterior = bayes(chain, i, x0, x)
        mean, variance = model.p_mean_variance(x, i, variance=kind)
        assert_close(mean, expected, **TIGHT)
        expected = (beta if kind == "beta" else posterior).reshape(-1)
        assert_close(variance.reshape(-1), expected, rtol=1e-10, atol=0)
        assert (mean + variance).shape == x.shape


@pytest.mark.parametrize("extra", [-1.0, 0.0, 1.0, [-0.5, 0.3, 2.0]], ids=str)
@every_chain
def test_a_learned_variance_interpolates_the_logarithms(chain, extra):
    """Nichol & Dhariwal 2021, eq. 15: extra -1 is the posterior's variance, +1 is beta."""
    x, i, extra = normal(4, 3), torch.tensor(places(chain)), torch.tensor(extra).double()
    model = ddpm(chain, extra=extra)
    low, high = (reverse_variance(chain, i, x, kind) for kind in ("posterior", "beta"))
    expected = low ** ((1 - extra) / 2) * high ** ((1 + extra) / 2)
    for clamp in (None, 1.0):
        _, variance = model.p_mean_variance(x, i, variance="learned", clamp=clamp)
        assert_close(variance, expected.expand_as(x), **TIGHT)


@both
@every_chain
def test_p_sample_is_a_step_of_ancestral_and_adds_no_noise_at_1(chain, kind):
    (x, z), model, n = normal(2, 4, 3), ddpm(chain), chain.num_steps
    source = {"noise": lambda t, s, like: z}
    together = model.p_sample(x, torch.tensor(places(chain)), variance=kind, **source)
    for row, i in enumerate(places(chain)):
        times = torch.tensor([i, i - 1], dtype=torch.float64) / n
        step = sd.sample(model.model, sd.Ancestral(kind), x, times=times, **source)
        assert_close(model.p_sample(x, i, variance=kind, **source), step, **TIGHT)
        assert_close(together[row], step[row], **TIGHT)
    assert torch.equal(together[0], model.p_mean_variance(x, 1)[0][0])


@pytest.mark.parametrize("name", ["linear", "cosine", "users"])
def test_p_sample_is_the_published_algorithm(name):
    """Ho et al.'s Algorithm 2 (variance beta), and CMU 10-423's, where x_0 is clamped first."""
    (x, z), chain = normal(2, 4, 3), CHAINS[name]
    model = ddpm(chain, sd.Eps())
    source = {"noise": lambda t, s, like: z}
    for i in places(chain):
        beta, abar, before = at(chain, i, x)
        alpha, eps = 1 - beta, output_of(model, i, x)
        ho = (x - beta / (1 - abar).sqrt() * eps) / alpha.sqrt() + (i > 1) * beta.sqrt() * z
        assert_close(model.p_sample(x, i, **source), ho, **TIGHT)
        x0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
        cmu = alpha.sqrt() * (1 - before) / (1 - abar) * x
        cmu += before.sqrt() * (1 - alpha) / (1 - abar) * x0
        cmu += ((1 - before) / (1 - abar) * (1 - alpha)).sqrt() * z
        made = model.p_sample(x, i, variance="posterior", clamp=1.0, **source)
        assert_close(made, cmu, **TIGHT)


@both
def test_sample_is_the_ancestral_sampler_on_all_n_steps(kind):
    chain, size = CHAINS["cosine"], {"dtype": torch.float64}
    model = sd.DDPM(sd.exact.GaussianMixture(chain, [0.4, 0.6], [-1.0, 1.0], [0.1, 0.2]))
    for make in (lambda: {"seeds": [3, 1, 4]},
                 lambda: {"generator": torch.Generator().manual_seed(2)}):  # fmt: skip
        source = make()
        x = chain.prior((3, 2), **source, **size)
        expected = sd.sample(model.model, sd.Ancestral(kind), x, steps=50, **source)
        assert_close(model.sample((3, 2), variance=kind, **make(), **size), expected, **TIGHT)


def test_p_chain_starts_anywhere_and_gives_every_state_down_to_x0():
    chain, seeds = CHAINS["cosine"], range(4)
    model, x = ddpm(chain), normal(4, 3)
    for i in (1, 7, 50):
        states = list(model.p_chain(x, i, clamp=1.0, seeds=seeds))
        assert len(states) == i
        times = [j / 50 for j in range(i, -1, -1)]
        noise, here = Brownian(seeds, chain.u, times), x
        for j, state in zip(range(i, 0, -1), states, strict=True):
            with torch.no_grad():
                here = model.p_sample(here, j, clamp=1.0, noise=noise)
            assert torch.equal(state, here)
    start = chain.prior((4, 3), seeds=seeds, dtype=torch.float64)
    *_, last = model.p_chain(start, 50, seeds=seeds)
    assert torch.equal(last, model.sample((4, 3), seeds=seeds, dtype=torch.float64))


def test_a_chain_that_is_not_finite_warns_and_does_not_start_from_nan():
    chain = ddpm(sd.Discrete.linear(5))
    x = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="x must be finite"):
        chain.p_chain(x * math.nan, 5)
    network = torch.nn.Linear(1, 1).double()
    with torch.no_grad():
        network.bias[0] = math.inf
    broken = sd.DDPM(sd.adopt(lambda x, step: network(x), sd.Discrete.linear(5)))
    with pytest.warns(RuntimeWarning, match="2 of 2 samples are not finite at the end.*DDPM"):
        list(broken.p_chain(x, 5))
