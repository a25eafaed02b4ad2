"""Standardization: exact moments, an inverse to rounding, numbers that survive a file."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from training_runs import RECIPE, fresh

import sde_diffusion as sd
from sde_diffusion import data, training
from sde_diffusion.data import Standardization, standardized
from sde_diffusion.files.storage import BadFile

X = torch.randn(200, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [[1e-3, 1.0, 50.0], [2.0, 3.0, 1e4]]
) + torch.tensor([[1.0, -2.0, 1e4], [0.0, 5.0, 0.0]])
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
@pytest.mark.parametrize("axes", [(0,), (0, 2), (0, 1, 2)])
def test_standardized_data_have_mean_0_and_std_1_and_the_inverse_restores_them(kind, axes):
    """z is rounded to float32: by eps |z| / 2 each, |z| < 8 here, and averages by no more."""
    before = X.clone()
    z, scaling = standardized(kind(X), axes=axes)
    assert torch.equal(X, before)
    assert z.dtype == torch.float32
    assert (z.double().mean(axes).abs() <= 4 * EPS).all()
    assert ((z.double().square().mean(axes) - 1).abs() <= 8 * EPS).all()
    assert torch.equal(scaling(X), z)
    # The error of z, times std, and three roundings of numbers up to |x| + 2 |mean|.
    bound = EPS * (4 * scaling.std + 3 * (X.abs() + 2 * scaling.mean.abs()))
    assert ((scaling.inverse(z) - X).abs() <= bound).all()


def test_unknown_values_do_not_count():
    """Mean and std are those of numpy's nan functions; z is 0 where nothing is known."""
    known = torch.arange(X.numel()).reshape(X.shape) % 7 > 0
    holes = X.double().masked_fill(~known, math.nan)
    z, scaling = standardized(holes, mask=known)
    assert_close(scaling.mean.numpy(), np.nanmean(holes.numpy(), 0), rtol=1e-13, atol=1e-13)
    assert_close(scaling.std.numpy(), np.nanstd(holes.numpy(), 0), rtol=1e-13, atol=0)
    assert (z[~known] == 0).all()
    points = data.Points(z, mask=known)
    assert torch.equal(points.x, z)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": X.index_fill(2, torch.tensor([1]), 0.1)}, r"got one value at \(0, 1\)"),
        ({"x": X[:1]}, r"x must vary in each coordinate; got one value at \(0, 0\)"),
        ({"x": X, "mask": (math.inf > X).index_fill(2, torch.tensor([2]), False)}, r"\(0, 2\)"),
        ({"x": X, "axes": (1,)}, "axes must hold 0"),
        ({"x": X, "axes": (0, 3)}, "axes must hold 0 and others below 3"),
        ({"x": X, "axes": (0, -1)}, "axes must hold 0"),
        ({"x": X / torch.zeros(1)}, "x must be finite; got"),
        ({"x": torch.arange(4)}, "x must be floats"),
        ({"x": torch.arange(120_002.0).reshape(2, -1)}, "at most 50,000 means; got 60,001"),
    ],
)  # fmt: skip
def test_what_cannot_be_standardized_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        standardized(**given)


def test_the_inverse_is_kept_in_the_record_of_a_model_and_its_checkpoints(tmp_path):
    z, scaling = standardized(X.flatten(1)[:, :2])
    facts = {"standardization": scaling.record}
    state = fresh(facts=facts)
    state.advance(training.draw(data.Points(z), RECIPE, state.times, 0))
    state.averaged.save(tmp_path / "model.safetensors", **facts)
    loaded = Standardization.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.mean, scaling.mean)
    assert torch.equal(loaded.std, scaling.std)
    folder = training.save(state, tmp_path, **state.settings)
    assert torch.equal(Standardization.load(folder / "denoiser.safetensors").std, scaling.std)
    other = fresh(facts={"standardization": standardized(2 * X.flatten(1)[:, :2])[1].record})
    with pytest.raises(training.OtherSettings, match="standardization"):
        training.resume(other, tmp_path)


WRONG = {
    "none": {},
    "a number": {"standardization": 1.0},
    "no std": {"standardization": {"shape": [2], "mean": [0.0, 0.0]}},
    "another shape": {"standardization": {"shape": [3], "mean": [0.0, 0.0], "std": [1.0, 1.0]}},
    "std 0": {"standardization": {"shape": [2], "mean": [0.0, 0.0], "std": [1.0, 0.0]}},
    "words": {"standardization": {"shape": [2], "mean": ["a", "b"], "std": [1.0, 1.0]}},
    "two lengths": {"standardization": {"shape": [2], "mean": [0.0, 0.0], "std": [1.0]}},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_record_without_a_usable_standardization_is_refused_by_name(tmp_path, what):
    path = tmp_path / "model.safetensors"
    sd.Denoiser(sd.networks.MLP((2,), width=4), sd.VP()).save(path, **WRONG[what])
    with pytest.raises(BadFile, match=r"model\.json: "):
        Standardization.load(path)
