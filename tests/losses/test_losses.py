"""Losses: noise prediction is weighted score matching; times follow their laws."""

import math

import pytest
import torch
from cases import PARAMETERIZATIONS
from oracles import fitted_order, vp_beta
from scipy.integrate import quad
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.losses.times import stratified

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


KNOWN = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1]], dtype=torch.bool)


def gradients(model, losses):
    return torch.autograd.grad(losses.mean(), list(model.parameters()))


@pytest.mark.parametrize("weight", [None, sd.losses.SNR()])
@pytest.mark.parametrize("hidden", [torch.nan, 1e30, -3.0])
def test_a_masked_loss_and_its_gradient_are_those_of_the_known_coordinates(hidden, weight):
    """Whatever stands in the others: the reference never has them, its network sees sigma eps."""
    (x0, eps), model = problem(), denoiser(sd.X0())
    level = sd.VP().level(T, x0)
    seen = model(level.alpha * torch.where(KNOWN, x0, 0.0) + level.sigma * eps, level).x0
    factor = 1.0 if weight is None else weight(level)[:, 0]
    each = [((seen[k] - x0[k])[KNOWN[k]] ** 2).mean() for k in range(4)]
    spoilt = x0.masked_fill(~KNOWN, hidden)
    ours = sd.denoising_loss(model, spoilt, T, eps, mask=KNOWN, space=sd.X0(), weight=weight)
    expected = torch.stack(each) * factor
    assert_close(ours, expected, rtol=1e-14, atol=0)
    pairs = zip(gradients(model, ours), gradients(model, expected), strict=True)
    for found, reference in pairs:
        assert_close(found, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mask_that_is_true_everywhere_changes_no_bit(dtype):
    (x0, eps), model = problem(dtype), denoiser(sd.Eps(), dtype)
    plain = sd.denoising_loss(model, x0, T, eps)
    masked = sd.denoising_loss(model, x0, T, eps, mask=torch.ones_like(KNOWN))
    assert torch.equal(plain, masked)
    for a, b in zip(gradients(model, plain), gradients(model, masked), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", [torch.ones(4, dtype=torch.bool), torch.ones(4, 3),
                                  torch.ones(1, 3, dtype=torch.bool)])  # fmt: skip
def test_a_mask_that_is_not_one_bool_a_coordinate_is_refused(mask):
    (x0, eps), model = problem(), denoiser(sd.Eps())
    with pytest.raises(ValueError, match=r"^mask must be bools shaped like x0, \(4, 3\); got"):
        sd.denoising_loss(model, x0, T, eps, mask=mask)


@pytest.mark.parametrize("space", PARAMETERIZATIONS)
def test_losses_in_different_spaces_differ_by_a_factor_of_the_level(space):
    """With eps_hat - eps = e: x0 - sigma/alpha e, score - e/sigma, v - e/alpha (VP), ..."""
    (x0, eps), model = problem(), denoiser(sd.Eps())
    level = sd.VP().level(T, x0)
    factor = {
        "eps": torch.ones_like(T),
        "x0": (level.sigma / level.alpha).flatten(),
        "score": (1 / level.sigma).flatten(),
        "v": (1 / level.alpha).flatten(),
        "velocity": (1 + level.sigma / level.alpha).flatten(),
        # F = (x0 - c_skip x) / c_out, and x is given: c_out = sigma s / sqrt(alpha^2 s^2 + sigma^2)
        "karras": ((0.64 * level.alpha**2 + level.sigma**2).sqrt() / 0.8 / level.alpha).flatten(),
    }[space]
    base = sd.denoising_loss(model, x0, T, eps)
    other = sd.denoising_loss(model, x0, T, eps, space=PARAMETERIZATIONS[space])
    assert_close(other, factor**2 * base, rtol=1e-10, atol=0)


def test_a_weight_multiplies_each_samples_loss():
    (x0, eps), model = problem(), denoiser(sd.V())
    base = sd.denoising_loss(model, x0, T, eps)
    weighted = sd.denoising_loss(model, x0, T, eps, weight=lambda level: level.sigma**2)
    assert_close(weighted, sd.VP().sigma(T) ** 2 * base, rtol=1e-12, atol=0)


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


# ---- penalties and weights -------------------------------------------------------------------


def test_penalties_are_their_formulas():
    (x0, eps), model = problem(), denoiser(sd.Eps())
    level = sd.VP().level(T, x0)
    with torch.no_grad():
        error = model.network(level.alpha * x0 + level.sigma * eps, T) - eps
    for penalty, expected in (
        (None, error**2),
        (sd.losses.L2(), error**2),
        (sd.losses.L1(), error.abs()),
        (
            sd.losses.Huber(0.5),
            torch.where(error.abs() < 0.5, error**2 / 2, 0.5 * (error.abs() - 0.25)),
        ),
        (lambda e: e**4, error**4),
    ):
        made = sd.denoising_loss(model, x0, T, eps, penalty=penalty)
        assert_close(made.detach(), expected.mean(1), rtol=1e-12, atol=0)


# Each published loss in its own words, as a weight on the squared error of eps (VP: alpha^2 = a).
WEIGHTS = {
    "simple": (sd.losses.Simple(), lambda a, t: 1.0),
    "likelihood": (sd.losses.Likelihood(sd.VP()), lambda a, t: vp_beta(t) / (1 - a)),
    "snr": (sd.losses.SNR(), lambda a, t: 1.0),
    "min-snr": (sd.losses.MinSNR(5.0), lambda a, t: min(a / (1 - a), 5.0) * (1 - a) / a),
    "edm": (sd.losses.EDMWeight(0.5), lambda a, t: 1 + (1 - a) / a / 0.25),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("parameterization", ["eps", "v", "karras"])
def test_named_weights_are_the_published_ones_for_any_network(name, parameterization):
    """EDM: (r^2 + s^2) / (r s)^2 on x0, whose error is r times that of eps, so 1 + r^2 / s^2."""
    weight, formula = WEIGHTS[name]
    (x0, eps), model = problem(), denoiser(PARAMETERIZATIONS[parameterization])
    on_eps = sd.denoising_loss(model, x0, T, eps, space=sd.Eps())
    alpha2 = (sd.VP().alpha(T) ** 2).tolist()
    factor = torch.tensor(
        [formula(a, t) for a, t in zip(alpha2, T.tolist(), strict=True)], dtype=torch.float64
    )
    made = sd.denoising_loss(model, x0, T, eps, weight=weight)
    assert_close(made, factor * on_eps, rtol=1e-9, atol=0)


def test_the_edm_weight_is_one_on_the_output_of_its_own_network():
    (x0, eps), model = problem(), denoiser(sd.models.Preconditioned(0.5))
    weighted = sd.denoising_loss(model, x0, T, eps, weight=sd.losses.EDMWeight(0.5))
    assert_close(weighted, sd.denoising_loss(model, x0, T, eps), rtol=1e-10, atol=0)


def test_float_levels_and_tensor_levels_weigh_the_same():
    chain = sd.Discrete.linear(10)
    times = torch.tensor([0.1, 0.2, 1.0], dtype=torch.float64)
    batch = chain.level(times, torch.zeros(3, 1, dtype=torch.float64))
    for weight in (sd.losses.Simple(), sd.losses.Likelihood(sd.VP()), sd.losses.SNR(),
                   sd.losses.MinSNR(), sd.losses.EDMWeight(),
                   sd.losses.VLB(chain), sd.losses.VLB(chain, "posterior")):  # fmt: skip
        apart = [weight(level) for level in chain.levels(times)]
        assert all(isinstance(value, float) for value in apart)
        together = torch.as_tensor(weight(batch), dtype=torch.float64).expand(3, 1).flatten()
        assert_close(together, torch.tensor(apart, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_n_times_the_discrete_bounds_term_tends_to_the_continuous_one(variance, t):
    """N beta^2 / (2 sigma^2 alpha (1 - abar)) -> g^2 / (2 sigma^2), at rate 1/N."""
    sizes, errors = (500, 1000, 2000, 4000), []
    limit = float(vp_beta(t) / 2 / sd.VP().variance(torch.tensor(t, dtype=torch.float64)))
    for n in sizes:
        chain = sd.processes.discretize(sd.VP(), n)
        (level,) = chain.levels(torch.tensor([t], dtype=torch.float64))
        errors.append(abs(n * sd.losses.VLB(chain, variance)(level) - limit))
    assert fitted_order(sizes, errors) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            {"weight": sd.losses.MinSNR(), "space": sd.V()},
            r"MinSNR\(gamma=5.0\) weighs errors of X0",
        ),
        ({"weight": sd.losses.VLB(sd.Discrete.linear(7))}, "i/N alone"),
        (
            {"weight": sd.losses.VLB(sd.Discrete.linear(20))},
            r"its own chain's levels .* got t=0\.05",
        ),
        ({"weight": sd.losses.SNR}, "weight must be a function of the level such as SNR"),
        ({"weight": 2.0}, "weight must be a function"),
        ({"space": sd.Eps}, "space must be a parameterization such as Eps"),
        ({"space": "eps"}, "space must be"),
        ({"penalty": sd.losses.L1}, "penalty must be a function of the error"),
        ({"penalty": "l1"}, "penalty must be"),
    ],
)
def test_a_weight_out_of_its_place_is_refused(arguments, named):
    (x0, eps), model = problem(), denoiser(sd.Eps())
    with pytest.raises((ValueError, TypeError), match=named):
        sd.denoising_loss(model, x0, T, eps, **arguments)


def test_weights_at_the_ends_are_finite_or_refused_by_name():
    data, noise = sd.RectifiedFlow().levels(torch.tensor([0.0, 1.0]))
    assert sd.losses.MinSNR(5.0)(data) == 5
    assert sd.losses.MinSNR(5.0)(noise) == sd.losses.SNR()(noise) == 0
    assert sd.losses.EDMWeight(0.5)(noise) == 4
    batch = sd.RectifiedFlow().level(torch.tensor([0.0, 1.0]), torch.zeros(2, 1))
    assert sd.losses.MinSNR(5.0)(batch).flatten().tolist() == [5, 0]
    for weight in (sd.losses.SNR(), sd.losses.EDMWeight()):
        for level in (data, batch):
            with pytest.raises(ValueError, match="the weight SNR is not defined at sigma = 0"):
                weight(level)
    for level in (noise, batch):
        with pytest.raises(ValueError, match=r"^t must be at most .* g\^2 .* got 1"):
            sd.losses.Likelihood(sd.RectifiedFlow())(level)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sd.losses.MinSNR(0), "gamma"),
        (lambda: sd.losses.Huber(-1.0), "delta"),
        (lambda: sd.losses.EDMWeight(math.nan), "sigma_data"),
        (lambda: sd.losses.VLB(sd.Discrete.linear(), "learned"), "variance"),
        (lambda: sd.losses.VLB(sd.VP()), "process must be a Discrete process"),
        (lambda: sd.losses.LikelihoodTimes(None), "process must be a Process"),
        (lambda: sd.losses.NormalLogSNR(None), "process must be a Process"),
        (lambda: sd.losses.LikelihoodTimes(sd.VP(), 0), "t_min"),
        (lambda: sd.losses.LikelihoodTimes(sd.Cosine(), 0.999), "t_min"),
        (lambda: sd.losses.NormalLogSNR(sd.VP(), std=0), "std"),
        (lambda: sd.losses.DiscreteTimes(0), "num_steps"),
        (
            lambda: sd.losses.NormalLogSNR(sd.VP(1e-3, 1e-2), mean=-40.0),
            "leave nothing of the process",
        ),
        (lambda: sd.losses.UniformTimes(0.5, 0.5), "t_max"),
        (lambda: sd.losses.UniformTimes(-0.1), "t_min"),
        (lambda: sd.losses.UniformTimes()(0.5), "quantile must be a tensor"),
        (
            lambda: sd.losses.UniformTimes()(torch.tensor([0.5, 1.5])),
            "quantile must lie .* got 1.5",
        ),
        (lambda: sd.losses.DiscreteTimes(5)(torch.tensor([math.nan])), "quantile must lie"),
        (lambda: sd.losses.stratified(0.5, torch.arange(2), 0), "batch_size"),
        (lambda: sd.losses.stratified(2.0, torch.arange(2), 2), "offset"),
        (lambda: sd.models.TimestepIndex(0), "num_steps"),
        (lambda: sd.models.TimestepIndex(10, counts_from=2), "counts_from"),
    ],
)
def test_values_out_of_range_are_named(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


# ---- times -----------------------------------------------------------------------------------


def test_discrete_times_hit_each_step_equally_often():
    quantiles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    times = sd.losses.DiscreteTimes(50)(quantiles)
    counts = torch.bincount((times * 50).round().long(), minlength=51)
    assert counts[0] == 0
    assert bool((counts[1:] == 200).all())


def test_uniform_times_may_be_cut():
    q = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert sd.losses.UniformTimes()(q).tolist() == [0, 0.25, 1]
    assert sd.losses.UniformTimes(0.2, 0.6)(q).tolist() == pytest.approx([0.2, 0.3, 0.6])


SUPPORTS = {
    "uniform": (sd.losses.UniformTimes(), 0.0, 1.0),
    "cut": (sd.losses.UniformTimes(0.2, 0.6), 0.2, 0.6),
    "discrete": (sd.losses.DiscreteTimes(7), 1 / 7, 1.0),
    "likelihood": (sd.losses.LikelihoodTimes(sd.VP(), 1e-3), 1e-3, 1.0),
    "likelihood-cosine": (sd.losses.LikelihoodTimes(sd.Cosine()), 1e-5, sd.Cosine().t_max),
    "normal": (sd.losses.NormalLogSNR(sd.VP(), 0.5), 0.0, 1.0),
    "normal-rectified": (sd.losses.NormalLogSNR(sd.RectifiedFlow()), 0.0, 1.0),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_support_is_the_range_of_the_quantile_function(name):
    """Quantiles 0 and 1 are its ends, to the rounding of the inverse of log-SNR."""
    law, low, high = SUPPORTS[name]
    assert law.support == (low, high)
    times = law(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert bool((times.diff() >= 0).all())
    assert float(times[0]) == pytest.approx(low, rel=1e-9, abs=1e-9)
    assert float(times[-1]) == pytest.approx(high, rel=1e-9, abs=1e-9)


def test_stratified_quantiles_put_one_in_each_stratum():
    q = stratified(0.3, torch.arange(64), 64)
    assert_close((q * 64).floor(), torch.arange(64, dtype=torch.float64))


@pytest.mark.parametrize("process", [sd.VP(), sd.RectifiedFlow()], ids=["vp", "rectified"])
def test_normal_log_snr_is_normal_within_the_processs_range(process):
    """Quantiles against scipy's truncated normal."""
    from scipy.stats import truncnorm

    times = sd.losses.NormalLogSNR(process, mean=0.5, std=2.0)
    quantiles = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    log_snr = process.log_snr(times(quantiles))
    lowest = float(process.log_snr(torch.ones((), dtype=torch.float64)))
    law = truncnorm((lowest - 0.5) / 2.0, math.inf, loc=0.5, scale=2.0)
    expected = torch.from_numpy(law.ppf(1 - quantiles.numpy()))
    assert_close(log_snr, expected, rtol=1e-9, atol=1e-9)


def test_normal_log_snr_of_a_path_far_in_the_tail_stays_on_the_path():
    """VP(1e-8, 1e-8) never gets below a log-SNR of 18, which is 9 standard deviations out."""
    t = sd.losses.NormalLogSNR(sd.VP(1e-8, 1e-8))(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    assert bool((t > 0).all())
    assert bool((t.diff() > 0).all())


@pytest.mark.parametrize("process", [sd.VP(), sd.VE(), sd.EDM(), sd.RectifiedFlow(), sd.Cosine()])
def test_likelihood_times_have_the_density_g2_over_sigma2(process):
    """The share of [t_min, t] is the integral of g^2 / sigma^2 over it: Gauss-Legendre in log t
    (and in 1 - t near a pole), against the quantile function."""
    law = sd.losses.LikelihoodTimes(process, 1e-3)
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def rate(t):
        t = torch.tensor(t, dtype=torch.float64)
        return float(process.diffusion(t) ** 2 / process.variance(t))

    for share, t in zip(quantiles.tolist(), law(quantiles).tolist(), strict=True):
        mass = quad(rate, 1e-3, t, epsrel=1e-11, limit=200)[0]
        assert mass / law.total == pytest.approx(share, rel=1e-8, abs=0)


def test_importance_sampling_estimates_the_likelihood_loss_with_less_variance():
    """total E[h] = E[g^2 / sigma^2 h] over uniform times in [t_min, 1], for |eps error|^2 = h."""
    law, n = sd.losses.LikelihoodTimes(sd.VP(), 1e-3), 20_000
    q = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def h(t):
        return 0.25 * sd.VP().alpha(t) ** 2 / (0.25 * sd.VP().alpha(t) ** 2 + sd.VP().variance(t))

    importance = law.total * h(law(q))
    t = 1e-3 + (1 - 1e-3) * q
    uniform = (1 - 1e-3) * vp_beta(t) / sd.VP().variance(t) * h(t)
    error = math.sqrt(float(importance.var() + uniform.var()) / n)
    assert abs(float(importance.mean() - uniform.mean())) < 4.5 * error
    assert float(importance.var()) < float(uniform.var()) / 10


def test_a_weight_of_another_shape_is_refused():
    """(B,) would be broadcast against the width of the data."""
    model = sd.exact.Gaussian(sd.VP(), torch.zeros(2), 1.0)
    net = sd.Denoiser(sd.networks.MLP((2,)), model.process)
    x0, t = torch.ones(2, 2), torch.tensor([0.2, 0.9])
    with pytest.raises(ValueError, match=r"weight must return a number, or one per sample shaped"):
        sd.denoising_loss(net, x0, t, x0, weight=lambda level: level.alpha.flatten())
