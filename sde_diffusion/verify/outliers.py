"""Outliers: draws and steps of a law that differ from their neighbours."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

STANDS_OUT = 4.0  # times the change of its neighbours: a step is reported
MISSING = -5.0  # log share of an outer draw against its neighbour
SMOOTH = 32  # fewer steps are too coarse to judge
UNLIKE = 1.35  # ratio of neighbouring steps from which they are not compared


def odd_draws(draws: Sequence[Any], steps: Sequence[Any]) -> list[str]:
    """Draws that add more or less noise, relative to their step, than their neighbours.

    Between steps of unequal size the shares of a correct sampler differ too: there a draw is
    reported only if it is nearly missing.
    """
    shares = [math.log(max(draw.share, 1e-12)) for draw in draws]
    if any(map(math.isnan, shares)) or max(shares, default=0.0) < -20:
        return []
    found = spikes(shares, least=-MISSING if unjudged(steps) else 0.1)
    if len(shares) >= SMOOTH:  # at the ends shares bend, but none is missing
        pairs = [(0, 1), (1, 2), (2, 3), (-2, -3), (-3, -4)]  # the last may rightly add none
        edge = [(a % len(shares), shares[a] - shares[b]) for a, b in pairs]
        found = sorted([*found, *(each for each in edge if each[1] < MISSING)])
    return [
        f"draw {index + 1} of {len(draws)} (t={draws[index].t:.4g} to {draws[index].s:.4g}) adds "
        f"{draws[index].added:.3e}, {math.exp(excess):.3g} times what those around it would"
        for index, excess in found
    ]


def odd_steps(steps: Sequence[Any]) -> list[str]:
    """Steps that move the law away from the data's by more than their neighbours."""
    if unjudged(steps):
        return []
    steps = at_levels(steps)
    found: dict[int, float] = {}
    for changes in np.diff([step.shift for step in steps], axis=0).T.tolist():
        for index, excess in spikes(changes, least=1e-3):
            found[index] = max(abs(excess), found.get(index, 0.0))
    return [
        f"step {index + 1} of {len(steps) - 1} (t={steps[index].t:.4g} to "
        f"{steps[index + 1].t:.4g}) moves the law by {excess:.2e} standard deviations more than "
        f"those around it"
        for index, excess in sorted(found.items())
    ]


def unjudged(steps: Sequence[Any]) -> str:
    """The reason why steps are not judged by their neighbours; empty if they are."""
    steps = at_levels(steps)
    if steps[0].exact is None:
        return "no step is judged, since the model has no law of its data"
    if len(steps) <= SMOOTH:
        return f"fewer than {SMOOTH} steps are not judged by their neighbours"
    if not even([step.log_snr for step in steps]):
        return "steps differ too much in size to compare them"
    return ""


def at_levels(steps: Sequence[Any]) -> list[Any]:
    """The last state at each level, after any earlier stage."""
    last = {step.t: step for step in steps}
    return list(last.values())


def even(log_snr: Sequence[float]) -> bool:
    """True if neighbouring steps are of like size in log-SNR, all but three at either end."""
    steps = [b - a for a, b in pairwise(log_snr)][3:-3]
    return all(a > 0 and b > 0 and 1 / UNLIKE < b / a < UNLIKE for a, b in pairwise(steps))


def spikes(values: Sequence[float], least: float) -> list[tuple[int, float]]:
    """Indices at which a sequence leaves its neighbours, and by how much.

    Each value is compared with the median of the three to either side; it must be further from it
    than STANDS_OUT times all but one of them, and than `least`. The first and the last three are
    not judged: a multistep scheme warms up there, and the finish at sigma = 0 is a different step.
    Sequences shorter than SMOOTH are not judged: a correct step may stand out there.
    """
    if len(values) < SMOOTH:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(values), 7)
    around = np.delete(windows, 3, axis=1)
    middle = np.median(around, axis=1)
    usual = np.sort(np.abs(around - middle[:, None]))[:, -2]  # an odd one may stand near
    excess = windows[:, 3] - middle
    odd = np.flatnonzero(np.abs(excess) > np.maximum(least, STANDS_OUT * usual))
    return [(3 + int(index), float(excess[index])) for index in odd]
