"""Chains: the published tables, to nine digits, and the numbers that follow from them."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import sde_diffusion as sd


def alpha_bar(betas):
    return np.cumprod(1 - np.asarray(betas, dtype=np.float64))


def cosine_betas(n, s=0.008):
    """Nichol & Dhariwal 2021, as their code has it, in plain Python floats."""

    def f(t):
        return math.cos((t + s) / (1 + s) * math.pi / 2) ** 2

    return [min(1 - f((i + 1) / n) / f(i / n), 0.999) for i in range(n)]


def cmu_betas(n, s=0.008):
    """CMU 10-423, homework 2, eq. 16: 1 - clip(abar_t / abar_(t-1), 0.001, 1)."""
    t = np.arange(n + 1) / n
    abar = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2
    abar = abar / abar[0]
    return 1 - np.clip(abar[1:] / abar[:-1], 0.001, 1)


def sigmoid_betas(n, low=1e-4, high=0.02):
    return [low + (high - low) / (1 + math.exp(-z)) for z in np.linspace(-6, 6, n)]


TABLES = {
    "linear": (sd.Discrete.linear(), np.linspace(1e-4, 0.02, 1000)),
    "linear-50": (sd.Discrete.linear(50, 1e-3, 0.3), np.linspace(1e-3, 0.3, 50)),
    "scaled": (sd.Discrete.scaled_linear(), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    "cosine": (sd.Discrete.cosine(), cosine_betas(1000)),
    "cosine-10": (sd.Discrete.cosine(10), cosine_betas(10)),
    "cmu": (sd.Discrete.cosine(300), cmu_betas(300)),
    "sigmoid": (sd.Discrete.sigmoid(), sigmoid_betas(1000)),
    "constant": (sd.Discrete.constant(10), [1 - math.exp(-2 / 10)] * 10),
    "constant-0.9": (sd.Discrete.constant(7, alpha=0.9), [1 - 0.81] * 7),
    "users": (sd.Discrete(np.array([0.1, 0.05, 0.7])), [0.1, 0.05, 0.7]),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_the_published_ones(name):
    """1 - a ratio near 1 loses digits in the oracle: 1e-16 of a beta of 4e-5 is 3e-12."""
    chain, betas = TABLES[name]
    i = torch.arange(1, len(betas) + 1, dtype=torch.float64) / len(betas)
    assert_close(np.array(chain.betas), np.array(betas), rtol=1e-9, atol=0)
    abar = alpha_bar(betas)
    assert_close((chain.alpha(i) ** 2).numpy(), abar, rtol=1e-9, atol=0)
    assert_close(chain.variance(i).numpy(), 1 - abar, rtol=1e-9, atol=1e-15)
    assert_close((chain.alpha(i.float()) ** 2).double().numpy(), abar, rtol=1e-4, atol=0)


def test_the_ends_of_two_chains_have_the_values_found_in_print():
    """Ho et al. 2020's abar_T; the sigma / alpha of Stable Diffusion that k-diffusion prints."""
    assert float(sd.Discrete.linear().alpha(1.0) ** 2) == pytest.approx(4.036e-05, abs=5e-9)
    ratio = torch.exp(-sd.Discrete.scaled_linear().log_snr(torch.tensor([0.001, 1.0])) / 2)
    assert ratio.tolist() == [pytest.approx(0.0292, abs=5e-5), pytest.approx(14.6146, abs=5e-5)]


@pytest.mark.parametrize("name", ["linear", "scaled", "cosine-10"])
def test_zero_terminal_snr_is_lin_et_als_algorithm(name):
    chain = TABLES[name][0]
    root = np.sqrt(alpha_bar(chain.betas))
    first, last = root[0], root[-1]
    root = (root - last) * first / (first - last)
    rescaled = chain.zero_terminal_snr()
    i = torch.arange(1, chain.num_steps + 1, dtype=torch.float64) / chain.num_steps
    assert_close(rescaled.alpha(i).numpy(), root, rtol=1e-9, atol=0)
    assert float(rescaled.alpha(1.0)) == 0
    assert float(rescaled.log_snr(1.0)) == -math.inf
    assert rescaled.betas[-1] == 1
    assert rescaled.betas[0] == pytest.approx(chain.betas[0], rel=1e-9, abs=0)
    assert rescaled.t_max == 1 - 1 / chain.num_steps


def test_constant_alpha_is_the_ou_process_at_its_times():
    """alpha = e^(-1/N): alpha^k = e^(-k/N) (TTIC 31230, problem 1c)."""
    for n in (1, 10, 1000):
        t = torch.arange(1, n + 1, dtype=torch.float64) / n
        chain = sd.Discrete.constant(n)
        assert_close(chain.alpha(t), torch.exp(-t), rtol=n * 2.3e-16 + 1e-15, atol=0)
        assert_close(chain.sigma(t), sd.OU(1.0).sigma(t), rtol=n * 2.3e-16 + 1e-15, atol=0)


def test_a_chain_tends_to_noise_whatever_its_rising_betas():
    """KL(q(x_T | x_0) || N(0, I)) <= abar m2 / 2 + ..., abar <= (1 - beta_1)^T (DTU 3.1)."""
    previous = math.inf
    for n in (100, 200, 400, 800):
        chain = sd.Discrete(tuple(0.02 + 0.01 * i / (i + 50) for i in range(n)))
        kl = float(sd.DDPM(sd.exact.Gaussian(chain)).prior_term(torch.full((1, 1), 3.0)))
        abar = 0.98**n
        assert 0 <= kl <= (9 * abar - math.log1p(-abar)) / 2
        assert kl < previous
        previous = kl


@pytest.mark.parametrize("name", ["linear", "cosine-10", "users"])
def test_reverse_variances_are_ho_et_als(name):
    chain, betas = TABLES[name]
    betas, abar = np.asarray(betas), np.concatenate([[1.0], alpha_bar(betas)])
    posterior = (1 - abar[:-1]) / (1 - abar[1:]) * betas
    assert_close(chain.posterior_variances.numpy(), posterior, rtol=1e-9, atol=0)
    assert_close(chain.model_variances("beta").numpy(), betas, rtol=1e-9, atol=0)
    clipped = np.append(posterior[1], posterior[1:])
    assert_close(chain.model_variances("posterior").numpy(), clipped, rtol=1e-9, atol=0)


def test_the_only_step_of_a_chain_keeps_its_beta():
    assert sd.Discrete((0.3,)).model_variances("posterior").tolist() == [0.3]
    with pytest.raises(ValueError, match="variance must be one of beta, posterior"):
        sd.Discrete((0.3,)).model_variances("learned")
