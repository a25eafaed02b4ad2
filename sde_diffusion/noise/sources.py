"""Sources of random numbers. Nothing in this package reads or advances a global generator.

Every draw of a seeded source is a function of its key alone: a Philox counter (Salmon et al. 2011)
with the key (seed, purpose, step, position). So a sample does not depend on the rest of its batch,
and a training step does not depend on the number of processes.
"""

from collections.abc import Callable, Sequence, Sized
from enum import IntEnum
from functools import partial
from typing import Any, Protocol

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
    """Return the random stream of one address, from its block number `block` on.

    An address has 2^64 blocks of its own; a block is four 64-bit words, such as four float64
    numbers in [0, 1).
    """
    seed = validate.integer("each seed", seed, at_least=0, at_most=2**128 - 1)
    counter = [block, position, step, int(purpose)]
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


class Noise(Protocol):
    """A source of standard normal noise for the interval [s, t] of a path.

    An independent source ignores t and s; a Brownian path or a bridge needs them.
    """

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        """Draw N(0, I) with the shape, dtype and device of `like`."""
        ...


def check_seeds(seeds: Sized, like: Tensor) -> None:
    """Refuse a number of seeds that is not the number of samples."""
    if len(seeds) != len(like):
        got = f"{len(seeds)} for a batch of {len(like)}"
        raise ValueError(f"seeds must hold one seed per sample; got {got}")


def sequence_of_seeds(seeds: Any) -> Sequence[int]:
    """Return `seeds` if it is a sequence; a single number and a tensor are not."""
    if isinstance(seeds, Tensor | str) or not hasattr(seeds, "__len__"):
        hint = "; use seeds.tolist()" if isinstance(seeds, Tensor) else ""
        got = validate.shown(seeds) + hint
        raise TypeError(f"seeds must be a sequence of integers, one per sample; got {got}")
    return seeds


class Generated:
    """Independent draws for the whole batch from one torch generator.

    Args:
        generator: on the CPU or on the device of the batch; None makes one with fresh entropy.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        what = "a torch.Generator; for a number use seeds="
        self.generator = validate.kind("generator", generator, what, "device", "seed")

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        device = self.generator.device
        draw = torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=device)
        return draw.to(like.device)

    def entropy(self) -> int:
        """Draw a seed for a library with its own generator."""
        draw = torch.randint(2**62, (), generator=self.generator, device=self.generator.device)
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
        check_seeds(self.streams, like)
        dtype = np.float64 if like.dtype == torch.float64 else np.float32
        rows = [row.standard_normal(like.shape[1:], dtype=dtype) for row in self.streams]
        return torch.from_numpy(np.stack(rows)).to(like) if rows else torch.empty_like(like)


class Injected:
    """A function noise(t, s, like) of the caller, whose draws are checked.

    A draw of another shape would be broadcast: all samples would have the same noise.
    """

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        draw: Any = self.noise(t, s, like)
        if not isinstance(draw, Tensor):
            raise TypeError(f"noise must return a tensor; got {validate.shown(draw)}")
        for name in ("shape", "dtype", "device"):
            got, wanted = getattr(draw, name), getattr(like, name)
            if got != wanted:
                got, wanted = (tuple(v) if name == "shape" else v for v in (got, wanted))
                raise ValueError(f"noise must return the {name} of like, {wanted}; got {got}")
        return draw


class Repeated:
    """A source whose draws are kept in a list: draws that are in it already are repeated.

    Args:
        source: of the first run.
        draws: empty in the first run.
    """

    def __init__(self, source: Noise, draws: list[Any]) -> None:
        self.source, self.draws, self.count = source, draws, 0
        entropy = getattr(source, "entropy", None)
        self.entropy = entropy and partial(self.next, entropy)

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        return self.next(self.source, t, s, like)

    def next(self, draw: Callable[..., Any], *arguments: Any) -> Any:
        """Return the next draw."""
        if self.count == len(self.draws):
            self.draws.append(draw(*arguments))
        self.count += 1
        return self.draws[self.count - 1]


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
    source: Noise = Generated(generator)
    if seeds is not None:
        source = Seeded(sequence_of_seeds(seeds), Purpose.PRIOR)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type; got {dtype}")
    sizes = validate.shape("shape", shape)
    if not sizes:
        raise ValueError("shape must be that of a batch (B, ...); got ()")
    return source(1.0, 1.0, torch.empty(sizes, dtype=dtype, device=device))
