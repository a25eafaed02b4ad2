"""Operators: linear maps from x0 (B, ...) to a measurement y (B, ...), as plain callables.

Any other differentiable function of a batch does as well. One that holds something per sample is
a dataclass whose field is marked by `models.per_sample_field`; one that leaves a part of y out has
observed_part(y), y with 0 there.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion import validate
from sde_diffusion.models.derivatives import ordinary
from sde_diffusion.models.model import per_sample_field
from sde_diffusion.validate import Checked, Count, Positive

__all__ = ["Blur", "Downsample", "Gray", "Mask", "Matrix", "binary", "check_broadcast"]


def binary(name: str, mask: Any) -> Tensor:
    """The rule that a mask holds 0 and 1, and both of them."""
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


def finite_matrix(name: str, value: Any) -> Any:
    """The rule that a matrix is (m, d) of finite numbers."""
    validate.batch(name, value)
    if value.ndim != 2 or not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be (m, d), of finite numbers; got {tuple(value.shape)}")
    return value


@dataclass(frozen=True, eq=False)
class Mask(Checked):
    """mask * x0: some of the pixels, and 0 for the others.

    Args:
        mask: 1 where a pixel is known, 0 where not; broadcasts against x0.
    """

    mask: Annotated[Tensor, binary] = per_sample_field(full_rank=True)

    def __call__(self, x0: Tensor) -> Tensor:
        check_broadcast(self.mask, x0, "mask", "the images")
        return ordinary(self.mask.to(x0)) * x0

    def observed_part(self, y: Tensor) -> Tensor:
        return self(y)


@dataclass(frozen=True)
class Downsample(Checked):
    """The mean of each square of factor x factor pixels; x0 (B, C, H, W)."""

    factor: Count = 2

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.ndim != 4 or any(side % self.factor for side in x0.shape[2:]):
            raise ValueError(
                f"images must be (B, C, H, W) with sides divisible by {self.factor}; got "
                f"{tuple(x0.shape)}"
            )
        return F.avg_pool2d(x0, self.factor)


@dataclass(frozen=True)
class Blur(Checked):
    """Convolution with a Gaussian, images (B, C, H, W) continued by their border pixels.

    Args:
        std: of the Gaussian, in pixels; it is cut at 3 std.
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
    """y = A x0 on the coordinates of a sample.

    Args:
        matrix: A, (m, d).
    """

    matrix: Annotated[Tensor, finite_matrix]

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.shape[1:].numel() != self.matrix.shape[1]:
            raise ValueError(
                f"matrix must be (m, {x0.shape[1:].numel()}) for samples {tuple(x0.shape[1:])}; "
                f"got {tuple(self.matrix.shape)}"
            )
        return x0.flatten(1) @ ordinary(self.matrix.to(x0)).T


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
