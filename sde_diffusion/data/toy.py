r"""Distributions in the plane: easy to plot, hard enough to show faults.

By default all are centred and of about unit size, as the noise is. A sample is a function of
(n, seed) alone, and n points are the first n of any longer sample with that seed.

In the formulas u is uniform in [0, 1), z standard normal, and R(a) a rotation by the angle a.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.noise.sources import Purpose, stream

__all__ = ["Chequerboard", "Moons", "Pinwheel", "SwissRoll", "Toy", "TwoGaussians"]


def planar(name: str, x: Tensor) -> None:
    """Rule of points in the plane: a tensor of floats (..., 2)."""
    if x.shape[-1:] != (2,) or not x.is_floating_point():
        raise ValueError(f"{name} must be points (..., 2) of floats; got {validate.shown(x)}")


Planar = Annotated[Tensor, planar]
Finite = Annotated[float, validate.Number()]
AtLeastTwo = Annotated[int, validate.Integer(2)]


class Toy(validate.Checked, ABC):
    """A distribution in the plane. Implementations are frozen dataclasses of its parameters."""

    @validate.arguments
    def sample(self, n: validate.Count, seed: int) -> Float[Tensor, "n 2"]:
        """Draw n independent points, float32.

        Raises:
            TypeError, ValueError: unless n is a positive integer.
        """
        u, z = (stream(seed, Purpose.TOY, step) for step in (0, 1))
        points = self.points(u.random((n, 3)), z.standard_normal((n, 2)))
        return torch.from_numpy(points.astype(np.float32))

    @abstractmethod
    def points(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Map uniform u (n, 3) and standard normal z (n, 2) to points (n, 2), row by row."""


@dataclass(frozen=True)
class TwoGaussians(Toy):
    r"""weight N(+m, std^2 I) + (1 - weight) N(-m, std^2 I),   m = (mean, mean).

    DTU course 02460 has this distribution in the unit square, with unequal shares:
    TwoGaussians(weight=0.2), mapped by x -> (x + 2) / 4.
    """

    mean: Finite = 1.0
    std: validate.Positive = 0.4
    weight: validate.Share = 0.5

    def points(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        sign = np.where(u[:, :1] < self.weight, 1, -1)
        return sign * self.mean + self.std * z

    @validate.arguments
    def log_prob(self, x: Planar) -> Float[Tensor, "*batch"]:
        """Return the log-density at x (..., 2)."""
        shares = torch.tensor([self.weight, 1 - self.weight], dtype=x.dtype, device=x.device)
        means = torch.tensor([self.mean, -self.mean], dtype=x.dtype, device=x.device)
        distance2 = ((x[..., None] - means) ** 2).sum(-2)
        exponents = shares.log() - distance2 / (2 * self.std**2)
        return exponents.logsumexp(-1) - math.log(2 * math.pi * self.std**2)


@dataclass(frozen=True)
class Chequerboard(Toy):
    """Uniform on the dark squares of a board of squares x squares on [-2, 2]^2.

    Square (i, j), counted from the lower left corner, is dark where i + j is even. The default is
    the board of Grathwohl et al. 2019 (FFJORD) at half its size; DTU course 02460 has
    Chequerboard(squares=3), mapped to the unit square by x -> (x + 2) / 4.
    """

    squares: AtLeastTwo = 4

    @property
    def side(self) -> float:
        """Side of one square."""
        return 4 / self.squares

    def points(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        dark = np.argwhere(np.indices((self.squares, self.squares)).sum(0) % 2 == 0)
        corner = dark[(u[:, 0] * len(dark)).astype(int)]
        clear = 2**-20 / self.side  # margin, so that float32 does not round over an edge
        inside = clear + (1 - 2 * clear) * u[:, 1:]
        return self.side * (corner + inside) - 2

    @validate.arguments
    def log_prob(self, x: Planar) -> Float[Tensor, "*batch"]:
        """Return the log-density at x (..., 2): -inf on the light squares and off the board."""
        square = ((x + 2) / self.side).floor()
        on_board = ((square >= 0) & (square < self.squares)).all(-1)
        dark = on_board & (square.sum(-1) % 2 == 0)
        area = math.ceil(self.squares**2 / 2) * self.side**2
        return torch.where(dark, x.new_tensor(-math.log(area)), -torch.inf)


@dataclass(frozen=True)
class Moons(Toy):
    r"""Two interleaved half circles.

    x = sqrt(2) (p - c) + noise z,   c = (1/2, 1/4),   a = pi u,
    p = (cos a, sin a)  or  (1 - cos a, 1/2 - sin a), each half of the time

    The shape is scikit-learn's `make_moons` (Pedregosa et al. 2011), moved to mean 0.
    """

    noise: validate.NonNegative = 0.1

    def points(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        upper = np.stack([np.cos(np.pi * u[:, 1]), np.sin(np.pi * u[:, 1])], axis=1)
        p = np.where(u[:, :1] < 0.5, upper, (1, 0.5) - upper)
        return math.sqrt(2) * (p - (0.5, 0.25)) + self.noise * z


@dataclass(frozen=True)
class SwissRoll(Toy):
    r"""A spiral.

    x = ((a cos a, a sin a) - c) / 7 + noise z,   a = 3 pi (1/2 + u),   c = (2, 2 / (3 pi))

    c makes the mean 0. The shape is that of scikit-learn's
    `make_swiss_roll` (Marsland 2014, ch. 6) seen from its end.
    """

    noise: validate.NonNegative = 0.1

    def points(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        a = 3 * np.pi * (0.5 + u[:, :1])
        p = a * np.concatenate([np.cos(a), np.sin(a)], axis=1)
        return (p - (2, 2 / (3 * np.pi))) / 7 + self.noise * z


@dataclass(frozen=True)
class Pinwheel(Toy):
    r"""Bent arms, evenly turned (Johnson et al. 2016).

    x = sqrt(2) R(2 pi k / arms + rate e^r) (r, tangential z_2),
    r = 1 + radial z_1,   k uniform in 0 .. arms - 1
    """

    arms: AtLeastTwo = 5
    radial: validate.NonNegative = 0.3
    tangential: validate.NonNegative = 0.1
    rate: Finite = 0.25

    def points(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        r, across = 1 + self.radial * z[:, 0], self.tangential * z[:, 1]
        a = 2 * np.pi * np.floor(self.arms * u[:, 0]) / self.arms + self.rate * np.exp(r)
        turned = (r * np.cos(a) - across * np.sin(a), r * np.sin(a) + across * np.cos(a))
        return math.sqrt(2) * np.stack(turned, axis=1)
