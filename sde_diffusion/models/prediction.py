r"""Predictions: what a model says of the clean data and the noise in a noisy batch.

Convention: x = alpha x0 + sigma eps. Every quantity in use is a combination of x0 and eps:

    score = -eps / sigma,    v = alpha eps - sigma x0,    velocity = eps - x0.

A parameterization says how x0 and eps follow from what the network puts out. They are linear in
(x, out), so a prediction keeps only that pair and the coefficients: any quantity costs two fused
operations, and none is computed that is not asked for.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sde_diffusion.processes import Level, Scalar

__all__ = ["Parameterization", "Prediction", "from_network", "truth"]

Row = tuple[Scalar, Scalar]  # (a, b) stands for  a first + b second


class Parameterization(Protocol):
    """What the network's output means. Implementations are frozen dataclasses."""

    def input_scale(self, level: Level) -> Scalar:
        """The network sees this times x; 1 unless the parameterization says otherwise."""
        return 1.0

    def x0(self, level: Level) -> Row:
        """x0 as a combination of (x, out)."""
        ...

    def eps(self, level: Level) -> Row:
        """eps as a combination of (x, out)."""
        ...

    def target(self, prediction: "Prediction") -> Tensor:
        """What the network should have put out, were `prediction` the truth."""
        ...


class Prediction:
    """x0, eps, score, v and velocity of a batch, each computed when asked for.

    Every one is a fresh tensor, which a sampler may work on in place.

    Args:
        first, second: two tensors (B, ...) that span the prediction, usually x and the output.
        level: where the batch stands.
        meaning: how x0 and eps are combined from them.
        extra: what else the network put out (B, ...), such as the variance's interpolation.
    """

    __slots__ = ("extra", "first", "level", "meaning", "second")

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        level: Level,
        meaning: Parameterization,
        extra: Tensor | None = None,
    ) -> None:
        self.first, self.second, self.level, self.meaning = first, second, level, meaning
        self.extra = extra

    def combine(self, of_x0: Scalar, of_eps: Scalar) -> Tensor:
        """of_x0 * x0 + of_eps * eps, without forming either."""
        a, b = 0.0, 0.0
        if not is_zero(of_x0):
            c, d = self.meaning.x0(self.level)
            a, b = of_x0 * c, of_x0 * d
        if not is_zero(of_eps):
            c, d = self.meaning.eps(self.level)
            a, b = a + of_eps * c, b + of_eps * d
        if is_zero(a):
            return self.second * b
        if is_zero(b):
            return self.first * a
        if isinstance(b, float):
            return torch.add(self.first * a, self.second, alpha=b)
        return self.first * a + self.second * b

    @property
    def x0(self) -> Tensor:
        """The clean data: E[x0 | x] for the best model."""
        return self.combine(1.0, 0.0)

    @property
    def eps(self) -> Tensor:
        """The noise: E[eps | x]."""
        return self.combine(0.0, 1.0)

    @property
    def score(self) -> Tensor:
        """grad log p_t(x) = -eps / sigma; refused at sigma = 0."""
        return self.combine(0.0, -1.0 / nonzero(self.level.sigma, "the score", "sigma"))

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0 (Salimans & Ho 2022)."""
        return self.combine(-self.level.sigma, self.level.alpha)

    @property
    def velocity(self) -> Tensor:
        """eps - x0 = dy/du, the flow's slope in the straight frame."""
        return self.combine(-1.0, 1.0)


@dataclass(frozen=True)
class Pair(Parameterization):
    """The span is (x0, eps) itself: what is known in closed form, or known because it was drawn."""

    def x0(self, level: Level) -> Row:
        return 1.0, 0.0

    def eps(self, level: Level) -> Row:
        return 0.0, 1.0

    def target(self, prediction: Prediction) -> Tensor:
        raise TypeError("a pair (x0, eps) is not the output of one network")


def truth(x0: Tensor, eps: Tensor, level: Level) -> Prediction:
    """The prediction that is right: the x0 and eps a noisy batch was made from."""
    return Prediction(x0, eps, level, Pair())


def from_network(x: Tensor, out: Any, level: Level, meaning: Parameterization) -> Prediction:
    """The prediction of a network that returned `out` for x (B, C, ...).

    Args:
        out: shaped like x; or (B, 2 C, ...), whose second half is then `extra`; or a tuple or a
            record that has such a tensor first or as `sample`.
    """
    out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    if not isinstance(out, Tensor):
        raise TypeError(f"the output of the network must be a tensor; got {out!r:.80}")
    out = out.to(x.dtype)
    if out.shape == x.shape:
        return Prediction(x, out, level, meaning)
    if x.ndim < 2 or out.shape != (len(x), 2 * x.shape[1], *x.shape[2:]):
        raise ValueError(
            f"the output of the network must be shaped like x, {tuple(x.shape)}, or have twice "
            f"the channels; got {tuple(out.shape)}"
        )
    out, extra = out.chunk(2, dim=1)
    return Prediction(x, out, level, meaning, extra)


def is_zero(scalar: Scalar) -> bool:
    """True for the float 0; a tensor is never inspected, which on a GPU would wait for it."""
    return isinstance(scalar, float) and scalar == 0.0


def nonzero(scalar: Scalar, what: str, name: str) -> Scalar:
    """The scalar, or a named refusal where it is 0."""
    if isinstance(scalar, Tensor):
        zero = scalar.device.type == "cpu" and bool((scalar == 0).any())
    else:
        zero = scalar == 0
    if zero:
        raise ValueError(f"{what} is not defined at {name} = 0")
    return scalar
