"""Exact models: score = gradient of the log-density, flows, moments."""

import math

import numpy as np
import pytest
import torch
from cases import PROCESSES
from oracles import normal, reverse_sde_moments
from scipy.integrate import quad
from torch.testing import assert_close

import sde_diffusion as sd


def mixture(process, d=3, k=4):
    """A mixture with full covariances."""
    generator = torch.Generator().manual_seed(7)
    roots = torch.randn(k, d, d, dtype=torch.float64, generator=generator) / 2
    covariances = roots @ roots.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    means = torch.randn(k, d, dtype=torch.float64, generator=generator)
    return sd.exact.GaussianMixture(process, torch.tensor([1.0, 2, 3, 4]), means, covariances)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_score_is_the_gradient_of_the_log_density(process, t):
    model = mixture(process)
    x = normal(8, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
    level = process.levels(torch.tensor([t], dtype=torch.float64))[0]
    assert_close(model(x.detach(), level).score, gradient, rtol=1e-9, atol=1e-9)


def test_x0_and_eps_compose_to_x():
    """x = alpha E[x0 | x] + sigma E[eps | x], at the ends too."""
    for process in PROCESSES.values():
        model, x = mixture(process), normal(8, 3)
        for level in process.levels(torch.tensor([1.0, 0.5, 1e-3, 0.0], dtype=torch.float64)):
            made = model(x, level)
            assert_close(level.alpha * made.x0 + level.sigma * made.eps, x, rtol=0, atol=1e-12)


def test_per_sample_levels_agree_with_one_level_each():
    model, x = mixture(sd.VP()), normal(4, 3)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    together = model(x, sd.VP().level(t, x)).velocity
    apart = [model(x[i : i + 1], level).velocity for i, level in enumerate(sd.VP().levels(t))]
    assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-12)


def test_density_integrates_to_one():
    model = sd.exact.GaussianMixture(sd.VP(), [0.3, 0.7], [[-1.0], [2.0]], [0.2, 0.5])

    def density(x):
        return float(model.log_prob(torch.tensor([[x]], dtype=torch.float64), 0.1).exp())

    assert quad(density, -12, 12, epsabs=1e-11, limit=200)[0] == pytest.approx(1, abs=1e-9)


def test_samples_have_the_mixtures_moments(generator):
    n, model = 40_000, mixture(sd.VP())
    x = model.sample(n, generator)
    weights = model.log_weights.exp()[:, None]
    mean = (weights * model.means).sum(0)
    assert bool(((x.mean(0) - mean).abs() < 4.5 * x.std(0) / math.sqrt(n)).all())
    covariances = model.axes * model.variances[:, None, :] @ model.axes.mT
    spread = (model.means - mean)[:, :, None] * (model.means - mean)[:, None, :]
    second = (weights[..., None] * (covariances + spread)).sum(0)
    centred = x - mean
    products = centred[:, :, None] * centred[:, None, :]
    bound = 4.5 * products.std(0) / math.sqrt(n)
    assert bool(((products.mean(0) - second).abs() < bound).all())


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_the_gaussian_flow_carries_marginals_to_marginals_and_composes(process):
    root = torch.tensor([[1.0, 0.3], [0.0, 0.4]], dtype=torch.float64)
    model = sd.exact.Gaussian(process, torch.tensor([1.0, -2.0]), root @ root.T)
    x = process.prior((6, 2), seeds=range(6), dtype=torch.float64)
    half = model.flow(x, 1.0, 0.4)
    assert_close(model.flow(half, 0.4, 0.0), model.flow(x, 1.0, 0.0), rtol=1e-12, atol=1e-12)
    assert_close(model.flow(half, 0.4, 1.0), x, rtol=1e-10, atol=1e-10)
    # density: log p_t(x) - log p_s(flow(x)) is the constant log det of the map
    change = model.log_prob(x, 1.0) - model.log_prob(half, 0.4)
    assert_close(change, change.mean().expand_as(change), rtol=0, atol=1e-10)


def test_covariance_forms_agree():
    x = normal(5, 2)
    level = sd.VP().levels(torch.tensor([0.3]))[0]
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    made = [
        sd.exact.Gaussian(sd.VP(), mean, torch.tensor(form, dtype=torch.float64))
        for form in (0.7, [0.7, 0.7], [[0.7, 0.0], [0.0, 0.7]])
    ]
    for other in made[1:]:
        assert_close(made[0](x, level).eps, other(x, level).eps)
        assert_close(made[0].covariance, other.covariance)
        assert_close(made[0].log_prob(x), other.log_prob(x))


def test_a_scalar_gaussian_is_the_law_of_every_coordinate():
    model = sd.exact.Gaussian(sd.VP(), 1.0, 0.25)
    x = normal(3, 2, 4)
    flat = sd.exact.Gaussian(sd.VP(), torch.ones(8), torch.tensor(0.25))
    level = sd.VP().levels(torch.tensor([0.3]))[0]
    assert_close(model(x, level).x0.flatten(1), flat(x.flatten(1), level).x0)
    assert_close(model.log_prob(x), flat.log_prob(x.flatten(1)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1.0], [[0.0]], [[[-1.0]]]), "positive definite"),
        (([1.0, -1.0], [[0.0], [1.0]], [1.0, 1.0]), "weights"),
        (([1.0], [[0.0], [1.0]], [1.0, 1.0]), "first dimension"),
        (([1.0], [[0.0, 0.0]], [[1.0, 1.0, 1.0]]), "covariances"),
    ],
)
def test_bad_mixtures_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        sd.exact.GaussianMixture(sd.VP(), *(torch.tensor(a) for a in arguments))


def test_samples_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        mixture(sd.VP()).log_prob(torch.zeros(2, 4))


def test_the_reverse_sdes_law_is_the_solution_of_its_moment_equations():
    """DOP853 at 1e-11 on d(mean)/dt, d(variance)/dt of the reverse VP SDE, typed in oracles.py."""
    mean, covariance = sd.exact.Gaussian(
        sd.VP(), torch.tensor([0.7], dtype=torch.float64), 0.25
    ).reverse_sde()
    solved = reverse_sde_moments(0.7, 0.25)
    assert (float(mean), float(covariance)) == pytest.approx(solved, rel=1e-8, abs=0)


def test_the_reverse_sdes_law_follows_the_axes_of_the_data():
    """A rotated problem has the rotated law."""
    turn = torch.linalg.qr(torch.tensor([[1.0, 2], [3, 4]], dtype=torch.float64))[0]
    center, spread = torch.tensor([0.7, -1.0]).double(), torch.tensor([0.25, 2.0]).double()
    process = sd.OU(1.0)  # alpha(1) = 0.37: the start is far from the data's law
    straight = sd.exact.Gaussian(process, center, spread).reverse_sde()
    turned = sd.exact.Gaussian(process, turn @ center, turn * spread @ turn.T).reverse_sde()
    assert_close(turned[0], turn @ straight[0])
    assert_close(turned[1], turn @ straight[1] @ turn.T)


def test_the_least_eps_loss_is_the_exact_models():
    """Gauss-Hermite over (x0, eps): the integrand is a polynomial of degree 2, so it is exact."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    model = sd.exact.Gaussian(sd.VP(), torch.tensor([0.7], dtype=torch.float64), 0.25)
    x0, eps = (part.flatten()[:, None] for part in torch.meshgrid(0.7 + z / 2, z, indexing="ij"))
    for level in sd.VP().levels(torch.tensor([0.0, 0.1, 0.5, 1.0])):
        error = model(sd.VP().perturb(x0, level, eps), level).eps - eps
        expected = float((torch.outer(w, w).flatten() * error[:, 0] ** 2).sum())
        assert model.eps_loss(level) == pytest.approx(expected, rel=1e-12, abs=1e-15)
