"""Counter-based random numbers: each word of a stream can be computed alone.

SplitMix64 (Steele, Lea & Flood 2014) on int64 tensors, on the device that uses the numbers.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

__all__ = ["normals", "row_keys", "uniforms"]

# SplitMix64 (Steele, Lea & Flood 2014): the k-th word of a stream is mixed(key + k GAMMA).
GAMMA = 0x9E3779B97F4A7C15

ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

LAST = 31

WORDS = 2**64


def signed(word: int) -> int:
    """Reinterpret a 64-bit word as int64."""
    return word - WORDS if word >= WORDS // 2 else word


def mixed(word: int) -> int:
    """Mix a 64-bit word as SplitMix64 does, by Stafford's variant 13."""
    for shift, factor in ROUNDS:
        word = (word ^ word >> shift) * factor % WORDS
    return word ^ word >> LAST


def mixed_(words: Tensor) -> Tensor:
    """Mix a tensor of int64 in place, like `mixed`; masks undo the sign extension of shifts."""
    shifted = torch.empty_like(words)
    for shift, factor in ROUNDS:
        torch.bitwise_right_shift(words, shift, out=shifted).bitwise_and_(2 ** (64 - shift) - 1)
        words.bitwise_xor_(shifted).mul_(signed(factor))
    torch.bitwise_right_shift(words, LAST, out=shifted).bitwise_and_(2 ** (64 - LAST) - 1)
    return words.bitwise_xor_(shifted)


def normals(keys: Tensor, like: Tensor) -> Tensor:
    r"""Return N(0, I) by key: row k is a function of keys[k] and of the shape of a row.

    The two 32-bit halves of a word make two normals (Box & Muller 1958): with u, v in (-1, 1),

        sign(u) sqrt(-2 log |u|) (sin(pi v / 2), cos(pi v / 2)).

    In float64, u and v have 31 more bits; the numbers are otherwise those of float32.

    Args:
        keys: (B,) int64, on the device of `like`.
        like: (B, ...), float32 or float64.
    """
    if not like.numel():
        return torch.empty_like(like)
    size = like.shape[1:].numel()
    uniform = odd_halves(keys, size, like)
    if like.dtype == torch.float64:
        uniform.add_(odd_halves(keys ^ signed(GAMMA), size, like).mul_(2.0**-31))
    uniform.mul_(2.0**-31)
    v, u = uniform[:, 0], uniform[:, 1]
    radius = u.abs().log_().neg_().sqrt_().mul_(u.sign())
    torch.abs(v, out=u).sub_(1)  # cos(pi v / 2) = sin(pi (1 - |v|) / 2); its sign is that of u
    made = quarter_sine(uniform).mul_(radius[:, None])
    return made.flatten(1)[:, :size].reshape(like.shape)


def odd_halves(keys: Tensor, size: int, like: Tensor) -> Tensor:
    """Return odd signed 32-bit integers in the dtype of `like`, (B, 2, pairs) for `size` numbers.

    As they are odd, none is 0 and each is as likely as its negative.
    """
    words = mixed_(keys[:, None] + counters((size + 1) // 2, keys.device))
    words.bitwise_or_(2**32 + 1)
    made = torch.empty((len(words), 2, words.shape[1]), dtype=like.dtype, device=like.device)
    return made.copy_(words.view(torch.int32).view(*words.shape, 2).mT)


@lru_cache(maxsize=8)
def counters(n: int, device: torch.device) -> Tensor:
    """Return GAMMA, 2 GAMMA, ..., n GAMMA."""
    return torch.arange(1, n + 1, device=device).mul_(signed(GAMMA))


def quarter_sine(v: Tensor) -> Tensor:
    """Compute sqrt(2) sin(pi v / 2) on [-1, 1] by a polynomial, in half the time of torch.sin."""
    first, *rest = sine_series(5 if v.dtype == torch.float32 else 9)
    square = v * v
    made = square * rest[-1]
    for coefficient in rest[-2::-1]:
        made.add_(coefficient).mul_(square)
    return made.add_(first).mul_(v)


@lru_cache
def sine_series(terms: int) -> list[float]:
    """Return c_k of sqrt(2) sin(pi v / 2) = sum c_k v^(2 k + 1), by Chebyshev interpolation in v^2.

    The error is 1e-8 with 5 terms, 2e-15 with 9.
    """
    ratio = Chebyshev.interpolate(
        lambda square: np.pi / np.sqrt(2) * np.sinc(np.sqrt(square) / 2), terms - 1, domain=[0, 1]
    )
    return ratio.convert(kind=Polynomial).coef.tolist()


def row_keys(base: int, positions: range, device: torch.device | None = None) -> Tensor:
    """Return a key for each position: the word of that number in the stream of `base`, (n,)."""
    places = torch.arange(positions.start, positions.stop, device=device)
    return mixed_(places.mul_(signed(GAMMA)).add_(signed(base)))


def uniforms(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Return uniforms in [0, 1) of 24 bits, float32, (B, *shape): row k depends on keys[k]."""
    size = math.prod(shape)
    words = mixed_(keys[:, None] + counters(size, keys.device))
    words.bitwise_right_shift_(40).bitwise_and_(2**24 - 1)
    return words.float().mul_(2.0**-24).reshape(len(keys), *shape)
