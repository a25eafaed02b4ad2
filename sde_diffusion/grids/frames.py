r"""Frames: changes of variables in which the probability flow is integrated.

In t the flow  dx/dt = f x - g^2 score / 2  is singular at the data: sigma(t) grows like sqrt(t),
and solvers need many steps there. A frame consists of coordinates z(x) and a clock that depends on
the noise-to-signal ratio only. In a frame all processes have the same flow, and it is not singular.
At the data the clock is 0 and z = x0. The change of variables is exact, so a solver has the same
limit in every frame. The slope dz/dclock, and so the number of steps, depends on the frame.

    Straight        y = x / (alpha + sigma),  u = sigma / (alpha + sigma),  dy/du = eps - x0
    GaussianFrame   the end of the exact flow of N(m, S),  theta = arctan(sigma / alpha)
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Protocol

import torch
from torch import Tensor

from sde_diffusion.files import storage
from sde_diffusion.models.model import finite
from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import Level, Scalar
from sde_diffusion.processes.level import (
    coordinates,
    enter,
    leave,
    log_snr_at,
    per_sample,
    posterior_variance,
)
from sde_diffusion.validate import Checked, Kind, NonNegative, Positive, arguments, choice, integer

__all__ = ["IS_FRAME", "Frame", "GaussianFrame", "Straight"]

IS_FRAME = Kind("a frame such as Straight()", "enter", "leave", "slope", "clock")

PARTS = ("mean", "axes", "variances")  # of a Gaussian frame's file


class Frame(Protocol):
    """Interface of coordinates and a clock. Implementations are frozen dataclasses."""

    def clock(self, level: Level[float]) -> float:
        """Return the clock at a level; 0 at the data."""
        ...

    def log_snr(self, clock: Tensor) -> Tensor:
        """Return the log-SNR at values of the clock, any shape, float64: the inverse of `clock`."""
        ...

    def enter(self, x: Tensor, level: Level) -> Tensor:
        """Return z, shaped like x."""
        ...

    def leave(self, z: Tensor, level: Level) -> Tensor:
        """Return x: the inverse of `enter`."""
        ...

    def slope(self, prediction: Prediction) -> Tensor:
        """Return dz/dclock along the flow, from a prediction at a level; a new tensor."""
        ...


@dataclass(frozen=True)
class Straight:
    """The frame y = x / (alpha + sigma), in which y is linear in u between x0 and eps.

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
    For S = I and m = 0 the slope is v / sqrt(alpha^2 + sigma^2), with the angle of Salimans & Ho
    2022 as clock. With the clock u the same coordinates need more steps: near the data they are
    functions of sigma / alpha, which equals theta up to third order and u only up to second order.

    S = V diag(variances) V^T + rest (I - V V^T): of full rank or of low rank plus isotropic.

    Args:
        mean: m, shaped like one sample; () for samples of any shape.
        axes: V (d, r) with orthonormal columns.
        variances: (r,), positive.
        rest: the variance in the directions orthogonal to V; positive, not used if r = d.
    """

    mean: Annotated[Tensor, finite]
    axes: Annotated[Tensor, finite]
    variances: Annotated[Tensor, finite]
    rest: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        axes, variances = tuple(self.axes.shape), tuple(self.variances.shape)
        if len(axes) != 2 or variances != axes[1:]:
            raise ValueError(f"axes and variances must be (d, r) and (r,); got {axes}, {variances}")
        if self.mean.numel() not in (1, axes[0]):
            got = tuple(self.mean.shape)
            raise ValueError(f"mean must have {axes[0]} coordinates, as the axes; got shape {got}")
        if not bool((self.variances > 0).all()):
            least = float(self.variances.min())
            raise ValueError(f"variances must be positive; got {least:g}; use a floor")

    def __repr__(self) -> str:
        return f"GaussianFrame(rank {self.axes.shape[1]} of {self.axes.shape[0]})"

    @staticmethod
    @arguments
    def of(
        mean: Tensor, covariance: Tensor, *, rank: int | None = None, floor: NonNegative = 0.0
    ) -> "GaussianFrame":
        """Make the frame of a mean (*shape,) and a covariance (d, d).

        Args:
            rank: number of eigenvectors to keep, those of the largest eigenvalues [all]; in the
                other directions the variance is the mean of the other eigenvalues.
            floor: smallest eigenvalue allowed; smaller ones are raised to it. Constant pixels have
                eigenvalue 0: for dequantized images use the variance of the dequantization noise,
                `data.DEQUANTIZATION`.
        """
        wanted, got = (mean.numel(),) * 2, tuple(covariance.shape)
        if got != wanted:
            raise ValueError(f"covariance must be {wanted} for this mean; got {got}")
        variances, axes = torch.linalg.eigh(covariance.double())
        variances = variances.clamp(min=floor)
        kept = integer("rank", len(axes) if rank is None else rank, 1, len(axes))
        left = variances[: len(axes) - kept]
        rest = float(left.mean()) if len(left) else 1.0
        return GaussianFrame(mean.double(), axes[:, -kept:], variances[-kept:], rest)

    def clock(self, level: Level[float]) -> float:
        return math.atan2(level.sigma, level.alpha)

    def log_snr(self, clock: Tensor) -> Tensor:
        return -2 * clock.tan().log()

    def enter(self, x: Tensor, level: Level) -> Tensor:
        alpha, sigma, mean, spectrum, flat = self._parts(level, x)
        gains = [(s / (alpha**2 * s + sigma**2)) ** 0.5 for s in spectrum]
        return (mean + self._apply(gains, flat - alpha * mean)).reshape(x.shape)

    def leave(self, z: Tensor, level: Level) -> Tensor:
        alpha, sigma, mean, spectrum, flat = self._parts(level, z)
        gains = [((alpha**2 * s + sigma**2) / s) ** 0.5 for s in spectrum]
        return (alpha * mean + self._apply(gains, flat - mean)).reshape(z.shape)

    def slope(self, prediction: Prediction) -> Tensor:
        x0, eps = prediction.x0, coordinates(prediction.eps)
        alpha, sigma, mean, spectrum, flat = self._parts(prediction.level, x0)
        power = alpha**2 + sigma**2
        common = [power * s**0.5 * (alpha**2 * s + sigma**2) ** -1.5 for s in spectrum]
        of_eps = [c * alpha * s for c, s in zip(common, spectrum, strict=True)]
        of_x0 = [c * -sigma for c in common]
        return (self._apply(of_eps, eps) + self._apply(of_x0, flat - mean)).reshape(x0.shape)

    def posterior_root(self, v: Tensor, level: Level) -> Tensor:
        """Return L v with L L = Cov[x0 | x] = sigma^2 S C^-1 for data N(m, S); v (B, ...)."""
        alpha, sigma, _, spectrum, flat = self._parts(level, v)
        stds = [posterior_variance(s, alpha, sigma) ** 0.5 for s in spectrum]
        return self._apply(stds, flat).reshape(v.shape)

    def save(self, path: str | Path, **record: object) -> None:
        """Write `path` (.safetensors, in float32) and a JSON file beside it; `load` reads them."""
        tensors = {name: getattr(self, name).float() for name in PARTS}
        storage.write(Path(path), tensors, {"rest": self.rest, **record})

    @staticmethod
    def load(path: str | Path) -> "GaussianFrame":
        """Read a file of `save`.

        Raises:
            storage.BadFile: if anything is missing or damaged; it names the file and the reason.
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
        choice("name", name, sorted(path.stem for path in folder.glob("*.safetensors")))
        return GaussianFrame.load(folder / f"{name}.safetensors")

    def _parts(
        self, level: Level, x: Tensor
    ) -> tuple[Scalar, Scalar, Tensor, tuple[Tensor, float], Tensor]:
        """Return alpha, sigma, the mean, the spectrum of S, and x as (B, d).

        The spectrum is the eigenvalues of the axes (r,), and that of all orthogonal directions.
        """
        flat, d = coordinates(x), len(self.axes)
        if flat.shape[1] != d:
            got = flat.shape[1]
            raise ValueError(f"x must have {d} coordinates per sample, as the frame; got {got}")
        mean, _, variances = on(self, x.dtype, x.device)
        alpha, sigma = per_sample(level.alpha, flat), per_sample(level.sigma, flat)
        return alpha, sigma, mean, (variances, self.rest), flat

    def _apply(self, gains: list[Scalar], v: Tensor) -> Tensor:
        """Apply the function of S that has the values `gains` on its spectrum to v (B, d)."""
        of_axes, of_rest = gains
        axes = on(self, v.dtype, v.device)[1]
        if axes.shape[1] == axes.shape[0]:
            return (v @ axes * of_axes) @ axes.T
        return v * of_rest + (v @ axes * (of_axes - of_rest)) @ axes.T


@lru_cache(maxsize=8)
def on(
    frame: GaussianFrame, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (d,), axes and variances of a frame in a dtype on a device; cached."""
    parts = frame.mean.flatten(), frame.axes, frame.variances
    mean, axes, variances = (part.to(dtype).to(device) for part in parts)
    return mean, axes, variances


def check_orthonormal(axes: Tensor) -> None:
    """Refuse V (d, r) unless  V^T V w = w  for one random w: this takes d r operations only.

    Rounding to float32 changes each entry of V by a factor 1 +- 2^-24, and w by at most 2^-24 d.
    """
    if not 0 < axes.shape[1] <= axes.shape[0]:
        raise ValueError(f"axes must be (d, r) with 0 < r <= d; got {tuple(axes.shape)}")
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(axes.shape[1], generator=generator, dtype=axes.dtype)
    off = float((axes.T @ (axes @ w) - w).abs().max())
    if not off <= 1e-6 * len(axes):
        raise ValueError(f"axes must be orthonormal; got an error of {off:.1g}")
