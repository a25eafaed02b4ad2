"""`verify.law`: the exact law of an output, its distances, and what each step and draw does to it.

Bounds called rounding: float64, some hundred operations on numbers of order 1, hence 1e-10.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from oracles import ddpm_moments, normal, w2
from scipy.integrate import quad
from torch.testing import assert_close

import sde_diffusion as sd

MEAN, VARIANCE = 0.7, 0.25
DATA = sd.exact.Gaussian(sd.VP(), torch.tensor([MEAN], dtype=torch.float64), VARIANCE)
CHAIN = sd.processes.discretize(sd.VP(), 100, rule="exact")


def spd(k, d=3):
    """A symmetric positive definite matrix of condition some tens."""
    root = normal(k + 1, d, d)[k]
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


def law_of(mean, covariance):
    """A law with these moments."""
    return replace(sd.verify.law(sd.Heun(), DATA, steps=2), mean=mean, covariance=covariance)


def test_the_probe_states_what_monte_carlo_finds():
    n, sampler = 20_000, sd.Ancestral()
    law = sd.verify.law(sampler, DATA, steps=20)
    x = sd.VP().prior((n, 1), seeds=range(n), dtype=torch.float64)
    x = sd.sample(DATA, sampler, x, steps=20, generator=torch.Generator().manual_seed(0))
    variance = float(law.covariance)
    assert abs(float(x.mean() - law.mean)) < 4.5 * math.sqrt(variance / n)
    assert abs(float(x.var()) - variance) < 4.5 * variance * math.sqrt(2 / n)


def test_the_probe_in_two_dimensions_is_one_probe_per_eigenvector():
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    plane = sd.exact.Gaussian(sd.VP(), torch.tensor([1.0, -1.0]), covariance)
    law = sd.verify.law(sd.EulerMaruyama(), plane, steps=15)
    values, vectors = torch.linalg.eigh(covariance)
    for value, vector in zip(values, vectors.T, strict=True):
        line = sd.exact.Gaussian(sd.VP(), (vector @ plane.mean)[None], value)
        alone = sd.verify.law(sd.EulerMaruyama(), line, steps=15)
        assert_close(vector @ law.mean, alone.mean[0], rtol=1e-10, atol=1e-10)
        assert_close(vector @ law.covariance @ vector, alone.covariance[0, 0], rtol=1e-10, atol=0)


def test_data_of_any_shape_have_the_law_of_their_flat_coordinates():
    flat = sd.exact.Gaussian(sd.VP(), torch.arange(4.0), torch.tensor([0.1, 0.2, 0.5, 1.0]))
    square = sd.exact.Gaussian(sd.VP(), torch.arange(4.0).reshape(2, 2), flat.variances[0])
    laws = [sd.verify.law(sd.Ancestral(), data, steps=5) for data in (flat, square)]
    assert torch.equal(laws[0].mean, laws[1].mean)
    assert torch.equal(laws[0].covariance, laws[1].covariance)


def test_a_law_for_each_coordinate_is_that_of_one_at_any_shape():
    """`exact.Gaussian` with a mean of shape (): each coordinate is N(m, S) independently."""
    law = sd.verify.law(
        sd.Heun(), sd.exact.Gaussian(sd.VP(), MEAN, VARIANCE), steps=5, shape=(2, 2)
    )
    one = sd.verify.law(sd.Heun(), DATA, steps=5)
    assert_close(law.mean, one.mean.expand(4), rtol=1e-10, atol=1e-10)
    assert_close(law.covariance, one.covariance * torch.eye(4).double(), rtol=1e-10, atol=1e-10)


# ---- distances --------------------------------------------------------------------------------


def test_w2_is_the_one_dimensional_formula():
    law = sd.verify.law(sd.EulerMaruyama(), DATA, steps=9)
    ours = law.w2(DATA.mean, DATA.covariance)
    assert ours == law.w2()
    assert ours == pytest.approx(
        w2((float(law.mean), float(law.covariance)), (MEAN, VARIANCE)), rel=1e-9
    )


@pytest.mark.parametrize("d", [2, 5])
def test_w2_is_the_trace_formula_of_dowson_and_landau(d):
    """W^2 = |m - m'|^2 + tr(S + S' - 2 (S^(1/2) S' S^(1/2))^(1/2)), the root by scipy."""
    (m, q), a, b = normal(2, d), spd(0, d), spd(1, d)
    root = scipy.linalg.sqrtm(a.numpy())
    cross = scipy.linalg.sqrtm(root @ b.numpy() @ root)
    w2_squared = float((m - q).square().sum() + (a + b).trace()) - 2 * np.trace(cross).real
    assert law_of(m, a).w2(q, b) == pytest.approx(math.sqrt(w2_squared), rel=1e-10)
    assert law_of(q, b).w2(m, a) == pytest.approx(law_of(m, a).w2(q, b), rel=1e-10)


def test_w2_is_zero_at_equality_and_keeps_its_digits_far_below_the_root_of_rounding():
    """Standard deviations (1 + h) times as large are at W2 = h tr(S)^(1/2). The trace formula is a
    difference of numbers of order 1, so its root is 0 or above 1e-8. Ours is one of square roots:
    rounding of some d eps, here 3e-15."""
    m, a = normal(3), spd(0)
    scale = math.sqrt(float(a.trace()))
    assert law_of(m, a).w2(m, a) < 3e-15 * scale
    for h in (1e-6, 1e-9, 1e-12):
        apart = law_of(m, a * (1 + h) ** 2).w2(m, a)
        assert apart == pytest.approx(h * scale, rel=1e-5, abs=3e-15 * scale)


def test_w2_of_degenerate_laws_is_that_of_their_square_roots():
    """Of a point mass at q from N(m, S): W2^2 = |m - q|^2 + tr S."""
    m, a, zero = normal(3), spd(0), torch.zeros(3, 3, dtype=torch.float64)
    expected = math.sqrt(float(m.square().sum() + a.trace()))
    assert law_of(m, a).w2(0 * m, zero) == pytest.approx(expected, rel=1e-12)
    assert law_of(0 * m, zero).w2(m, a) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [1, 3])
def test_kl_is_that_of_torch_distributions(d):
    (m, q), a, b = normal(2, d), spd(0, d), spd(1, d)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(m, a), torch.distributions.MultivariateNormal(q, b)
    )
    assert law_of(m, a).kl(q, b) == pytest.approx(float(theirs), rel=1e-10)


def test_kl_is_its_integral():
    """int p log(p / q) for N(0.2, 0.5) against N(0.7, 0.25), by quadrature."""

    def log_density(x, mean, variance):
        return -((x - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2

    def integrand(x):
        p, q = log_density(x, 0.2, 0.5), log_density(x, MEAN, VARIANCE)
        return math.exp(p) * (p - q)

    integral, _ = quad(integrand, -8, 8, epsabs=1e-12, epsrel=1e-12)
    mean, variance = torch.tensor([[0.2], [0.5]], dtype=torch.float64)
    assert law_of(mean, variance[:, None]).kl(DATA.mean, DATA.covariance) == pytest.approx(
        integral, rel=1e-9
    )


def test_kl_is_zero_at_equality_and_its_second_order_near_it():
    """Variances (1 + h) times as large: KL = d (h - log(1 + h)) / 2 = d h^2 / 4 + O(h^3)."""
    m, a = normal(3), spd(0)
    assert abs(law_of(m, a).kl(m, a)) < 1e-14
    for h in (1e-2, 1e-4):
        expected = 3 * (h - math.log1p(h)) / 2
        # The ratios of variances are known to some eps times the condition, 1e-14; their slope is h
        assert law_of(m, (1 + h) * a).kl(m, a) == pytest.approx(expected, abs=1e-14 * h + 1e-18)


FLAT = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "other",
    [torch.eye(3, dtype=torch.float64),
     spd(0)],
    ids=["along the axes", "across them"],
)  # fmt: skip
def test_kl_is_infinite_where_the_output_has_no_density(other):
    m = normal(3)
    assert law_of(m, FLAT).kl(m, other) == math.inf


def test_departure_is_w2_of_a_run_from_the_datas_own_law():
    """From N(alpha_1 m, alpha_1^2 v + sigma_1^2), not from the prior."""
    law = sd.verify.law(sd.Ancestral(eta=0.0), DATA, steps=20)
    level = sd.VP().levels(torch.ones(1, dtype=torch.float64))[0]
    gain = float(law.start_gain)
    offset = float(law.mean)  # the prior's mean is 0
    mean = offset + gain * level.alpha * MEAN
    variance = gain**2 * (level.alpha**2 * VARIANCE + level.sigma**2)
    assert law.departure == pytest.approx(w2((mean, variance), (MEAN, VARIANCE)), rel=1e-9)
    assert law.w2() != pytest.approx(law.departure, rel=1e-9)


# ---- the law on the way -----------------------------------------------------------------------


def ancestral_path(betas, kind):
    """Ho et al.'s Algorithm 2 on N(MEAN, VARIANCE), from the data's own law at T: every state."""
    betas = np.asarray(betas)
    abar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    m, v = math.sqrt(abar[-1]) * MEAN, abar[-1] * VARIANCE + 1 - abar[-1]
    yield m, v
    for i in range(len(betas), 0, -1):
        beta, a, before = betas[i - 1], abar[i], abar[i - 1]
        total = a * VARIANCE + 1 - a
        gain = (1 - beta / total) / math.sqrt(1 - beta)
        m = gain * m + beta * math.sqrt(a) * MEAN / total / math.sqrt(1 - beta)
        added = beta if kind == "beta" else (1 - before) / (1 - a) * beta
        v = gain**2 * v + (added if i > 1 else 0.0)
        yield m, v


@pytest.mark.parametrize("kind", ["beta", "posterior"])
def test_the_law_at_every_call_is_the_chains_recursion_stopped_there(kind):
    data = DATA.on(CHAIN)
    law = sd.verify.law(sd.Ancestral(kind), data, steps=100)
    path = list(ancestral_path(CHAIN.betas, kind))
    assert len(law.steps) == len(path) == 101
    for step, expected, i in zip(law.steps, path, range(100, -1, -1), strict=True):
        assert step.t == pytest.approx(i / 100, rel=1e-12)
        assert (float(step.mean), float(step.covariance)) == pytest.approx(expected, rel=1e-8)
        level = CHAIN.levels(torch.tensor([step.t], dtype=torch.float64))[0]
        exact = level.alpha * MEAN, level.alpha**2 * VARIANCE + level.sigma**2
        departure = w2(expected, exact) / math.sqrt(exact[1])
        assert step.departure == pytest.approx(departure, rel=1e-6, abs=1e-10)
    whole = ddpm_moments(CHAIN.betas, MEAN, VARIANCE, kind)
    assert (float(law.mean), float(law.covariance)) == pytest.approx(whole, rel=1e-8)


def test_the_variance_is_that_of_the_start_and_of_each_draw():
    """What a draw adds reaches the output times the gains of the steps after it."""
    law = sd.verify.law(sd.Ancestral("beta"), DATA.on(CHAIN), steps=100)
    gains = [draw.gain for draw in law.draws]
    assert float(law.covariance) == pytest.approx(
        float(law.start_gain) ** 2 + sum(gain**2 for gain in gains), rel=1e-10
    )
    assert gains == pytest.approx(law.noise_gains.flatten().abs().tolist(), rel=1e-12)
    betas = np.asarray(CHAIN.betas)
    abar = np.cumprod(1 - betas)
    steps = (1 - betas / (abar * VARIANCE + 1 - abar)) / np.sqrt(1 - betas)
    for draw, i in zip(law.draws, range(100, 1, -1), strict=True):
        assert draw.added == pytest.approx(math.sqrt(betas[i - 1]), rel=1e-8)
        assert draw.gain == pytest.approx(draw.added * np.prod(steps[: i - 1]), rel=1e-8)


# ---- shares of the kernel's noise --------------------------------------------------------------


def levels_of(sampler, process, steps):
    return list(pairwise(process.levels(sampler.grid(process, steps))))


@pytest.mark.parametrize("process", [sd.VP(), sd.VE(), sd.RectifiedFlow()], ids=str)
def test_ddpms_large_variance_is_the_kernels_and_its_small_one_sigma_s_by_sigma_t_of_it(process):
    data = DATA.on(process)
    law = sd.verify.law(sd.Ancestral("beta"), data, steps=12)
    assert [draw.share for draw in law.draws] == pytest.approx([1.0] * 11, rel=1e-8)
    law = sd.verify.law(sd.Ancestral(), data, steps=12)
    steps = levels_of(sd.Ancestral(), process, 12)[:-1]
    assert len(law.draws) == len(steps)
    for draw, (t, s) in zip(law.draws, steps, strict=True):
        assert (draw.t, draw.s) == pytest.approx((t.t, s.t), rel=1e-9)
        assert draw.share == pytest.approx(s.sigma / t.sigma, rel=1e-8)


@pytest.mark.parametrize("process", [sd.VP(), sd.VE(), sd.RectifiedFlow()], ids=str)
def test_euler_maruyamas_share_is_g_root_dt_by_b_the_last_step_included(process):
    law = sd.verify.law(sd.EulerMaruyama(), DATA.on(process), steps=12)
    steps = levels_of(sd.EulerMaruyama(), process, 12)
    assert len(law.draws) == len(steps) == 12
    for draw, (t, s) in zip(law.draws, steps, strict=True):
        _, b = process.transition(*(torch.tensor(at.t, dtype=torch.float64) for at in (s, t)))
        _, g2 = process.rates(torch.tensor(t.t, dtype=torch.float64))
        added = math.sqrt(float(g2) * (t.t - s.t))
        assert draw.added == pytest.approx(added, rel=1e-9)
        assert draw.share == pytest.approx(added / float(b), rel=1e-8)


def test_there_is_one_gain_per_noise_draw_and_none_in_ancestrals_last_step_or_a_flow():
    assert len(sd.verify.law(sd.Ancestral(), DATA, steps=9).noise_gains) == 8
    assert len(sd.verify.law(sd.EulerMaruyama(), DATA, steps=9).noise_gains) == 9
    for flow in (sd.Heun(), sd.Adams(), sd.Ancestral(eta=0.0)):
        law = sd.verify.law(flow, DATA, steps=9)
        assert law.draws == ()
        assert law.noise_gains.shape == (0, 1, 1)


# ---- the last step ----------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.25, 1e-4])
def test_an_exact_flow_finished_by_eulers_step_misses_the_data_by_left(variance):
    """The exact map down to sigma / alpha = 0.002 and Euler's step from there."""
    data = sd.exact.Gaussian(sd.EDM(), torch.tensor([MEAN], dtype=torch.float64), variance)
    last = 0.002 / 80  # EDM: sigma = 80 t

    @dataclass(frozen=True)
    class Exact(sd.Ancestral):
        def step(self, model, x, t, s, noise, memory):
            if s.sigma == 0:
                return model(x, t).x0, None
            model(x, t)  # it asks where it stands
            return data.flow(x, t.t, s.t), None

    law = sd.verify.law(Exact(eta=0.0), data, times=[1.0, 0.5, last, 0.0])
    assert law.finish == pytest.approx(0.002, rel=1e-9)
    assert law.departure == pytest.approx(law.left, rel=1e-9, abs=1e-14)
    s2 = 0.002**2
    assert law.left == pytest.approx(s2 / (2 * math.sqrt(variance)), rel=s2 / variance)


# ---- planted faults ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Faulty(sd.Ancestral):
    """Ho et al.'s chain with one planted fault."""

    fault: str = ""

    def step(self, model, x, t, s, noise, memory):
        if self.fault == "noise in the last step" and s.sigma == 0:
            made, _ = super().step(model, x, t, s, noise, memory)
            return made + math.sqrt(t.sigma**2) * noise(t.t, s.t, x), None
        if self.fault == "no noise at one level" and 0.495 < t.t < 0.505:
            return super().step(model, x, t, s, lambda t, s, x: 0 * noise(t, s, x), memory)
        if self.fault == "noise doubled":
            return super().step(model, x, t, s, lambda *at: math.sqrt(2) * noise(*at), memory)
        return super().step(model, x, t, s, noise, memory)


@pytest.mark.parametrize(
    "fault", ["", "noise in the last step", "no noise at one level", "noise doubled", "posterior"]
)
def test_a_planted_fault_changes_the_law_and_its_absence_does_not(fault):
    sampler = sd.Ancestral() if fault == "posterior" else Faulty("beta", fault=fault)
    law = sd.verify.law(sampler, DATA.on(CHAIN), steps=100)
    mean, variance = ddpm_moments(CHAIN.betas, MEAN, VARIANCE, "beta")
    right = float(law.mean) == pytest.approx(mean, rel=1e-8)
    right = right and float(law.covariance) == pytest.approx(variance, rel=1e-8)
    assert right == (fault == "")


def test_the_faulty_step_and_draw_are_named_and_an_honest_chain_has_none():
    assert sd.verify.law(Faulty("beta"), DATA.on(CHAIN), steps=100).holds
    law = sd.verify.law(Faulty("beta", fault="no noise at one level"), DATA.on(CHAIN), steps=100)
    draw, step = law.faults
    assert draw.startswith("draw 51 of 99 (t=0.5 to 0.49) adds 0.000e+00")
    assert step.startswith("step 51 of 100 (t=0.5 to 0.49) moves the law")
    assert not law.holds
    assert law.verdict == f"{draw}; {step}"


def test_a_law_prints_its_numbers_its_verdict_and_what_it_does_not_prove():
    law = sd.verify.law(sd.Ancestral("beta"), DATA.on(CHAIN), steps=100)
    text = " ".join(str(law).split())
    parts = ("100 calls, 99 draws", f"{float(law.mean):.8g}", f"{float(law.covariance):.8g}",
             f"{law.w2():.3e}", f"verdict: {law.verdict}", "does not prove:")  # fmt: skip
    assert all(part in text for part in parts)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "sampler", [sd.Ancestral(), sd.Ancestral("beta"), sd.EulerMaruyama(), sd.Heun()], ids=str
)
def test_an_honest_sampler_on_a_random_grid_is_not_accused(sampler, seed):
    inner = torch.rand(59, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    times = [1.0, *inner.sort(descending=True).values.tolist(), 0.0]
    law = sd.verify.law(sampler, DATA, times=times)
    assert law.holds
    assert "differ too much in size" in law.verdict


def test_a_law_states_where_it_does_not_judge_and_starts_where_alpha_is_0():
    assert "fewer than 32" in sd.verify.law(sd.Heun(), DATA, steps=20).verdict
    flow = sd.exact.Gaussian(sd.RectifiedFlow(), DATA.mean, DATA.covariance)
    once = sd.verify.law(sd.Ancestral(), flow, steps=1)
    assert once.finish == math.inf
    assert once.left == pytest.approx(float(DATA.covariance.trace()) ** 0.5, rel=1e-12)
    assert float(once.covariance) < 1e-24  # the mean of the data, and nothing of the start
