"""Data that cannot be used: every script names the file, exits with 2, and leaves --out alone."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image
from scripts import run
from training_runs import small_mnist

READERS = {
    "mnist_vp": "--train --train-steps 1 --tracker none",
    "mnist_conditional": "--train --train-steps 1 --tracker none",
    "mnist_ddpm": "--epochs 1 --tracker none",
    "mnist_frame": "",
    "mnist_features": "--epochs 1",
    "evaluate": "--samplers heun --steps 2 --num-samples 64",
    "inpaint": "--steps 1",
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """MNIST's files with one label of 200."""
    root = small_mnist(tmp_path_factory.mktemp("damaged"))
    path = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    whole = bytearray(gzip.decompress(path.read_bytes()))
    whole[struct.calcsize(">2I") + 7] = 200
    path.write_bytes(gzip.compress(whole))
    return root, path


@pytest.mark.parametrize("how", ["flag", "variable"])
@pytest.mark.parametrize("script", READERS)
def test_a_damaged_data_set_is_named_before_out_is_touched(damaged, tmp_path, script, how):
    """inpaint has digits of its own for where there is no MNIST, not for where it is damaged."""
    root, path = damaged
    out = tmp_path / "out"
    where = ("--data-root", root) if how == "flag" else ()
    flags = (*READERS[script].split(), "--device", "cpu", "--out", out, *where)
    done = run(script, *flags, data=None if where else root)
    reason = "labels must lie in [0, 9]; got 200 in row 7"
    assert done.stderr == f"error: {path} cannot be read: {reason}\n"
    assert done.returncode == 2
    assert not out.exists()


def test_a_damaged_picture_is_named_before_the_folder_is_touched(tmp_path):
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "deep.png")
    flags = ("--data_path", folder, "--save_folder", out, "--train_steps", 1, "--tracker", "none")
    done = run("ddpm_images", *flags, "--image_size", 8, "--device", "cpu")
    assert done.stderr.startswith(f"error: {folder}/deep.png cannot be read: more than 8 bits")
    assert done.returncode == 2
    assert not out.exists()
