r"""Frames: changes of variables in which the probability flow is integrated.

In t the flow  dx/dt = f x - g^2 score / 2  is singular at the data: sigma(t) starts like sqrt(t),
and solvers need many steps there. A frame consists of coordinates z(x) and a clock that depends on
the noise-to-signal ratio alone. In it all processes have the same flow, without a singularity. At
the data the clock is 0 and z = x0. The change of variables is exact, so a solver has the same limit
in every frame; frames differ in the size of the slope that remains.

    Straight        y = x / (alpha + sigma),  u = sigma / (alpha + sigma),  dy/du = eps - x0
    GaussianFrame   the end of the exact flow of N(m, S),  theta = arctan(sigma / alpha)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.files import storage
from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import Level, Scalar
from sde_diffusion.processes.level import coordinates, enter, leave, log_snr_at
from sde_diffusion.validate import Checked, Kind, NonNegative, Positive, arguments

__all__ = ["IS_FRAME", "Frame", "GaussianFrame", "Straight"]

IS_FRAME = Kind("a frame such as Straight()", "enter", "leave", "slope", "clock")

PARTS = ("mean", "axes", "variances")  # of a Gaussian frame's file


class Frame(Protocol):
    """Coordinates and a clock. Implementations are frozen dataclasses."""

    def clock(self, level: Level[float]) -> float:
        """The value of the clock at a level, 0 at the data."""
        ...

    def log_snr(self, clock: Tensor) -> Tensor:
        """The log-SNR at a value of the clock: the inverse of `clock`; any shape, float64."""
        ...

    def enter(self, x: Tensor, level: Level) -> Tensor:
        """z, shaped like x."""
        ...

    def leave(self, z: Tensor, level: Level) -> Tensor:
        """x: the inverse of `enter`."""
        ...

    def slope(self, prediction: Prediction) -> Tensor:
        """dz/dclock along the flow, from a prediction at a level; a fresh tensor."""
        ...


@dataclass(frozen=True)
class Straight:
    """y = x / (alpha + sigma): the straight path from x0 to eps is a straight line in u.

    dy/du = eps - x0 = velocity,    u = sigma / (alpha + sigma)
    """

    def clock(self, level: Level[float]) -> float:
        return level.u

    def log_snr(self, clock: Tensor) -> Tensor:
        return log_snr_at(clock)

    def enter(self, x: Tensor, level: Level) -> Tensor:
        return enter(x, level)

    def leave(self, z: Tensor, level: Level) -> Tensor:
        return leave(z, level)

    def slope(self, prediction: Prediction) -> Tensor:
        return prediction.velocity


@dataclass(frozen=True, eq=False, repr=False)
class GaussianFrame(Checked):
    r"""Coordinates in which the flow of Gaussian data N(m, S) is constant.

    With  C = alpha^2 S + sigma^2 I,  the covariance of x_t for Gaussian data,

        z = m + S^(1/2) C^(-1/2) (x - alpha m),      theta = arctan(sigma / alpha),
        dz/dtheta = (alpha^2 + sigma^2) S^(1/2) C^(-3/2) (alpha S eps - sigma (x0 - m)),

    which is 0 for data N(m, S), and small at high noise for any data of that mean and covariance.
    For S = I and m = 0 the slope is v over its scale, in the angle of Salimans & Ho 2022. On the
    clock u the same coordinates need more steps: near the data they move with sigma / alpha, which
    equals theta up to third order and u only up to second order.

    S = V diag(variances) V^T + rest (I - V V^T): of full rank or of low rank plus isotropic.

    Args:
        mean: m (*shape,), the shape of one sample; () for any shape.
        axes: V (d, r) with orthonormal columns.
        variances: (r,), positive.
        rest: the variance of the directions orthogonal to V; positive, without effect for r = d.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    rest: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "axes", "variances"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name} must be finite; got nan or inf")
        if self.axes.ndim != 2 or self.variances.shape != self.axes.shape[1:]:
            raise ValueError(
                f"axes and variances must be (d, r) and (r,); got {tuple(self.axes.shape)} and "
                f"{tuple(self.variances.shape)}"
            )
        if self.mean.numel() not in (1, len(self.axes)):
            raise ValueError(
                f"mean must have {len(self.axes)} coordinates, as the axes; "
                f"got shape {tuple(self.mean.shape)}"
            )
        if not bool((self.variances > 0).all()):
            raise ValueError(
                f"variances must be positive; got {float(self.variances.min()):g}; use a floor"
            )

    def __repr__(self) -> str:
        return f"GaussianFrame(rank {self.axes.shape[1]} of {self.axes.shape[0]})"

    @staticmethod
    @arguments
    def of(
        mean: Tensor, covariance: Tensor, *, rank: int | None = None, floor: NonNegative = 0.0
    ) -> "GaussianFrame":
        """The frame of a mean (*shape,) and a covariance (d, d).

        Args:
            rank: number of eigenvectors that are kept, those of the largest eigenvalues [all];
                the other directions get the mean of the other eigenvalues.
            floor: least eigenvalue. Constant pixels have eigenvalue 0: for dequantized images use
                the variance of that noise, `data.DEQUANTIZATION`.
        """
        covariance = covariance.double()
        if covariance.shape != (mean.numel(),) * 2:
            raise ValueError(
                f"covariance must be ({mean.numel()}, {mean.numel()}) for this mean; "
                f"got {tuple(covariance.shape)}"
            )
        variances, axes = torch.linalg.eigh(covariance)
        variances = variances.clamp(min=floor)
        kept = validate.integer("rank", len(axes) if rank is None else rank, 1, len(axes))
        left = variances[: len(axes) - kept]
        rest = float(left.mean()) if len(left) else 1.0
        return GaussianFrame(mean.double(), axes[:, -kept:], variances[-kept:], rest)

    def clock(self, level: Level[float]) -> float:
        return math.atan2(level.sigma, level.alpha)

    def log_snr(self, clock: Tensor) -> Tensor:
        return -2 * clock.tan().log()

    def enter(self, x: Tensor, level: Level) -> Tensor:
        alpha, sigma = rows(level.alpha), rows(level.sigma)
        mean, flat = self._mean(x), self._flat(x)
        gains = [(s / (alpha**2 * s + sigma**2)) ** 0.5 for s in self._spectrum(x)]
        return (mean + self._apply(gains, flat - alpha * mean)).reshape(x.shape)

    def leave(self, z: Tensor, level: Level) -> Tensor:
        alpha, sigma = rows(level.alpha), rows(level.sigma)
        mean, flat = self._mean(z), self._flat(z)
        gains = [((alpha**2 * s + sigma**2) / s) ** 0.5 for s in self._spectrum(z)]
        return (alpha * mean + self._apply(gains, flat - mean)).reshape(z.shape)

    def slope(self, prediction: Prediction) -> Tensor:
        alpha, sigma = rows(prediction.level.alpha), rows(prediction.level.sigma)
        x0, eps = prediction.x0, self._flat(prediction.eps)
        of_eps, of_x0 = [], []
        for s in self._spectrum(x0):
            common = (alpha**2 + sigma**2) * s**0.5 * (alpha**2 * s + sigma**2) ** -1.5
            of_eps.append(common * alpha * s)
            of_x0.append(common * -sigma)
        off = coordinates(x0) - self._mean(x0)
        return (self._apply(of_eps, eps) + self._apply(of_x0, off)).reshape(x0.shape)

    def save(self, path: str | Path, **record: object) -> None:
        """Write `path` (.safetensors, in float32) and its JSON; read it with `load`."""
        tensors = {name: getattr(self, name).float() for name in PARTS}
        storage.write(Path(path), tensors, {"rest": self.rest, **record})

    @staticmethod
    def load(path: str | Path) -> "GaussianFrame":
        """Read a file of `save`.

        Raises:
            storage.BadFile: naming the file and the reason, if anything is missing or damaged.
        """
        path = Path(path)
        tensors, record = storage.read(path, PARTS)
        with storage.as_bad_file(path):
            storage.check_names("entry", record, ["rest"], others=True)
            if not all(value.is_floating_point() for value in tensors.values()):
                raise ValueError("tensors of a frame must be floating-point")
            mean, axes, variances = (tensors[name].double() for name in PARTS)
            made = GaussianFrame(mean, axes, variances, record["rest"])
            check_orthonormal(made.axes)
        return made

    @staticmethod
    def pretrained(name: str) -> "GaussianFrame":
        """Load a packaged frame: "mnist", 28x28 digits in [-1, 1]."""
        folder = Path(__file__).parents[1] / "weights" / "frames"
        validate.choice("name", name, sorted(path.stem for path in folder.glob("*.safetensors")))
        return GaussianFrame.load(folder / f"{name}.safetensors")

    def _flat(self, x: Tensor) -> Tensor:
        """x as (B, d)."""
        flat = coordinates(x)
        if flat.shape[1] != len(self.axes):
            raise ValueError(
                f"x must have {len(self.axes)} coordinates per sample, as the frame; "
                f"got {flat.shape[1]}"
            )
        return flat

    def _mean(self, like: Tensor) -> Tensor:
        return on(self, like.dtype, like.device)[0]

    def _spectrum(self, like: Tensor) -> Iterator[Scalar]:
        """The eigenvalues of the axes, (r,), then the one of the directions orthogonal to them."""
        yield on(self, like.dtype, like.device)[2]
        yield self.rest

    def _apply(self, gains: list[Scalar], v: Tensor) -> Tensor:
        """The function of S whose values on its spectrum are `gains`, times v (B, d)."""
        of_axes, of_rest = gains
        axes = on(self, v.dtype, v.device)[1]
        if axes.shape[1] == axes.shape[0]:
            return (v @ axes * of_axes) @ axes.T
        return v * of_rest + (v @ axes * (of_axes - of_rest)) @ axes.T


@lru_cache(maxsize=8)
def on(
    frame: GaussianFrame, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), axes and variances of a frame in a dtype on a device; copied once."""
    mean = frame.mean.flatten().to(device, dtype)
    return mean, frame.axes.to(device, dtype), frame.variances.to(device, dtype)


def check_orthonormal(axes: Tensor) -> None:
    """Refuse V (d, r) unless  V^T V w = w  for one w in general position: d r operations.

    Rounding to float32 moves each entry by a share 2^-24, and w by 2^-24 d at most.
    """
    if not 0 < axes.shape[1] <= axes.shape[0]:
        raise ValueError(f"axes must be (d, r) with 0 < r <= d; got {tuple(axes.shape)}")
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(axes.shape[1], generator=generator, dtype=axes.dtype)
    off = float((axes.T @ (axes @ w) - w).abs().max())
    if not off <= 1e-6 * len(axes):
        raise ValueError(f"axes must be orthonormal; got an error of {off:.1g}")


def rows(scalar: Scalar) -> Scalar:
    """A field of a level, broadcast against (B, d)."""
    return scalar.reshape(-1, 1) if isinstance(scalar, Tensor) else scalar
