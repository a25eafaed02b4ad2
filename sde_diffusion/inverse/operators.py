"""Operators: maps from x0 (B, ...) to a measurement y (B, ...), as plain callables.

All are linear but `PhaseRetrieval`. A @ B is the map x0 -> A(B(x0)), of operators or functions:

    Mask(mask) @ Blur(2.0)
    FourierTransform(mask) @ (lambda x0: torch.complex(x0[:, :1], x0[:, 1:]))    MRI, two channels

Any other differentiable function of a batch can be used too. If it contains one value per sample,
make it a dataclass and mark this field with `models.per_sample_field`. If it leaves out a part of
y, define observed_part(y), which sets this part, where y may be nan, to 0. A method
least_squares(r, spread, ridge) with the signature and result of `least_squares` is used in place of
the general solution.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.models.derivatives import ordinary
from sde_diffusion.models.model import finite, per_sample_field
from sde_diffusion.processes import Scalar
from sde_diffusion.validate import Checked, Count, FloatBatch, Kind, Positive

__all__ = [
    "Bicubic",
    "Blur",
    "CircularConvolution",
    "Composition",
    "Convolution",
    "Downsample",
    "FourierTransform",
    "Gray",
    "Mask",
    "Matrix",
    "Operator",
    "PhaseRetrieval",
    "Radon",
    "binary",
    "broadcast",
    "check_fits",
    "observed_part",
]

IS_FUNCTION = Kind("a function of a batch", "__call__")


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


def images(x0: Tensor, divisor: int = 1) -> Tensor:
    """Return x0 if it is (B, C, H, W) with sides divisible by `divisor`."""
    if x0.ndim != 4 or any(side % divisor for side in x0.shape[2:]):
        sides = f" with sides divisible by {divisor}" if divisor > 1 else ""
        raise ValueError(f"images must be (B, C, H, W){sides}; got {tuple(x0.shape)}")
    return x0


def observed_part(operator: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Return y with 0 in the parts that an operator leaves out."""
    part = getattr(operator, "observed_part", None)
    return y if part is None else part(y)


class Operator(Checked, ABC):
    """Base of the operators: A @ B is their composition."""

    @abstractmethod
    def __call__(self, x0: Tensor) -> Tensor:
        """Return A(x0) of a batch x0 (B, ...)."""

    def __matmul__(self, inner: Callable[[Tensor], Tensor]) -> "Composition":
        return Composition(self, inner)

    def __rmatmul__(self, outer: Callable[[Tensor], Tensor]) -> "Composition":
        return Composition(outer, self)


@dataclass(frozen=True, eq=False)
class Composition(Operator):
    """The map x0 -> outer(inner(x0)), written outer @ inner."""

    outer: Annotated[Callable[[Tensor], Tensor], IS_FUNCTION]
    inner: Annotated[Callable[[Tensor], Tensor], IS_FUNCTION]

    def __call__(self, x0: Tensor) -> Tensor:
        return self.outer(self.inner(x0))

    def observed_part(self, y: Tensor) -> Tensor:
        return observed_part(self.outer, y)


@dataclass(frozen=True, eq=False)
class Mask(Operator):
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
class Downsample(Operator):
    """The mean of each square of factor x factor pixels; x0 (B, C, H, W)."""

    factor: Count = 2

    def __call__(self, x0: Tensor) -> Tensor:
        return F.avg_pool2d(images(x0, self.factor), self.factor)


@dataclass(frozen=True)
class Bicubic(Operator):
    """Bicubic downsampling by a factor, with the kernel widened by it (a = -1/2; Keys 1981).

    That of PIL and of MATLAB's imresize; x0 (B, C, H, W). Weights beyond the border are left out
    and the others scaled up.
    """

    factor: Count = 2

    def __call__(self, x0: Tensor) -> Tensor:
        size = [side // self.factor for side in images(x0, self.factor).shape[2:]]
        return F.interpolate(x0, size=size, mode="bicubic", antialias=True)


@dataclass(frozen=True)
class Blur(Operator):
    """Convolution of images (B, C, H, W) with a Gaussian; border pixels are replicated.

    Args:
        std: standard deviation of the Gaussian in pixels; it is truncated at 3 std.
    """

    std: Positive = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        images(x0)
        reach = math.ceil(3 * self.std)
        places = torch.arange(-reach, reach + 1, dtype=torch.float64)
        line = torch.exp(-((places / self.std) ** 2) / 2)
        line = (line / line.sum()).to(x0)
        channels = x0.shape[1]
        padded = F.pad(x0, (reach, reach, reach, reach), mode="replicate")
        rows = F.conv2d(padded, line.expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(rows, line[:, None].expand(channels, 1, -1, 1), groups=channels)


@dataclass(frozen=True, eq=False)
class Convolution(Operator):
    """Convolution of images (B, C, H, W) with any kernel; border pixels are replicated.

        y[i] = sum_k kernel[k] x0[i + center - k],    center = (h // 2, w // 2)

    Args:
        kernel: (h, w), at most twice as large as the images.
    """

    kernel: Annotated[FloatBatch, two_axes, finite]

    def __call__(self, x0: Tensor) -> Tensor:
        (h, w), channels = self.kernel.shape, images(x0).shape[1]
        kernel = ordinary(self.kernel.to(x0)).flip(0, 1).expand(channels, 1, h, w)
        reach = ((w - 1) // 2, w // 2, (h - 1) // 2, h // 2)
        return F.conv2d(F.pad(x0, reach, mode="replicate"), kernel, groups=channels)


@dataclass(frozen=True, eq=False)
class CircularConvolution(Operator):
    """Convolution of periodic images (B, C, H, W) with any kernel: diagonal in Fourier space.

        y[i] = sum_k kernel[k] x0[i + center - k],    center = (h // 2, w // 2)

    Args:
        kernel: (h, w), at most as large as the images.
    """

    kernel: Annotated[FloatBatch, two_axes, finite]

    def __call__(self, x0: Tensor) -> Tensor:
        return self.filtered(x0, self.transfer(x0))

    def transfer(self, x0: Tensor) -> Tensor:
        """Return the kernel's Fourier transform H for images of this size, (H, W // 2 + 1)."""
        (h, w), sides = self.kernel.shape, images(x0).shape[2:]
        if h > sides[0] or w > sides[1]:
            raise ValueError(f"kernel must fit into images {tuple(sides)}; got {(h, w)}")
        kernel = F.pad(ordinary(self.kernel.to(x0)), (0, sides[1] - w, 0, sides[0] - h))
        return torch.fft.rfft2(kernel.roll((-(h // 2), -(w // 2)), (0, 1)))

    @staticmethod
    def filtered(x0: Tensor, transfer: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x0) * transfer, s=x0.shape[2:])

    def least_squares(self, r: Tensor, spread: Scalar, ridge: Scalar) -> tuple[Tensor, Tensor]:
        """Solve `least_squares` in closed form; frequencies that H removes are left out."""
        h = self.transfer(r)
        size = h.abs() ** 2
        low = (r[0].numel() * torch.finfo(r.dtype).eps) ** 2 * size.max()
        whole = spread * size + ridge
        counts = (size > low) & (whole > 0)
        d = self.filtered(r, torch.where(counts, h.conj() / torch.where(counts, whole, 1), 0))
        return d, r - spread * self(d)


@dataclass(frozen=True)
class Gray(Operator):
    """Luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601); (B, 3, ...) to (B, 1, ...)."""

    def __call__(self, x0: Tensor) -> Tensor:
        if x0.ndim < 2 or x0.shape[1] != 3:
            raise ValueError(f"images must have 3 channels; got {tuple(x0.shape)}")
        weights = x0.new_tensor([0.299, 0.587, 0.114])
        return torch.einsum("bc...,c->b...", x0, weights)[:, None]


@dataclass(frozen=True, eq=False)
class Matrix(Operator):
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


@dataclass(frozen=True, eq=False)
class FourierTransform(Operator):
    """The unitary discrete Fourier transform of images (B, C, H, W), complex, where it is measured.

    The transform of a real image is conjugate symmetric: frequencies k and -k measure it twice.

    Args:
        mask: 1 where a frequency is measured, in the order of `torch.fft.fft2`, 0 elsewhere;
            broadcasts against x0. All are measured by default.
    """

    mask: Annotated[Tensor, binary] | None = per_sample_field(full_rank=True, default=None)

    def __call__(self, x0: Tensor) -> Tensor:
        return self.observed_part(torch.fft.fft2(images(x0), norm="ortho"))

    def observed_part(self, y: Tensor) -> Tensor:
        return y if self.mask is None else where_known(self.mask, y)


@dataclass(frozen=True)
class PhaseRetrieval(Operator):
    """The modulus of the unitary Fourier transform of images (B, C, H, W): not linear.

    Args:
        oversampling: factor by which the sides of the images are enlarged, with zeros.
    """

    oversampling: Count = 2

    def __call__(self, x0: Tensor) -> Tensor:
        sides = [self.oversampling * side for side in images(x0).shape[2:]]
        return torch.fft.fft2(x0, s=sides, norm="ortho").abs()


@dataclass(frozen=True, eq=False)
class Radon(Operator):
    """Sums of images (B, C, H, W) along parallel lines; (B, C, angles, detectors).

    The pixel in column u and row v, counted from the center of the image, is projected to the place
    u cos(angle) + v sin(angle), and shared linearly by the two nearest of the detectors. They have
    distance 1 and cover the diagonal, so each projection has the sum of the image.

    Args:
        angles: in radians, (A,).
    """

    angles: Annotated[FloatBatch, finite]

    def __call__(self, x0: Tensor) -> Tensor:
        height, width = images(x0).shape[2:]
        detectors = width + 2 * math.ceil((math.hypot(height, width) - width) / 2 + 0.5)
        v, u = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (height, width))
        angle = self.angles.detach().cpu().double().flatten()[:, None, None]
        place = u * angle.cos() + v[:, None] * angle.sin() + (detectors - 1) / 2
        low = place.floor()
        first = low + detectors * torch.arange(len(angle))[:, None, None]
        share, pixels = (place - low).to(x0).flatten(1), x0.flatten(2)[:, :, None]
        seen = x0.new_zeros(*x0.shape[:2], len(angle) * detectors)
        for weight, where in ((1 - share, first), (share, first + 1)):
            index = where.long().flatten().to(x0.device)
            seen = seen.index_add(2, index, (pixels * weight).flatten(2))
        return seen.unflatten(2, (len(angle), detectors))
