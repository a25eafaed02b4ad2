"""Parts that the networks share: rules of arguments, features of the noise condition, dropout."""

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.noise.counter import uniforms
from sde_diffusion.validate import Each, Integer, Positive, Share, arguments

__all__ = ["Dropout", "Fourier"]

# The upper limits keep a record in a file from describing a network that no file could fill.
Side = Integer(1, 2**16)

Width = Annotated[int, Side]
CondWidth = Annotated[int, Integer(0, 2**16)]
Widths = Annotated[Sequence[int], Each(Side, 16, 1)]


def arguments_of(network: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network's constructor as JSON has them, from its local values."""
    given = {name: values[name] for name in signature(network).parameters}
    return {name: list(v) if isinstance(v, Sequence) else v for name, v in given.items()}


def check_images(x: Tensor, channels: int) -> None:
    """Raise ValueError unless x is (B, channels, H, W)."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be (B, {channels}, H, W); got shape {tuple(x.shape)}")


def check_cond(cond: Tensor | None, width: int) -> None:
    """Raise ValueError unless cond is (B, width), or None where width is 0."""
    found = 0 if cond is None else cond.shape[-1]
    if found and not width:
        raise ValueError(f"cond must be None: the network has no condition; got width {found}")
    if found != width:
        got = "None" if cond is None else f"{found}, shape {tuple(cond.shape)}"
        raise ValueError(f"cond must have width {width}; got {got}")


class Fourier(nn.Module):
    r"""Features of a noise condition c: sines and cosines at geometrically spaced frequencies.

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fourier":
        """Move the frequencies with the module, and keep them in float32: phases would be wrong."""
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(self.frequencies.device)
        return self

    def forward(self, c: Tensor) -> Tensor:
        """c: (B,), at least float32.  Returns (B, width) in the dtype of c."""
        angles = c[:, None] * self.frequencies.to(c)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Dropout(nn.Module):
    """Set each number to 0 with probability p and divide the others by 1 - p, while training.

    Row k of the mask is a function of keys[k], which training sets for each step: it does not
    depend on the batch or on the number of processes. Without keys this is torch's own dropout,
    which draws from the global generator.

    Args:
        p: the probability, in [0, 1).
    """

    @arguments
    def __init__(self, p: Share = 0.1) -> None:
        super().__init__()
        if p == 1:
            raise ValueError("p must be below 1; got 1")
        self.p = p
        self.keys: Tensor | None = None

    def forward(self, x: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
        """x: (B, ...)."""
        if not self.training or not self.p:
            return x
        if self.keys is None:
            return F.dropout(x, self.p)
        if len(self.keys) != len(x):
            raise ValueError(f"keys must hold one key per sample, {len(x)}; got {len(self.keys)}")
        kept = uniforms(self.keys, x.shape[1:]) >= self.p
        return x * kept.to(x.dtype).div_(1 - self.p)
