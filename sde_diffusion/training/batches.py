"""One step's data and noise, as functions of (seed, step, position in the global batch).

A resumed run draws the numbers of the uninterrupted one, and several processes or accumulated parts
of a batch draw the numbers of one process.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.data.datasets import Data, shuffled_indices
from sde_diffusion.losses.times import TimeDistribution, stratified
from sde_diffusion.networks import Dropout
from sde_diffusion.noise.counter import normals, row_keys, uniforms
from sde_diffusion.noise.sources import Purpose, stream
from sde_diffusion.training.recipe import Recipe

__all__ = ["Batch", "draw"]


class Batch(NamedTuple):
    """A contiguous part of one step's global batch: all of its randomness but the masks of dropout.

    Attributes:
        x0: samples (B, ...).
        t: times in [0, 1], (B,) float64.
        eps: standard normal noise, shaped like x0.
        cond: a condition (B, ...) of any shape and dtype, several by name, or None.
        first: position of the first sample in the global batch.
        keep: bool (B,), False where the sample is trained without its conditions; None: all True.
        mask: bools shaped like x0, False where a coordinate is unknown; None: all True.
        rows: of the data set, (B,), for messages.
    """

    x0: Tensor
    t: Tensor
    eps: Tensor
    cond: validate.Cond | None
    first: int = 0
    keep: Tensor | None = None
    mask: Tensor | None = None
    rows: Tensor | None = None


@validate.arguments
def draw(
    data: Data,
    recipe: Annotated[Recipe, validate.Kind("a Recipe", "batch_size", "seed")],
    times: TimeDistribution,
    step: Annotated[int, validate.Integer(0, 2**63 - 1)],
    positions: Annotated[range, validate.Kind("a range", "start", "stop")] | None = None,
    device: torch.device | None = None,
) -> Batch:
    """Draw the part `positions` of the global batch of `step`, a function of its arguments alone.

    Args:
        data: the samples, in the order of `shuffled_indices`.
        recipe: its seed, batch_size and cond_dropout.
        times: the law of t, evaluated at one quantile in each of batch_size strata.
        positions: a contiguous part of range(batch_size); all of it by default.
        device: device of the batch and of its noise; the CPU by default.
    """
    everything = range(recipe.batch_size)
    positions = everything if positions is None else positions
    if positions != everything[positions.start : positions.stop] or not positions:
        raise ValueError(f"positions must be a contiguous part of {everything}; got {positions}")
    start = step * recipe.batch_size
    index = shuffled_indices(recipe.seed, len(data), start + positions.start, len(positions))
    noise, dequantization, dropped = words(recipe.seed, Purpose.BATCH, step, 3)
    like = torch.empty((len(positions), *data.shape), device=device)
    eps = normals(row_keys(noise, positions, device), like)
    uniform = uniforms(row_keys(dequantization, positions, device), data.shape)
    places = torch.arange(positions.start, positions.stop)
    offset = stream(recipe.seed, Purpose.TIMES, step).random()
    t = times(stratified(offset, places, recipe.batch_size))
    x0, cond, *known = data.batch(index, uniform)
    if x0.shape != like.shape or not x0.is_floating_point():
        got = f"{tuple(x0.shape)}, {x0.dtype}"
        raise ValueError(f"data.batch must return floats of shape {tuple(like.shape)}; got {got}")
    keep, share = None, recipe.cond_dropout
    if share and cond is None:
        raise ValueError(f"cond_dropout must be 0 for data without conditions; got {share}")
    if share:
        keep = uniforms(row_keys(dropped, positions, device), ()) >= share
    return Batch(x0, t, eps, cond, positions.start, keep, known[0] if known else None, index)


def to_device(cond: Any, device: torch.device) -> Any:
    """Move a tensor, or tensors by name, to a device and keep their dtypes; None stays None."""
    if isinstance(cond, Mapping):
        return {name: value.to(device) for name, value in cond.items()}
    return None if cond is None else cond.to(device)


def mask(
    layers: Sequence[Dropout], recipe: Recipe, step: int, batch: Batch, device: torch.device
) -> None:
    """Set the keys of each layer's masks for this part of the step's batch."""
    positions = range(batch.first, batch.first + len(batch.x0))
    bases = words(recipe.seed, Purpose.DROPOUT, step, len(layers)) if layers else []
    for layer, base in zip(layers, bases, strict=True):
        layer.keys = row_keys(base, positions, device)


def words(seed: int, purpose: Purpose, step: int, count: int) -> list[int]:
    """The first 64-bit words of a step's stream."""
    return stream(seed, purpose, step).integers(2**64, size=count, dtype="uint64").tolist()


def stretches(recipe: Recipe, processes: int, process: int, parts: int) -> Iterator[range]:
    """The positions of one process in a global batch, cut into `parts` pieces.

    Raises:
        ValueError: if there are fewer positions than pieces: none may be empty.
    """
    size, pieces = recipe.batch_size, processes * parts
    if size < pieces:
        rule = f"at least {pieces} for {processes} processes with {parts} parts each"
        raise ValueError(f"batch_size must be {rule}; got {size}")
    for part in range(process * parts, (process + 1) * parts):
        yield range(part * size // pieces, (part + 1) * size // pieces)
