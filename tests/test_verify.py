"""The affine probe: it states the law that sampling has, and a wrong sampler's law is wrong."""

import math
from dataclasses import dataclass

import pytest
import torch
from oracles import ddpm_moments, w2
from torch.testing import assert_close

import sde_diffusion as sd

DATA = sd.exact.Gaussian(sd.VP(), torch.tensor([0.7], dtype=torch.float64), 0.25)


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


def test_there_is_one_gain_per_noise_draw_and_none_in_ancestrals_last_step():
    assert len(sd.verify.law(sd.Ancestral(), DATA, steps=9).noise_gains) == 8
    assert len(sd.verify.law(sd.EulerMaruyama(), DATA, steps=9).noise_gains) == 9
    assert len(sd.verify.law(sd.Heun(), DATA, steps=9).noise_gains) == 0


def test_w2_is_the_one_dimensional_formula():
    law = sd.verify.law(sd.EulerMaruyama(), DATA, steps=9)
    ours = law.w2(DATA.mean, DATA.covariance)
    assert ours == pytest.approx(
        w2((float(law.mean), float(law.covariance)), (0.7, 0.25)), rel=1e-9
    )


def test_what_is_not_affine_is_refused_by_name():
    mixture = sd.exact.GaussianMixture(sd.VP(), [0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
    for sampler in (sd.Adams(), sd.Ancestral()):
        with pytest.raises(ValueError, match="not affine on GaussianMixture"):
            sd.verify.law(sampler, mixture, steps=20)


@dataclass(frozen=True)
class Faulty(sd.Ancestral):
    """Ho et al.'s chain with one planted fault."""

    fault: str = ""

    def step(self, model, x, t, s, noise, memory):
        if self.fault == "noise in the last step" and s.sigma == 0:
            made, _ = super().step(model, x, t, s, noise, memory)
            return made + math.sqrt(t.sigma**2) * noise(t.t, s.t, x), None
        if self.fault == "no noise at one level" and 0.45 < t.t < 0.55:
            return super().step(model, x, t, s, lambda t, s, x: torch.zeros_like(x), memory)
        if self.fault == "noise doubled":
            return super().step(model, x, t, s, lambda *at: math.sqrt(2) * noise(*at), memory)
        return super().step(model, x, t, s, noise, memory)


@pytest.mark.parametrize(
    "fault", ["", "noise in the last step", "no noise at one level", "noise doubled", "posterior"]
)
def test_a_planted_fault_changes_the_law_and_its_absence_does_not(fault):
    chain = sd.discretize(sd.VP(), 100, rule="exact")
    data = sd.exact.Gaussian(chain, torch.tensor([0.7], dtype=torch.float64), 0.25)
    sampler = sd.Ancestral() if fault == "posterior" else Faulty("beta", fault=fault)
    law = sd.verify.law(sampler, data, steps=100)
    mean, variance = ddpm_moments(chain.betas, 0.7, 0.25, "beta")
    right = float(law.mean) == pytest.approx(mean, rel=1e-8)
    right = right and float(law.covariance) == pytest.approx(variance, rel=1e-8)
    assert right == (fault == "")
