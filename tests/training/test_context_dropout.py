"""Context dropout in training: who is told nothing is drawn by address, like all else of a step."""

import dataclasses
import itertools
import math

import pytest
import torch
from training_runs import PIXELS, TIMES, assert_same_bits, content, fresh

from sde_diffusion.data.datasets import Images
from sde_diffusion.files import storage
from sde_diffusion.networks import UNet
from sde_diffusion.training import EMA, Recipe, draw, restore, save

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
def test_who_is_told_nothing_depends_on_step_and_position_alone(cuts):
    for step in range(4):
        whole = draw(LABELLED, RECIPE, TIMES, step).cond
        pieces = [
            draw(LABELLED, RECIPE, TIMES, step, range(a, b)).cond
            for a, b in itertools.pairwise(cuts)
        ]
        assert torch.equal(whole, torch.cat(pieces))


def test_the_share_is_the_recipes_and_what_is_dropped_is_the_zero_vector():
    recipe = dataclasses.replace(RECIPE, batch_size=4096)
    batch, full = (
        draw(LABELLED, dataclasses.replace(recipe, cond_dropout=p), TIMES, 5) for p in (0.3, 0.0)
    )
    dropped = ~batch.cond.any(1)
    assert torch.equal(batch.cond[~dropped], full.cond[~dropped])
    assert abs(float(dropped.double().mean()) - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 4096)
    # Nothing else of the batch is drawn otherwise: an older run goes on as it began.
    for name in ("x0", "t", "eps"):
        assert torch.equal(getattr(batch, name), getattr(full, name))
    # Independent of the noise: its mean over those that are told nothing is 0.
    off = batch.eps.flatten(1).mean(1)[dropped]
    assert abs(float(off.mean())) < 4.5 / math.sqrt(36 * len(off))


@pytest.mark.parametrize(("p", "told"), [(0.0, 16), (1.0, 0)])
def test_at_the_ends_all_or_none_are_told(p, told):
    batch = draw(LABELLED, dataclasses.replace(RECIPE, cond_dropout=p), TIMES, 0)
    assert int(batch.cond.any(1).sum()) == told


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
