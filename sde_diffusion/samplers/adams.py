r"""Variable-step Adams methods, with a correction that costs no call.

With slopes F_n = dz/dc of a frame (see frames.py) at c_n on its clock, a step from c_n to c_(n+1)
is predicted by Adams-Bashforth. Before the *next* step, which evaluates F at the predicted point
anyway, it is corrected by Adams-Moulton (the idea of UniPC, Zhao et al. 2023):

    predict   z_(n+1) = z_n + sum_j w_j F_(n-j),   j = 0 .. k-1     w = integrals of the Lagrange
    correct   z_(n+1) = z_n + sum_j w_j F_(n+1-j), j = 0 .. c-1     basis over [c_n, c_(n+1)]

One call a step. A prediction extrapolates, which favours few slopes; a correction interpolates and
uses all slopes that exist, up to five. The last step, to sigma = 0, is a prediction without a
correction and uses one slope less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

from torch import Tensor

from sde_diffusion.grids import Grid, Power
from sde_diffusion.grids.frames import IS_FRAME, Frame, Straight
from sde_diffusion.samplers.sampler import Claims, Level, Model, Noise, finest
from sde_diffusion.validate import Checked, Count, Integer, Positive, arguments

__all__ = ["Adams", "adams_weights"]

SLOPES = 5  # in a correction, or k + 1 if that is more
FIRST = 0.5  # length of the first step, in units of the others

# Calls -> (k, p, start), as experiments/adams_table.py finds them.
STRAIGHT: dict[int, tuple[int, float, float | None]] = {
    3: (2, 1.0, None), 4: (2, 1.0, None), 5: (2, 1.4, None), 6: (2, 1.4, None),
    8: (2, 1.4, None), 10: (3, 1.4, None), 12: (3, 1.3, None), 15: (3, 1.4, None),
    20: (4, 1.4, None), 30: (5, 1.6, None), 50: (5, 1.4, None), 100: (5, 1.4, None),
}  # fmt: skip
GAUSSIAN: dict[int, tuple[int, float, float | None]] = {
    3: (1, 1.3, 2.0), 4: (1, 1.6, 4.0), 5: (2, 1.3, 4.0), 6: (2, 1.6, 4.0),
    8: (2, 1.4, 12.0), 10: (2, 1.6, 12.0), 12: (3, 1.6, 12.0), 15: (3, 1.6, 12.0),
    20: (3, 1.6, None), 30: (4, 1.6, None), 50: (5, 1.6, None), 100: (5, 1.4, None),
}  # fmt: skip


class History(NamedTuple):
    """The last corrected state and the slopes on the way to it, newest first."""

    z: Tensor
    nodes: tuple[float, ...]
    slopes: tuple[Tensor, ...]


@dataclass(frozen=True)
class Adams(Checked):
    """Adams-Bashforth-Moulton with k slopes, on a grid evenly spaced in clock^(1/p).

    The first steps have fewer slopes, so the first one is half as long as the others. A corrected
    prediction has order k + 1; the first step limits the order to 3 and the last to k (except for
    k = 1).

    Args:
        k: slopes in the prediction, 1 to 5.
        p: concentration of the grid towards the data; 1 is even on the clock.
        frame: coordinates of the integration, `frames.Straight()` or a `frames.GaussianFrame`.
        start: for a Gaussian frame, the sigma / alpha at which the calls begin: above it one more
            step, without a call, follows the exact flow of the Gaussian. Useful for few calls: its
            error does not decrease with the steps. None: from t = 1.
    """

    k: Annotated[int, Integer(1, 5)] = 3
    p: Positive = 1.4
    frame: Annotated[Frame, IS_FRAME] = Straight()  # noqa: RUF009 a frozen value
    start: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None and self.frame == Straight():
            raise ValueError(f"start must be None in the straight frame; got {self.start}")

    @staticmethod
    @arguments
    def auto(
        calls: Count,
        frame: Annotated[Frame, IS_FRAME] = Straight(),  # noqa: B008 a frozen value
    ) -> "Adams":
        """The setting with the least error at this number of calls.

        Used as `sample(..., Adams.auto(n), x, steps=n)`. The setting is the first row of a table
        with at least this number of calls; experiments/adams_table.py derives the table on
        mixtures and can be run on other data.
        """
        table = STRAIGHT if frame == Straight() else GAUSSIAN
        k, p, start = table[min((n for n in table if n >= calls), default=max(table))]
        return Adams(k, p, frame, start)

    @property
    def claims(self) -> Claims:
        """Each step ends with a prediction of order k, which the next step corrects."""
        order = min(max(self.k, 2), 3)
        return Claims(order, step_order=min(self.k, order))

    @property
    def grid(self) -> Grid:
        """n steps, preceded by the one without a call if `start` is given."""
        return Power(self.p, self.frame, FIRST, self.start)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: History | None,
    ) -> tuple[Tensor, History | None]:  # fmt: skip
        frame = self.frame
        now, then = frame.clock(t), frame.clock(s)
        low = s if then < now else t  # a path may also go up
        trusted = self.start is not None and low.sigma >= (1 - 1e-9) * self.start * low.alpha
        # If alpha underflows at both, they are one level.
        if trusted or abs(now - then) <= finest(x.dtype):
            return frame.leave(frame.enter(x, t), s), memory
        slope = frame.slope(model(x, t))
        if memory is None:
            z, nodes, slopes = frame.enter(x, t), (now,), (slope,)
        else:
            nodes, slopes = (now, *memory.nodes), (slope, *memory.slopes)
            z = advanced(memory.z, nodes, slopes, memory.nodes[0], now)
        k = max(1, self.k - 1) if s.sigma == 0 else self.k
        predicted = advanced(z, nodes[:k], slopes[:k], now, then)
        last = max(self.k, SLOPES - 1)  # one fewer than a correction uses: the next slope is added
        return frame.leave(predicted, s), History(z, nodes[:last], slopes[:last])


def advanced(
    z: Tensor, nodes: Sequence[float], slopes: Sequence[Tensor], start: float, end: float
) -> Tensor:
    """z plus the integral over [start, end] of the polynomial through the slopes."""
    weights = adams_weights(tuple(nodes), start, end)
    z = z.add(slopes[0], alpha=weights[0])
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        z.add_(slope, alpha=weight)
    return z


@lru_cache(maxsize=4096)
def adams_weights(nodes: tuple[float, ...], start: float, end: float) -> tuple[float, ...]:
    """Integrals over [start, end] of the Lagrange polynomials on `nodes`.

    In z = (c - start) / (end - start) each is expanded in powers of z and integrated over [0, 1].
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
