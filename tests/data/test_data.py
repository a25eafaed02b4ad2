"""Data sets are found, read in place and refused in one line; batches depend on their addresses."""

import gzip
import math
import os
import re
import shutil
import struct
import tempfile
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  first, as its import leaves a folder among the temporary files

from sde_diffusion import data
from sde_diffusion.data.datasets import Images, Points, dequantize, shuffled_indices, to_uint8
from sde_diffusion.data.image_files import DataNotFound
from sde_diffusion.data.rules import as_tensor
from sde_diffusion.metrics.features import MnistFeatures

PARTS = {"train": 20, "t10k": 10}


def idx(array):
    """The idx format: two zeros, type 8 (uint8), rank, big-endian sizes, bytes."""
    return b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape) + array.tobytes()


def contents():
    """File names without .gz and their bytes: small random images and labels."""
    numbers, files = np.random.default_rng(0), {}
    for part, n in PARTS.items():
        files[f"{part}-images-idx3-ubyte"] = numbers.integers(256, size=(n, 28, 28), dtype=np.uint8)
        files[f"{part}-labels-idx1-ubyte"] = numbers.integers(10, size=n, dtype=np.uint8)
    return files


LAYOUTS = {  # folder below the root, suffix
    "torchvision's, unpacked": ("{name}/raw", ""),
    "torchvision's, as fetched": ("{name}/raw", ".gz"),
    "a folder of the name": ("{name}", ".gz"),
    "a folder of the name, unpacked": ("{name}", ""),
    "flat, as Debian ships it": ("", ".gz"),
    "flat, unpacked": ("", ""),
}
SETS = {"MNIST": data.mnist, "FashionMNIST": data.fashion_mnist}


def lay_out(root, name="MNIST", layout="torchvision's, as fetched"):
    folder, suffix = LAYOUTS[layout]
    folder = root / folder.format(name=name)
    folder.mkdir(parents=True)
    for file, array in contents().items():
        packed = gzip.compress(idx(array)) if suffix else idx(array)
        folder.joinpath(file + suffix).write_bytes(packed)
    return folder


def snapshot(root):
    """Everything under root with sizes and times; a file made and removed again shows as well."""
    paths = [root, *sorted(root.rglob("*"))]
    return [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def refusal(root, load=data.mnist):
    with pytest.raises(DataNotFound) as caught:
        load(root)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def mnist(mnist_root):
    before = snapshot(mnist_root / "MNIST")
    sets = data.mnist(mnist_root), data.mnist(mnist_root, train=False)
    assert snapshot(mnist_root / "MNIST") == before  # read in place, nothing written
    return sets


def test_mnist_is_the_published_one(mnist):
    """Counts of the ten digits, and LeCun's first three labels of each part."""
    train, test = mnist
    assert train.pixels.shape == (60_000, 1, 28, 28)
    assert test.pixels.shape == (10_000, 1, 28, 28)
    assert train.pixels.dtype == test.pixels.dtype == torch.uint8
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.labels.bincount().tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert test.labels.bincount().tolist() == counts
    assert train.labels[:3].tolist() == [5, 0, 4]
    assert test.labels[:3].tolist() == [7, 2, 1]
    mean = train.pixels.double().mean() / 255
    assert round(mean.item(), 4) == 0.1307  # the constant of every MNIST example


def test_a_batch_is_the_dequantized_images_of_its_indices(mnist):
    train, _ = mnist
    index = torch.tensor([5, 59_999, 0, 5])
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4, *train.shape, dtype=torch.float64, generator=generator)
    x0, cond = train.batch(index, uniform)
    assert x0.shape == (4, 1, 28, 28)
    assert x0.dtype == torch.float32
    assert cond is None
    assert torch.equal(to_uint8(x0), train.pixels[index])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_in_place_from_a_read_only_root(tmp_path, monkeypatch, name, layout):
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    scratch.mkdir()
    lay_out(root, name, layout)
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, file) for file in files)):
            os.chmod(path, 0o555)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = snapshot(root)
    for part, n in PARTS.items():
        loaded = SETS[name](root, train=part == "train")
        files = contents()
        assert torch.equal(
            loaded.pixels[:, 0], torch.from_numpy(files[f"{part}-images-idx3-ubyte"])
        )
        assert loaded.labels.tolist() == files[f"{part}-labels-idx1-ubyte"].tolist()
        assert len(loaded) == n
    assert snapshot(root) == before  # shows writes even where the user is root
    assert not any(scratch.iterdir())


@pytest.mark.parametrize("name", SETS)
def test_missing_data_are_refused_in_one_line_that_says_what_to_do(tmp_path, name):
    message = refusal(tmp_path, SETS[name])
    for part in (*contents(), f"{tmp_path}/{name}/raw", "--data-root", "--download"):
        assert part in message
    assert "SDE_DIFFUSION_DATA" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("file", contents())
def test_one_missing_file_is_enough_to_refuse(tmp_path, file):
    (lay_out(tmp_path) / f"{file}.gz").unlink()
    assert file in refusal(tmp_path)


def test_the_root_is_what_is_given_then_the_variable_then_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SDE_DIFFUSION_DATA", str(tmp_path / "variable"))
    assert f"{tmp_path}/given/MNIST/raw" in refusal(tmp_path / "given")
    assert f"{tmp_path}/variable/MNIST/raw" in refusal(None)
    lay_out(tmp_path / "variable")
    assert len(data.mnist()) == PARTS["train"]
    monkeypatch.delenv("SDE_DIFFUSION_DATA")
    monkeypatch.chdir(tmp_path)
    assert " data/MNIST/raw" in refusal(None)
    lay_out(tmp_path / "data")
    assert len(data.mnist()) == PARTS["train"]


@pytest.mark.parametrize("length", [0, 5, 30, 0.5, -1])
def test_a_truncated_gz_is_refused_by_name(tmp_path, length):
    path = lay_out(tmp_path) / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert length == 0 or path.name in message  # gzip takes an empty file for an empty archive


def test_a_damaged_gz_is_refused_by_name_or_read_unharmed(tmp_path):
    """gzip ends in a CRC-32; unharmed, where a flip hits the header's time or unused bits."""
    path = lay_out(tmp_path) / "t10k-labels-idx1-ubyte.gz"
    whole, labels, refused = path.read_bytes(), data.mnist(tmp_path, train=False).labels, 0
    for bit in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = data.mnist(tmp_path, train=False)
        except DataNotFound:
            refused += path.name in refusal(tmp_path)
        else:
            assert torch.equal(loaded.labels, labels)
    assert refused > 0.7 * len(whole) * 8 / 5  # all but 6 of about 40 bytes matter


def of_shape(kind, *shape, value=0):
    """Return bytes of a whole IDX file of another type or shape."""
    return idx(np.full(shape, value, dtype=np.uint8)).replace(b"\x08", kind, 1)


HOSTILE = {  # file, its bytes, the reason
    "14 x 56": ("train-images", of_shape(b"\x08", 20, 14, 56), "28 x 28 bytes; got 20 x 14 x 56"),
    "1 x 1": ("train-images", of_shape(b"\x08", 20, 1, 1), "got 20 x 1 x 1"),
    "none": ("train-images", of_shape(b"\x08", 0, 28, 28), "got 0 x 28 x 28"),
    "too many": ("train-labels", of_shape(b"\x08", 60_001), "1 to 60000 bytes; got 60001"),
    "floats": ("train-images", of_shape(b"\x0d", 20, 28, 28), "format: starts with 00 00 0d 03"),
    "labels of 200": ("train-labels", of_shape(b"\x08", 20, value=200),
                      r"labels must lie in \[0, 9\]; got 200 in row 0"),
    "labels as images": ("train-images", of_shape(b"\x08", 20), "starts with 00 00 08 01"),
    "a header cut short": ("train-images", b"\0\0\x08\3\0\0", "train-images-idx3-ubyte"),
    "a byte more": ("train-labels", of_shape(b"\x08", 20) + b"\0", "20 bytes after .* got more"),
    "a byte less": ("train-labels", of_shape(b"\x08", 20)[:-1], "20 bytes after .* got 19"),
    "fewer labels": ("train-labels", of_shape(b"\x08", 19), "19 labels for the 20 images of "),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["torchvision's, unpacked", "torchvision's, as fetched"])
@pytest.mark.parametrize("what", HOSTILE)
def test_files_of_another_type_shape_or_range_are_refused_by_name(tmp_path, what, layout):
    """Also with download=True, which never reads them by other means."""
    file, contents, reason = HOSTILE[what]
    (path,) = lay_out(tmp_path, layout=layout).glob(f"{file}*")
    path.write_bytes(gzip.compress(contents) if path.suffix else contents)
    message = refusal(tmp_path)
    assert message.startswith(f"{path} cannot be read: ")
    assert re.search(reason, message)
    assert refusal(tmp_path, lambda root: data.mnist(root, download=True)) == message


@pytest.mark.parametrize("count", [2**20, 60_000])
def test_a_small_gz_that_unpacks_to_a_large_file_takes_no_memory(tmp_path, count):
    """Of 1 GB, in 1 MB; the header says all of it, or MNIST's size, which may be read."""
    path = lay_out(tmp_path) / "train-images-idx3-ubyte.gz"
    pack = zlib.compressobj(9, wbits=31)
    head = b"\0\0\x08\3" + struct.pack(">3I", count, 28, 28)
    first, zeros = (pack.compress(x) + pack.flush(zlib.Z_FULL_FLUSH) for x in (head, bytes(2**24)))
    path.write_bytes(first + 60 * zeros)  # after a full flush a part does not refer to others
    tracemalloc.start()
    try:
        message = refusal(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.startswith(f"{path} cannot be read: must hold ")
    assert peak < (2**20 if count > 60_000 else 2.5 * 60_000 * 784)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:2],
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: b"\0\0\x0a" + whole[3:],  # a type that the format does not have
        lambda whole: b"\0\0\x0e" + whole[3:],  # float64
        lambda whole: b"\0\0\x08\x07" + whole[4:],  # rank 7
        lambda whole: b"\x1f\x8b\x08\x00" + whole[4:],
        lambda whole: whole[:4] + b"\xff\xff\xff\xff" + whole[8:],  # 2^32 - 1 images
    ],
)
def test_a_damaged_unpacked_file_is_refused_in_one_line(tmp_path, damage):
    path = lay_out(tmp_path, layout="torchvision's, unpacked") / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    assert str(tmp_path) in refusal(tmp_path)


def test_images_and_labels_of_different_numbers_are_refused(tmp_path):
    folder = lay_out(tmp_path, layout="torchvision's, unpacked")
    shutil.copy(folder / "t10k-labels-idx1-ubyte", folder / "train-labels-idx1-ubyte")
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_dequantization_is_inverted_exactly_for_every_pixel_and_every_u_below_one(dtype, bits):
    """The largest u below 1 is 1 - 2^-bits."""
    near_one = 1 - 2.0 ** -torch.arange(1, bits + 1, dtype=torch.float64)
    anywhere = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    u = torch.cat([anywhere, near_one.to(dtype), (1 - near_one).to(dtype), anywhere.new_zeros(1)])
    assert u.max() < 1
    pixels = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, len(u))
    x = dequantize(pixels, u.expand_as(pixels))
    assert x.dtype == torch.float32
    assert x.min() == -1
    assert x.max() < 1
    assert torch.equal(to_uint8(x), pixels)


def test_dequantization_is_the_pixel_plus_u_in_units_of_1_128th():
    """(pixel + u) / 128 - 1, to 16 bits of u: 2^-16 / 128; float32 rounds by 2^-25 at most."""
    u = torch.rand(256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = dequantize(torch.arange(256, dtype=torch.uint8), u)
    expected = (torch.arange(256, dtype=torch.float64) + u) / 128 - 1
    assert ((x.double() - expected).abs() <= 2**-23).all()


def test_what_lies_outside_becomes_the_nearest_pixel():
    x = torch.tensor([-torch.inf, -7.0, -1.0, 1.0, 7.0, torch.inf])
    assert to_uint8(x).tolist() == [0, 0, 0, 255, 255, 255]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), "x must be numbers; got nan in row 1"),
        (torch.tensor(math.nan), "x must be numbers; got nan in row 0"),
        (torch.tensor([0, 100, 255], dtype=torch.uint8), r"floats in \[-1, 1\]; got a tensor"),
        (torch.tensor([0, 1]), r"floats in \[-1, 1\]; got a tensor"),
    ],
)
def test_what_is_no_picture_in_minus_one_to_one_is_refused(x, message):
    """uint8 would wrap: 255 became 0, and nan became 0."""
    with pytest.raises(ValueError, match=message):
        to_uint8(x)


def test_pictures_in_0_to_255_warn_where_they_would_be_clamped():
    with pytest.warns(UserWarning, match="x has values from 0 to 255"):
        to_uint8(torch.tensor([0.0, 255.0]))


@pytest.mark.parametrize("size", [1, 2, 97])
def test_every_epoch_is_a_permutation(size):
    epochs = shuffled_indices(0, size, 0, 4 * size).reshape(4, size)
    assert epochs.dtype == torch.int64
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(size).expand(4, size))


def test_epochs_and_seeds_are_shuffled_differently():
    shuffles = [*shuffled_indices(0, 97, 0, 4 * 97).reshape(4, 97), shuffled_indices(1, 97, 0, 97)]
    assert len(torch.stack(shuffles).unique(dim=0)) == 5


def test_any_stretch_of_the_order_is_the_slice_of_the_whole():
    whole = shuffled_indices(3, 10, 0, 60)
    for start in range(25):
        for count in range(35):
            assert torch.equal(shuffled_indices(3, 10, start, count), whole[start : start + count])


def test_the_order_is_uniform():
    """Each of 5 items comes first in 1/5 of 2,000 epochs: a binomial's 4.5 standard errors."""
    first = shuffled_indices(0, 5, 0, 10_000).reshape(2000, 5)[:, 0]
    assert ((first.bincount(minlength=5) - 400).abs() < 4.5 * (2000 * 0.2 * 0.8) ** 0.5).all()


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="size"):
        shuffled_indices(0, 0, 0, 1)


def test_points_are_used_as_they_are():
    x = torch.arange(12.0).reshape(4, 3)
    points = Points(x)
    assert len(points) == 4
    assert points.shape == (3,)
    x0, cond = points.batch(torch.tensor([2, 0]), torch.rand(2, 3))
    assert torch.equal(x0, x[[2, 0]])
    assert cond is None


# ---- what is checked when a set is made --------------------------------------------------------

GRAY = torch.arange(2 * 5 * 5, dtype=torch.uint8).reshape(2, 1, 5, 5)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "<i4", ">i4", "int64", "uint16", "u8"])
def test_integers_that_are_pixels_are_taken_from_tensors_and_arrays(dtype):
    array = GRAY.numpy().astype(dtype)
    before = array.copy()
    made = [Images(array[:, :, ::-1][:, :, ::-1], LABELS.numpy().astype(dtype), classes=2)]
    if array.dtype.isnative:
        made.append(Images(torch.from_numpy(array), torch.from_numpy(LABELS.numpy().astype(dtype))))
    for images in made:
        assert torch.equal(images.pixels, GRAY)
        assert images.pixels.dtype == torch.uint8
        assert torch.equal(images.labels, LABELS)
    made[0].pixels.zero_()
    assert np.array_equal(array, before)


def test_an_array_that_cannot_be_written_is_copied():
    array = GRAY.numpy().copy()
    array.flags.writeable = False
    assert torch.equal(Images(array, LABELS).pixels, GRAY)


CENTRED = GRAY / 25 - 1
REFUSED_PIXELS = {
    "floats in [0, 1]": (GRAY / 255, r"integers in \[0, 255\]; got float32 from 0 to 0.192157; "
                                     r"e.g. \(pixels \* 255\).round\(\).to\(torch.uint8\)"),
    "floats in [-1, 1]": (CENTRED, r"from -1 to 0.96; e.g. \(\(pixels \+ 1\) \* 127.5\).round"),
    "floats in [0, 255]": (GRAY.double(), r"float64 from 0 to 49; e.g. pixels.round\(\)"),
    "an array of floats": ((GRAY / 255).numpy(), r'\* 255\).round\(\).astype\("uint8"\)$'),
    "floats far off": (1000.0 * GRAY, r"float32 from 0 to 49000$"),
    "floats with nan": (GRAY / torch.zeros(1), r"float32 from nan to nan$"),
    "complex numbers": (GRAY.to(torch.complex64), r"integers in \[0, 255\]; got complex64$"),
    "bools": (GRAY > 9, r"got bool; e.g. \(255 \* pixels\).to"),
    "12 bits": (GRAY.short().index_fill(0, LABELS[1:], 4095), r"\[0, 255\]; got 4095 in image 1"),
    "negative": (GRAY.long() - 30, r"got -30 in image 0"),
    "channels last": (torch.zeros(2, 28, 28, 1, dtype=torch.uint8), r"pixels.permute\(0, 3, 1, 2"),
    "an array, channels last": (np.zeros((2, 9, 8, 3), np.uint8), r"pixels.transpose\(0, 3, 1, 2"),
    "RGBA, channels last": (np.zeros((2, 9, 8, 4), np.uint8), r"channels last; use"),
    "no channels": (GRAY[:, 0], r"got shape \(2, 5, 5\); use pixels\[:, None\]"),
    "no height": (GRAY[:, :, :0], r"got shape \(2, 1, 0, 5\)$"),
    "words": (np.array([[[["a"]]]]), r"hold numbers of 64 bits at most; got <U1"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED_PIXELS)
def test_pixels_are_refused_when_made_with_what_to_write(what):
    pixels, message = REFUSED_PIXELS[what]
    with pytest.raises((TypeError, ValueError), match=f"^pixels must .*{message}") as caught:
        Images(pixels, LABELS)
    assert len(str(caught.value).split()) <= 25


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10], r"labels must lie in \[0, 9\], the classes; got 10 in row 1$"),
        ([-1, 3], r"got -1 in row 0$"),
        ([0.0, 2.5], r"labels must be whole numbers; got 2.5 in row 1$"),
        ([0.0, math.nan], r"got nan in row 1$"),
        ([3], r"one integer per image, \(2,\); got a tensor of shape \(1,\)"),
        ([[1, 0], [0, 1]], r"one integer per image, \(2,\); got a tensor of shape \(2, 2\)"),
    ],
)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_labels_are_refused_when_made_with_the_first_bad_row(labels, message, kind):
    with pytest.raises(ValueError, match=message):
        Images(GRAY, kind(labels), classes=10)


def test_labels_outside_the_classes_are_refused_where_classes_are_given_later():
    with pytest.raises(ValueError, match="got 7 in row 1"):
        replace(Images(GRAY, torch.tensor([0, 7])), classes=5)
    with pytest.raises(ValueError, match="classes must be at least 0"):
        Images(GRAY, LABELS, classes=-1)


@pytest.mark.parametrize("value", [[[1.0]], 1.0, None, "x", np.float32(1)])
def test_data_that_are_neither_tensor_nor_array_are_refused(value):
    with pytest.raises(TypeError, match="x must be a tensor or a numpy array; got"):
        as_tensor("x", value)


def test_images_of_0_and_1_in_bytes_warn():
    with pytest.warns(UserWarning, match="pixels are 0 and 1 of 255"):
        Images((GRAY > 9).to(torch.uint8), LABELS)


X = torch.linspace(-1, 1, 24).reshape(4, 3, 2)
KNOWN = torch.arange(24).reshape(4, 3, 2) % 5 > 0
CONDS = {
    "labels": torch.arange(4),
    "an array": np.arange(8.0, dtype=np.float32).reshape(4, 2),
    "two by name": {"text": torch.ones(4, 3, 5), "label": np.arange(4)},
}


@pytest.mark.parametrize("name", CONDS)
def test_points_have_conditions_of_any_shape(name):
    points, index = Points(X.numpy(), CONDS[name]), torch.tensor([2, 0])
    x0, cond = points.batch(index, torch.zeros(2, 3, 2))
    assert torch.equal(x0, X[[2, 0]])
    given, found = CONDS[name], cond
    if not isinstance(given, dict):
        given, found = {"": given}, {"": cond}
    for key, value in given.items():
        assert torch.equal(found[key], torch.as_tensor(value)[[2, 0]])
    assert data.fingerprint(points) != data.fingerprint(Points(X))


def test_points_with_a_mask_return_it_and_zeros_where_unknown():
    points = Points(X.masked_fill(~KNOWN, math.nan), mask=KNOWN.numpy())
    x0, cond, known = points.batch(torch.tensor([2, 0]), torch.zeros(2, 3, 2))
    assert cond is None
    assert torch.equal(known, KNOWN[[2, 0]])
    assert torch.equal(x0, torch.where(KNOWN, X, 0.0)[[2, 0]])
    assert data.fingerprint(points) != data.fingerprint(Points(points.x))


def spoilt(value):
    x = X.clone()
    x[2, 1, 0] = value
    return x


REFUSED_POINTS = {
    "nan": ((spoilt(math.nan),), "x must be finite; got nan in row 2; give mask="),
    "infinite": ((spoilt(-math.inf).numpy(),), "x must be finite; got -inf in row 2"),
    "nan where known": ((spoilt(math.nan), None, X < 5), "where mask is True; got nan in row 2"),
    "integers": ((torch.arange(6).reshape(3, 2),), r"x must be floats \(N, ...\); got a tensor"),
    "one number": ((torch.tensor(1.0),), r"x must be floats \(N, ...\)"),
    "a masked array": ((np.ma.masked_invalid(spoilt(math.nan)),), "mask=~array.mask"),
    "a short condition": ((X, X[:3]), r"cond must have one entry per point, \(4, ...\)"),
    "a condition with nan": ((X, {"a": spoilt(math.nan)}), "a must be finite; got nan in row 2"),
    "a mask of rows": ((X, None, LABELS > 0), "mask must be bools shaped like x"),
    "a mask of numbers": ((X, None, torch.ones_like(X)), "mask must be bools shaped like x"),
    "a row without a value": ((X, None, KNOWN.index_fill(0, LABELS[1:], 0)),
                              "mask must be True somewhere in each row; got False in row 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED_POINTS)
def test_points_are_refused_when_made_with_the_first_bad_row(what):
    given, message = REFUSED_POINTS[what]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        Points(*given)
    assert len(str(caught.value).split()) <= 25


@pytest.mark.parametrize("scale", [255.0, 65535.0, -20.0, 1e-5])
def test_points_that_the_noise_does_not_fit_warn_with_their_range(scale):
    x = scale * torch.linspace(0.5, 1, 8)
    low, high = sorted((scale / 2, scale))
    with pytest.warns(UserWarning, match=f"x has values from {low:g} to {high:g}, beside noise"):
        Points(x)


def test_images_know_the_shape_of_one():
    images = Images(torch.zeros(7, 3, 8, 5, dtype=torch.uint8), torch.zeros(7, dtype=torch.long))
    assert len(images) == 7
    assert images.shape == (3, 8, 5)


def test_labels_are_one_hot_conditions_where_asked_for():
    pixels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([2, 0, 1])
    index, uniform = torch.tensor([1, 0]), torch.zeros(2, 1, 2, 2)
    assert Images(pixels, labels).batch(index, uniform)[1] is None
    cond = Images(pixels, labels, classes=3).batch(index, uniform)[1]
    assert cond.tolist() == [[1, 0, 0], [0, 0, 1]]


# ---- digits that come with the package ---------------------------------------------------------


def test_the_packaged_digits_are_the_first_of_mnists_test_set(mnist):
    packaged, (_, theirs) = data.sample_digits(), mnist
    assert torch.equal(packaged.pixels, theirs.pixels[:20])
    assert torch.equal(packaged.labels, theirs.labels[:20])


def test_the_packaged_digits_are_what_their_labels_say():
    digits = data.sample_digits()
    assert digits.pixels.shape == (20, 1, 28, 28)
    x = data.dequantize(digits.pixels, torch.full(digits.pixels.shape, 0.5))
    assert torch.equal(MnistFeatures().probabilities(x).argmax(1), digits.labels)
