"""Features of a scalar noise condition c (time in [0, 1], or log-SNR), shape (B,) -> (B, width)."""

import math

import torch
from torch import Tensor, nn

from sde_diffusion import validate

__all__ = ["Fourier"]


class Fourier(nn.Module):
    r"""Sines and cosines at geometrically spaced frequencies.

    c  ->  [sin(w_k c), cos(w_k c)],   w_k = max_frequency^(k / (n - 1)),   k < n = width / 2

    With c = t in [0, 1] and max_frequency = 1000 this is the transformer embedding of the integer
    step that DDPM uses (Ho et al. 2020, App. B), its lowest frequencies (longer than the whole
    interval) left out.

    Args:
        width: number of features, even.
        max_frequency: the highest angular frequency; 1 / max_frequency is the resolution in c.
    """

    frequencies: Tensor

    def __init__(self, width: int, max_frequency: float = 1000.0) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"width must be even and at least 4; got {width}")
        validate.number("max_frequency", max_frequency, 0, strict=True)
        exponents = torch.linspace(0, 1, width // 2, dtype=torch.float64)
        frequencies = torch.exp(exponents * math.log(max_frequency)).float()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        """c: (B,).  Returns (B, width)."""
        angles = c[:, None] * self.frequencies.to(c.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)
