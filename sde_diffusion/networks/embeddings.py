"""Features of a scalar noise condition c (time in [0, 1], or log-SNR), shape (B,) -> (B, width)."""

import math
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from sde_diffusion.validate import Integer, Positive, arguments

__all__ = ["Fourier"]


class Fourier(nn.Module):
    r"""Sines and cosines at geometrically spaced frequencies.

    c  ->  [sin(w_k c), cos(w_k c)],   w_k = max_frequency^(k / (n - 1)),   k < n = width / 2

    With c = t in [0, 1] and max_frequency = 1000 this is the transformer embedding of the integer
    step that DDPM uses (Ho et al. 2020, App. B), without its lowest frequencies, whose periods
    are longer than the whole interval.

    Args:
        width: number of features, even.
        max_frequency: the highest angular frequency; 1 / max_frequency is the resolution in c.
    """

    frequencies: Tensor

    @arguments
    def __init__(
        self,
        width: Annotated[int, Integer(4, 2**16, multiple_of=2)],
        max_frequency: Positive = 1000.0,
    ) -> None:
        super().__init__()
        frequencies = np.exp(np.linspace(0, 1, width // 2) * math.log(max_frequency))
        # From numpy: a constant holds its numbers even where `torch.device("meta")` is in force.
        constant = torch.from_numpy(frequencies.astype(np.float32))
        self.register_buffer("frequencies", constant, persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        """c: (B,).  Returns (B, width)."""
        angles = c[:, None] * self.frequencies.to(c)
        return torch.cat([angles.sin(), angles.cos()], dim=1)
