"""A training run is a function of its recipe, its data and its first weights, however it is cut."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from training_runs import (
    IMAGES,
    POINTS,
    RECIPE,
    RUNS,
    TIMES,
    assert_same_bits,
    content,
    fresh,
    ran,
    unet,
)

from sde_diffusion.data import Images, Points, dequantize, order
from sde_diffusion.losses import denoising_loss
from sde_diffusion.times import DiscreteTimes
from sde_diffusion.training import EMA, PowerEMA, Recipe, draw, restore, save, train


def repr_shape(data):
    return f"{len(data)} of {data.shape}"


def global_states():
    theirs = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), repr(theirs), random.getstate()


# ---- data order, noise and times -------------------------------------------------------------


@pytest.mark.parametrize("data", [POINTS, IMAGES, Points(torch.arange(9.0))], ids=repr_shape)
@pytest.mark.parametrize("cuts", [(0, 4, 8, 12, 16), (0, 1, 16), tuple(range(17))], ids=len)
def test_a_batch_is_the_concatenation_of_its_pieces(data, cuts):
    for step in (0, 3):  # step 3 of 16 crosses the end of an epoch of 50, and of three of 9
        whole = draw(data, RECIPE, TIMES, step)
        pieces = [draw(data, RECIPE, TIMES, step, range(a, b)) for a, b in itertools.pairwise(cuts)]
        for field in ("x0", "t", "eps"):
            parts = torch.cat([getattr(piece, field) for piece in pieces])
            assert torch.equal(getattr(whole, field), parts)
        assert whole.cond is None
        assert len(whole.x0) == len(whole.t) == RECIPE.batch_size


def test_batches_follow_the_order_of_the_data():
    seen = torch.cat([draw(POINTS, RECIPE, TIMES, step).x0 for step in range(5)])
    assert torch.equal(seen, POINTS.x[order(RECIPE.seed, 50, 0, 80)])
    assert len(seen[:50].unique(dim=0)) == 50  # every datum once in the first epoch


def test_no_two_positions_steps_or_seeds_share_noise():
    rows, places = [], []
    for seed in (0, 1):
        recipe = Recipe(batch_size=16, seed=seed)
        for step in range(8):
            batch = draw(IMAGES, recipe, TIMES, step)
            uniform = (batch.x0 + 1) * 128 % 1  # what dequantization added
            rows += [*batch.eps.flatten(1), *uniform.flatten(1)]
            places.append(batch.t)
    assert len(torch.stack(rows).unique(dim=0)) == 2 * 8 * 16 * 2
    assert len(torch.cat(places).unique()) == 2 * 8 * 16


def test_noise_is_standard_normal_and_independent_of_what_dequantizes():
    """n products of independent variables of mean 0: standard error of the mean sqrt(var / n)."""
    images = Images(torch.zeros(64, 1, 32, 32, dtype=torch.uint8), torch.zeros(64))
    batch = draw(images, Recipe(batch_size=64), TIMES, 0)
    eps, uniform = batch.eps.double().flatten(), (batch.x0.double().flatten() + 1) * 128
    n = len(eps)
    assert abs(eps.mean()) < 4.5 / n**0.5
    assert abs(eps.square().mean() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs(uniform.mean() - 0.5) < 4.5 * (1 / 12 / n) ** 0.5
    assert abs((eps * (uniform - 0.5)).mean()) < 4.5 * (1 / 12 / n) ** 0.5
    neighbours = batch.eps.double()[1:] * batch.eps.double()[:-1]
    assert abs(neighbours.mean()) < 4.5 / neighbours.numel() ** 0.5


def test_one_time_falls_in_each_stratum_and_all_are_shifted_alike():
    for step in range(3):
        t = draw(POINTS, RECIPE, TIMES, step).t
        assert t.dtype == torch.float64
        assert torch.equal((t * 16).floor(), torch.arange(16.0, dtype=torch.float64))
        assert_close(t * 16 - torch.arange(16), t[:1].expand(16) * 16, rtol=0, atol=1e-13)
    t = draw(POINTS, RECIPE, DiscreteTimes(16), 0).t
    assert torch.equal(t * 16, torch.arange(1.0, 17.0, dtype=torch.float64))


@pytest.mark.parametrize("positions", [range(0, 16, 2), range(8, 17), range(-1, 4), range(5, 2)])
def test_positions_that_are_no_stretch_of_the_batch_are_refused(positions):
    """A stride would pair the noise of one position with the datum of another."""
    with pytest.raises(ValueError, match="positions"):
        draw(POINTS, RECIPE, TIMES, 0, positions)


def test_drawing_and_advancing_leave_the_global_generators_alone(tmp_path):
    class Plain:
        """Data from outside the package; beartype, which checks ours, draws from `random`."""

        shape = (2,)

        def __len__(self):
            return 50

        def batch(self, index, uniform):
            return POINTS.x[index], None

    state = fresh()
    before = global_states()
    for _ in range(2):
        state.advance(draw(Plain(), RECIPE, TIMES, state.step))
    restore(state, save(state, tmp_path))
    assert global_states() == before


# ---- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_two_equal_runs_are_equal_bit_for_bit(run):
    network, data = RUNS[run]
    first, second = (content(ran(4, network=network, data=data)) for _ in range(2))
    assert_same_bits(first, second)


def test_training_takes_every_step_of_the_recipe_once():
    state = fresh()
    metrics = list(train(state, POINTS))
    assert [metric.step for metric in metrics] == list(range(1, 13))
    assert state.step == 12
    assert list(train(state, POINTS)) == []
    assert_same_bits(content(state), content(ran(12)))
    rates = [metric.learning_rate for metric in metrics]
    assert rates == [RECIPE.rate(step) for step in range(12)]


def test_the_learning_rate_is_a_ramp_times_half_a_cosine():
    recipe = Recipe(steps=100, warmup=10, learning_rate=0.5)
    for step in range(100):
        expected = 0.5 * min(1, (step + 1) / 10) * np.cos(np.pi * step / 200) ** 2
        assert abs(recipe.rate(step) - expected) < 1e-15


@pytest.mark.parametrize("run", RUNS)
def test_accumulated_gradients_are_the_gradient_of_the_whole_batch(run):
    """Mean over 4 equal pieces of the gradients of the pieces' mean losses; float64 sums differ
    by rounding only."""
    network, data = RUNS[run]
    state = ran(3, network=network, data=data)  # away from the U-Net's initial zeros
    denoiser = state.denoiser.double()

    def gradient(positions=None):
        batch = draw(data, RECIPE, TIMES, 5, positions)
        loss = denoising_loss(denoiser, batch.x0.double(), batch.t, batch.eps.double()).mean()
        return torch.autograd.grad(loss, list(denoiser.network.parameters()))

    whole = gradient()
    pieces = [gradient(range(4 * k, 4 * k + 4)) for k in range(4)]
    assert sum(g.square().sum() for g in whole) > 1e-4
    for one, *parts in zip(whole, *pieces, strict=True):
        assert_close(one, sum(parts) / 4, rtol=1e-12, atol=1e-12)


def test_the_average_is_its_closed_form_sum():
    """mean_K = sum_j c_j w_j, c_j = (1 - d_(j-1)) prod_(k=j)^(K-1) d_k, d_0 = 0 and else
    d_k = min(decay, (1 + k) / (10 + k)): one average of all weights so far, c_j summing to 1."""
    recipe = Recipe(steps=40, batch_size=8, warmup=0, learning_rate=0.1, ema=EMA(0.6))
    state = fresh(recipe=recipe)
    state.denoiser.double()
    state.shadow.double()
    state.average = [p.data for p in state.shadow.parameters()]
    history = []
    for _ in train(state, POINTS):
        history.append(torch.nn.utils.parameters_to_vector(state.denoiser.network.parameters()))
    decay = [0.0, *(min(0.6, (1 + k) / (10 + k)) for k in range(1, 40))]
    assert 0.6 in decay
    assert decay[1] < 0.6
    shares = [(1 - decay[j - 1]) * np.prod(decay[j:40]) for j in range(1, 41)]
    assert abs(sum(shares) - 1) < 1e-12
    expected = sum(share * weights for share, weights in zip(shares, history, strict=True))
    average = torch.nn.utils.parameters_to_vector(state.averaged.network.parameters())
    assert_close(average, expected, rtol=0, atol=1e-12)
    assert (average - history[-1]).abs().max() > 1e-3


def test_one_update_of_the_average_is_the_convex_combination():
    mean, value = [torch.zeros(3, dtype=torch.float64)], [torch.ones(3, dtype=torch.float64)]
    EMA(0.99)(mean, value, torch.tensor(5))
    assert_close(mean[0], torch.full((3,), 1 - 6 / 15, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_gradient_is_clipped_to_the_recipe():
    """AdamW does not see the scale of one gradient: what was clipped shows in its first moment,
    (1 - 0.9) g."""
    state = fresh(recipe=Recipe(steps=1, batch_size=16, clip=1e-3))
    metrics = state.advance(draw(POINTS, RECIPE, TIMES, 0))
    assert metrics.gradient_norm > 1e-3
    moments = [slots["exp_avg"].double() for slots in state.optimizer.state.values()]
    norm = sum(moment.square().sum() for moment in moments) ** 0.5
    assert abs(norm / 1e-4 - 1) < 1e-3  # clip_grad_norm_ divides by norm + 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("field", ["x0", "eps"])
def test_a_bad_batch_is_named_and_changes_nothing(field, value):
    state = ran(3)
    before = content(state)
    batch = draw(POINTS, RECIPE, TIMES, 3)
    spoilt = getattr(batch, field).clone()
    spoilt[4, 1] = value
    with pytest.raises(FloatingPointError, match="at step 3; weights unchanged"):
        state.advance(batch._replace(**{field: spoilt}))
    assert_same_bits(content(state), before)
    state.advance(batch)
    assert_same_bits(content(state), content(ran(4)))


def test_a_gradient_that_overflows_is_refused_like_a_loss():
    """Data of 1e18 have a loss near 1e36, which float32 holds; the gradient with respect to the
    first weights is as large, and its square is not."""
    state = ran(1)
    before = content(state)
    batch = draw(POINTS, RECIPE, TIMES, 1)
    with pytest.raises(FloatingPointError, match="gradient norm inf at step 1"):
        state.advance(batch._replace(x0=torch.full_like(batch.x0, 1e18)))
    assert_same_bits(content(state), before)


def test_bf16_trains_float32_weights():
    recipe = Recipe(steps=3, batch_size=8, dtype="bf16")
    state = ran(3, network=unet, data=IMAGES, recipe=recipe)
    full = ran(3, network=unet, data=IMAGES, recipe=Recipe(steps=3, batch_size=8))
    weights, exact = content(state), content(full)
    assert all(v.dtype == torch.float32 for k, v in weights.items() if k.startswith("network"))
    assert any(not torch.equal(weights[k], exact[k]) for k in weights)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("clip", 0.0),
        ("clip", float("nan")),
        ("ema", 1.0),
        ("ema", -0.1),
        ("ema", float("nan")),
        ("seed", -1),
        ("seed", 0.5),
        ("dtype", "float16"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        Recipe(**{name: value})


def test_a_gradient_need_not_be_clipped():
    assert Recipe(clip=float("inf")).clip == float("inf")


def test_dequantization_is_part_of_the_draw():
    """The images of a batch are the data's pixels, each with a uniform of its own."""
    batch = draw(IMAGES, RECIPE, TIMES, 0)
    pixels = IMAGES.pixels[order(RECIPE.seed, 40, 0, 16)]
    low, high = dequantize(pixels, torch.zeros(())), dequantize(pixels, torch.ones(()))
    assert ((low <= batch.x0) & (batch.x0 <= high)).all()
    assert len(batch.x0.unique()) > 16 * 36 * 0.99
