"""The CMU sheet's program in this process, and small runs of it, for its tests."""

import csv
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import ddpm_images as program
import numpy as np
import pytest
import torch
from common import command, flags
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]

# The sheet's command lines, as it prints them.
TRAIN = """
python main.py \\
    --data_path ./data/train \\
    --save_folder path_to_save_folder \\
    --time_steps 50 \\
    --train_steps 10000 \\
    --image_size 32 \\
    --batch_size 32 \\
    --learning_rate 1e-3 \\
    --unet_dim 16
"""
VISUALIZE = """
python main.py \\
    --data_path ./data/train/ \\
    --load_path path_to_saved_model \\
    --save_folder path_to_save_folder \\
    --time_steps 50 \\
    --train_steps 10000 \\
    --image_size 32 \\
    --batch_size 32 \\
    --learning_rate 1e-3 \\
    --unet_dim 16 \\
    --visualize
"""
FEW = {"50": "6", "10000": "6", "32": "8", "16": "8"}  # numbers that take no time
T = 6
MORE = "--save_and_sample_every 3 --num_samples 3 --tracker none"


def words(line, **numbers):
    """The arguments of a command line of the sheet, some of them replaced."""
    given = line.replace("\\\n", " ").split()[2:]
    return [numbers.get(word, word) for word in given]


def run(*arguments):
    """The program in this process: its exit status, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["experiments/ddpm_images.py", *map(str, arguments)])
        with torch.random.fork_rng():
            try:
                command.run(program.main, program.Config)
            except SystemExit as ended:
                code = ended.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def parsed(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["experiments/ddpm_images.py", *arguments])
        return flags.parse(program.Config)


@pytest.fixture(scope="module", name="place")
def place_fixture(tmp_path_factory):
    """A folder with ./data/train, in AFHQ's layout: digits of scikit-learn stand for the cats."""
    root = tmp_path_factory.mktemp("sheet")
    images, target = load_digits(return_X_y=True)
    for label, name in enumerate(("cat", "dog", "wild")):
        (root / "data" / "train" / name).mkdir(parents=True)
        for k, pixels in enumerate(images[target == label][:20]):
            gray = (pixels.reshape(8, 8) * 15.9).astype(np.uint8)
            Image.fromarray(gray).save(root / "data" / "train" / name / f"{k:03d}.png")
    return root


@pytest.fixture(scope="module", name="trained")
def trained_fixture(place):
    """The sheet's first command line, with small numbers, in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = run(*words(TRAIN, **FEW), *MORE.split())
    return SimpleNamespace(folder=place / "path_to_save_folder", **vars(done))


@pytest.fixture(name="config")
def config_fixture(place):
    return program.Config(
        data_path=place / "data" / "train", time_steps=T, image_size=8, unet_dim=8, batch_size=8
    )


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
