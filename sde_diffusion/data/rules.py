"""Rules of data, checked when a set is made: types, shapes, ranges and rows that are not finite.

Numpy arrays are copied, tensors are not. Nothing is converted that could mean two things: pixels
that are floats, and channels last, are refused with the conversion to write.
"""

import math

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.validate import shown, warn

__all__ = [
    "Array",
    "as_tensor",
    "known_floats",
    "per_point",
    "refuse",
    "warn_of_size",
    "whole_labels",
    "whole_pixels",
]

Array = Tensor | np.ndarray

LARGEST, SMALLEST = 8.0, 0.01  # root mean squares of data beside noise of standard deviation 1


def as_tensor(name: str, value: object) -> Tensor:
    """Return a tensor without its graph, or a copy of a numpy array of numbers or bools."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ma.MaskedArray):
        got = "a masked array; give its data, and mask=~array.mask to Points"
        raise TypeError(f"{name} must be an array without a mask; got {got}")
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a tensor or a numpy array; got {shown(value)}")
    if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        raise TypeError(f"{name} must hold numbers of 64 bits at most; got {value.dtype}")
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))


def whole_pixels(value: Array) -> Tensor:
    """Return images (N, C, H, W) as uint8; integers of other types are converted if they fit."""
    pixels, is_numpy = as_tensor("pixels", value), isinstance(value, np.ndarray)
    shape = tuple(pixels.shape)
    if pixels.ndim != 4 or 0 in shape[1:] or channels_last(shape):
        hint = "; use pixels[:, None]" if pixels.ndim == 3 else ""
        if channels_last(shape):
            moved = "transpose" if is_numpy else "permute"
            hint = f", channels last; use pixels.{moved}(0, 3, 1, 2)"
        raise ValueError(f"pixels must be images (N, C, H, W); got shape {shape}{hint}")
    if pixels.is_floating_point() or pixels.is_complex() or pixels.dtype == torch.bool:
        got, made = conversion(pixels)
        cast = '.astype("uint8")' if is_numpy else ".to(torch.uint8)"
        hint = f"; e.g. {made}{cast}" if made else ""
        raise ValueError(f"pixels must be integers in [0, 255]; got {got}{hint}")
    if pixels.dtype != torch.uint8:
        for start, part in enumerate(pixels.split(4096)):
            part = part.long()
            outside = (part < 0) | (part > 255)
            if bool(outside.any()):
                got = f"{part[outside][0]} in image {4096 * start + first_row(outside)}"
                raise ValueError(f"pixels must lie in [0, 255]; got {got}")
        pixels = pixels.to(torch.uint8)
    if pixels.numel() and int(pixels.max()) == 1:
        warn("pixels are 0 and 1 of 255; if 1 is white, use pixels * 255")
    return pixels


def channels_last(shape: tuple[int, ...]) -> bool:
    """Return True for (N, H, W, C) with 1 or 3 channels, or 4 where H is larger."""
    if len(shape) != 4 or shape[1] in (1, 3):
        return False
    return shape[3] in (1, 3) or (shape[3] == 4 < shape[1])


def conversion(pixels: Tensor) -> tuple[str, str | None]:
    """Return a description of pixels that are not integers, and the expression that rounds them.

    The expression is None if the range is not that of [0, 1], [-1, 1] or [0, 255].
    """
    name = str(pixels.dtype).removeprefix("torch.")
    if pixels.dtype == torch.bool:
        return name, "(255 * pixels)"
    if not pixels.numel() or pixels.is_complex():
        return name, None
    low, high = (float(end) for end in pixels.aminmax())
    ranges = {
        (0, 1): "(pixels * 255).round()",
        (-1, 1): "((pixels + 1) * 127.5).round()",
        (0, 255): "pixels.round()",
    }
    made = [text for (a, b), text in ranges.items() if a <= low and high <= b]
    return f"{name} from {low:g} to {high:g}", made[0] if made else None


def whole_labels(labels: Tensor, count: int, classes: int) -> Tensor:
    """Return labels (count,) as int64, in [0, classes - 1] if there are classes."""
    if labels.shape != (count,) or labels.is_complex():
        raise ValueError(f"labels must be one integer per image, ({count},); got {shown(labels)}")
    if labels.is_floating_point():
        whole = labels.isfinite() & (labels == labels.trunc())
        refuse("labels", "be whole numbers", labels, ~whole)
    labels = labels.long()
    if classes:
        outside = (labels < 0) | (labels >= classes)
        refuse("labels", f"lie in [0, {classes - 1}], the classes", labels, outside)
    return labels


def known_floats(value: Array, mask: Array | None) -> tuple[Tensor, Tensor | None]:
    """Return points (N, ...), finite where known and 0 elsewhere, and the mask of what is known."""
    x = as_tensor("x", value)
    if not x.ndim or not x.is_floating_point():
        cast = "" if x.is_complex() or not x.ndim else "; e.g. as float32"
        raise ValueError(f"x must be floats (N, ...); got {shown(x)}{cast}")
    if mask is None:
        refuse("x", "be finite", x, ~x.isfinite(), "; give mask= where values are missing")
        return x, None
    known = as_tensor("mask", mask)
    if known.dtype != torch.bool or known.shape != x.shape:
        rule = f"be bools shaped like x, {tuple(x.shape)}"
        raise ValueError(f"mask must {rule}; got {shown(known)}")
    known = known.to(x.device)
    nothing = ~(known if known.ndim == 1 else known.flatten(1).any(1))
    refuse("mask", "be True somewhere in each row", known, nothing, "; drop that row")
    refuse("x", "be finite where mask is True", x, known & ~x.isfinite())
    return x.masked_fill(~known, 0), known


def per_point(name: str, value: object, count: int) -> Tensor:
    """Return a condition if it has one finite entry per point."""
    cond = as_tensor(name, value)
    if not cond.ndim or len(cond) != count:
        raise ValueError(f"{name} must have one entry per point, ({count}, ...); got {shown(cond)}")
    refuse(name, "be finite", cond, ~cond.isfinite())
    return cond


def refuse(name: str, rule: str, value: Tensor, bad: Tensor, hint: str = "") -> None:
    """Raise a ValueError with the first row and value that are bad, if there are any."""
    if bool(bad.any()):
        got = value[bad].flatten()[0].item()
        raise ValueError(f"{name} must {rule}; got {got} in row {first_row(bad)}{hint}")


def first_row(bad: Tensor) -> int:
    """Return the first index of the first axis at which something is True."""
    return int(torch.atleast_1d(bad).nonzero()[0, 0])


def warn_of_size(name: str, x: Tensor, smallest: float = SMALLEST) -> None:
    """Warn of data much larger or smaller than the noise, with their range. Synchronizes a GPU."""
    if not x.numel():
        return
    low, high = (float(end) for end in x.detach().aminmax())
    size = float(x.detach().float().square().mean().sqrt())  # an outlier is no scale
    if math.isfinite(low + high) and (size > LARGEST or 0 < size < smallest):
        what = f"{name} has values from {low:g} to {high:g}, beside noise of standard deviation 1"
        warn(f"{what}; scale images to [-1, 1], other data by data.standardized")
