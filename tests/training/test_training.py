"""A training run is a function of its recipe, its data and its first weights, however it is cut."""

import itertools
import math
import random
import re

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
    mlp_dropout,
    ran,
    unet,
    unet_dropout,
)

import sde_diffusion as sd
from sde_diffusion.data.datasets import Images, Points, dequantize, shuffled_indices
from sde_diffusion.losses.times import DiscreteTimes
from sde_diffusion.networks import Dropout
from sde_diffusion.training import Recipe, TrainState, draw, restore, save, train
from sde_diffusion.training.batches import mask


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
    assert torch.equal(seen, POINTS.x[shuffled_indices(RECIPE.seed, 50, 0, 80)])
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


@pytest.mark.parametrize("network", [mlp_dropout, unet_dropout])
@pytest.mark.parametrize("parts", [2, 3, 16])
def test_accumulated_gradients_are_the_gradient_of_the_whole_batch(network, parts):
    """Sums in another order: float64 rounding. With dropout, whose masks belong to positions."""
    data = POINTS if network is mlp_dropout else IMAGES
    recipe = Recipe(steps=12, batch_size=16, warmup=3, clip=math.inf)
    states = [fresh(network, recipe, dtype=torch.float64) for _ in range(2)]
    metrics = [next(train(state, data, k)) for state, k in zip(states, (1, parts), strict=True)]
    whole, cut = ([p.grad for p in state.denoiser.parameters()] for state in states)
    assert sum(g.square().sum() for g in whole) > 1e-4
    for one, other in zip(whole, cut, strict=True):
        assert_close(other, one, rtol=1e-12, atol=1e-12)
    assert_close(metrics[0].loss, metrics[1].loss, rtol=1e-12, atol=0)


def test_more_parts_than_positions_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 17"):
        next(train(fresh(), POINTS, 17))


def test_masks_are_those_of_the_position_the_layer_and_the_step():
    """p is 0.2 of n numbers: its standard error is sqrt(.16 / n)."""
    state = fresh(mlp_dropout)
    layers = [part for part in state.denoiser.network.modules() if isinstance(part, Dropout)]
    seen, ones = [], torch.ones(16, 1000)
    for step in (0, 1):
        batch = draw(POINTS, RECIPE, TIMES, step)
        mask(layers, RECIPE, step, batch, torch.device("cpu"))
        for layer in layers:
            seen.append(layer(ones))
        part = draw(POINTS, RECIPE, TIMES, step, range(5, 9))
        mask(layers, RECIPE, step, part, torch.device("cpu"))
        assert torch.equal(layers[1](ones[:4]), seen[-1][5:9])
    rows = torch.cat(seen)
    assert len(rows.unique(dim=0)) == len(rows) == 2 * 2 * 16
    assert set(rows.unique().tolist()) == {0.0, 1.25}
    dropped = (rows == 0).double().mean()
    assert abs(dropped - 0.2) < 4.5 * (0.16 / rows.numel()) ** 0.5
    state.averaged.network.eval()
    assert torch.equal(layers[0].eval()(ones), ones)


def test_torchs_own_dropout_repeats_and_leaves_the_global_generator_alone():
    def network():
        return Plain(torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Dropout(), torch.nn.Linear(32, 2)))  # fmt: skip  # noqa: E501

    before = torch.get_rng_state()
    first, second = (ran(3, network=network) for _ in range(2))
    assert_same_bits(content(first), content(second))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_same_bits(content(ran(3, network=network)), content(first))
    torch.set_rng_state(before)


class Plain(torch.nn.Module):
    """A network that is not told the noise level."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, c):
        return self.inner(x)


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
    row = shuffled_indices(RECIPE.seed, len(POINTS), 3 * 16 + 4, 1).item()
    named = rf"at step 3: {field} of data row {row} \(position 4\); weights unchanged"
    with pytest.raises(FloatingPointError, match=named):
        state.advance(batch._replace(**{field: spoilt}))
    assert_same_bits(content(state), before)
    state.advance(batch)
    assert_same_bits(content(state), content(ran(4)))


class Spoilt:
    """Data from outside the package, whose rows 17 and 40 are not finite."""

    shape = (2,)

    def __len__(self):
        return 50

    def batch(self, index, uniform):
        return POINTS.x.index_fill(0, torch.tensor([17, 40]), torch.nan)[index], None


def test_a_sample_that_is_not_finite_is_named_by_its_row_in_the_data():
    """However a batch is cut; an epoch of 50 rows in batches of 16 meets both by step 3."""
    for parts in (1, 3):
        with pytest.raises(FloatingPointError) as caught:
            list(train(fresh(), Spoilt(), parts))
        rows, places = re.search(r"x0 of data row ([\d, ]+) \(position ([\d, ]+)\)",
                                 str(caught.value)).groups()  # fmt: skip
        step = int(re.search(r"at step (\d+)", str(caught.value))[1])
        order = shuffled_indices(RECIPE.seed, 50, 16 * step, 16)
        assert {int(row) for row in rows.split(",")} <= {17, 40}
        assert [int(row) for row in rows.split(",")] == order[
            [int(place) for place in places.split(",")]
        ].tolist()


def test_values_of_unknown_coordinates_do_not_reach_the_weights():
    """Two sets that differ, or are nan, only where the mask is False train the same weights."""
    known = torch.arange(100).reshape(50, 2) % 3 > 0
    runs = []
    for hidden in (torch.nan, 7.0):
        points = Points(POINTS.x.masked_fill(~known, hidden), mask=known)
        state = ran(4, data=points)
        runs.append(content(state))
    assert_same_bits(*runs)
    plain = content(ran(4))
    assert any(not torch.equal(runs[0][name], plain[name]) for name in plain)


def test_pixels_as_floats_warn_on_the_first_batch_of_a_state_and_not_again():
    class Bytes(Spoilt):
        def batch(self, index, uniform):
            return 255 * POINTS.x[index].abs(), None

    state = fresh()
    with pytest.warns(UserWarning, match="x0 of the first batch has values from .*standardized"):
        state.advance(draw(Bytes(), RECIPE, TIMES, 0))
    state.advance(draw(Bytes(), RECIPE, TIMES, 1))  # warnings are errors here


def test_a_bad_step_can_be_skipped_and_is_counted():
    """The run is then the one whose data had no such step: same weights, same average."""
    state, other = ran(3, bad="skip"), ran(3)
    before = content(state)
    batch = draw(POINTS, RECIPE, TIMES, 3)
    metrics = state.advance(batch._replace(x0=torch.full_like(batch.x0, torch.nan)))
    assert (metrics.step, metrics.skipped, metrics.learning_rate) == (4, 1, 0.0)
    after = content(state)
    assert (int(after.pop("step")), int(after.pop("skipped"))) == (4, 1)
    assert_same_bits(after, {k: v for k, v in before.items() if k not in ("step", "skipped")})
    other.step = 4  # it too goes on with the fifth batch
    for one in (state, other):
        one.advance(draw(POINTS, RECIPE, TIMES, 4))
    weights = [content(one) for one in (state, other)]
    for name in weights[0]:
        if name.startswith("network"):
            assert torch.equal(weights[0][name], weights[1][name]), name


def test_a_bad_batch_leaves_running_statistics_alone():
    """Batch norm moves its buffers in the forward pass, before the loss is known."""
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    state = fresh(lambda: Plain(network))
    state.advance(draw(POINTS, RECIPE, TIMES, 0))
    assert_close(state.averaged.network.inner[0].running_mean, network[0].running_mean)
    before = {name: value.clone() for name, value in state.denoiser.network.state_dict().items()}
    batch = draw(POINTS, RECIPE, TIMES, 1)
    with pytest.raises(FloatingPointError, match=r"\(position 0, 1, 2, 3, 4, \.\.\.\)"):
        state.advance(batch._replace(x0=torch.full_like(batch.x0, torch.inf)))
    assert_same_bits(state.denoiser.network.state_dict(), before)


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
        ("ema", 0.999),
        ("decay", "step"),
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
    pixels = IMAGES.pixels[shuffled_indices(RECIPE.seed, 40, 0, 16)]
    low, high = dequantize(pixels, torch.zeros(())), dequantize(pixels, torch.ones(()))
    assert ((low <= batch.x0) & (batch.x0 <= high)).all()
    assert len(batch.x0.unique()) > 16 * 36 * 0.99


def test_a_denoiser_is_sampled_after_its_training_as_in_eval_mode():
    """The masks of the last step are those of its batch: they must not be used again."""
    network = sd.networks.MLP((2,), width=16, depth=1, dropout=0.5)
    recipe = Recipe(steps=2, batch_size=8, warmup=1)
    state = TrainState(sd.Denoiser(network, sd.VP(), sd.V()), recipe)
    points = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    for _ in train(state, Points(points)):
        x = sd.prior(state.denoiser, (16, 2), seeds=range(16))  # another size than the batch's
        made = sd.sample(state.denoiser, sd.Heun(), x, steps=3)
        assert network.training
        network.eval()
        assert torch.equal(made, sd.sample(state.denoiser, sd.Heun(), x, steps=3))
        network.train()
