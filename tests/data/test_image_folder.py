"""Folders of images as data: torchvision's layout and sizes, and one line for whatever is wrong."""

import os
import struct
import zlib

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


def test_4_bits_a_colour_and_16_bits_a_pixel_are_read(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6 2 2 15\n" + bytes([15] * 12))
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 62, 0, 54, 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0)
    (tmp_path / "b.bmp").write_bytes(head + b"\xff\x7f" * 4)
    assert (image_folder(tmp_path, 2).pixels == 255).all()


def test_a_strip_of_pixels_takes_no_more_memory_than_a_square(tmp_path):
    """Resized as a whole to 64 x 6,400,000 it would take a gigabyte."""
    Image.fromarray(np.full((1, 100_000), 7, dtype=np.uint8)).save(tmp_path / "a.png")
    assert (image_folder(tmp_path, 64).pixels == 7).all()


# ---- what a file says about itself -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_as_exif_says(tmp_path, orientation, kind):
    """EXIF 2.32, 4.6.4 A, tag 274: the sides of the picture that row 0 and column 0 stand for.

    Blocks of 16 x 16 pixels of one colour leave JPEG the rounding of luma and chroma by 1/2, hence
    1/2 + 1.772 / 2 levels, and the rounding of the result.
    """
    upright = np.kron(noise(2, 2), np.ones((16, 16, 1), np.uint8))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(kind, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{kind}", exif=exif, **how)
    gap = image_folder(tmp_path, 32).pixels[0].permute(1, 2, 0).int() - torch.tensor(upright).int()
    assert gap.abs().max() <= (1 if kind == "jpg" else 0)


COLOURS = {"white": (255, 255, 255), "#102030": (16, 32, 48)}


@pytest.mark.parametrize("background", COLOURS)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_pixels_show_the_background_and_not_what_they_hide(tmp_path, mode, background):
    """Modes with an alpha of their own, and those with one transparent colour (PNG's tRNS)."""
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[:, :, :3] = 90
    hidden[4:] = (200, 200, 200, 255)
    plain = {"P": 0, "RGB": (90, 90, 90), "L": 90}
    if mode == "P":
        index = Image.fromarray((hidden[:, :, 3] > 0).astype(np.uint8), mode="P")
        index.putpalette([90, 90, 90, 200, 200, 200])
    image = index if mode == "P" else Image.fromarray(hidden).convert(mode)
    extra = {"transparency": plain[mode]} if mode in plain else {}
    image.save(tmp_path / "a.png", **extra)
    pixels = image_folder(tmp_path, 8, background=background).pixels[0]
    assert (pixels[:, 4:] == 200).all()
    assert (pixels[:, :4].flatten(1) == torch.tensor(COLOURS[background])[:, None]).all()


def test_a_half_transparent_pixel_is_the_mean_of_its_colour_and_the_background(tmp_path):
    """(alpha c + (255 - alpha) b) / 255, rounded; resized after compositing, as a viewer shows."""
    values = noise(8, 8)
    alpha = np.random.default_rng(1).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([values, alpha], 2)).save(tmp_path / "a.png")
    exact = (alpha / 255.0) * values + (1 - alpha / 255.0) * 255
    found = image_folder(tmp_path, 8).pixels[0].permute(1, 2, 0).double().numpy()
    assert np.abs(found - exact).max() <= 1
    small = image_folder(tmp_path, 4).pixels[0]
    Image.fromarray(found.astype(np.uint8)).save(tmp_path / "a.png")
    assert torch.equal(small, image_folder(tmp_path, 4).pixels[0])


@pytest.mark.parametrize("background", ["nothing", "", "#12345", "rgba(1, 2, 3, 0)", "#01020300"])
def test_a_background_that_is_no_opaque_colour_is_refused(tree, background):
    with pytest.raises(ValueError, match="background must be an opaque colour such as gray"):
        image_folder(tree, 8, background=background)


# ---- what is left out --------------------------------------------------------------------------


def test_files_left_out_are_counted_with_the_reasons(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for k in range(3):
        Image.fromarray(noise(8, 8)).save(elsewhere / f"{k}.png")
    before = image_folder(tree, 8)
    (tree / "dog" / "more").symlink_to(elsewhere)
    (tree / "dog" / "itself").symlink_to(tree / "dog")
    (tree / "cat" / "notes.txt").write_text("no image")
    (tree / "cat" / "a.gif").write_text("no image")
    (tree / "wild" / "README").write_text("no image")
    (tree / "wild" / "gone.png").symlink_to(tree / "nowhere")
    Image.fromarray(noise(8, 8)).save(tree / "stray.png")
    with pytest.warns(UserWarning, match="left out") as caught:
        images = image_folder(tree, 8)
    (message,) = [str(one.message) for one in caught]
    assert message.startswith(f"10 of 16 files left out of {tree}: ")
    for part in ("5 in linked folders", "1 of type .txt", "1 of type .gif", "1 of type unknown",
                 "1 not regular files", "1 above the class folders"):  # fmt: skip
        assert part in message
    assert torch.equal(images.pixels, before.pixels)
    with pytest.warns(UserWarning, match=r"2 of 5 files left out .*: 1 of type \.\w+, 1 of type"):
        image_folder(tree, 8, data_class="cat")


def test_a_class_folder_that_is_a_link_is_a_class(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.fromarray(noise(8, 8)).save(elsewhere / "a.png")
    (tree / "bear").symlink_to(elsewhere)
    assert image_folder(tree, 8).labels.tolist() == [0, 1, 1, 1, 2, 2, 3]


def test_a_class_without_images_is_named(tree):
    """It shifts the labels of those after it."""
    (tree / "annotations").mkdir()
    with pytest.warns(UserWarning, match="the classes annotations hold no images"):
        assert image_folder(tree, 8).labels.tolist() == [1, 1, 1, 2, 2, 3]
    Image.fromarray(noise(8, 8)).save(tree / "stray.png")
    with pytest.raises(DataNotFound, match="annotations holds no images"):
        image_folder(tree, 8, data_class="annotations")


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


def png16(colour_type, channels):
    """A PNG of 8 x 8 pixels of 16 bits a channel, of black."""

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    def make(path):
        head = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
        rows = zlib.compress(bytes(8 * (1 + 8 * channels * 2)))
        parts = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        (path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)

    return make


def tiff16(path):
    """A TIFF of one pixel of 16 bits a channel: PIL reads its upper halves."""
    values = {256: 1, 257: 1, 258: 134, 259: 1, 262: 2, 273: 140, 277: 3, 278: 1, 279: 6}
    pairs = values.items()
    entries = b"".join(struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, v) for tag, v in pairs)
    head = b"II*\0" + struct.pack("<IH", 8, len(pairs))
    body = bytes(134 - len(head + entries)) + struct.pack("<HHH", 16, 16, 16) + bytes(6)
    (path / "deep.tif").write_bytes(head + entries + body)


def ppm(largest):
    size = 2 if largest > 255 else 1
    return lambda path: (path / "deep.ppm").write_bytes(b"P6 2 2 %d\n" % largest + bytes(12 * size))


def animated(kind):
    frames = [Image.fromarray(noise(8, 8, seed)) for seed in (0, 1, 2)]
    how = {"save_all": True, "append_images": frames[1:]}
    return lambda path: frames[0].save(path / f"many.{kind}", **how)


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
    "16 bits of red, green and blue": (png16(2, 3), "deep.png cannot be read: more than 8 bits"),
    "16 bits of gray and alpha": (png16(4, 2), "deep.png cannot be read: more than 8 bits"),
    "16 bits of all four": (png16(6, 4), "deep.png cannot be read: more than 8 bits"),
    "16 bits in a TIFF": (tiff16, "deep.tif cannot be read: more than 8 bits"),
    "16 bits in a PPM": (ppm(65535), "deep.ppm cannot be read: more than 8 bits"),
    "10 bits in a PPM": (ppm(1023), "deep.ppm cannot be read: more than 8 bits"),
    "pages": (animated("tiff"), "many.tiff cannot be read: 3 images in one file"),
    "an animated PNG": (animated("png"), "many.png cannot be read: 3 images in one file"),
    "an animated WEBP": (animated("webp"), "many.webp cannot be read: 3 images in one file"),
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
