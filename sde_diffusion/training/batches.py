"""One step's data and noise, as functions of (seed, step, position in the global batch).

So a resumed run draws what the uninterrupted one would have drawn, and several processes or
accumulated parts of a batch draw what one process draws at once.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.data.datasets import Data, shuffled_indices
from sde_diffusion.losses.times import TimeDistribution, stratified
from sde_diffusion.networks import Dropout
from sde_diffusion.noise.counter import normals, row_keys, uniforms
from sde_diffusion.noise.sources import Purpose, stream
from sde_diffusion.training.recipe import Recipe

__all__ = ["Batch", "draw", "mask", "stretches"]


class Batch(NamedTuple):
    """A stretch of one step's global batch: all of its randomness but that of dropout.

    Attributes:
        x0: samples (B, ...).
        t: times in [0, 1], (B,) float64.
        eps: standard normal noise, shaped like x0.
        cond: conditions (B, width), or None.
        first: position of the first sample in the global batch.
    """

    x0: Tensor
    t: Tensor
    eps: Tensor
    cond: Tensor | None
    first: int = 0


def draw(
    data: Data,
    recipe: Recipe,
    times: TimeDistribution,
    step: int,
    positions: range | None = None,
    device: torch.device | None = None,
) -> Batch:
    """The part `positions` of the global batch of `step`, a function of its arguments alone.

    Args:
        data: where samples come from, in the order of `data.order`.
        recipe: its seed and batch_size.
        times: the law of t, met by one quantile in each of batch_size strata.
        positions: a stretch of range(batch_size); all of it by default.
        device: where the noise is drawn and the batch is wanted; the CPU by default.
    """
    validate.kind("recipe", recipe, "a Recipe", "batch_size", "seed")
    validate.integer("step", step, 0, 2**63 - 1)
    everything = range(recipe.batch_size)
    if positions is not None:
        validate.kind("positions", positions, "a range", "start", "stop")
    positions = everything if positions is None else positions
    if positions != everything[positions.start : positions.stop] or not positions:
        raise ValueError(f"positions must be a stretch of {everything}; got {positions}")
    start = step * recipe.batch_size
    index = shuffled_indices(recipe.seed, len(data), start + positions.start, len(positions))
    noise, dequantization, dropped = words(recipe.seed, Purpose.BATCH, step, 3)
    like = torch.empty((len(positions), *data.shape), device=device)
    eps = normals(row_keys(noise, positions, device), like)
    uniform = uniforms(row_keys(dequantization, positions, device), data.shape)
    places = torch.arange(positions.start, positions.stop)
    offset = stream(recipe.seed, Purpose.TIMES, step).random()
    t = times(stratified(offset, places, recipe.batch_size))
    x0, cond = data.batch(index, uniform)
    if cond is not None and recipe.cond_dropout:
        kept = uniforms(row_keys(dropped, positions, cond.device), (1,)) >= recipe.cond_dropout
        cond = cond * kept
    return Batch(x0, t, eps, cond, positions.start)


def mask(
    layers: Sequence[Dropout], recipe: Recipe, step: int, batch: Batch, device: torch.device
) -> None:
    """Give each layer the masks of this part of the step's batch."""
    positions = range(batch.first, batch.first + len(batch.x0))
    bases = words(recipe.seed, Purpose.DROPOUT, step, len(layers)) if layers else []
    for layer, base in zip(layers, bases, strict=True):
        layer.keys = row_keys(base, positions, device)


def words(seed: int, purpose: Purpose, step: int, count: int) -> list[int]:
    """The first 64-bit words of a step's stream."""
    return stream(seed, purpose, step).integers(2**64, size=count, dtype="uint64").tolist()


def stretches(recipe: Recipe, processes: int, process: int, parts: int) -> Iterator[range]:
    """What one of the processes does of a global batch, in as many parts.

    Raises:
        ValueError: if there are fewer positions than parts: each process must have work in each.
    """
    size, pieces = recipe.batch_size, processes * parts
    if size < pieces:
        raise ValueError(
            f"batch_size must be at least {pieces} for {processes} processes with {parts} parts "
            f"each; got {size}"
        )
    for part in range(process * parts, (process + 1) * parts):
        yield range(part * size // pieces, (part + 1) * size // pieces)
