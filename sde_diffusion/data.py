"""Data sets as plain tensors, and batches that are functions of their addresses.

Images are uint8 in memory and in [-1, 1] in the model: x = (pixel + u) / 128 - 1 with u uniform in
[0, 1), so that a density makes sense (uniform dequantization, Theis et al. 2016).
"""

import gzip
import hashlib
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import errors, storage
from sde_diffusion.noise import Purpose, stream
from sde_diffusion.strict import printable

__all__ = [
    "Data",
    "DataNotFound",
    "Images",
    "Points",
    "data_root",
    "dequantize",
    "fashion_mnist",
    "fingerprint",
    "image_folder",
    "mnist",
    "moments",
    "order",
    "sample_digits",
    "to_uint8",
]

VARIABLE = "SDE_DIFFUSION_DATA"
# What torchvision's ImageFolder takes for an image, and what may be inside. Formats that other
# programs draw, such as EPS, are not among them, whatever a file's name is.
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
DEQUANTIZATION = 1 / (12 * 128**2)  # variance that uniform dequantization gives to every pixel


class DataNotFound(FileNotFoundError):
    """A data set is not there, or not whole; the message says where it was looked for."""


@runtime_checkable
class Data(Protocol):
    """What training draws from."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
        """The samples `index` (B,) and their conditions.

        Args:
            uniform: numbers in [0, 1), (B, *sample shape), the only randomness a sample may use.
        """
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        ...


@dataclass(frozen=True, eq=False)
class Images:
    """Images (N, C, H, W) uint8 with labels (N,), dequantized as they are drawn.

    Args:
        classes: if not 0, the label is the condition, one-hot (B, classes) float32.
    """

    pixels: Tensor
    labels: Tensor
    classes: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape[1:])

    def batch(self, index: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
        x0 = dequantize(self.pixels[index.to(self.pixels.device)].to(uniform.device), uniform)
        if not self.classes:
            return x0, None
        labels = self.labels[index.to(self.labels.device)].to(uniform.device)
        return x0, torch.nn.functional.one_hot(labels, self.classes).float()


@dataclass(frozen=True, eq=False)
class Points:
    """Points (N, ...) of any shape, used as they are."""

    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def batch(self, index: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.x[index.to(self.x.device)].to(uniform.device), None


def dequantize(pixels: Tensor, uniform: Tensor) -> Tensor:
    """uint8 pixels and numbers in [0, 1) to float32 in [-1, 1): (pixel + u) / 128 - 1.

    u is cut to 16 bits: pixel + u then has the 24 that float32 holds, and nothing is rounded, which
    for u near 1 would be up, into the next pixel's interval.
    """
    u = (uniform * 65536).floor() / 65536
    return ((pixels + u) / 128 - 1).float()


def moments(images: Images) -> tuple[Tensor, Tensor]:
    r"""Mean (C, H, W) and covariance (d, d) of the dequantized images, float64.

    With pixels p and u uniform in [0, 1):  E x = (E p + 1/2) / 128 - 1,  and dequantization adds
    DEQUANTIZATION to each variance: also to that of a constant pixel, which has no other.
    """
    d = images.pixels[0].numel()
    total = torch.zeros(d, dtype=torch.float64)
    squares = torch.zeros(d, d, dtype=torch.float64)
    for part in images.pixels.reshape(len(images), d).split(4096):
        pixels = part.double() - 128  # sums of whole numbers below 2^53 are exact
        total += pixels.sum(0)
        squares += pixels.T @ pixels
    mean = total / len(images)
    covariance = (squares / len(images) - mean[:, None] * mean) / 128**2
    covariance.diagonal().add_(DEQUANTIZATION)
    return ((mean + 0.5) / 128).reshape(images.shape), covariance


def fingerprint(data: Data) -> str:
    """Number, shape and a hash of 256 samples spread over the data: other data have another."""
    size = len(data)
    index = torch.linspace(0, size - 1, min(size, 256), dtype=torch.float64).long()
    samples, cond = data.batch(index, torch.zeros(len(index), *data.shape))
    hashed = hashlib.sha256()
    for part in (samples, cond):
        if part is not None:
            hashed.update(part.cpu().contiguous().numpy().tobytes())
    return f"{size} of {tuple(data.shape)}, {hashed.hexdigest()[:16]}"


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8: the pixel whose interval holds x, the nearest one outside."""
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def order(seed: int, size: int, start: int, count: int) -> Tensor:
    """Data indices of the global positions start .. start + count - 1, (count,) int64.

    Epoch e is a permutation that depends on (seed, e) alone, so any stretch can be had anywhere.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1: there are no data; got {size}")
    chosen = [np.empty(0, dtype=np.int64)]
    while count > 0:
        epoch, offset = divmod(start, size)
        part = permutation(seed, epoch, size)[offset : offset + count]
        chosen.append(part)
        start, count = start + len(part), count - len(part)
    return torch.from_numpy(np.concatenate(chosen))


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> Any:
    """That of an epoch; a step asks for that of the step before, so it is kept."""
    return stream(seed, Purpose.ORDER, epoch).permutation(size)


def data_root(given: str | Path | None) -> Path:
    """`given`, or the environment variable SDE_DIFFUSION_DATA, or ./data."""
    return Path(given or os.environ.get(VARIABLE) or "data")


def mnist(root: str | Path | None = None, *, train: bool = True, download: bool = False) -> Images:
    """MNIST digits, 60,000 to train and 10,000 to test, 28x28.

    Args:
        root: folder that holds MNIST/raw/*-ubyte or *-ubyte.gz; see `data_root`. It is only read,
            unless `download` is given.
        download: fetch what is missing into `root`.
    Raises:
        DataNotFound: naming the files, the folder and what to set.
    """
    return _idx("MNIST", data_root(root), train, download)


def fashion_mnist(
    root: str | Path | None = None, *, train: bool = True, download: bool = False
) -> Images:
    """Fashion-MNIST, the same sizes; the folder of Debian's dataset-fashion-mnist works too."""
    return _idx("FashionMNIST", data_root(root), train, download)


def sample_digits() -> Images:
    """The first 20 test digits of MNIST, which come with the package."""
    tensors, _ = storage.read(Path(__file__).parent / "weights/digits/mnist_test.safetensors")
    return Images(tensors["pixels"], tensors["labels"])


def _idx(name: str, root: Path, train: bool, download: bool) -> Images:
    from torchvision import datasets

    made = getattr(datasets, name)
    if download:
        try:
            made(root, train=train, download=True)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataNotFound(f"{name} could not be fetched into {root}: {reason}") from None
    with _unpacked(name, root) as folder:
        try:
            loaded = made(folder, train=train)
        except (RuntimeError, ValueError, LookupError, AssertionError, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataNotFound(f"{name} under {root} cannot be read: {reason}") from None
        if len(loaded.data) != len(loaded.targets):
            raise DataNotFound(
                f"{name} under {root} cannot be read: {len(loaded.data)} images with "
                f"{len(loaded.targets)} labels"
            )
        return Images(loaded.data[:, None].clone(), loaded.targets.clone())


@contextmanager
def _unpacked(name: str, root: Path) -> Iterator[Path]:
    """A root from which torchvision can read: `root`, or a scratch copy unpacked from its .gz."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    files = [f"{part}-{kind}" for part in ("train", "t10k") for kind in kinds]
    places = [root / name / "raw", root / name, root]
    for place in places:
        if place == places[0] and all((place / file).is_file() for file in files):
            yield root
            return
        for suffix in (".gz", ""):
            found = [place / (file + suffix) for file in files]
            if all(path.is_file() for path in found):
                with tempfile.TemporaryDirectory() as scratch:
                    raw = Path(scratch, name, "raw")
                    raw.mkdir(parents=True)
                    for path, file in zip(found, files, strict=True):
                        try:
                            data = path.read_bytes()
                            raw.joinpath(file).write_bytes(
                                gzip.decompress(data) if suffix else data
                            )
                        except (OSError, EOFError, zlib.error) as error:
                            raise DataNotFound(f"{path} cannot be unpacked: {error}") from None
                    yield Path(scratch)
                return
    raise DataNotFound(
        f"{name} not found: need {', '.join(files)} (or .gz) in {places[0]}; "
        f"set --data-root or {VARIABLE} to the folder above {name}, or give --download"
    )


def image_folder(path: str | Path, size: int, *, data_class: str | None = None) -> Images:
    """Images in folders named after their classes, as torchvision's ImageFolder reads them.

    AFHQ's layout is one: train/cat/*.jpg. A folder that itself holds images is one class. They are
    made RGB; the shorter side is resized to `size`, antialiased, and the middle of the longer one
    is kept. Files are in the order of their paths, so index k is the same image everywhere.

    Args:
        path: the folder.
        size: of the square images, in pixels.
        data_class: the only class wanted; its label stays what it is among all classes.
    Raises:
        DataNotFound: if there is no folder, class or image, or a file is not a whole image of 8
            bits a colour, with its name.
    """
    errors.integer("size", size)
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
    """The folders in `root`, but hidden ones: the classes of what is in them."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def images_under(folder: Path) -> list[Path]:
    """The images at any depth, by their paths."""
    every = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return sorted((p for p in every if is_image(p)), key=lambda p: p.as_posix())


def is_image(path: Path) -> bool:
    """Whether it is a file, neither hidden nor a pipe, with the name of an image."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def square(path: Path, size: int) -> Tensor:
    """The middle of an image file as uint8 (3, size, size)."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; but a bomb is refused:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"more than 8 bits a colour (mode {image.mode})")
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
    except Exception as error:  # decoders raise what they like at bytes that they were not made for
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataNotFound(printable(f"{path} cannot be read: {reason}")) from None
