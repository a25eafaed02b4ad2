"""Image data sets on disk: MNIST, Fashion-MNIST, folders of images."""

import gzip
import os
import re
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.data.datasets import Images
from sde_diffusion.files import png, storage
from sde_diffusion.files.strict_json import printable
from sde_diffusion.validate import Count, arguments, warn

__all__ = [
    "DataDamaged",
    "DataNotFound",
    "data_root",
    "fashion_mnist",
    "image_folder",
    "mnist",
    "sample_digits",
]

VARIABLE = "SDE_DIFFUSION_DATA"

# The suffixes of torchvision's ImageFolder, and the formats allowed in a file of any name. Formats
# that other programs render, such as EPS, are excluded.
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

SIDE = 28  # of the images of MNIST and Fashion-MNIST, in pixels
MOST = {"train": 60_000, "t10k": 10_000}  # images in their parts


class DataNotFound(FileNotFoundError):
    """A data set is missing or incomplete; the message names the folder that was searched."""


class DataDamaged(DataNotFound):
    """A data set is there and cannot be used, or not be downloaded; the message names the file."""


@contextmanager
def as_damaged(what: str) -> Iterator[None]:
    """Turn every exception raised inside into a DataDamaged: `what`, then the reason.

    Every exception, not a list of them: decoders raise any at damaged files.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataDamaged(printable(f"{what}: {reason}")) from None


def data_root(given: str | Path | None) -> Path:
    """Return `given`, or the environment variable SDE_DIFFUSION_DATA, or ./data."""
    return Path(given or os.environ.get(VARIABLE) or "data")


def mnist(root: str | Path | None = None, *, train: bool = True, download: bool = False) -> Images:
    """Load the MNIST digits, 60,000 to train and 10,000 to test, 28x28.

    Args:
        root: folder that holds MNIST/raw/*-ubyte or *-ubyte.gz; see `data_root`. Only `download`
            writes to it.
        download: download missing files into `root`.
    Raises:
        DataNotFound: naming the files, the folder and what to set; DataDamaged if a file is not
            what its name says.
    """
    return digits("MNIST", data_root(root), train, download)


def fashion_mnist(
    root: str | Path | None = None, *, train: bool = True, download: bool = False
) -> Images:
    """Load Fashion-MNIST, of MNIST's sizes; also from Debian's dataset-fashion-mnist."""
    return digits("FashionMNIST", data_root(root), train, download)


def sample_digits() -> Images:
    """Load the first 20 test digits of MNIST, which come with the package."""
    tensors, _ = storage.read(Path(__file__).parents[1] / "weights/digits/mnist_test.safetensors")
    return Images(tensors["pixels"], tensors["labels"])


def digits(name: str, root: Path, train: bool, download: bool) -> Images:
    """Load a data set that is published as MNIST is."""
    try:
        files = idx_files(name, root)
    except DataNotFound:
        if not download:
            raise
        from torchvision import datasets

        with as_damaged(f"{name} could not be downloaded into {root}"):
            getattr(datasets, name)(root, download=True)
        files = idx_files(name, root)
    arrays = [idx_array(path) for path in files]
    for k in (0, 2):
        with as_damaged(f"{files[k + 1]} cannot be read"):
            if (n := len(arrays[k])) != (labels := len(arrays[k + 1])):
                raise ValueError(f"{labels} labels for the {n} images of {files[k]}")
    pixels, labels = arrays[:2] if train else arrays[2:]
    return Images(pixels[:, None], labels)


def idx_files(name: str, root: Path) -> list[Path]:
    """Return the files of a data set: images and labels to train, images and labels to test."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    files = [f"{part}-{kind}" for part in ("train", "t10k") for kind in kinds]
    usual = root / name / "raw"
    for place, suffix in product((usual, root / name, root), ("", ".gz")):
        found = [place / (file + suffix) for file in files]
        if all(path.is_file() for path in found):
            return found
    raise DataNotFound(
        f"{name} not found: need {', '.join(files)} (or .gz) in {usual}; "
        f"set --data-root or {VARIABLE} to the folder above {name}, or download it "
        f"(download=True; mnist_vp.py --train --download)"
    )


def idx_array(path: Path) -> Tensor:
    """Read images (N, 28, 28) or labels (N,) in the IDX format, as uint8.

    The format is 0, 0, 8 (uint8), the rank, big-endian sizes, the bytes. The header is checked
    before the rest is unpacked, since a small .gz can hold a thousand times its size.
    """
    sides = (SIDE, SIDE) if "idx3" in path.name else ()  # the name states it
    most = MOST[path.name.split("-")[0]]
    opened = gzip.open if path.suffix == ".gz" else open
    with as_damaged(f"{path} cannot be read"), opened(path, "rb") as file:
        start, ndim = file.read(4), 1 + len(sides)
        if start != bytes([0, 0, 8, ndim]):
            got = f"starts with {start.hex(' ') or 'nothing'}"
            raise ValueError(f"not an array of bytes with {ndim} axes in the IDX format: {got}")
        count, *rest = map(int, np.frombuffer(file.read(4 * ndim), ">u4", ndim))
        if not 0 < count <= most or tuple(rest) != sides:
            rule = " x ".join(map(str, (f"1 to {most}", *sides)))
            raise ValueError(f"must hold {rule} bytes; got {' x '.join(map(str, [count, *rest]))}")
        size = count * SIDE**2 if sides else count
        data = file.read(size + 1)
        if len(data) != size:
            got = f"{len(data):,}" if len(data) < size else "more"
            raise ValueError(f"must hold {size:,} bytes after its header; got {got}")
        values = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(count, *sides).copy())
        if not sides and int(values.max()) > 9:
            row = int((values > 9).nonzero()[0])
            raise ValueError(f"labels must lie in [0, 9]; got {int(values[row])} in row {row}")
    return values


def check_colour(name: str, value: str) -> None:
    """Rule of opaque colours that PIL knows."""
    from PIL import ImageColor

    try:
        known = len(ImageColor.getrgb(value)) == 3
    except ValueError:
        known = False
    if not known:
        rule = "an opaque colour such as gray or #808080"
        raise ValueError(f"{name} must be {rule}; got {value!r:.40}")


@arguments
def image_folder(
    path: str | Path,
    size: Count,
    *,
    data_class: str | None = None,
    background: Annotated[str, check_colour] = "white",
) -> Images:
    """Load images in folders named after their classes, as torchvision's ImageFolder does.

    For example AFHQ: train/cat/*.jpg. A folder that itself holds images is one class. Images are
    turned upright (EXIF), composited on `background` where they are transparent, and converted to
    RGB; embedded colour profiles are not applied. The shorter side is resized to `size`,
    antialiased, and the longer one is cropped to its middle. Files are sorted by path, so index k
    is the same image everywhere. A warning gives the number of files left out, and why.

    Args:
        path: the folder.
        size: side of the square images, in pixels.
        data_class: the only class to load; its label is its index among all classes.
        background: a colour by name or as #rrggbb.
    Raises:
        DataNotFound: if there is no folder, class or image, or a file is not one whole image of 8
            bits a colour, with its name.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataNotFound(f"{root}: no such folder of images")
    names = classes(root)
    if data_class is not None and data_class not in names:
        there = f"there are: {', '.join(names)}" if names else "there are none"
        raise DataNotFound(printable(f"{root} has no class {data_class!r}; {there}"))
    wanted = names if data_class is None else [data_class]
    found = {file: names.index(name) for name in wanted for file in images_under(root / name)}
    empty = set(wanted) - {names[label] for label in found.values()} if found else set[str]()
    if not found and data_class is None:
        found = {file: 0 for file in sorted(root.iterdir()) if is_image(file)}
    if not found:
        where = root if data_class is None else root / data_class
        raise DataNotFound(printable(f"{where} holds no images ({' '.join(sorted(SUFFIXES))})"))
    if empty:
        text = f"{root}: the classes {', '.join(sorted(empty))} hold no images"
        warn(printable(text))
    above = [file for file in root.iterdir() if data_class is None and not file.is_dir()]
    inside = [file for name in wanted for file in (root / name).rglob("*")]
    if reasons := left_out(root, [*above, *inside], found):
        count, why = sum(reasons.values()), ", ".join(f"{n} {why}" for why, n in reasons.items())
        text = f"{count} of {count + len(found)} files left out of {root}: {why}"
        warn(printable(text))
    pixels = torch.stack([square(file, size, background) for file in found])
    return Images(pixels, torch.tensor([*found.values()]))


def left_out(root: Path, files: Iterable[Path], found: Container[Path]) -> Counter[str]:
    """Count the files under `root` that are neither hidden nor found, by reason."""
    reasons: Counter[str] = Counter()
    for file in files:
        if file in found or any(part.startswith(".") for part in file.relative_to(root).parts):
            continue
        if file.is_symlink() and file.is_dir():  # not followed, as it may lead to itself
            reasons["in linked folders"] += sum(path.is_file() for path in file.rglob("*"))
        elif file.is_dir():
            continue
        elif not file.is_file():
            reasons["not regular files"] += 1
        elif file.suffix.lower() not in SUFFIXES:
            reasons[f"of type {file.suffix.lower() or 'unknown'}"] += 1
        else:
            reasons["above the class folders"] += 1
    return +reasons


def classes(root: Path) -> list[str]:
    """Return the names of the folders in `root` that are not hidden: the classes."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def images_under(folder: Path) -> list[Path]:
    """Return the paths of the images at any depth, sorted."""
    return sorted(filter(is_image, folder.rglob("*")), key=Path.as_posix)


def is_image(path: Path) -> bool:
    """True for a regular file that is not hidden and has the suffix of an image."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def square(path: Path, size: int, background: str) -> Tensor:
    """Read the middle of an image file as uint8 (3, size, size)."""
    from PIL import Image, ImageOps

    with as_damaged(f"{path} cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; decompression bombs are refused
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "PNG":
                with open(path, "rb") as file:
                    png.check_rows(file)
            check_kind(image)
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                behind = Image.new("RGBA", upright.size, background)
                upright = Image.alpha_composite(behind, upright.convert("RGBA"))
            fitted = ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def check_kind(image: Any) -> None:
    """Refuse an opened image file that holds several images, or more than 8 bits a colour.

    PIL reads 16 bits of red, green and blue as 8; only the decoder's arguments have the number.
    """
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: of one scene
    if frames > 1:
        raise ValueError(f"{frames} images in one file")
    stored = str([tile.args for tile in image.tile])
    deep = re.search(";16[A-Z]", stored) is not None  # BMP has ;16 for 16 bits in all
    if image.format == "PPM":
        deep = any(int(number) > 255 for number in re.findall("[0-9]+", stored))
    if deep or image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits a colour (mode {image.mode})")
