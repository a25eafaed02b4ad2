"""Sources of random numbers. Global generators are neither read nor advanced.

Every draw of a seeded source is a function of its key alone: a Philox counter (Salmon et al. 2011)
addressed by (seed, purpose, step, position). A sample is therefore independent of the rest of its
batch, and a training step of the number of processes that share it.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import validate

__all__ = ["Generated", "Noise", "Purpose", "Seeded", "stream"]


class Purpose(IntEnum):
    """Purpose of a stream of numbers; streams of different purposes never overlap."""

    PRIOR = 0
    PATH = 1
    ORDER = 2
    BATCH = 3
    TIMES = 4
    TOY = 5
    DROPOUT = 6
    FOREIGN = 7


def stream(
    seed: int, purpose: Purpose, step: int = 0, position: int = 0, block: int = 0
) -> np.random.Generator:
    """The random stream at one address, from block number `block` on.

    An address has 2^64 blocks that no other shares; a block is four 64-bit words, such as four
    float64 numbers in [0, 1).
    """
    seed = validate.integer("seed", seed, at_least=0, at_most=2**128 - 1)
    counter = [block, position, step, int(purpose)]
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


class Noise(Protocol):
    """A source of the standard normal that belongs to the interval [s, t] of a path.

    An independent source ignores t and s; a Brownian path or a bridge needs them.
    """

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        """A draw of N(0, I) with the shape, dtype and device of `like`."""
        ...


class Generated:
    """Independent draws for the whole batch from one torch generator.

    Args:
        generator: source of the numbers, on the CPU or on the device of the batch; None stands for
            fresh entropy.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self.generator = generator

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        draw = torch.randn(
            like.shape, generator=self.generator, dtype=like.dtype, device=self.generator.device
        )
        return draw.to(like.device)

    def entropy(self) -> int:
        """A seed for a library with its own random generator."""
        low, high = 0, 2**62
        draw = torch.randint(low, high, (), generator=self.generator, device=self.generator.device)
        return int(draw)


class Seeded:
    """Independent draws with one stream per sample: row k depends on seeds[k] alone.

    Args:
        seeds: one non-negative integer per row of the batch.
        purpose: PRIOR for the start of a path, PATH for its noise.
    """

    def __init__(self, seeds: Sequence[int], purpose: Purpose = Purpose.PATH) -> None:
        self.streams = [stream(seed, purpose) for seed in seeds]

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        if len(self.streams) != len(like):
            raise ValueError(
                f"seeds must hold one seed per sample; got {len(self.streams)} for a batch of "
                f"{len(like)}"
            )
        dtype = np.float64 if like.dtype == torch.float64 else np.float32
        rows = [row.standard_normal(like.shape[1:], dtype=dtype) for row in self.streams]
        return torch.from_numpy(np.stack(rows)).to(like) if rows else torch.empty_like(like)


def start(
    shape: Sequence[int],
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """N(0, I) of this shape (B, ...), from a generator or from one seed per sample."""
    if generator is not None and seeds is not None:
        raise ValueError("generator must be left out where seeds are given; got both")
    source: Noise = Seeded(seeds, Purpose.PRIOR) if seeds is not None else Generated(generator)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type; got {dtype}")
    sizes = validate.shape("shape", shape)
    if not sizes:
        raise ValueError("shape must be that of a batch (B, ...); got ()")
    return source(1.0, 1.0, torch.empty(sizes, dtype=dtype, device=device))
