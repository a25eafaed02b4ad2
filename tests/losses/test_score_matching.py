"""Score matching: three losses with one gradient, in expectations that are exact to rounding.

Data are a few atoms and eps goes over the nodes of a Gauss-Hermite rule, so that an expectation is
a finite sum. Networks are smooth: the rule converges exponentially, and what it lacks is read off
as the change from one order to a higher one.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from cases import PROCESSES
from oracles import EPS, normal
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.losses.score_matching import implicit_loss, sliced_loss

T = 0.5
ORDERS, CONVERGED = (48, 64), 1e-12
ATOMS, SHARES = [[-0.5, 0.2], [0.25, -0.15], [0.4, 0.5]], [0.2, 0.5, 0.3]
# alpha and sigma^2 at t = 1/2: Song et al. 2021, eq. 33 and 31 (exact kernel); x = (1-t) x0 + t eps
SCHEDULES = {
    "vp": (math.exp(-0.05 * T - 19.9 * T**2 / 4), -math.expm1(-0.1 * T - 19.9 * T**2 / 2)),
    "ve": (1.0, 1e-4 * (5000.0 ** (2 * T) - 1)),
    "rectified-flow": (1 - T, T**2),
}
OUTPUTS = {"vp": sd.Eps(), "ve": sd.models.Preconditioned(0.8), "rectified-flow": sd.Velocity()}
every_process = pytest.mark.parametrize("name", SCHEDULES)


def denoiser(name, shape, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = sd.networks.MLP(shape, width=8, depth=2).double()
    return sd.Denoiser(network, PROCESSES[name], OUTPUTS[name])


def time(n):
    return torch.full((n,), T, dtype=torch.float64)


def signs(shape):
    """All 2^d vectors of +1 and -1, each shared by the batch."""
    every = product((-1.0, 1.0), repeat=math.prod(shape))
    return [torch.tensor(row, dtype=torch.float64).reshape(1, *shape) for row in every]


def expectations(model, name, shape, order):
    """Denoising, implicit, sliced and explicit loss; and E |grad log p_t|^2 / d."""
    d, (alpha, variance) = math.prod(shape), SCHEDULES[name]
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(order))
    eps = torch.cartesian_prod(*[nodes] * d).reshape(-1, d)
    weight = torch.cartesian_prod(*[weights / weights.sum()] * d).reshape(-1, d).prod(1)
    atoms, shares = (torch.tensor(v, dtype=torch.float64) for v in (ATOMS, SHARES))
    atoms = atoms[:, :d]
    x0, eps = atoms.repeat_interleave(len(eps), 0), eps.repeat(len(atoms), 1)
    weight = (shares[:, None] * weight).flatten()

    x = alpha * x0 + variance**0.5 * eps
    pull = alpha * atoms - x[:, None]
    share = (shares.log() - pull.square().sum(2) / (2 * variance)).softmax(1)
    slope = (share[:, :, None] * pull).sum(1) / variance  # of log p_t, the mixture's
    x0, eps, x = (v.reshape(-1, *shape) for v in (x0, eps, x))
    t = time(len(x))
    score = model(x, PROCESSES[name].level(t, x)).score.flatten(1)
    losses = {
        "denoising": sd.denoising_loss(model, x0, t, eps, space=sd.Score()),
        "implicit": implicit_loss(model, x, t),
        "sliced": sliced_loss(model, x, t, signs(shape)),
        "explicit": (score - slope).square().mean(1),
    }
    constant = (weight * slope.square().mean(1)).sum()
    return {key: (weight * value).sum() for key, value in losses.items()}, constant


def gradient(value, model):
    parts = torch.autograd.grad(
        value, list(model.parameters()), retain_graph=True, materialize_grads=True
    )
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("shape", [(1,), (1, 2, 1)], ids=str)
@every_process
def test_denoising_implicit_sliced_and_explicit_score_matching_have_one_gradient(name, shape):
    """Vincent 2011, eq. 11; Hyvarinen 2005, Theorem 1.

    The bound is what each rule lacks, and a thousand roundings.
    """
    model = denoiser(name, shape)
    coarse, fine = (
        {key: gradient(value, model) for key, value in losses.items()}
        for losses in (expectations(model, name, shape, order)[0] for order in ORDERS)
    )
    size = float(fine["denoising"].abs().max())
    lacking = {key: float((fine[key] - coarse[key]).abs().max()) for key in fine}
    assert max(lacking.values()) < CONVERGED * size
    for key in fine:
        gap = float((fine[key] - fine["denoising"]).abs().max())
        assert gap <= lacking[key] + lacking["denoising"] + 1000 * EPS * size, key


@pytest.mark.parametrize("shape", [(1,), (1, 2, 1)], ids=str)
@every_process
def test_their_values_differ_by_constants_whatever_the_parameters(name, shape):
    """E |grad log p(x_t | x_0)|^2 / d = 1 / sigma^2, and E |grad log p_t|^2 / d."""
    inverse = 1 / SCHEDULES[name][1]
    for seed in (1, 2):
        model = denoiser(name, shape, seed)
        (coarse, before), (fine, of_data) = (
            expectations(model, name, shape, order) for order in ORDERS
        )
        lacking = {key: abs((fine[key] - coarse[key]).item()) for key in fine}
        lacking["explicit"] += abs((of_data - before).item())
        assert max(lacking.values()) < CONVERGED * inverse
        constants = {
            "implicit": inverse,
            "sliced": inverse,
            "explicit": inverse - of_data.item(),
        }
        for key, constant in constants.items():
            gap = abs((fine["denoising"] - fine[key]).item() - constant)
            bound = lacking[key] + lacking["denoising"] + 1000 * EPS * inverse
            assert gap <= bound, key


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)], ids=str)
@every_process
def test_the_loss_of_a_gaussians_score_is_minus_the_mean_precision(name, shape):
    """s = -C^-1 (x - alpha m): |s|^2 / d - 2 tr(C^-1) / d, on average -tr(C^-1) / d.

    The average is over alpha m +- sqrt(d) (columns of a root of C), whose covariance is C.
    """
    d, (alpha, variance) = math.prod(shape), SCHEDULES[name]
    root, mean, eye = normal(d, d) / 2, normal(d), torch.eye(d, dtype=torch.float64)
    covariance = root @ root.T + 0.1 * eye
    model = sd.exact.Gaussian(PROCESSES[name], mean.reshape(shape), covariance)
    total = alpha**2 * covariance + variance * eye
    spread = math.sqrt(d) * torch.linalg.cholesky(total).T
    x = (alpha * mean + torch.cat([spread, -spread])).reshape(-1, *shape)
    precision = torch.linalg.inv(total)
    score = -(x.reshape(-1, d) - alpha * mean) @ precision
    expected = (score**2).mean(1) - 2 * precision.trace() / d
    for loss in (implicit_loss(model, x, time(len(x))),
                 sliced_loss(model, x, time(len(x)), signs(shape))):  # fmt: skip
        # inverses cost the condition number of C, below 1e3 here
        assert_close(loss, expected, rtol=1e4 * EPS, atol=1e4 * EPS * float(precision.trace()))
        assert float(loss.detach().mean()) == pytest.approx(
            -float(precision.trace()) / d, rel=1e4 * EPS
        )


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 2, 2)], ids=str)
@every_process
def test_sliced_over_all_signs_is_implicit(name, shape):
    """The mean of v v' is the identity over all signs, and over sqrt(d) times the basis."""
    x, model, d = normal(5, *shape), denoiser(name, shape), math.prod(shape)
    exact = implicit_loss(model, x, time(5))
    basis = d**0.5 * torch.eye(d, dtype=torch.float64).reshape(d, 1, *shape)
    for probes in (signs(shape), basis, [v.expand_as(x) for v in signs(shape)]):
        rounding = 1000 * EPS * float(exact.detach().abs().max())
        assert_close(sliced_loss(model, x, time(5), probes), exact, rtol=0, atol=rounding)


@every_process
def test_sliced_with_one_random_sign_is_unbiased(name, generator):
    n, point = 20_000, normal(1, 3)
    model, x = denoiser(name, (3,)), point.expand(n, 3)
    probe = torch.randint(0, 2, (n, 3), generator=generator).double() * 2 - 1
    loss = sliced_loss(model, x, time(n), [probe]).detach()
    gap = loss.mean() - implicit_loss(model, point, time(1)).item()
    assert float(loss.std()) > 0
    assert abs(gap) < 4.5 * loss.std() / math.sqrt(n)


@every_process
def test_each_sample_has_its_own_time_and_knows_nothing_of_the_others(name):
    x, model = normal(3, 2, 2), denoiser(name, (2, 2))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for loss in (implicit_loss, lambda *a: sliced_loss(*a, signs((2, 2)))):
        together = loss(model, x, t)
        assert together.shape == (3,)
        for row in range(3):
            alone = loss(model, x[row : row + 1], t[row])
            assert_close(alone[0], together[row], rtol=1000 * EPS, atol=1000 * EPS)


@pytest.mark.parametrize("loss", [implicit_loss, lambda *a: sliced_loss(*a, [torch.ones(1, 2)])],
                         ids=["implicit", "sliced"])  # fmt: skip
@every_process
def test_a_time_without_noise_is_refused(name, loss):
    for t in (torch.tensor(0.0), torch.tensor([0.5, 0.0])):
        with pytest.raises(ValueError, match="score is not defined at sigma = 0"):
            loss(denoiser(name, (2,)), normal(2, 2), t)


def test_no_probes_are_refused():
    for probes in ([], (), torch.empty(0, 2, 2)):
        with pytest.raises(ValueError, match="probes must hold at least one"):
            sliced_loss(denoiser("vp", (2,)), normal(2, 2), time(2), probes)


@pytest.mark.parametrize("loss", [implicit_loss, lambda *a: sliced_loss(*a, [torch.ones(2, 2)])],
                         ids=["implicit", "sliced"])  # fmt: skip
def test_inputs_and_global_generators_stay_and_no_grad_does_not_matter(loss):
    model, x, t = denoiser("vp", (2,)), normal(2, 2), time(2)
    watched = normal(2, 2).requires_grad_()
    before = x.clone()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with torch.no_grad():
        made = loss(model, x, t)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.equal(t, time(2))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    again = loss(model, watched, t)
    assert torch.equal(made, again)
    again.sum().backward()
    assert watched.grad is None
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    single = sd.Denoiser(model.network.float(), model.process, model.parameterization)
    assert loss(single, x.float(), t).dtype == torch.float32


def test_any_rank_any_size_and_a_time_as_a_float():
    model = sd.exact.Gaussian(sd.VP(), 0.5, 0.25)
    for shape in ((5,), (0, 3), (2, 1, 2)):
        x, probe = normal(*shape), [torch.ones(1, *shape[1:], dtype=torch.float64)]
        assert implicit_loss(model, x, 0.5).shape == shape[:1]
        assert sliced_loss(model, x, 0.5, probe).shape == shape[:1]


def test_probes_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"probes must hold .* shaped like x, \(2, 3\)"):
        sliced_loss(sd.exact.Gaussian(sd.VP()), normal(2, 3), 0.5, [normal(4)])
