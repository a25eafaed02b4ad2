"""Image data sets on disk: MNIST, Fashion-MNIST, folders of images."""

import gzip
import os
import tempfile
import warnings
import zlib
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


def one_line(error: Exception) -> str:
    """Return the message of an error in one line, or its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


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
    return _idx("MNIST", data_root(root), train, download)


def fashion_mnist(
    root: str | Path | None = None, *, train: bool = True, download: bool = False
) -> Images:
    """Load Fashion-MNIST, of MNIST's sizes; also from Debian's dataset-fashion-mnist."""
    return _idx("FashionMNIST", data_root(root), train, download)


def sample_digits() -> Images:
    """Load the first 20 test digits of MNIST, which come with the package."""
    tensors, _ = storage.read(Path(__file__).parents[1] / "weights/digits/mnist_test.safetensors")
    return Images(tensors["pixels"], tensors["labels"])


def _idx(name: str, root: Path, train: bool, download: bool) -> Images:
    from torchvision import datasets

    made = getattr(datasets, name)
    if download:
        try:
            made(root, train=train, download=True)
        except (RuntimeError, OSError) as error:
            reason = one_line(error)
            raise DataNotFound(f"{name} could not be downloaded into {root}: {reason}") from None
    with _unpacked(name, root) as folder:
        try:
            loaded = made(folder, train=train)
            if len(loaded.data) != len(loaded.targets):
                raise ValueError(f"{len(loaded.data)} images with {len(loaded.targets)} labels")
        except (RuntimeError, ValueError, LookupError, AssertionError, OSError) as error:
            reason = one_line(error)
            raise DataNotFound(f"{name} under {root} cannot be read: {reason}") from None
        return Images(loaded.data[:, None].clone(), loaded.targets.clone())


@contextmanager
def _unpacked(name: str, root: Path) -> Iterator[Path]:
    """Yield a root for torchvision: `root`, or a temporary copy with its .gz files unpacked."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    files = [f"{part}-{kind}" for part in ("train", "t10k") for kind in kinds]
    usual = root / name / "raw"
    for place, suffix in product((usual, root / name, root), ("", ".gz")):
        found = [place / (file + suffix) for file in files]
        if all(path.is_file() for path in found):
            break
    else:
        raise DataNotFound(
            f"{name} not found: need {', '.join(files)} (or .gz) in {usual}; "
            f"set --data-root or {VARIABLE} to the folder above {name}, or give --download"
        )
    if place == usual and not suffix:
        yield root
        return
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, name, "raw")
        raw.mkdir(parents=True)
        for path, file in zip(found, files, strict=True):
            try:
                data = path.read_bytes()
                raw.joinpath(file).write_bytes(gzip.decompress(data) if suffix else data)
            except (OSError, EOFError, zlib.error) as error:
                raise DataNotFound(f"{path} cannot be unpacked: {error}") from None
        yield Path(scratch)


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
    every = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return sorted((p for p in every if is_image(p)), key=lambda p: p.as_posix())


def is_image(path: Path) -> bool:
    """True for a regular file that is not hidden and has the suffix of an image."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def square(path: Path, size: int) -> Tensor:
    """Read the middle of an image file as uint8 (3, size, size)."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; decompression bombs are refused
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"more than 8 bits a colour (mode {image.mode})")
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
    except Exception as error:  # decoders raise any exception at damaged files
        raise DataNotFound(printable(f"{path} cannot be read: {one_line(error)}")) from None
