r"""Variable-step Adams methods in the straight frame, with a correction that costs no call.

With slopes F_n = velocity(y_n, u_n), a step from u_n to u_(n+1) is predicted by Adams-Bashforth,
and before the *next* step, when F at the predicted point has been evaluated anyway, it is redone
by Adams-Moulton (the idea of UniPC, Zhao et al. 2023, in velocity form):

    predict   y_(n+1) = y_n + sum_j w_j F_(n-j),   j = 0 .. k-1     w = integrals of the Lagrange
    correct   y_(n+1) = y_n + sum_j w_j F_(n+1-j), j = 0 .. k       basis over [u_n, u_(n+1)]

One call a step. The last step, to sigma = 0, is a prediction: nothing is evaluated there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion import errors, frames
from sde_diffusion.denoiser import Model
from sde_diffusion.noise import Noise
from sde_diffusion.processes import Level, Process

__all__ = ["Adams", "adams_weights"]


class History(NamedTuple):
    """The last corrected state and the slopes on the way to it, newest first."""

    y: Tensor
    nodes: tuple[float, ...]
    slopes: tuple[Tensor, ...]


@dataclass(frozen=True)
class Adams:
    """Adams-Bashforth-Moulton with k slopes, on a grid evenly spaced in u^(1/p).

    The order is k + 1, that of the corrector, but 3 at most: the first steps have only one slope
    to predict from and two to correct with, an error of third order.

    Args:
        k: slopes in the prediction, 1 to 5. 2 suits up to 12 calls, 3 up to 30.
        p: concentration of the grid towards the data; 1 is even in u.
    """

    k: int = 3
    p: float = 1.25

    def __post_init__(self) -> None:
        errors.integer("k", self.k)
        if self.k > 5:
            raise ValueError(f"k must be at most 5; got {self.k}")
        errors.number("p", self.p, 0, strict=True)

    @property
    def order(self) -> int:
        return min(self.k + 1, 3)

    @property
    def step_order(self) -> int:
        """k, up to the order: a step ends with a prediction, which the next one corrects."""
        return min(self.k, self.order)

    def grid(self, process: Process, steps: int | None) -> Tensor:
        return frames.grid(process, errors.integer("steps", steps), self.p)

    def step(
        self,
        model: Model,
        x: Tensor,
        t: Level[float],
        s: Level[float],
        noise: Noise,
        memory: History | None,
    ) -> tuple[Tensor, History | None]:
        if t.u - s.u <= finest(x.dtype):  # or alpha has underflowed at both: one level, no step
            return frames.leave(frames.enter(x, t), s), memory
        slope = model(x, t).velocity
        if memory is None:
            y, nodes, slopes = frames.enter(x, t), (t.u,), (slope,)
        else:
            nodes, slopes = (t.u, *memory.nodes), (slope, *memory.slopes)
            y = advanced(memory.y, nodes, slopes, memory.nodes[0], t.u)
        nodes, slopes = nodes[: self.k], slopes[: self.k]
        predicted = advanced(y, nodes, slopes, t.u, s.u)
        return frames.leave(predicted, s), History(y, nodes, slopes)


def finest(dtype: torch.dtype) -> float:
    """The least step whose slopes can be told apart; x of less than 32 bits is held to that."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def advanced(
    y: Tensor, nodes: Sequence[float], slopes: Sequence[Tensor], start: float, end: float
) -> Tensor:
    """y plus the integral over [start, end] of the polynomial through the slopes."""
    weights = adams_weights(tuple(nodes), start, end)
    y = y.add(slopes[0], alpha=weights[0])
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        y.add_(slope, alpha=weight)
    return y


@lru_cache(maxsize=4096)
def adams_weights(nodes: tuple[float, ...], start: float, end: float) -> tuple[float, ...]:
    """Integrals over [start, end] of the Lagrange polynomials on `nodes`.

    In z = (u - start) / (end - start) each is expanded in powers of z and integrated over [0, 1].
    """
    h = end - start
    z = [(node - start) / h for node in nodes]
    weights = []
    for j, own in enumerate(z):
        powers = [1.0]  # coefficients of prod_(i != j) (z - z_i) / (z_j - z_i), lowest first
        for i, other in enumerate(z):
            if i != j:
                shifted, gap = [0.0, *powers], own - other
                scaled = [*(other * c for c in powers), 0.0]
                powers = [(a - b) / gap for a, b in zip(shifted, scaled, strict=True)]
        weights.append(h * sum(c / (n + 1) for n, c in enumerate(powers)))
    return tuple(weights)
