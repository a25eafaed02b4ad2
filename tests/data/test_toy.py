"""Toy distributions: densities against quadrature and torch, samples against exact moments.

A mean over n independent points has standard error (standard deviation) / sqrt(n); bounds are 4.5
of them, with the deviation estimated from the sample (relative error 1 / sqrt(2 n), negligible).
"""

import math
import random
import runpy
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions

from sde_diffusion.data import toy as module
from sde_diffusion.data.toy import Chequerboard, Moons, Pinwheel, SwissRoll, TwoGaussians

ALL = [TwoGaussians(), TwoGaussians(weight=0.2), Chequerboard(), Chequerboard(squares=3)]
ALL += [Moons(), SwissRoll(), Pinwheel()]
WITH_DENSITY = ALL[:4]
N = 20_000
P = 2 * stats.norm.sf(4.5)  # the chance of 4.5 standard errors
PLAIN = runpy.run_path(module.__file__)  # as users have it, without the checks of annotations


def global_states():
    theirs = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), repr(theirs), random.getstate()


def assert_mean(values, expected):
    error = values.double().mean(0) - torch.as_tensor(expected, dtype=torch.float64)
    assert (error.abs() < 4.5 * values.double().std(0) / len(values) ** 0.5).all()


@pytest.mark.parametrize("toy", ALL, ids=repr)
def test_a_sample_is_a_function_of_n_and_seed(toy):
    before = global_states()
    x = toy.sample(100, 3)
    assert x.shape == (100, 2)
    assert x.dtype == torch.float32
    assert torch.equal(x, toy.sample(100, 3))
    assert not torch.isin(x, toy.sample(100, 4)).any()
    assert global_states() == before


@pytest.mark.parametrize("toy", ALL, ids=repr)
def test_n_points_are_the_first_of_any_longer_sample(toy):
    assert torch.equal(toy.sample(7, 0), toy.sample(1000, 0)[:7])


@pytest.mark.parametrize("name", ["TwoGaussians", "Chequerboard", "Moons", "SwissRoll", "Pinwheel"])
@pytest.mark.parametrize("n", [0, -1, True, 2.0, None])
def test_a_number_of_points_that_is_no_positive_integer_is_refused(name, n):
    with pytest.raises((TypeError, ValueError), match=rf"^n must be .*; got {n}$"):
        PLAIN[name]().sample(n, 0)


@pytest.mark.parametrize("name", ["TwoGaussians", "Chequerboard"])
@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(()), torch.zeros(5, 2, dtype=torch.int)])
def test_the_density_of_what_is_no_point_is_refused(name, x):
    with pytest.raises(ValueError, match=r"^x must be points \(\.\.\., 2\) of floats; got"):
        PLAIN[name]().log_prob(x)


@pytest.mark.parametrize("toy", ALL, ids=repr)
def test_a_negative_seed_is_refused(toy):
    with pytest.raises(ValueError, match="each seed must be at least 0; got -1"):
        toy.sample(1, -1)


@pytest.mark.parametrize(
    ("made", "argument", "value"),
    [
        (TwoGaussians, "std", 0.0),
        (TwoGaussians, "weight", 1.5),
        (TwoGaussians, "mean", math.nan),
        (Chequerboard, "squares", 1),
        (Moons, "noise", -0.1),
        (SwissRoll, "noise", math.inf),
        (Pinwheel, "arms", 1),
        (Pinwheel, "radial", -1.0),
        (Pinwheel, "tangential", -1.0),
        (Pinwheel, "rate", math.nan),
    ],
)
def test_a_bad_parameter_is_refused_by_name(made, argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must .* got {value}$"):
        made(**{argument: value})


def test_a_distribution_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        ALL[0].std = 2.0


# Exact means and mean squares |x|^2, from the formulas in the docstrings.
MOMENTS = [
    (TwoGaussians(), (0, 0), 2 * (1 + 0.4**2)),
    (TwoGaussians(weight=0.2), (-0.6, -0.6), 2 * (1 + 0.4**2)),
    (Chequerboard(), (0, 0), 2 * 4 / 3),
    # 5 dark squares of side 4/3: 4 at |corner|^2 = 2 (4/3)^2, each adding 2 (4/3)^2 / 12
    (Chequerboard(squares=3), (0, 0), (4 / 3) ** 2 * (4 / 5 * 2 + 2 / 12)),
    # E|p|^2 = 1 above, 1 + 5/4 - 2 E cos - E sin = 9/4 - 2 / pi below; |c|^2 = 5/16
    (Moons(), (0, 0), 2 * ((1 + 9 / 4 - 2 / math.pi) / 2 - 5 / 16) + 2 * 0.1**2),
    # E a^2 = 39 pi^2 / 4 for a uniform in [3 pi / 2, 9 pi / 2]
    (
        SwissRoll(),
        (0, 0),
        (39 * math.pi**2 / 4 - 4 - (2 / (3 * math.pi)) ** 2) / 49 + 2 * 0.1**2,
    ),
    (Pinwheel(), (0, 0), 2 * (1 + 0.3**2 + 0.1**2)),
]


@pytest.mark.parametrize(("toy", "mean", "square"), MOMENTS, ids=repr)
def test_samples_have_the_exact_mean_and_size(toy, mean, square):
    x = toy.sample(N, 1)
    assert_mean(x, mean)
    assert_mean((x**2).sum(1), square)


@pytest.mark.parametrize("toy", WITH_DENSITY, ids=repr)
def test_the_density_integrates_to_one(toy):
    """Midpoint rule, h = 1/60 on [-4, 4]^2: edges of squares fall between nodes, so that boards are
    summed exactly; for Gaussians of std 0.4 = 24 h it is exact up to the tails beyond 7.5 std."""
    h = 1 / 60
    nodes = torch.arange(-240, 240, dtype=torch.float64) * h + h / 2
    grid = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), dim=-1)
    density = toy.log_prob(grid).exp()
    assert density.shape == grid.shape[:-1]
    assert abs(density.sum() * h**2 - 1) < 1e-12


@pytest.mark.parametrize("toy", [TwoGaussians(), TwoGaussians(mean=0.5, std=0.2, weight=0.2)])
def test_two_gaussians_have_the_density_of_the_mixture_in_torch(toy, generator):
    means = torch.tensor([[toy.mean] * 2, [-toy.mean] * 2], dtype=torch.float64)
    component = distributions.Independent(distributions.Normal(means, toy.std), 1)
    shares = torch.tensor([toy.weight, 1 - toy.weight], dtype=torch.float64)
    theirs = distributions.MixtureSameFamily(distributions.Categorical(shares), component)
    x = 4 * (torch.rand(50, 3, 2, dtype=torch.float64, generator=generator) - 0.5)
    torch.testing.assert_close(toy.log_prob(x), theirs.log_prob(x), rtol=1e-12, atol=1e-12)


def test_two_gaussians_are_two_gaussians_in_the_stated_shares():
    """Projected on the diagonal the modes stand sqrt(2) / 0.4 = 3.5 std from the origin each."""
    toy = TwoGaussians(weight=0.2)
    x = toy.sample(N, 2).double()
    along = x.sum(1) / math.sqrt(2)
    share = stats.norm.cdf(math.sqrt(2) / 0.4)
    assert_mean((along > 0).double(), 0.2 * share + 0.8 * (1 - share))
    across = (x[:, 0] - x[:, 1]) / math.sqrt(2)  # N(0, 0.4^2), whichever the mode
    assert stats.kstest(across.numpy() / 0.4, "norm").pvalue > P


@pytest.mark.parametrize("squares", [2, 3, 4, 7, 1000])
def test_every_point_of_a_chequerboard_lies_on_a_dark_square(squares):
    """At 1,000 squares float32 would round some 10 of these points over an edge."""
    toy = Chequerboard(squares=squares)
    log_prob = toy.log_prob(toy.sample(5 * N, 0))
    dark = math.ceil(squares**2 / 2)
    assert log_prob.unique().tolist() == [
        pytest.approx(-math.log(16 * dark / squares**2), rel=1e-6)
    ]


def test_a_chequerboard_has_the_density_of_its_picture():
    inside = torch.tensor([[-1.5, -1.5], [-1.5, 0.5], [-0.5, -0.5], [1.5, 1.5]])
    light = torch.tensor([[-1.5, -0.5], [0.5, 1.5], [1.5, -1.5]])
    off = torch.tensor([[2.5, 2.5], [-2.5, -1.5], [-3.5, 0.5], [0.5, 2.5]])
    assert (Chequerboard().log_prob(inside) == torch.tensor(-math.log(8))).all()
    assert (Chequerboard().log_prob(torch.cat([light, off])) == -math.inf).all()


def test_a_chequerboard_is_uniform_over_and_inside_its_squares():
    """Counts of 8 squares are binomial(n, 1/8); inside, both coordinates are uniform."""
    x = Chequerboard().sample(N, 5).double() + 2
    _, counts = x.floor().unique(dim=0, return_counts=True)
    assert len(counts) == 8
    assert ((counts - N / 8).abs() < 4.5 * math.sqrt(N * 7 / 64)).all()
    for coordinate in (x - x.floor()).T:
        assert stats.kstest(coordinate.numpy(), "uniform").pvalue > P


def test_moons_without_noise_are_two_half_circles():
    """float32 coordinates below 4 are within 2^-23 of the curve: so are radii, scaled back."""
    p = Moons(noise=0.0).sample(N, 6).double() / math.sqrt(2) + torch.tensor([0.5, 0.25])
    error = 2**-23
    centre = torch.tensor([[0.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    radius = (p[:, None] - centre).norm(dim=2)
    upper = ((radius[:, 0] - 1).abs() < error) & (p[:, 1] > -error)
    lower = ((radius[:, 1] - 1).abs() < error) & (p[:, 1] < 0.5 + error)
    assert (upper | lower).all()
    assert_mean(upper.double(), 0.5)


def test_a_swiss_roll_without_noise_is_a_spiral_evenly_filled_in_angle():
    """|p| is the angle a itself; float32 coordinates below 4 err by 2^-23, p by sqrt(2) 7 times
    that, its direction by a-th part of it and the angle read off |p| by as much again."""
    centre = torch.tensor([2, 2 / (3 * math.pi)], dtype=torch.float64)
    p = SwissRoll(noise=0.0).sample(N, 7).double() * 7 + centre
    a = p.norm(dim=1)
    curve = a[:, None] * torch.stack([a.cos(), a.sin()], dim=1)
    assert ((p - curve).norm(dim=1) < math.sqrt(2) * 7 * 2**-23 * (1 + a)).all()
    share = (a - 1.5 * math.pi) / (3 * math.pi)
    assert share.min() > -1e-6
    assert share.max() < 1 + 1e-6
    assert stats.kstest(share.numpy(), "uniform").pvalue > P


@pytest.mark.parametrize("arms", [2, 5])
def test_a_pinwheel_unwound_is_one_gaussian_per_arm(arms):
    """Without bending, arm k stands at the angle 2 pi k / arms, 7.8 std from the next."""
    x = Pinwheel(arms=arms, radial=0.05, tangential=0.02, rate=0.0).sample(N, 8).double()
    angle = torch.atan2(x[:, 1], x[:, 0])
    arm = (angle * arms / (2 * math.pi)).round() % arms
    _, counts = arm.unique(return_counts=True)
    assert len(counts) == arms
    assert ((counts - N / arms).abs() < 4.5 * math.sqrt(N * (arms - 1)) / arms).all()
    turn = -2 * math.pi * arm / arms
    r = (x[:, 0] * turn.cos() - x[:, 1] * turn.sin()) / math.sqrt(2)
    across = (x[:, 0] * turn.sin() + x[:, 1] * turn.cos()) / math.sqrt(2)
    assert stats.kstest((r.numpy() - 1) / 0.05, "norm").pvalue > P
    assert stats.kstest(across.numpy() / 0.02, "norm").pvalue > P


def test_the_bend_of_a_pinwheel_turns_each_point_by_rate_times_e_to_the_radius():
    """Same seed, same numbers: with tangential = 0 only the angle differs, by 0.25 e^r.

    Coordinates below 4 err by 2^-23: 2 (w and z) times sqrt(2) of that, and 0.25 e^r |x| < 2.4
    times from the angle, for r < 1.5: 5.3 * 2^-23 in all.
    """
    straight = Pinwheel(tangential=0.0, radial=0.1, rate=0.0).sample(1000, 9).double()
    bent = Pinwheel(tangential=0.0, radial=0.1, rate=0.25).sample(1000, 9).double()
    r = straight.norm(dim=1) / math.sqrt(2)
    z, w = torch.view_as_complex(straight), torch.view_as_complex(bent)
    expected = z * torch.polar(torch.ones_like(r), 0.25 * r.exp())
    assert ((w - expected).abs() < 5.3 * 2**-23).all()
