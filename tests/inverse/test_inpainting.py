"""Completing images: known pixels to the bit, at the level entered; the sheet's two gradients."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from cases import FIXED_STEP, OWN_STEPS, PROCESSES
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.inverse.corrections import BackpropCorrection, PosteriorMeanCorrection
from sde_diffusion.inverse.inpainting import MaskedMSE, RePaint, Replacement, complete_image
from sde_diffusion.processes import forward_kernel


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
Y = drawn(4, 5, seed=3)


def data(process=None):
    root = drawn(5, 5, seed=8) / 2
    covariance = root @ root.T + 0.1 * torch.eye(5).double()
    return sd.exact.Gaussian(process or sd.VP(), drawn(5, seed=9) / 2, covariance)


def level_of(process, t):
    return process.levels(torch.tensor([t], dtype=torch.float64))[0]


@pytest.mark.parametrize("process", ["vp", "edm", "rectified-flow", "discrete"])
@pytest.mark.parametrize("name", FIXED_STEP)
@pytest.mark.parametrize("rule", [Replacement, lambda *a: RePaint(*a, rounds=2, jump=2)])
def test_known_pixels_end_to_the_bit(rule, name, process):
    process = PROCESSES[process]
    x = drawn(4, 5) * process.prior_std
    made = sd.sample(data(process), rule(FIXED_STEP[name], Y, MASK), x, steps=4, seeds=range(4))
    known = MASK == 1
    assert torch.equal(made[:, known], Y[:, known])
    assert made.isfinite().all()
    assert (made[:, ~known] - Y[:, ~known]).abs().max() > 0.01


@pytest.mark.parametrize("process", PROCESSES)
def test_the_known_region_is_noised_to_the_level_that_is_entered(process):
    """After a step from t to s its law is N(alpha_s y, sigma_s^2): mean by a source of zeros, each
    pixel's standard deviation by one of ones, at s and not at t."""
    process = PROCESSES[process]
    times = sd.grids.Usual()(process, 5)
    for source, expect in (
        (torch.zeros_like, lambda level: level.alpha * Y),
        (torch.ones_like, lambda level: level.alpha * Y + level.sigma),
    ):
        states = sd.trajectory(
            data(process), Replacement(sd.Ancestral(), Y, MASK), drawn(4, 5), times=times,
            noise=lambda t, s, like, source=source: source(like),
        )  # fmt: skip
        for state, level in zip(states, process.levels(times[1:]), strict=True):
            known = MASK == 1
            assert_close(state.x[:, known], expect(level)[:, known], rtol=1e-14, atol=0)


def test_unknown_pixels_of_y_are_never_looked_at():
    blank = torch.where(MASK == 1, Y, math.nan)
    for rule in (
        lambda y: Replacement(sd.Heun(), y, MASK),
        lambda y: RePaint(sd.Heun(), y, MASK, 2),
    ):
        ours, theirs = (
            sd.sample(data(), rule(y), drawn(4, 5), steps=3, seeds=range(4)) for y in (Y, blank)
        )
        assert torch.equal(ours, theirs)
    ours, theirs = (
        complete_image(data(), y, MASK, 0.5, steps=5, seeds=range(4)) for y in (Y, blank)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("process", PROCESSES)
def test_repaint_goes_back_up_by_the_forward_kernel(process):
    """Up from s to t keeps the law of level t, its mean and its variance; and RePaint goes so: its
    second round is asked about  a x_s + b z."""
    process = PROCESSES[process]
    asked = Asked(data(process))
    t, s = level_of(process, 0.6), level_of(process, 0.4)
    draws = iter([drawn(4, 5, seed=k) for k in (1, 2, 3)])
    x = drawn(4, 5, seed=9) * process.prior_std
    rule = RePaint(sd.Ancestral(eta=0.0), Y, MASK, rounds=2)
    rule.step(asked, x, t, s, lambda *_: next(draws), None)
    plain = Replacement(sd.Ancestral(eta=0.0), Y, MASK)
    x_s, _ = plain.step(data(process), x, t, s, lambda *_: drawn(4, 5, seed=1), None)
    a = t.alpha / s.alpha
    b = math.sqrt(t.sigma**2 - (a * s.sigma) ** 2)
    assert_close(asked.x[0], x, rtol=0, atol=0)
    assert_close(asked.x[1], a * x_s + b * drawn(4, 5, seed=2), rtol=1e-9, atol=1e-12)
    for t, s in ((0.9, 0.3), (0.5, 0.49), (0.2, 0.0), (process.t_max, 0.5)):
        high, low = level_of(process, t), level_of(process, s)
        a, b = forward_kernel(low, high)
        assert_close(a * low.alpha, high.alpha, rtol=1e-12, atol=1e-300)
        assert_close(a**2 * low.sigma**2 + b**2, high.sigma**2, rtol=1e-9, atol=0)


class Asked:
    """A model that remembers what it was asked about."""

    def __init__(self, model):
        self.model, self.process, self.x = model, model.process, []

    def __call__(self, x, level):
        self.x.append(x.clone())
        return self.model(x, level)


@pytest.mark.parametrize(("rounds", "jump"), [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_repaint_costs_rounds_times_jump_calls_a_step(rounds, jump):
    class Counted:
        process, count, model = sd.VP(), 0, data()

        def __call__(self, x, level):
            self.count += 1
            return self.model(x, level)

    model = Counted()
    rule = RePaint(sd.Ancestral(), Y, MASK, rounds, jump)
    made = sd.sample(model, rule, drawn(4, 5), steps=3, seeds=range(4))
    assert model.count == 3 * rounds * jump
    if (rounds, jump) == (1, 1):
        plain = Replacement(sd.Ancestral(), Y, MASK)
        assert torch.equal(made, sd.sample(model, plain, drawn(4, 5), steps=3, seeds=range(4)))


def test_repaint_comes_closer_to_the_posterior_than_replacement():
    """On correlated Gaussian data: the error of the unknown pixels' mean given the known ones."""
    model, n, known = data(), 2000, MASK == 1
    y = drawn(1, 5, seed=11).expand(n, 5)
    exact = model.given(torch.eye(5).double()[known], y[0, known], 1e-6).means[0]
    errors = {}
    for name, rule in {
        "replacement": Replacement(sd.Ancestral(), y, MASK),
        "repaint": RePaint(sd.Ancestral(), y, MASK, rounds=10),
    }.items():
        made = sd.sample(
            model, rule, drawn(n, 5), steps=30, generator=torch.Generator().manual_seed(0)
        )
        errors[name] = float((made.mean(0) - exact).norm())
    assert errors["repaint"] < errors["replacement"] / 2


# ---- the sheet's rule --------------------------------------------------------------------------


def test_the_mse_is_the_mean_over_one_samples_pixels():
    x0 = drawn(4, 5)
    cost = MaskedMSE(Y, MASK)(x0)
    expected = torch.stack([((MASK * (x0[k] - Y[k])) ** 2).mean() for k in range(4)])
    assert_close(cost, expected, rtol=1e-14, atol=0)
    assert_close(MaskedMSE(Y[1:2], MASK)(x0[1:2]), expected[1:2], rtol=1e-14, atol=0)


@pytest.mark.parametrize("chain", [sd.Discrete.linear(50), sd.VP()])
def test_to_mean_is_the_gradient_with_respect_to_the_mean(chain):
    """Through x0_hat = (mean - c_t x_t) / c_0 by automatic differentiation, c_0 and c_t from the
    posterior of the discrete face; the network is not differentiated."""
    if isinstance(chain, sd.VP):
        chain = sd.processes.discretize(chain, 50)
    model, x, ddpm = data(chain), drawn(4, 5), sd.DDPM(data(chain))
    cost = MaskedMSE(Y, MASK)
    for i in (50, 20, 2, 1):
        t, s = (level_of(chain, k / 50) for k in (i, i - 1))
        plain, _ = sd.Ancestral().step(model, x, t, s, lambda *a: drawn(4, 5, seed=1), None)
        made, _ = PosteriorMeanCorrection(sd.Ancestral(), cost, 0.7).step(
            model, x, t, s, lambda *a: drawn(4, 5, seed=1), None
        )
        one, zero = torch.ones(1, 5).double(), torch.zeros(1, 5).double()
        c_0, c_t = (
            float(ddpm.q_posterior(a, b, i)[0][0, 0]) for a, b in ((one, zero), (zero, one))
        )
        mean = ddpm.q_posterior(model(x, t).x0, x, i)[0].requires_grad_()
        (gradient,) = torch.autograd.grad(cost((mean - c_t * x) / c_0).sum(), mean)
        assert_close(made, plain - 0.7 * gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FIXED_STEP)
@pytest.mark.parametrize("route", [BackpropCorrection, PosteriorMeanCorrection])
def test_completion_takes_any_sampler_at_its_own_number_of_calls(route, name):
    class Counted:
        process, count, model = sd.VP(), 0, data()

        def __call__(self, x, level):
            self.count += 1
            return self.model(x, level)

    sampler, plain, model = FIXED_STEP[name], Counted(), Counted()
    sd.sample(plain, sampler, drawn(4, 5), steps=6, seeds=range(4))
    made = complete_image(
        model, Y, MASK, 0.2, route=route, sampler=sampler, steps=6, seeds=range(4)
    )
    assert model.count == plain.count
    assert made.isfinite().all()
    assert made.dtype == Y.dtype


def test_a_picture_in_0_to_255_warns_and_its_unknown_pixels_do_not():
    wide = torch.where(MASK == 1, Y, 255.0)
    for y, context in ((wide, nullcontext()), (255 * Y, pytest.warns(UserWarning, match="y has"))):
        with context:
            complete_image(data(), y, MASK, 0.0, steps=2, seeds=range(4))


@pytest.mark.parametrize("name", OWN_STEPS)
@pytest.mark.parametrize("route", [BackpropCorrection, PosteriorMeanCorrection])
def test_a_sampler_with_steps_of_its_own_is_corrected_at_the_times_given(route, name):
    sampler, times = OWN_STEPS[name], torch.linspace(1, 0, 5)

    def made(scale):
        source = torch.Generator().manual_seed(0)
        return complete_image(
            data(), Y, MASK, scale, route=route, sampler=sampler, times=times, generator=source
        )

    assert made(0.1).isfinite().all()
    assert not torch.equal(made(0.1), made(0.0))
    with pytest.raises(ValueError, match="steps must be left out"):
        complete_image(data(), Y, MASK, 0.1, sampler=sampler)


@pytest.mark.parametrize("route", [BackpropCorrection, PosteriorMeanCorrection])
def test_completion_agrees_with_what_is_known_and_does_not_know_its_batch(route):
    known, scale = MASK == 1, {BackpropCorrection: 3.0, PosteriorMeanCorrection: 0.1}[route]
    made = complete_image(data(), Y, MASK, scale, route=route, steps=100, seeds=range(4))
    free = complete_image(data(), Y, MASK, 0.0, route=route, steps=100, seeds=range(4))
    off, before = ((m - Y)[:, known].norm() for m in (made, free))
    assert off < before / 3
    alone = complete_image(data(), Y[2:3], MASK, scale, route=route, steps=100, seeds=[2])
    assert_close(made[2:3], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("route", [BackpropCorrection, PosteriorMeanCorrection])
def test_clipping_holds_the_x0_of_rule_and_step(route):
    """One step written out: x_s and the gradient are those of the clamped x0."""
    model, x, scale = data(), drawn(4, 5, seed=3) * 2, 0.4
    t, s = level_of(model.process, 0.5), level_of(model.process, 0.3)
    made = complete_image(
        model, 5 * Y, MASK, scale, route=route, clip=True, sampler=Beginning(x), times=[0.5, 0.3],
    )  # fmt: skip
    point = x.clone().requires_grad_()
    x0 = model(point, t).x0.clamp(-1, 1)
    cost = (MASK * (x0 - 5 * Y)).square().mean(1).sum()
    assert (x0 == 1).any()
    assert (x0.abs() < 1).any()
    eps = (x - t.alpha * x0) / t.sigma
    expected = s.alpha * x0 + s.sigma * eps  # DDIM
    if route is BackpropCorrection:
        expected = expected - scale * torch.autograd.grad(cost, point)[0]
    else:
        kernel = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
        c_0 = s.alpha * kernel / t.sigma**2
        expected = expected - scale / c_0 * torch.autograd.grad(cost, x0)[0]
    assert_close(made, expected.detach(), rtol=0, atol=1e-10)


@dataclass(frozen=True)
class Beginning:
    """DDIM from a given batch, wherever it is told to begin."""

    x: torch.Tensor
    claims = sd.Ancestral(eta=0.0).claims
    grid = sd.Ancestral().grid

    def step(self, model, x, t, s, noise, memory):
        return sd.Ancestral(eta=0.0).step(model, self.x, t, s, noise, memory)


def test_to_mean_asks_no_derivative_of_the_network():
    class Stone:
        process, model = sd.VP(), data()

        @torch.no_grad()
        def __call__(self, x, level):
            return self.model(x, level)

    made = (
        complete_image(model, Y, MASK, 0.1, route=PosteriorMeanCorrection, steps=5, seeds=range(4))
        for model in (Stone(), data())
    )
    assert torch.equal(*made)
    with pytest.raises(ValueError, match="no derivative"):
        complete_image(Stone(), Y, MASK, 0.1, steps=5, seeds=range(4))


def test_clipped_images_end_within_the_range():
    last = complete_image(data(), 5 * Y, MASK, 0.0, steps=20, clip=True, seeds=range(4))
    assert last.abs().max() <= 1  # the last step ends in x0


FOUR = torch.ones(2, 4)


@pytest.mark.parametrize(("y", "mask", "says"), [
    (FOUR, torch.tensor([1.0, 0, 1]), "broadcast"),
    (FOUR, torch.ones(3, 2, 4) * torch.eye(2, 4), "broadcast"),
    (FOUR, torch.full((4,), 0.5), "0 and 1 only"),
    (FOUR, torch.zeros(4), "nothing is known"),
    (FOUR, torch.ones(4), "nothing is left"),
    (FOUR, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), "shows nothing of sample 1"),
    (FOUR, torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 0]]), "shows everything of sample 0"),
    (FOUR * math.nan, torch.tensor([1.0, 0, 0, 0]), "finite where it is known"),
    (torch.ones(2, 4, dtype=torch.int64), torch.tensor([1.0, 0, 0, 0]), "floating-point"),
])  # fmt: skip
def test_bad_images_and_masks_are_refused_by_name(y, mask, says):
    for call in (
        lambda: complete_image(data(), y, mask, 1.0),
        lambda: Replacement(sd.Heun(), y, mask),
        lambda: RePaint(sd.Heun(), y, mask),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_bad_numbers_are_refused_by_name():
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            complete_image(data(), Y, MASK, scale)
    with pytest.raises(ValueError, match="route"):
        complete_image(data(), Y, MASK, 1.0, route="network")
    with pytest.raises(TypeError, match="model"):
        complete_image(None, Y, MASK, 1.0)
    with pytest.raises(ValueError, match="ymask must broadcast"):
        complete_image(data(), Y, MASK[:2], 1.0)
    with pytest.raises(ValueError, match="steps"):
        complete_image(data(), Y, MASK, 1.0, steps=3, times=[1.0, 0.0])
    with pytest.raises(ValueError, match="rounds"):
        RePaint(sd.Heun(), Y, MASK, 0)
    with pytest.raises(ValueError, match="y must be shaped like x"):
        sd.sample(data(), Replacement(sd.Heun(), Y, MASK), drawn(3, 5), steps=2)


@pytest.mark.parametrize("route", [BackpropCorrection, PosteriorMeanCorrection])
def test_a_rule_that_diverges_is_named(route):
    """Its known pixels end at more than 10 times the size of y."""
    with pytest.warns(RuntimeWarning, match="of 4 samples do not fit y: the RMSE is") as found:
        made = complete_image(data(), Y, MASK, 300.0, route=route, steps=10, seeds=range(4))
    off = (MASK * (made - Y)).norm(dim=1) > 10 * (MASK * Y).norm(dim=1)
    assert f"{int(off.sum())} of 4" in str(found[0].message)
    assert len(found) == 1
