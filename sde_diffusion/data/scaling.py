"""Standardization of points, and its inverse for samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sde_diffusion.data.rules import Array, known_floats
from sde_diffusion.files import storage
from sde_diffusion.validate import shown

__all__ = ["Standardization", "standardized"]

MEANS = 50_000  # at most in a record, whose size is limited to 4 MiB


@dataclass(frozen=True, eq=False)
class Standardization:
    """The map z = (x - mean) / std and its inverse. x and z are (B, ...).

    Args:
        mean, std: float64, shaped like one sample, with axes of 1 where coordinates share them.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.std.shape:
            raise ValueError(f"std must be shaped like mean; got {shown(self.std)}")
        if not bool((self.mean.isfinite() & self.std.isfinite() & (self.std > 0)).all()):
            raise ValueError("mean must be finite and std positive; got others")

    def __call__(self, x: Tensor) -> Tensor:
        """Return z, computed in float64, in the dtype of x."""
        return ((x.double() - self.mean.to(x.device)) / self.std.to(x.device)).to(x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """Return x = mean + std z, in the dtype and on the device of z."""
        return self.mean.to(z) + self.std.to(z) * z

    @property
    def record(self) -> dict[str, object]:
        """The numbers as JSON, for the record of a model: save(path, standardization=record)."""
        numbers = {name: getattr(self, name).flatten().tolist() for name in ("mean", "std")}
        return {"shape": list(self.mean.shape), **numbers}

    @staticmethod
    def load(path: str | Path) -> "Standardization":
        """Read the entry `standardization` in the record of a saved model, bit for bit.

        Args:
            path: the .safetensors file; the JSON file is beside it.
        Raises:
            storage.BadFile: if the record is damaged or has no such entry.
        """
        record = storage.examine(Path(path)).record
        with storage.as_bad_file(Path(path).with_suffix(".json")):
            found = record.get("standardization")
            if not isinstance(found, dict) or found.keys() != {"shape", "mean", "std"}:
                raise ValueError("its record has no standardization of shape, mean and std")
            numbers = (torch.tensor(found[name], dtype=torch.float64) for name in ("mean", "std"))
            return Standardization(*(value.reshape(found["shape"]) for value in numbers))


def standardized(
    x: Array, *, axes: Sequence[int] = (0,), mask: Array | None = None
) -> tuple[Tensor, Standardization]:
    """Return data of mean 0 and standard deviation 1, and the map between them and x.

        z, scaling = data.standardized(x)
        points = data.Points(z)
        ...
        state.averaged.save(path, standardization=scaling.record)
        x = data.Standardization.load(path).inverse(sd.sample(...))

    Args:
        x: floats (N, ...), a tensor or a numpy array.
        axes: those over which mean and std are taken: (0,) gives one of each per coordinate,
            (0, 2, 3) one per channel of images (N, C, H, W).
        mask: bools shaped like x, False where a coordinate is unknown; there z is 0, and mean and
            std are those of the known values.
    Raises:
        ValueError: naming the first coordinate that does not vary.
    """
    x, known = known_floats(x, mask)
    axes = tuple(axes)
    if 0 not in axes or not set(axes) <= set(range(x.ndim)):
        raise ValueError(f"axes must hold 0 and others below {x.ndim}; got {axes}")
    known = torch.ones_like(x, dtype=torch.bool) if known is None else known
    highest = x.masked_fill(~known, -math.inf).amax(axes, keepdim=True)
    constant = highest <= x.masked_fill(~known, math.inf).amin(axes, keepdim=True)
    if bool(constant.any()):
        place = tuple(constant[0].nonzero()[0].tolist())
        raise ValueError(f"x must vary in each coordinate; got one value at {place}; remove it")
    if (count := constant.numel()) > MEANS:
        raise ValueError(f"axes must leave at most {MEANS:,} means; got {count:,}; give more axes")
    values, counts = x.double(), known.sum(axes, keepdim=True)
    mean = values.sum(axes, keepdim=True) / counts  # unknown values are 0
    off = (values - mean).masked_fill(~known, 0)
    std = (off.square().sum(axes, keepdim=True) / counts).sqrt()
    return (off / std).to(x.dtype), Standardization(mean[0].cpu(), std[0].cpu())
