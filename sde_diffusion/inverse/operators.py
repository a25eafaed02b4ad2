"""Operators: linear maps from x0 (B, ...) to a measurement y (B, ...), as plain callables.

Any other differentiable function of a batch can be used too. If it contains one value per sample,
make it a dataclass and mark this field with `models.per_sample_field`. If it leaves out a part of
y, define observed_part(y), which sets this part to 0.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.models.derivatives import ordinary
from sde_diffusion.models.model import finite, per_sample_field
from sde_diffusion.validate import Checked, Count, FloatBatch, Positive

__all__ = ["Blur", "Downsample", "Gray", "Mask", "Matrix", "binary", "broadcast", "check_fits"]


def binary(name: str, mask: Any) -> Tensor:
    """Return a mask if it contains 0 and 1, both and nothing else; a rule for annotations."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor of 0 and 1; got {mask!r:.80}")
    known = mask == 1
    if not bool((known | (mask == 0)).all()):
        raise ValueError(f"{name} must hold 0 and 1 only; got other values")
    if not bool(known.any()):
        raise ValueError(f"{name} must be 1 somewhere; got 0 everywhere: nothing is known")
    if bool(known.all()):
        raise ValueError(f"{name} must be 0 somewhere; got 1 everywhere: nothing is left to find")
    return mask


def two_axes(name: str, value: Tensor) -> Tensor:
    """Return a matrix if it is (m, d); a rule for annotations."""
    if value.ndim != 2:
        raise ValueError(f"{name} must be a matrix (m, d); got shape {tuple(value.shape)}")
    return value


def broadcast(mask: Tensor, images: Tensor, mask_name: str, images_name: str) -> Tensor:
    """Return a mask expanded to the shape of the images, if it broadcasts against them."""
    try:
        return mask.expand(images.shape)
    except RuntimeError:
        rule = f"broadcast against {images_name}, {tuple(images.shape)}"
        raise ValueError(f"{mask_name} must {rule}; got {tuple(mask.shape)}") from None


def where_known(mask: Tensor, y: Tensor) -> Tensor:
    """Return y, which may be nan where it is not known, with 0 there."""
    try:
        return torch.where(ordinary(mask.to(y.device)) == 1, y, 0)
    except RuntimeError:
        shapes = f"broadcast against y, {tuple(y.shape)}"
        raise ValueError(f"mask must {shapes}; got {tuple(mask.shape)}") from None


def check_fits(y: Tensor, x: Tensor, name: str) -> Tensor:
    """Return y if it is shaped like the batch x, called `name`, or like one sample of it."""
    shape, got = tuple(x.shape), tuple(y.shape)
    if got[1:] != shape[1:] or got[0] not in (1, shape[0]):
        raise ValueError(f"y must be shaped like {name}, {shape}; got {got}")
    return y


@dataclass(frozen=True, eq=False)
class Mask(Checked):
    """The known pixels of x0, and 0 for the others: mask * x0.

    Args:
        mask: 1 where a pixel is known, 0 elsewhere; broadcasts against x0.
    """

    mask: Annotated[Tensor, binary] = per_sample_field(full_rank=True)

    def __call__(self, x0: Tensor) -> Tensor:
        broadcast(self.mask, x0, "mask", "the images")
        return ordinary(self.mask.to(x0)) * x0

    def observed_part(self, y: Tensor) -> Tensor:
        return where_known(self.mask, y)


@dataclass(frozen=True)
class Downsample(Checked):
    """The mean of each square of factor x factor pixels; x0 (B, C, H, W)."""

    factor: Count = 2

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.ndim != 4 or any(side % self.factor for side in x0.shape[2:]):
            wanted = f"(B, C, H, W) with sides divisible by {self.factor}"
            raise ValueError(f"images must be {wanted}; got {tuple(x0.shape)}")
        return F.avg_pool2d(x0, self.factor)


@dataclass(frozen=True)
class Blur(Checked):
    """Convolution of images (B, C, H, W) with a Gaussian; border pixels are replicated.

    Args:
        std: standard deviation of the Gaussian in pixels; it is truncated at 3 std.
    """

    std: Positive = 1.0

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
class Matrix(Checked):
    """The product y = A x0 with the flattened coordinates of each sample.

    Args:
        matrix: A, (m, d).
    """

    matrix: Annotated[FloatBatch, two_axes, finite]

    def __call__(self, x0: Tensor) -> Tensor:
        d, got = x0.shape[1:].numel(), tuple(self.matrix.shape)
        if got[1] != d:
            raise ValueError(f"matrix must be (m, {d}) for {tuple(x0.shape[1:])}; got {got}")
        return x0.flatten(1) @ ordinary(self.matrix.to(x0)).T
