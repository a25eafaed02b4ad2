"""Discrete and continuous: one step, the whole chain, and back."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from cases import MEAN
from oracles import EPS, ddpm_moments, fitted_order, reverse_sde_moments, vp_beta, w2
from torch.testing import assert_close

import sde_diffusion as sd

SIZES = (50, 100, 200, 400, 800)


def one_step(n, at):
    """Euler-Maruyama from t - 1/N to t against the chain's kernel, both reading beta at `at`.

    Returns the gaps of scale, variance and standard deviation.
    """
    beta = vp_beta(at) / n
    chain = sd.processes.discretize(sd.VP(), n)
    i = round(0.5 * n)
    s, t = (torch.tensor(k / n, dtype=torch.float64) for k in (i - 1, i))
    scale, deviation = (float(v) for v in chain.transition(s, t))
    return abs(scale - (1 - beta / 2)), abs(deviation**2 - beta), abs(deviation - math.sqrt(beta))


def test_one_ddpm_step_is_one_euler_step_to_second_order_in_mean_and_variance():
    """sqrt(1 - b) = 1 - b/2 - b^2/8 - ..., and the variances are the same number b."""
    gaps = [one_step(n, 0.5) for n in SIZES]
    assert fitted_order(SIZES, [gap[0] for gap in gaps]) == pytest.approx(2, abs=0.05)
    assert max(gap[1] for gap in gaps) < 1e-13


def test_reading_beta_at_the_steps_start_costs_half_an_order_on_paths():
    """The variance differs by beta' dt^2, so the noise's factor by O(dt^1.5)."""
    gaps = [one_step(n, 0.5 - 1 / n) for n in SIZES]
    assert fitted_order(SIZES, [gap[1] for gap in gaps]) == pytest.approx(2, abs=0.05)
    assert fitted_order(SIZES, [gap[2] for gap in gaps]) == pytest.approx(1.5, abs=0.05)


def test_the_discretized_chain_tends_to_vp_at_rate_one_over_n():
    errors = []
    for n in SIZES:
        t = torch.arange(1, n + 1, dtype=torch.float64) / n
        errors.append(
            float((sd.processes.discretize(sd.VP(), n).alpha(t) - sd.VP().alpha(t)).abs().max())
        )
    assert fitted_order(SIZES, errors) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_the_exact_rule_agrees_at_every_grid_point(n):
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    chain = sd.processes.discretize(sd.VP(), n, rule="exact")
    assert_close(chain.alpha(t), sd.VP().alpha(t), rtol=1e-12, atol=0)
    assert_close(chain.variance(t), sd.VP().variance(t), rtol=1e-12, atol=0)


def test_euler_betas_are_the_published_ones():
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    betas = torch.tensor(sd.processes.discretize(sd.VP(), 1000).betas, dtype=torch.float64)
    assert_close(betas, vp_beta(t) / 1000, rtol=1e-12, atol=0)


def test_the_interpolating_sde_has_the_chains_marginals_and_transitions():
    chain = sd.Discrete.linear(20)
    path = sd.processes.interpolate(chain)
    t = torch.arange(21, dtype=torch.float64) / 20
    assert torch.equal(path.alpha(t), chain.alpha(t))
    for ours, theirs in zip(
        path.transition(t[:-1], t[1:]), chain.transition(t[:-1], t[1:]), strict=True
    ):
        assert torch.equal(ours, theirs)
    betas = torch.tensor(chain.betas, dtype=torch.float64)
    assert_close(path.transition(t[:-1], t[1:])[1] ** 2, betas, rtol=1e-12, atol=0)
    between = torch.tensor([0.512], dtype=torch.float64)  # inside (10/20, 11/20)
    rate = -20 * torch.log1p(-betas[10])
    assert_close(path.diffusion(between) ** 2, rate[None], rtol=1e-10, atol=0)


def test_discretizing_the_interpolating_sde_exactly_gives_the_chain_back():
    chain = sd.Discrete.linear(50)
    back = sd.processes.discretize(sd.processes.interpolate(chain), 50, rule="exact")
    assert back.betas == pytest.approx(chain.betas, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((sd.RectifiedFlow(), 10), "variance-preserving.*got RectifiedFlow"),
        ((sd.VP(), 10), "take more steps"),
        ((sd.VP(), 0), "num_steps"),
        ((sd.VP(), 100, "midpoint"), "rule"),
    ],
)
def test_what_has_no_chain_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        sd.processes.discretize(*arguments)


# ---- agreement ---------------------------------------------------------------------------------


def typed_distances(n):
    """The chain beta_i = beta(i/N)/N against VP, in numpy: marginals, kernels, least eps-loss."""
    t = np.arange(n + 1) / n
    alpha2 = np.exp(-(0.1 * t + 19.9 * t**2 / 2))
    betas = (0.1 + 19.9 * t[1:]) / n
    abar = np.append(1.0, np.cumprod(1 - betas))
    marginals = max(
        np.abs(np.sqrt(alpha2) - np.sqrt(abar)).max(),
        np.abs(np.sqrt(1 - alpha2) - np.sqrt(1 - abar)).max(),
    )
    kernels = alpha2[1:] / alpha2[:-1]
    transitions = max(
        np.abs(np.sqrt(kernels) - np.sqrt(1 - betas)).max(), np.abs(1 - kernels - betas).max()
    )
    least = [a / 4 / (a / 4 + 1 - a) for a in (alpha2[1:], abar[1:])]
    return marginals, transitions, np.abs(least[0] - least[1]).max()


def test_agreement_reports_the_distances_of_the_definitions():
    report = sd.verify.agreement(
        sd.VP(), partial(sd.processes.discretize, sd.VP()), sizes=(100, 200), mean=MEAN
    )
    limit = reverse_sde_moments(MEAN, 0.25)
    for k, n in enumerate((100, 200)):
        expected = typed_distances(n)
        made = (report.marginals[k], report.transitions[k], report.losses[k])
        assert made == pytest.approx(expected, rel=1e-9)
        betas = (0.1 + 19.9 * np.arange(1, n + 1) / n) / n
        distance = w2(ddpm_moments(betas, MEAN, 0.25, "beta"), limit)
        assert report.laws[k] == pytest.approx(distance, rel=1e-6)


def test_the_rates_of_vp_and_its_chains():
    """Marginals at 1.00, one kernel at 2, the output law at 1 (beta) and log N / N (posterior)."""
    chains = partial(sd.processes.discretize, sd.VP())
    report = sd.verify.agreement(sd.VP(), chains, sampler=sd.Ancestral("beta"))
    assert report.sizes == (1024, 2048, 4096)
    assert report.rates["marginals"] == pytest.approx(1, abs=5e-3)
    assert report.rates["transitions"] == pytest.approx(2, abs=5e-3)
    assert report.rates["losses"] == pytest.approx(1, abs=5e-3)
    assert 0.98 <= report.rates["laws"] <= 1.02
    # Shorter chains: the sampler has a part in the laws alone.
    shorter = sd.verify.agreement(
        sd.VP(), chains, sampler=sd.Ancestral("posterior"), sizes=(256, 512, 1024)
    )
    assert 0.9 <= shorter.rates["laws"] <= 1.02


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (sd.OU(1.0), sd.Discrete.constant),
        (sd.VP(), partial(sd.processes.discretize, sd.VP(), rule="exact")),
        (sd.VP(3.0, 3.0), sd.OU(1.5)),
    ],
    ids=["ttic", "exact rule", "constant rate"],
)
def test_what_is_equal_agrees_to_rounding_and_has_no_rate(a, b):
    report = sd.verify.agreement(a, b, sizes=(16, 64))
    for name in ("marginals", "transitions", "losses"):
        assert max(getattr(report, name)) < 64 * 4 * EPS
        assert report.rates[name] is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sizes": (8, 8)}, "sizes must hold different"),
        ({"b": lambda n: sd.Discrete.linear(1000)}, "b.N. must be a chain of N steps; got 1000"),
        ({"b": lambda n: None}, "b.N. must be a Process"),
        ({"sampler": "ancestral"}, "sampler must be a Sampler"),
    ],
)
def test_a_family_that_is_none_has_no_rate(arguments, named):
    with pytest.raises((ValueError, TypeError), match=named):
        sd.verify.agreement(
            sd.VP(), **{"b": partial(sd.processes.discretize, sd.VP()), **arguments}
        )


def test_agreement_takes_the_size_of_the_chain_on_either_side():
    chain = sd.Discrete.linear(100, 1e-3, 0.2)
    there, back = sd.verify.agreement(sd.VP(), chain), sd.verify.agreement(chain, sd.VP())
    assert there.sizes == back.sizes == (100,)
    assert there.marginals == back.marginals


def test_a_chain_has_its_own_size_and_the_report_can_be_printed():
    report = sd.verify.agreement(sd.VP(), sd.Discrete.linear(100, 1e-3, 0.2))
    assert report.sizes == (100,)
    assert set(report.rates.values()) == {None}
    _, header, row, *closing = str(report).splitlines()
    assert header.split() == ["N", "marginals", "transitions", "losses", "laws"]
    assert row.split()[0] == "100"
    assert [float(cell) for cell in row.split()[1:]] == pytest.approx(
        [report.marginals[0], report.transitions[0], report.losses[0], report.laws[0]], rel=5e-3
    )
    assert "marginals -, transitions -, losses -, laws -" in " ".join(closing)


def test_the_chain_of_cosine_is_its_table_but_for_the_published_clip():
    exact = sd.processes.discretize(sd.Cosine(), 100, "exact")
    assert exact.betas[-1] == 1
    assert exact.betas[:-1] == sd.Discrete.cosine(100).betas[:-1]
    with pytest.raises(ValueError, match=r"rule must be 'exact' for Cosine.*0\.999"):
        sd.processes.discretize(sd.Cosine(), 100)
