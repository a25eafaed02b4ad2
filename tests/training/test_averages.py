"""Averages of the weights and the learning rate as closed forms; what training refuses."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from training_runs import POINTS, RECIPE, fresh

from sde_diffusion.data.datasets import Points
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.processes import VP
from sde_diffusion.training import EMA, PowerEMA, Recipe, TrainState, train


@pytest.mark.parametrize(("decay", "last"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_the_learning_rate_falls_as_it_is_told(decay, last):
    recipe = Recipe(steps=100, warmup=0, learning_rate=1.0, decay=decay)
    assert recipe.rate(0) == 1.0
    assert abs(recipe.rate(50) - last) < 1e-15
    assert recipe.rate(99) == pytest.approx({"cosine": np.cos(np.pi * 99 / 200) ** 2, "linear": 0.01, "constant": 1.0}[decay], rel=1e-12)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (200, 20), (4999, 499),
                                               (5000, 500), (10**6, 500)])  # fmt: skip
def test_the_warm_up_fits_the_run(steps, warmup):
    """The rate reaches 90 % of its value in any run, and the field holds the number used."""
    recipe = Recipe(steps=steps)
    assert recipe.warmup == recipe.settings["warmup"] == warmup
    assert max(map(recipe.factor, range(0, steps, max(1, steps // 1000)))) > 0.9
    assert Recipe(steps=steps, warmup=steps).warmup == steps
    with pytest.raises(ValueError, match=f"warmup must be at most steps, {steps}; got {steps + 1}"):
        Recipe(steps=steps, warmup=steps + 1)


@pytest.mark.parametrize("steps", [20, 200, 2000, 20_000])
@pytest.mark.parametrize("ema", [EMA(), EMA(0.99999), PowerEMA()], ids=str)
def test_the_beginning_of_a_run_of_any_length_is_not_in_its_average(steps, ema):
    """After n steps the first m weigh prod_(k=m)^(n-1) d_k. Under the ramp (1 + k)/(10 + k) this is
    at most prod_(i=1)^9 (m + i)/(n + i), under PowerEMA (m/n)^(gamma + 1)."""
    m = steps // 10
    first = np.prod([ema.decay_at(k) for k in range(m, steps)])
    ramp = np.prod([(m + i) / (steps + i) for i in range(1, 10)])
    bound = ramp if isinstance(ema, EMA) else (m / steps) ** (ema.gamma + 1)
    assert first <= bound * (1 + 1e-9)
    assert bound < 1e-5


def shares_of_ema(steps, decay):
    """c_j = (1 - d_(j-1)) prod_(k=j)^(K-1) d_k with d_0 = 0 and d_k = min(decay, (1+k)/(10+k))."""
    d = [0.0, *(min(decay, (1 + k) / (10 + k)) for k in range(1, steps))]
    return [(1 - d[j - 1]) * np.prod(d[j:steps]) for j in range(1, steps + 1)]


def shares_of_power(steps, gamma):
    """(j/K)^(gamma + 1) - ((j - 1)/K)^(gamma + 1): the profile t^gamma, integrated over a step."""
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return np.diff(edges)


@pytest.mark.parametrize(
    ("ema", "shares"),
    [
        (EMA(0.6), shares_of_ema(40, 0.6)),
        (EMA(0.99), shares_of_ema(40, 0.99)),
        (PowerEMA(0.1), shares_of_power(40, PowerEMA(0.1).gamma)),
        (PowerEMA(0.25), shares_of_power(40, PowerEMA(0.25).gamma)),
    ],
    ids=str,
)
def test_an_average_is_its_closed_form_sum(ema, shares):
    recipe = Recipe(steps=40, batch_size=8, warmup=0, learning_rate=0.1, ema=ema)
    state = fresh(recipe=recipe, dtype=torch.float64)
    history = []
    for _ in train(state, POINTS):
        history.append(torch.nn.utils.parameters_to_vector(state.denoiser.network.parameters()))
    assert abs(sum(shares) - 1) < 1e-12
    expected = sum(share * weights for share, weights in zip(shares, history, strict=True))
    average = torch.nn.utils.parameters_to_vector(state.averaged.network.parameters())
    assert_close(average, expected, rtol=0, atol=1e-12)
    assert (average - history[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_power_functions_width_is_the_one_asked_for(sigma_rel):
    """Karras et al. 2024: the profile t^gamma on [0, 1] has variance
    (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), and 16.97, 6.94 for .05 and .10 (their Table 8)."""
    gamma = PowerEMA(sigma_rel).gamma
    assert abs((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) / sigma_rel**2 - 1) < 1e-10
    published = {0.05: 16.97, 0.1: 6.94}
    assert abs(gamma - published.get(sigma_rel, gamma)) < 5e-3


@pytest.mark.parametrize("make", [lambda: EMA(1.0), lambda: EMA(-0.1), lambda: PowerEMA(0.3),
                                  lambda: PowerEMA(0.0), lambda: EMA(float("nan"))])  # fmt: skip
def test_a_bad_average_is_refused(make):
    with pytest.raises(ValueError, match=r"^(decay|sigma_rel) must"):
        make()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"denoiser": "mnist_vp"}, "denoiser must be a Denoiser"),
        ({"recipe": {"steps": 3}}, "recipe must be a Recipe"),
        ({"times": 0.5}, "times must be a callable"),
        ({"weight": 2.0}, "weight must be a callable"),
        ({"engine": "cuda"}, "engine must be an Engine"),
        ({"bad": "ignore"}, "bad must be one of raise, skip"),
        ({"denoiser": Denoiser(torch.nn.Identity(), VP())}, "a parameter that requires a gradient"),
    ],
)
def test_a_state_refuses_by_name_what_it_cannot_use(arguments, named):
    given = {"denoiser": fresh().denoiser, "recipe": RECIPE, **arguments}
    with pytest.raises((TypeError, ValueError), match=named):
        TrainState(**given)


def test_a_loop_refuses_by_name_what_it_cannot_use():
    for arguments, named in (
        ((None, POINTS), "state must be a TrainState"),
        ((fresh(), [1, 2]), "data must be a data set"),
        ((fresh(), POINTS, 0), "parts must be at least 1"),
        ((fresh(), Points(torch.zeros(0, 2))), "size must be at least 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=named):
            next(train(*arguments))
    with pytest.raises(ValueError, match="at least one part"):
        fresh().advance()
