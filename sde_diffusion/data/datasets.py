"""Data sets as plain tensors, and batches that are functions of seed and position.

Images are uint8 in memory and in [-1, 1] in the model: x = (pixel + u) / 128 - 1 with u uniform in
[0, 1), so that they have a density (uniform dequantization, Theis et al. 2016).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.data.rules import (
    Array,
    as_tensor,
    known_floats,
    per_point,
    refuse,
    warn_of_size,
    whole_labels,
    whole_pixels,
)
from sde_diffusion.noise.sources import Purpose, stream
from sde_diffusion.validate import Cond

__all__ = [
    "DEQUANTIZATION",
    "Data",
    "Images",
    "Points",
    "dequantize",
    "fingerprint",
    "moments",
    "shuffled_indices",
    "to_uint8",
]

Drawn = tuple[Tensor, Cond | None] | tuple[Tensor, Cond | None, Tensor]

DEQUANTIZATION = 1 / (12 * 128**2)  # variance that uniform dequantization gives to every pixel


@runtime_checkable
class Data(Protocol):
    """A data set, as training reads it."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, uniform: Tensor) -> Drawn:
        """Return the samples `index` (B,) and their conditions, (B, ...) or several by name.

        A third value may follow, the mask of the loss: bools shaped like the samples, False where a
        coordinate is unknown and its value is to be ignored.

        Args:
            uniform: numbers in [0, 1), (B, *sample shape): the only randomness of a sample.
        """
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        ...


@dataclass(frozen=True, eq=False, init=False)
class Images:
    """Images (N, C, H, W) uint8 with labels (N,), dequantized as they are drawn.

    Args:
        pixels: integers in [0, 255], a tensor or a numpy array.
        labels: one integer per image.
        classes: if not 0, the label is the condition, one-hot (B, classes) float32, and lies in
            [0, classes - 1].
    """

    pixels: Tensor
    labels: Tensor
    classes: int = 0

    def __init__(self, pixels: Array, labels: Array, classes: int = 0) -> None:
        classes = validate.integer("classes", classes, 0)
        made = whole_pixels(pixels)
        whole = whole_labels(as_tensor("labels", labels), len(made), classes)
        vars(self).update(pixels=made, labels=whole, classes=classes)

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


@dataclass(frozen=True, eq=False, init=False)
class Points:
    """Points (N, ...) of any shape, with a condition and a mask of the loss where they have any.

    They should be of about unit size, as the noise is: see `standardized`.

    Args:
        x: floats, a tensor or a numpy array; finite where known.
        cond: conditions (N, ...), or several by name.
        mask: bools shaped like x, False where a coordinate is unknown. The loss is the mean over
            the known ones of each point; the network sees the unknown ones as 0 plus noise. Give
            the mask in `cond` too if the network is to see it.
    """

    x: Tensor
    cond: Cond | None = None
    mask: Tensor | None = None

    def __init__(
        self,
        x: Array,
        cond: Array | Mapping[str, Array] | None = None,
        mask: Array | None = None,
    ) -> None:
        made, known = known_floats(x, mask)
        warn_of_size("x", made)
        if isinstance(cond, Mapping):
            cond = {name: per_point(name, value, len(made)) for name, value in cond.items()} or None
        elif cond is not None:
            cond = per_point("cond", cond, len(made))
        vars(self).update(x=made, cond=cond, mask=known)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def batch(self, index: Tensor, uniform: Tensor) -> Drawn:
        def rows(value: Tensor) -> Tensor:
            return value[index.to(value.device)].to(uniform.device)

        cond = self.cond
        if isinstance(cond, Mapping):
            cond = {name: rows(value) for name, value in cond.items()}
        elif cond is not None:
            cond = rows(cond)
        x0 = rows(self.x)
        return (x0, cond) if self.mask is None else (x0, cond, rows(self.mask))


def dequantize(pixels: Tensor, uniform: Tensor) -> Tensor:
    """Convert uint8 pixels and numbers u in [0, 1) to float32 (pixel + u) / 128 - 1 in [-1, 1).

    u is truncated to 16 bits: pixel + u then has 24 bits, as float32, and is not rounded, which for
    u near 1 would reach the interval of the next pixel.
    """
    u = (uniform * 65536).floor() / 65536
    return ((pixels + u) / 128 - 1).float()


def moments(images: Images) -> tuple[Tensor, Tensor]:
    r"""Compute mean (C, H, W) and covariance (d, d) of the dequantized images, float64.

    With pixels p and u uniform in [0, 1):  E x = (E p + 1/2) / 128 - 1,  and dequantization adds
    DEQUANTIZATION to each variance; a constant pixel has no other variance.
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
    """Identify data by number, shape and a hash of 256 samples spread over them."""
    size = len(data)
    index = torch.linspace(0, size - 1, min(size, 256), dtype=torch.float64).long()
    samples, cond, *known = data.batch(index, torch.zeros(len(index), *data.shape))
    hashed = hashlib.sha256()
    masks = [("mask", part) for part in known]
    for name, part in [("", samples), *named_tensors(cond).items(), *masks]:
        hashed.update(name.encode())
        hashed.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{size} of {tuple(data.shape)}, {hashed.hexdigest()[:16]}"


def named_tensors(cond: Cond | None) -> Mapping[str, Tensor]:
    """Conditions by name; a single one has the name ""."""
    if cond is None:
        return {}
    return cond if isinstance(cond, Mapping) else {"": cond}


def to_uint8(x: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8: the pixel whose interval holds x, clamped outside.

    Raises:
        ValueError: unless x are floats without nan, naming the first row that has one.
    """
    validate.kind("x", x, "a tensor of floats", "is_floating_point", "isnan")
    if not x.is_floating_point():
        raise ValueError(f"x must be floats in [-1, 1]; got {validate.shown(x)}")
    refuse("x", "be numbers", x, x.isnan())
    warn_of_size("x", x, smallest=0.0)
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def shuffled_indices(seed: int, size: int, start: int, count: int) -> Tensor:
    """Return the data indices of the positions start .. start + count - 1, (count,) int64.

    Epoch e is a permutation that depends on (seed, e) alone, so any process can compute any part.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}: there are no data")
    chosen = [np.empty(0, dtype=np.int64)]
    while count > 0:
        epoch, offset = divmod(start, size)
        part = permutation(seed, epoch, size)[offset : offset + count]
        chosen.append(part)
        start, count = start + len(part), count - len(part)
    return torch.from_numpy(np.concatenate(chosen))


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> Any:
    """Return the permutation of one epoch (cached: consecutive steps need the same one)."""
    return stream(seed, Purpose.ORDER, epoch).permutation(size)
