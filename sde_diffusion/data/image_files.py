"""Image data sets on disk: MNIST, Fashion-MNIST, folders of images."""

import gzip
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.data.datasets import Images
from sde_diffusion.files import storage
from sde_diffusion.files.strict_json import printable
from sde_diffusion.validate import Count, arguments

__all__ = ["DataNotFound", "data_root", "fashion_mnist", "image_folder", "mnist", "sample_digits"]

VARIABLE = "SDE_DIFFUSION_DATA"

# The suffixes of torchvision's ImageFolder, and the formats allowed in a file of any name. Formats
# that other programs render, such as EPS, are excluded.
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


class DataNotFound(FileNotFoundError):
    """A data set is missing or incomplete; the message names the folder that was searched."""


@contextmanager
def as_not_found(what: str) -> Iterator[None]:
    """Turn every exception raised inside into a DataNotFound: `what`, then the reason.

    Every exception, not a list of them: decoders raise any at damaged files.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataNotFound(printable(f"{what}: {reason}")) from None


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
        DataNotFound: naming the files, the folder and what to set.
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
    if download:
        from torchvision import datasets

        with as_not_found(f"{name} could not be downloaded into {root}"):
            getattr(datasets, name)(root, download=True)
    arrays = [idx_array(path) for path in idx_files(name, root)]
    pixels, targets = arrays[:2] if train else arrays[2:]
    if len(pixels) != len(targets):
        got = f"{len(pixels)} images with {len(targets)} labels"
        raise DataNotFound(f"{name} under {root} cannot be read: {got}")
    return Images(pixels[:, None], targets.long())


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
    """Read a file of the IDX format: 0, 0, 8 (uint8), the rank, big-endian sizes, the bytes."""
    ndim = 3 if "idx3" in path.name else 1  # the name states it
    with as_not_found(f"{path} cannot be read"):
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        if data[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError(f"not an array of bytes with {ndim} axes in the IDX format")
        sizes = np.frombuffer(data, ">u4", ndim, offset=4)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(sizes)
    return torch.from_numpy(values.copy())


@arguments
def image_folder(path: str | Path, size: Count, *, data_class: str | None = None) -> Images:
    """Load images in folders named after their classes, as torchvision's ImageFolder does.

    For example AFHQ: train/cat/*.jpg. A folder that itself holds images is one class. Images are
    converted to RGB, the shorter side is resized to `size`, antialiased, and the longer one is
    cropped to its middle. Files are sorted by path, so index k is the same image everywhere.

    Args:
        path: the folder.
        size: side of the square images, in pixels.
        data_class: the only class to load; its label is its index among all classes.
    Raises:
        DataNotFound: if there is no folder, class or image, or a file is not a whole image of 8
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
    found = [(file, names.index(name)) for name in wanted for file in images_under(root / name)]
    if not found:
        found = [(file, 0) for file in sorted(root.iterdir()) if is_image(file)]
    if not found:
        where = root if data_class is None else root / data_class
        raise DataNotFound(printable(f"{where} holds no images ({' '.join(sorted(SUFFIXES))})"))
    pixels = torch.stack([square(file, size) for file, _ in found])
    return Images(pixels, torch.tensor([label for _, label in found]))


def classes(root: Path) -> list[str]:
    """Return the names of the folders in `root` that are not hidden: the classes."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def images_under(folder: Path) -> list[Path]:
    """Return the paths of the images at any depth, sorted."""
    return sorted(filter(is_image, folder.rglob("*")), key=Path.as_posix)


def is_image(path: Path) -> bool:
    """True for a regular file that is not hidden and has the suffix of an image."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def square(path: Path, size: int) -> Tensor:
    """Read the middle of an image file as uint8 (3, size, size)."""
    from PIL import Image, ImageOps

    with as_not_found(f"{path} cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; decompression bombs are refused
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a colour (mode {image.mode})")
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
