"""Conditions in training: of any shape and dtype; dropped samples are drawn by address."""

import dataclasses
import itertools
import math

import pytest
import torch
from training_runs import PIXELS, POINTS, TIMES, assert_same_bits, content, fresh

from sde_diffusion.data.datasets import Images, fingerprint, named_tensors, shuffled_indices
from sde_diffusion.files import storage
from sde_diffusion.losses import denoising_loss
from sde_diffusion.models.parameterizations import V
from sde_diffusion.models.prediction import from_network
from sde_diffusion.networks import UNet
from sde_diffusion.noise.counter import row_keys, uniforms
from sde_diffusion.noise.sources import Purpose
from sde_diffusion.processes import VP
from sde_diffusion.training import EMA, Recipe, TrainState, draw, restore, save
from sde_diffusion.training.batches import words
from sde_diffusion.training.state import blame

CLASSES = 3
LABELLED = Images(PIXELS.to(torch.uint8), torch.arange(40) % CLASSES, classes=CLASSES)
RECIPE = Recipe(steps=12, batch_size=16, warmup=3, ema=EMA(0.9), cond_dropout=0.3)


def by_class():
    return UNet(channels=(8, 16), blocks=1, embedding=8, heads=2, cond=CLASSES)


def trained(steps, recipe=RECIPE):
    state = fresh(by_class, recipe)
    for _ in range(steps):
        state.advance(draw(LABELLED, recipe, TIMES, state.step))
    return state


@pytest.mark.parametrize("cuts", [(0, 16), (0, 5, 16), (0, 1, 2, 15, 16)])
def test_who_is_dropped_depends_on_step_and_position_alone(cuts):
    for step in range(4):
        whole = draw(LABELLED, RECIPE, TIMES, step)
        pieces = [draw(LABELLED, RECIPE, TIMES, step, range(a, b))
                  for a, b in itertools.pairwise(cuts)]  # fmt: skip
        for field in ("cond", "keep"):
            parts = torch.cat([getattr(piece, field) for piece in pieces])
            assert torch.equal(getattr(whole, field), parts)


def test_who_is_dropped_is_drawn_by_address():
    """The third word of the step's stream, mixed with the position: earlier runs go on."""
    for step in range(3):
        base = words(RECIPE.seed, Purpose.BATCH, step, 3)[2]
        kept = uniforms(row_keys(base, range(16)), (1,)) >= 0.3
        assert torch.equal(draw(LABELLED, RECIPE, TIMES, step).keep, kept[:, 0])


def test_the_share_is_the_recipes_and_nothing_else_of_the_batch_changes():
    recipe = dataclasses.replace(RECIPE, batch_size=4096)
    batch, full = (
        draw(LABELLED, dataclasses.replace(recipe, cond_dropout=p), TIMES, 5) for p in (0.3, 0.0)
    )
    assert full.keep is None
    assert batch.keep.shape == (4096,)
    assert abs(float(batch.keep.double().mean()) - 0.7) < 4.5 * math.sqrt(0.3 * 0.7 / 4096)
    for name in ("x0", "t", "eps", "cond"):
        assert torch.equal(getattr(batch, name), getattr(full, name))
    # Independent of the noise: its mean over the dropped samples is 0.
    off = batch.eps.flatten(1).mean(1)[~batch.keep]
    assert abs(float(off.mean())) < 4.5 / math.sqrt(36 * len(off))


@pytest.mark.parametrize(("p", "kept"), [(1e-30, 16), (1.0, 0)])
def test_at_the_ends_all_or_none_are_kept(p, kept):
    batch = draw(LABELLED, dataclasses.replace(RECIPE, cond_dropout=p), TIMES, 0)
    assert int(batch.keep.sum()) == kept


def test_a_dropped_sample_has_the_loss_of_the_null():
    """Zeros for a float vector; the other samples of the batch are unchanged, bit for bit."""
    model = fresh(by_class).denoiser
    for parameter in model.parameters():  # the last convolutions are 0 at first
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    batch = draw(LABELLED, RECIPE, TIMES, 0)
    given = (model, batch.x0, batch.t, batch.eps)
    made = denoising_loss(*given, cond=batch.cond, keep=batch.keep)
    assert torch.equal(made, denoising_loss(*given, cond=batch.cond * batch.keep[:, None]))
    kept = denoising_loss(*given, cond=batch.cond)
    assert torch.equal(made == kept, batch.keep)
    assert 0 < int(batch.keep.sum()) < 16


class Conditioned:
    """Points whose condition is any function of their index."""

    shape = (2,)

    def __init__(self, cond):
        self.cond = cond

    def __len__(self):
        return 50

    def batch(self, index, uniform):
        return POINTS.x[index], self.cond(index)


# Labels (B,), for which `cond * keep` would be (B, B); tokens with L = B, whose positions it would
# drop.
CONDITIONS = {
    "labels": lambda i: i % 10,
    "flags": lambda i: i % 2 == 0,
    "tokens": lambda i: (i[:, None] + torch.arange(16)) % 7,
    "features": lambda i: (i[:, None, None] + torch.ones(16, 3)).half(),
    "image": lambda i: i[:, None, None, None] + torch.zeros(1, 4, 4),
    "mapping": lambda i: {"label": i % 10, "text": i[:, None] + torch.ones(16).double()},
}


class Received(torch.nn.Module):
    """A denoiser that keeps the conditions that reach it."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(2, 2)
        self.process, self.parameterization, self.trained = VP(), V(), None

    def forward(self, x, level, cond=None):
        self.cond = cond
        return from_network(x, self.network(x), level, self.parameterization)


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_of_any_shape_and_dtype_reach_the_denoiser_as_they_are(name):
    data, recipe = Conditioned(CONDITIONS[name]), dataclasses.replace(RECIPE, cond_dropout=0.0)
    batch = draw(data, recipe, TIMES, 0)
    state = TrainState(Received(), recipe)
    state.advance(batch)
    expected = data.cond(shuffled_indices(recipe.seed, 50, 0, 16))
    for found in (batch.cond, state._trained.cond):
        for key, value in named_tensors(expected).items():
            assert torch.equal(named_tensors(found)[key], value)
            assert named_tensors(found)[key].dtype == value.dtype
    assert batch.keep is None


@pytest.mark.parametrize("name", CONDITIONS)
def test_dropout_keeps_or_drops_whole_samples_whatever_the_shape(name):
    batch = draw(Conditioned(CONDITIONS[name]), RECIPE, TIMES, 0)
    assert batch.keep.shape == (16,)
    assert torch.equal(batch.keep, draw(LABELLED, RECIPE, TIMES, 0).keep)


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_fingerprint_of_data_covers_their_conditions(name):
    one, other = (Conditioned(lambda i, k=k: CONDITIONS[name](i + k)) for k in (0, 1))
    assert fingerprint(one) == fingerprint(Conditioned(CONDITIONS[name])) != fingerprint(other)


def test_a_condition_that_is_not_finite_is_named():
    cond = {"label": torch.arange(16), "text": torch.ones(16, 3)}
    cond["text"][5, 1] = torch.nan
    batch = draw(LABELLED, RECIPE, TIMES, 0)._replace(cond=cond)
    row = shuffled_indices(RECIPE.seed, 40, 5, 1).item()
    found = blame((batch,), [torch.zeros(16)])
    assert found == f": cond text of data row {row} (position 5)"
    batch = batch._replace(cond=cond["text"], rows=None)
    assert blame((batch,), [torch.zeros(16)]) == ": cond of position 5"


@pytest.mark.parametrize("keep", [torch.ones(3), torch.ones(4), torch.ones(3, dtype=torch.bool),
                                  torch.ones(4, 1, dtype=torch.bool)])  # fmt: skip
def test_a_keep_that_is_not_one_bool_a_sample_is_refused(keep):
    model, x = fresh(by_class).denoiser, torch.zeros(4, 1, 6, 6)
    with pytest.raises(ValueError, match=r"^keep must be"):
        denoising_loss(model, x, torch.ones(4), x, cond=torch.zeros(4, 3), keep=keep)
    with pytest.raises(ValueError, match="given with cond"):
        denoising_loss(model, x, torch.ones(4), x, keep=torch.ones(4, dtype=torch.bool))


def test_a_resumed_run_drops_what_the_uninterrupted_one_does(tmp_path):
    checkpoint = save(trained(3), tmp_path)
    resumed = fresh(by_class, RECIPE, seed=99)
    restore(resumed, checkpoint)
    for _ in range(3):
        resumed.advance(draw(LABELLED, RECIPE, TIMES, resumed.step))
    assert_same_bits(content(resumed), content(trained(6)))


def test_a_checkpoint_from_before_there_was_cond_dropout_is_one_without(tmp_path):
    plain = dataclasses.replace(RECIPE, cond_dropout=0.0)
    checkpoint = save(trained(2, plain), tmp_path)
    path = checkpoint / "training.safetensors"
    tensors, record = storage.read(path)
    assert record["settings"].pop("cond_dropout") == 0.0
    storage.write(path, tensors, {k: v for k, v in record.items() if k not in storage.OURS})
    assert "cond_dropout" not in storage.read(path)[1]["settings"]
    resumed = fresh(by_class, plain, seed=99)
    restore(resumed, checkpoint)
    assert_same_bits(content(resumed), content(trained(2, plain)))
    with pytest.raises(ValueError, match=r"cond_dropout 0.0 -> 0.3"):
        restore(fresh(by_class, RECIPE), checkpoint)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, "much"])
def test_a_share_that_is_none_is_refused(p):
    with pytest.raises((TypeError, ValueError), match="cond_dropout"):
        Recipe(cond_dropout=p)


def test_dropout_without_conditions_and_data_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"cond_dropout must be 0 for data without .* got 0\.3"):
        draw(POINTS, RECIPE, TIMES, 0)

    class Wrong(Conditioned):
        shape = (3,)

    with pytest.raises(ValueError, match=r"data.batch must return floats of shape \(16, 3\)"):
        draw(Wrong(CONDITIONS["labels"]), RECIPE, TIMES, 0)
