"""Verification: what a sampler's output law is, by running the sampler.

For Gaussian data the exact model is affine, so a sampler's output is affine in its start and in
each of its noise draws. Running its real code once on a batch of basis inputs (nothing; a unit
start; a unit impulse in each draw) therefore gives its exact law, with no Monte Carlo; one more
input, all of them together, shows whether it is affine.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion.denoiser import Model
from sde_diffusion.sampling import Sampler, sample

__all__ = ["Law", "law"]


EVERYTHING = -2.0  # size of the input that is all others together; neither 0 nor 1


class Law(NamedTuple):
    """The Gaussian law of a sampler's output, and what it is made of.

    Attributes:
        mean: (d,).
        covariance: (d, d).
        start_gain: (d, d), output per unit of start.
        noise_gains: (draws, d, d), output per unit of each noise draw, in order.
    """

    mean: Tensor
    covariance: Tensor
    start_gain: Tensor
    noise_gains: Tensor

    def w2(self, mean: Tensor, covariance: Tensor) -> float:
        r"""Wasserstein-2 distance to N(m, S) (Dowson & Landau 1982).

        W^2 = |m - m'|^2 + tr(S + S' - 2 (S^(1/2) S' S^(1/2))^(1/2))
        """
        root = matrix_root(covariance)
        cross = matrix_root(root @ self.covariance @ root)
        bures = (self.covariance + covariance - 2 * cross).trace()
        return float(((self.mean - mean).square().sum() + bures.clamp(min=0)).sqrt())


def law(
    sampler: Sampler,
    data: Model,
    *,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
) -> Law:
    """The exact output law of a fixed-step sampler on Gaussian data, started from the prior.

    Args:
        sampler: any sampler that is affine for an affine model and takes its noise from `noise`.
        data: the exact model of Gaussian data, or any other affine one.
        steps, times: as in `sample`.
        shape: of one sample, of d coordinates; an exact model knows its own.
    Raises:
        ValueError: if the output for all inputs together is not that of the affine map.
    """
    shape = tuple(getattr(data, "shape", ()) if shape is None else shape) or (1,)
    d = prod(shape)
    counter = Impulses(d)
    sample(data, sampler, torch.zeros(1, *shape, dtype=torch.float64),
           steps=steps, times=times, noise=counter)  # fmt: skip
    basis = torch.zeros(2 + d + d * counter.draws, d, dtype=torch.float64)
    basis[1 : 1 + d] = torch.eye(d, dtype=torch.float64)
    basis[-1] = EVERYTHING
    x = basis.reshape(len(basis), *shape)
    out = sample(data, sampler, x, steps=steps, times=times, noise=Impulses(d)).reshape(-1, d)
    effects, together = out[1:-1] - out[0], out[-1] - out[0]
    if not torch.allclose(EVERYTHING * effects.sum(0), together, rtol=1e-6, atol=1e-6):
        raise ValueError(
            f"{sampler} is not affine on {type(data).__name__}: it has no Gaussian law"
        )
    gains = effects.reshape(1 + counter.draws, d, d).transpose(1, 2)
    start, noises = gains[0], gains[1:]
    covariance = data.process.prior_std**2 * start @ start.T
    covariance = covariance + torch.einsum("nij,nkj->ik", noises, noises)
    return Law(out[0], covariance, start, noises)


class Impulses:
    """Noise that is a unit impulse: draw j in row 1 + d + j d + i, coordinate i.

    The last row has all of them, times EVERYTHING.
    """

    def __init__(self, d: int) -> None:
        self.d, self.draws = d, 0

    def __call__(self, t: float, s: float, like: Tensor) -> Tensor:
        draw = torch.zeros(like.shape, dtype=like.dtype).reshape(len(like), -1)
        first = 1 + self.d + self.draws * self.d
        self.draws += 1
        if first < len(draw):
            draw[first : first + self.d] = torch.eye(self.d, dtype=like.dtype)
            draw[-1] = EVERYTHING
        return draw.reshape(like.shape)


def matrix_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
