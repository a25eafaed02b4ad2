"""Losses: noise prediction is weighted score matching; times follow their laws."""

import math

import pytest
import torch
from cases import PARAMETERIZATIONS
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.losses import stratified

T = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator).to(dtype)
    return x0, eps


def denoiser(parameterization, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = sd.networks.MLP((3,), width=16)
    return sd.Denoiser(network.to(dtype), sd.VP(), parameterization)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_eps_loss_is_the_variance_weighted_denoising_score_matching_loss(dtype, bound):
    """|eps_hat - eps|^2 = sigma^2 |score_hat - grad log p(x_t | x0)|^2, the right side typed."""
    (x0, eps), model = problem(dtype), denoiser(sd.Eps(), dtype)
    ours = sd.denoising_loss(model, x0, T, eps)
    level = sd.VP().level(T, x0)
    x = level.alpha * x0 + level.sigma * eps
    with torch.no_grad():
        score = -model.network(x, T.to(dtype)) / level.sigma
    conditional = -(x - level.alpha * x0) / level.sigma**2
    dsm = (level.sigma**2 * (score - conditional) ** 2).mean(1)
    # x - alpha x0 loses 1 / sigma of the precision of eps, for which the bound allows here
    assert_close(ours.detach(), dsm, rtol=bound / float(level.sigma.min()), atol=0)
    exact = (level.sigma**2 * (score + eps / level.sigma) ** 2).mean(1)
    assert_close(ours.detach(), exact, rtol=bound, atol=0)


@pytest.mark.parametrize("space", PARAMETERIZATIONS)
def test_losses_in_different_spaces_differ_by_a_factor_of_the_level(space):
    """With eps_hat - eps = e: x0 - sigma/alpha e, score - e/sigma, v - e/alpha (VP)."""
    (x0, eps), model = problem(), denoiser(sd.Eps())
    level = sd.VP().level(T, x0)
    factor = {
        "eps": torch.ones_like(T),
        "x0": (level.sigma / level.alpha).flatten(),
        "score": (1 / level.sigma).flatten(),
        "v": (1 / level.alpha).flatten(),
    }[space]
    base = sd.denoising_loss(model, x0, T, eps)
    other = sd.denoising_loss(model, x0, T, eps, space=PARAMETERIZATIONS[space])
    assert_close(other, factor**2 * base, rtol=1e-10, atol=0)


def test_a_weight_multiplies_each_samples_loss():
    (x0, eps), model = problem(), denoiser(sd.V())
    base = sd.denoising_loss(model, x0, T, eps)
    weighted = sd.denoising_loss(model, x0, T, eps, weight=lambda level: level.diffusion2)
    assert_close(weighted, sd.VP().diffusion(T) ** 2 * base, rtol=1e-12, atol=0)


def test_noise_shared_by_the_batch_is_refused():
    (x0, eps), model = problem(), denoiser(sd.Eps())
    with pytest.raises(ValueError, match="eps must be shaped like x0"):
        sd.denoising_loss(model, x0, T, eps[:1])


def test_the_truth_has_no_loss_and_the_gradient_is_finite():
    class Oracle(torch.nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.eps = torch.nn.Parameter(eps.clone())

        def forward(self, x, c):
            return self.eps

    x0, eps = problem()
    model = sd.Denoiser(Oracle(eps), sd.VP(), sd.Eps())
    loss = sd.denoising_loss(model, x0, T, eps).mean()
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(model.network.eps.grad, torch.zeros_like(eps))


def test_a_trained_loss_reaches_the_floor_of_a_known_law_and_does_not_beat_it():
    """N(0, 1/4): the floor is the exact model's loss on the same draws; 5 % is promises.md's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sd.Denoiser(sd.networks.MLP((1,), width=64, depth=2), sd.VP(), sd.Eps())
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)

    def batch(n):
        x0, eps = torch.randn(2, n, 1, generator=generator)
        return x0 / 2, torch.rand(n, generator=generator), eps

    for _ in range(800):
        optimizer.zero_grad()
        sd.denoising_loss(model, *batch(512)).mean().backward()
        optimizer.step()
        schedule.step()
    x0, t, eps = batch(200_000)
    exact = sd.exact.Gaussian(sd.VP(), 0.0, 0.25)
    level = sd.VP().level(t, x0)
    with torch.no_grad():
        reached = sd.denoising_loss(model, x0, t, eps)
        floor = (
            (exact(sd.VP().perturb(x0, level, eps), level).eps - eps).square().flatten(1).mean(1)
        )
    gap = reached - floor
    assert float(reached.mean()) < 1.05 * float(floor.mean())
    assert float(gap.mean()) > -4.5 * float(gap.std()) / math.sqrt(len(gap))


# ---- times -----------------------------------------------------------------------------------


def test_discrete_times_hit_each_step_equally_often():
    quantiles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    times = sd.DiscreteTimes(50)(quantiles)
    counts = torch.bincount((times * 50).round().long(), minlength=51)
    assert counts[0] == 0
    assert bool((counts[1:] == 200).all())


def test_stratified_quantiles_put_one_in_each_stratum():
    q = stratified(0.3, torch.arange(64), 64)
    assert_close((q * 64).floor(), torch.arange(64, dtype=torch.float64))


@pytest.mark.parametrize("process", [sd.VP(), sd.RectifiedFlow()], ids=["vp", "rectified"])
def test_normal_log_snr_is_normal_within_the_processs_range(process):
    """Quantiles against scipy's truncated normal."""
    from scipy.stats import truncnorm

    times = sd.NormalLogSNR(process, mean=0.5, std=2.0)
    quantiles = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    log_snr = process.log_snr(times(quantiles))
    lowest = float(process.log_snr(torch.ones((), dtype=torch.float64)))
    law = truncnorm((lowest - 0.5) / 2.0, math.inf, loc=0.5, scale=2.0)
    expected = torch.from_numpy(law.ppf(1 - quantiles.numpy()))
    assert_close(log_snr, expected, rtol=1e-9, atol=1e-9)


def test_normal_log_snr_of_a_path_far_in_the_tail_stays_on_the_path():
    """VP(1e-8, 1e-8) never gets below a log-SNR of 18, which is 9 standard deviations out."""
    t = sd.NormalLogSNR(sd.VP(1e-8, 1e-8))(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert bool((t > 0).all())
    assert bool((t.diff() > 0).all())


@pytest.mark.parametrize(
    "make", [lambda: sd.NormalLogSNR(sd.VP(), std=0), lambda: sd.DiscreteTimes(0)]
)
def test_laws_of_time_that_are_none_are_refused(make):
    with pytest.raises(ValueError, match=r"std|num_steps"):
        make()
