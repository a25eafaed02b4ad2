"""Folders of images as data: torchvision's layout and sizes, and one line for whatever is wrong."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from sde_diffusion.data.image_files import DataNotFound, image_folder


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def tree(tmp_path):
    """Three classes, their files written in no order, some of them in folders of their own."""
    names = ("dog/b.png", "cat/z.png", "cat/a.PNG", "wild/deep/c.bmp", "cat/m.tiff", "dog/a.webp")
    for seed, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(24, 24, seed)).save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "._a.png").write_text("what some systems leave beside a.png")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_order_and_labels_are_those_of_torchvisions_image_folder(tree):
    (tree / "cat" / "._a.png").unlink()  # which torchvision takes for an image, and the next
    (tree / ".cache").rmdir()  # for a class
    whole = v2.Compose([v2.Resize(12), v2.CenterCrop(12), v2.PILToTensor()])
    theirs = datasets.ImageFolder(str(tree), whole)
    ours = image_folder(tree, 12)
    assert ours.labels.tolist() == theirs.targets == [0, 0, 0, 1, 1, 2]
    assert torch.equal(ours.pixels, torch.stack([x for x, _ in theirs]))


def test_what_is_hidden_is_no_image_and_no_class(tree):
    assert image_folder(tree, 8).labels.tolist() == [0, 0, 0, 1, 1, 2]


def test_one_class_keeps_its_label_and_the_folder_of_a_class_is_one_itself(tree):
    everything = image_folder(tree, 8)
    dogs = image_folder(tree, 8, data_class="dog")
    alone = image_folder(tree / "dog", 8)
    assert dogs.labels.tolist() == [1, 1]
    assert alone.labels.tolist() == [0, 0]
    assert torch.equal(dogs.pixels, everything.pixels[3:5])
    assert torch.equal(alone.pixels, dogs.pixels)
    assert dogs.pixels.dtype == torch.uint8
    assert dogs.shape == (3, 8, 8)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (100, 80)])
@pytest.mark.parametrize("size", [16, 32])
def test_the_shorter_side_is_resized_and_the_middle_of_the_longer_one_kept(tmp_path, shape, size):
    """Where torchvision rounds no length it is the same picture, to one level of rounding."""
    image = Image.fromarray(noise(*shape))
    image.save(tmp_path / "a.png")
    theirs = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])(image)
    gap = image_folder(tmp_path, size).pixels[0].int() - theirs.int()
    assert gap.abs().max() <= 1


def test_stripes_finer_than_a_pixel_become_gray(tmp_path):
    """Resized without antialiasing they would stay stripes, or turn into all of one colour."""
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    inside = image_folder(tmp_path, 16).pixels[0, :, 1:-1, 1:-1].float()
    assert (inside - 127.5).abs().max() <= 1  # the filter's sum of them is 0 there, but rounded


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_any_image_of_8_bits_becomes_rgb(tmp_path, mode):
    gray = Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).convert("RGB").convert(mode)
    gray.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert (image_folder(tmp_path, 8).pixels == 255).all()


def test_a_strip_of_pixels_takes_no_more_memory_than_a_square(tmp_path):
    """Resized as a whole to 64 x 6,400,000 it would take a gigabyte."""
    Image.fromarray(np.full((1, 100_000), 7, dtype=np.uint8)).save(tmp_path / "a.png")
    assert (image_folder(tmp_path, 64).pixels == 7).all()


def truncated(path):
    Image.fromarray(noise(64, 64)).save(path / "half.jpg")
    whole = (path / "half.jpg").read_bytes()
    (path / "half.jpg").write_bytes(whole[: len(whole) // 2])


def program(path):
    """PIL would hand it to ghostscript."""
    (path / "drawn.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")


def bomb(side):
    def make(path):
        Image.new("1", (side, side)).save(path / "bomb.png")

    return make


WRONG = {
    "empty": (lambda path: None, "holds no images"),
    "text": (lambda path: (path / "text.jpg").write_text("no image"), "text.jpg cannot be read"),
    "no bytes": (lambda path: (path / "void.png").touch(), "void.png cannot be read"),
    "truncated": (truncated, "half.jpg cannot be read"),
    "a program": (program, "drawn.png cannot be read"),
    "a large image": (bomb(9500), "bomb.png cannot be read"),
    "a larger image": (bomb(13500), "bomb.png cannot be read"),
    "16 bits": (
        lambda path: Image.fromarray(np.zeros((8, 8), np.uint16)).save(path / "deep.png"),
        "more than 8 bits",
    ),
    "a name of two lines": (lambda path: (path / "a\nb.png").touch(), "a\\nb.png cannot be read"),
    "a pipe": (lambda path: os.mkfifo(path / "pipe.png"), "holds no images"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_image_is_refused_in_one_line_that_names_it(tmp_path, what):
    make, message = WRONG[what]
    make(tmp_path)
    with pytest.raises(DataNotFound) as refused:
        image_folder(tmp_path, 8)
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_or_class_that_is_not_there_is_refused(tree):
    with pytest.raises(DataNotFound, match="nowhere: no such folder"):
        image_folder(tree / "nowhere", 8)
    with pytest.raises(DataNotFound, match="'lion'; there are: cat, dog, wild"):
        image_folder(tree, 8, data_class="lion")
    with pytest.raises(DataNotFound, match="'cat'; there are none"):
        image_folder(tree / "dog", 8, data_class="cat")
    with pytest.raises(ValueError, match="size must be at least 1"):
        image_folder(tree, 0)
