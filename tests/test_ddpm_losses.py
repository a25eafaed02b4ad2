"""The discrete face: its losses and bounds, against torch's KL, and what it refuses."""

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
from oracles import ddpm_moments, normal
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

import sde_diffusion as sd

# ---- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [None, sd.losses.L1()], ids=["l2", "l1"])
def test_p_loss_and_its_gradient_are_those_of_the_formula(penalty):
    (x0, eps), chain = normal(2, 4, 3), CHAINS["cosine"]
    i, model = torch.tensor(places(chain)), ddpm(chain, sd.Eps())
    _, abar, _ = at(chain, i, x0)
    error = output_of(model, i, abar.sqrt() * x0 + (1 - abar).sqrt() * eps) - eps
    expected = (error.abs() if penalty else error**2).mean(1)
    loss = model.p_loss(x0, i, eps, penalty=penalty)
    assert_close(loss, expected, **TIGHT)
    parameters = list(model.model.parameters())
    gradients = (torch.autograd.grad(value.sum(), parameters) for value in (loss, expected))
    for ours, typed in zip(*gradients, strict=True):
        assert_close(ours, typed, **TIGHT)


def test_a_ddpm_and_its_denoiser_are_one_network_in_training():
    (x0, eps), chain = normal(2, 4, 3), CHAINS["cosine"]
    i, model = torch.tensor(places(chain)), ddpm(chain, sd.Eps())
    losses = {
        "discrete": lambda: model.p_loss(x0, i, eps).mean(),
        "continuous": lambda: sd.denoising_loss(model.model, x0, i.double() / 50, eps).mean(),
    }
    for trained, other in (("discrete", "continuous"), ("continuous", "discrete")):
        before = losses[other]().item()
        optimizer = torch.optim.SGD(model.model.parameters(), 1e-3)
        losses[trained]().backward()
        optimizer.step()
        assert losses[other]().item() < before
        assert_close(losses["discrete"](), losses["continuous"](), **TIGHT)


@pytest.mark.parametrize("name", ["bound", "negative_elbo"])
def test_a_likelihood_of_nan_is_refused(name):
    model = sd.DDPM(sd.exact.Gaussian(sd.Discrete.linear(4)))
    with pytest.raises(ValueError, match="x0 must be finite; got nan or infinity"):
        getattr(model, name)(torch.tensor([[0.0, float("nan")]]))


def test_negative_elbo_is_unbiased(generator):
    """E|eps - eps_hat|^2 = abar S / (abar S + 1 - abar) a coordinate, for N(m, S) and its model."""
    chain, n = CHAINS["cosine"], 40_000
    data = sd.exact.Gaussian(chain, torch.tensor([0.5, -1.0]), torch.tensor([0.25, 4.0]))
    x0 = torch.tensor([0.5, -1.0]) + torch.tensor([0.5, 2.0]) * normal(n, 2)
    abar, s = np.cumprod(1 - np.asarray(chain.betas)), np.array([[0.25], [4.0]])
    loss = sd.DDPM(data).negative_elbo(x0, generator=generator)
    gap = loss.mean() - (abar * s / (abar * s + 1 - abar)).mean(1).sum()
    assert abs(gap) < 4.5 * loss.std() / math.sqrt(n)


@pytest.mark.parametrize("kind", ["beta", "posterior", "learned"])
@every_chain
def test_bound_terms_are_divergences_of_normals(chain, kind):
    """KL(q || p), the last one -log p(x_0 | x_1), the first KL(q(x_N | x_0) || N(0, 1))."""
    (x0, eps), i = normal(2, 4, 3), torch.tensor(places(chain))
    extra = torch.tensor([-0.5, 0.3, 2.0], dtype=torch.float64)
    model, (_, abar, _) = ddpm(chain, extra=extra), at(chain, i, x0)
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    mean, _ = bayes(chain, i, abar.sqrt() * x - (1 - abar).sqrt() * output_of(model, i, x), x)
    low, high = (reverse_variance(chain, i, x, k) for k in ("posterior", "beta"))
    learned = low ** ((1 - extra) / 2) * high ** ((1 + extra) / 2)
    p = Normal(mean, {"beta": high, "posterior": low, "learned": learned}[kind].sqrt())
    of_q, variance = bayes(chain, i, x0, x)
    expected = kl_divergence(Normal(of_q, variance.clamp(min=1e-300).sqrt()), p)
    expected = torch.where(i[:, None] == 1, -p.log_prob(x0), expected).sum(1)
    assert_close(model.bound_term(x0, i, eps, variance=kind), expected, rtol=1e-9, atol=1e-9)
    for row, j in enumerate(places(chain)):
        term = model.bound_term(x0, j, eps, variance=kind)[row]
        assert_close(term, expected[row], rtol=1e-9, atol=1e-9)
    last = Normal(abar[-1].sqrt() * x0, (1 - abar[-1]).sqrt())
    assert_close(model.prior_term(x0), kl_divergence(last, Normal(0.0, 1.0)).sum(1), **TIGHT)


@both
@pytest.mark.parametrize("name", ["linear", "cosine", "users"])
def test_the_vlb_weight_makes_the_eps_loss_the_models_part_of_the_bound(name, kind):
    """Ho et al. 2020, eq. 12, at every i, 1 included: beta^2 / (2 sigma^2 alpha (1 - abar))."""
    chain = CHAINS[name]
    (x0, eps), i = normal(2, chain.num_steps, 3), torch.arange(1, chain.num_steps + 1)
    model, (beta, abar, _) = ddpm(chain, sd.Eps()), at(chain, i, x0)
    of_p, of_q = reverse_variance(chain, i, x0, kind), bayes(chain, i, x0, x0)[1]
    error = eps - output_of(model, i, abar.sqrt() * x0 + (1 - abar).sqrt() * eps)
    typed = (beta**2 / (2 * of_p * (1 - beta) * (1 - abar)) * error**2).sum(1)
    t, weight = i.double() / chain.num_steps, sd.losses.VLB(chain, kind)
    loss = 3 * sd.denoising_loss(model.model, x0, t, eps, weight=weight)
    assert_close(loss, typed, rtol=1e-9, atol=0)
    ratio = of_q / of_p
    rest = torch.where(i[:, None] == 1, (2 * math.pi * of_p).log(), ratio - 1 - ratio.log())
    terms = model.bound_term(x0, i, eps, variance=kind)
    assert_close(terms - 3 / 2 * rest[:, 0], loss, rtol=1e-9, atol=1e-9)


def joint_laws(chain, m, s, kind):
    """q(x_0 .. x_N) for x_0 ~ N(m, s), and p(x_0 .. x_N) with the exact model of it."""
    root = torch.tensor(np.sqrt(np.cumprod([1.0, *(1 - np.asarray(chain.betas))])))
    total, k = root**2 * s + 1 - root**2, torch.arange(len(root))
    low, high = torch.minimum(k[:, None], k), torch.maximum(k[:, None], k)
    q = MultivariateNormal(root * m, root[high] / root[low] * total[low])
    factor, offset = torch.eye(len(root)).double(), torch.zeros_like(root)
    for i in range(chain.num_steps, 0, -1):
        x = torch.tensor([0.0, 1.0], dtype=torch.float64)
        (b, end), _ = bayes(chain, i, m + root[i] * s / total[i] * (x - root[i] * m), x)
        factor[i - 1] = (end - b) * factor[i]
        factor[i - 1, i - 1] = reverse_variance(chain, i, x[0], kind).sqrt()
        offset[i - 1] = (end - b) * offset[i] + b
    return q, MultivariateNormal(offset, factor @ factor.T)


@both
def test_the_bound_is_the_divergence_of_the_two_chains_and_above_the_likelihood(kind, generator):
    """E bound = KL(q(x_0 .. x_N) || p(x_0 .. x_N)) + entropy of x_0, over data and noise.

    The chain's density p(x_0) is the law of Algorithm 2 with sigma_1^2 z added in the last step.
    """
    chain, n, m, s = sd.Discrete.linear(20, 1e-3, 0.3), 20_000, 0.7, 0.25
    q, p = joint_laws(chain, m, s, kind)
    mean, variance = ddpm_moments(chain.betas, m, s, kind)
    variance += float(reverse_variance(chain, 1, torch.zeros(()), kind))
    assert_close(p.mean[0].item(), mean, **TIGHT)
    assert_close(p.covariance_matrix[0, 0].item(), variance, **TIGHT)
    x0 = m + s**0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    model = sd.DDPM(sd.exact.Gaussian(chain, m, s))
    bound = model.bound(x0, variance=kind, generator=generator)
    parts = bound.prior + bound.reconstruction + bound.terms.sum(1)
    assert torch.equal(bound.total, bound.prior + bound.terms.sum(1) + bound.reconstruction)
    expected = kl_divergence(q, p) + Normal(m, s**0.5).entropy()
    assert abs(parts.mean() - expected) < 4.5 * parts.std() / math.sqrt(n)
    above = parts + Normal(mean, variance**0.5).log_prob(x0[:, 0])
    assert above.mean() > -4.5 * above.std() / math.sqrt(n)


# ---- bad values and good manners -------------------------------------------------------------

FACES = {
    "q_sample": lambda d, x, i: d.q_sample(x, i, x),
    "q_chain": lambda d, x, i: d.q_chain(x, i),
    "q_posterior": lambda d, x, i: d.q_posterior(x, x, i)[0],
    "predict_x0": lambda d, x, i: d.predict_x0(x, i, clamp=1.0)[0],
    "p_mean_variance": lambda d, x, i: d.p_mean_variance(x, i)[0],
    "p_sample": lambda d, x, i: d.p_sample(x, i),
    "p_loss": lambda d, x, i: d.p_loss(x, i, x),
    "bound_term": lambda d, x, i: d.bound_term(x, i, x),
}
WHOLE = {
    "p_chain": lambda d, x, i: list(d.p_chain(x, 3))[-1],
    "negative_elbo": lambda d, x, i: d.negative_elbo(x),
    "prior_term": lambda d, x, i: d.prior_term(x),
    "bound": lambda d, x, i: d.bound(x).total,
    "sample": lambda d, x, i: d.sample(x.shape, dtype=x.dtype),
}


@pytest.mark.parametrize("face", FACES.values(), ids=FACES.keys())
@pytest.mark.parametrize(
    ("i", "error"),
    [(0, ValueError), (51, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError),
     (None, TypeError), ([1, 2], TypeError), (torch.tensor([1.0, 2.0]), TypeError),
     (torch.tensor([True, True]), TypeError), (torch.tensor([1]), ValueError),
     (torch.tensor([1, 2, 3]), ValueError), (torch.tensor([[1, 2]]), ValueError),
     (torch.tensor([0, 1]), ValueError), (torch.tensor([1, 51]), ValueError)],
    ids=str,
)  # fmt: skip
def test_what_is_no_index_is_named(face, i, error):
    with pytest.raises(error, match=r"^i must"):
        face(ddpm(CHAINS["cosine"]), normal(2, 3), i)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda d: sd.DDPM(sd.exact.Gaussian(sd.VP())), r"Discrete process.*got Gaussian on VP"),
        (
            lambda d: sd.DDPM(sd.exact.Gaussian(sd.processes.interpolate(d.process))),
            "got Gaussian on Interpolated",
        ),
        (lambda d: d.q_sample(X, 1, X[:1]), "eps must be shaped like x0"),
        (lambda d: d.p_loss(X, 1, X[:, :1]), "eps must be shaped like x0"),
        (lambda d: d.bound_term(X, 1, X[0]), "eps must be shaped like x0"),
        (lambda d: d.q_posterior(X, X[:1], 1), "x must be shaped like x0"),
        (lambda d: d.predict_x0(X, 1, clamp=0), "clamp must"),
        (lambda d: d.p_sample(X, 1, clamp=-1.0), "clamp must"),
        (lambda d: d.sample((2, 3), clamp=math.nan), "clamp must"),
        (lambda d: d.predict_x0(X, 1, clamp=True), "clamp must"),
        (lambda d: d.p_mean_variance(X, 1, variance="foo"), "variance must be one of .* 'foo'"),
        (lambda d: d.bound_term(X, 1, X, variance="foo"), "variance must be one of .* 'foo'"),
        (lambda d: d.p_sample(X, 1, variance="learned"), "twice the channels"),
        (lambda d: d.bound(X, variance="learned"), "twice the channels"),
        (lambda d: next(d.p_chain(X, 0)), "i must"),
        (lambda d: next(d.p_chain(X, 51)), "i must"),
        (lambda d: next(d.p_chain(X, torch.tensor([1, 2]))), "i must"),
        (lambda d: d.q_chain(X, 1, seeds=[1]), "seeds must hold"),
        (lambda d: d.sample((2, 3), seeds=[1, 2], generator=torch.Generator()), "got both"),
        (lambda d: ddpm(d.process.zero_terminal_snr(), sd.Eps()).p_sample(X, 50), "alpha = 0"),
    ],
)
def test_bad_values_are_named(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make(ddpm(CHAINS["cosine"]))


@pytest.mark.parametrize("face", (FACES | WHOLE).values(), ids=(FACES | WHOLE).keys())
def test_inputs_and_global_generators_stay_and_types_are_kept(face):
    model, x, i = ddpm(CHAINS["users"]), normal(3, 3), torch.tensor([1, 2, 3])
    before = x.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    made = face(model, x, i)
    assert torch.equal(x, before)
    assert torch.equal(i, torch.tensor([1, 2, 3]))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert made.dtype == torch.float64
    assert face(model, x.float(), i).dtype == torch.float32
    exact = sd.DDPM(sd.exact.Gaussian(CHAINS["users"]))
    for none in (i[:0], 2):
        assert face(exact, x[:0], none).shape == (0, *made.shape[1:])


@pytest.mark.parametrize("name", ["p_loss", "negative_elbo", "bound_term", "prior_term", "bound"])
def test_batches_of_rank_one(name):
    model, x = sd.DDPM(sd.exact.Gaussian(sd.Discrete.linear(10), 0.5, 0.25)), normal(5)
    arguments = (3, normal(5)) if name in ("p_loss", "bound_term") else ()
    made = getattr(model, name)(x, *arguments)
    assert (made.total if name == "bound" else made).shape == (5,)


def test_batches_of_integers_are_refused_by_name():
    model, images = sd.DDPM(sd.exact.Gaussian(sd.Discrete.linear(10))), torch.full((2, 3), 200)
    for call in (
        lambda: model.q_sample(images, 5, torch.ones(2, 3)),
        lambda: model.prior_term(images),
        lambda: model.p_mean_variance(images, 5),
    ):
        with pytest.raises(ValueError, match="must be a floating-point batch"):
            call()


@pytest.mark.parametrize("x", [None, [[0.5]], np.zeros((1, 1))], ids=["none", "list", "numpy"])
def test_what_is_no_tensor_is_named(x):
    model = sd.DDPM(sd.exact.Gaussian(sd.Discrete.linear(10)))
    for call in (
        lambda: model.q_sample(x, 1, torch.ones(1, 1)),
        lambda: model.q_chain(x, 1),
        lambda: model.q_posterior(torch.ones(1, 1), x, 1),
        lambda: model.p_mean_variance(x, 1),
        lambda: model.p_sample(x, 1),
        lambda: model.negative_elbo(x),
        lambda: model.prior_term(x),
        lambda: model.bound(x),
    ):
        with pytest.raises(TypeError, match=r"must be a tensor \(B, ...\); got"):
            call()


def test_a_chain_that_starts_nowhere_is_refused_at_the_call():
    model = sd.DDPM(sd.exact.Gaussian(sd.Discrete.linear(10)))
    with pytest.raises(ValueError, match="i must be at least 1; got 0"):
        model.p_chain(normal(2, 3), 0)


def test_a_zero_snr_chain_has_no_weight_on_errors_of_eps_but_a_bound():
    chain = sd.Discrete.linear(10).zero_terminal_snr()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        sd.losses.VLB(chain)
    model = sd.DDPM(sd.exact.Gaussian(chain, 0.5, 0.25))
    assert model.bound(normal(4, 2)).total.isfinite().all()
