"""What is measured of an image: linear maps from x0 (B, ...) to y (B, ...), as plain callables.

Any other differentiable function of a batch does as well. One that holds something of each sample
has rows(index, ndim), itself for these samples of a batch of this rank; one that says nothing of a
part of y has observed_part(y), y with 0 there.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion import validate
from sde_diffusion.models.derivatives import ordinary

__all__ = ["Blur", "Downsample", "Gray", "Mask", "Matrix", "binary", "check_broadcast"]


@dataclass(frozen=True, eq=False)
class Mask:
    """mask * x0: some of the pixels, and 0 for the others.

    Args:
        mask: 1 where a pixel is known, 0 where not; broadcasts against x0.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        binary("mask", self.mask)

    def __call__(self, x0: Tensor) -> Tensor:
        check_broadcast(self.mask, x0, "mask", "the images")
        return ordinary(self.mask.to(x0)) * x0

    def observed_part(self, y: Tensor) -> Tensor:
        return self(y)

    def rows(self, index: Tensor, ndim: int) -> "Mask":
        if self.mask.ndim < ndim or len(self.mask) == 1:
            return self
        part = copy.copy(self)  # not made anew: a part, or no sample, may well be known as a whole
        object.__setattr__(part, "mask", self.mask[index.to(self.mask.device)])
        return part


@dataclass(frozen=True)
class Downsample:
    """The mean of each square of factor x factor pixels; x0 (B, C, H, W)."""

    factor: int = 2

    def __post_init__(self) -> None:
        validate.integer("factor", self.factor)

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.ndim != 4 or any(side % self.factor for side in x0.shape[2:]):
            raise ValueError(
                f"images must be (B, C, H, W) with sides divisible by {self.factor}; got "
                f"{tuple(x0.shape)}"
            )
        return F.avg_pool2d(x0, self.factor)


@dataclass(frozen=True)
class Blur:
    """Convolution with a Gaussian, images (B, C, H, W) continued by their border pixels.

    Args:
        std: of the Gaussian, in pixels; it is cut at 3 std.
    """

    std: float = 1.0

    def __post_init__(self) -> None:
        validate.number("std", self.std, 0, strict=True)

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W); got {tuple(x0.shape)}")
        reach = math.ceil(3 * self.std)
        places = torch.arange(-reach, reach + 1, dtype=torch.float64)
        line = torch.exp(-((places / self.std) ** 2) / 2)
        line = (line / line.sum()).to(x0)
        channels = x0.shape[1]
        padded = F.pad(x0, (reach, reach, reach, reach), mode="replicate")
        rows = F.conv2d(padded, line.expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(rows, line[:, None].expand(channels, 1, -1, 1), groups=channels)


@dataclass(frozen=True)
class Gray:
    """Luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601); (B, 3, ...) to (B, 1, ...)."""

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.ndim < 2 or x0.shape[1] != 3:
            raise ValueError(f"images must have 3 channels; got {tuple(x0.shape)}")
        weights = x0.new_tensor([0.299, 0.587, 0.114])
        return torch.einsum("bc...,c->b...", x0, weights)[:, None]


@dataclass(frozen=True, eq=False)
class Matrix:
    """y = A x0 on the coordinates of a sample.

    Args:
        matrix: A, (m, d).
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        validate.batch("matrix", self.matrix)
        if self.matrix.ndim != 2 or not bool(self.matrix.isfinite().all()):
            raise ValueError(
                f"matrix must be (m, d), of finite numbers; got {tuple(self.matrix.shape)}"
            )

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.shape[1:].numel() != self.matrix.shape[1]:
            raise ValueError(
                f"matrix must be (m, {x0.shape[1:].numel()}) for samples {tuple(x0.shape[1:])}; "
                f"got {tuple(self.matrix.shape)}"
            )
        return x0.flatten(1) @ ordinary(self.matrix.to(x0)).T


def binary(name: str, mask: Any) -> Tensor:
    """The mask, if it is one that hides something and shows something."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor of 0 and 1; got {mask!r:.80}")
    known = mask == 1
    if not bool((known | (mask == 0)).all()):
        raise ValueError(f"{name} must hold nothing but 0 and 1")
    if not bool(known.any()):
        raise ValueError(f"{name} is 0 everywhere: nothing is known")
    if bool(known.all()):
        raise ValueError(f"{name} is 1 everywhere: nothing is left to find")
    return mask


def check_broadcast(mask: Tensor, images: Tensor, mask_name: str, images_name: str) -> None:
    """Refuse a mask that does not broadcast against the images."""
    try:
        whole = torch.broadcast_shapes(mask.shape, images.shape) == images.shape
    except RuntimeError:
        whole = False
    if not whole:
        raise ValueError(
            f"{mask_name} must broadcast against {images_name}, {tuple(images.shape)}; got "
            f"{tuple(mask.shape)}"
        )
