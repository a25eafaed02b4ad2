"""A fully connected network on (x, t), t in [0, 1], as course exercises use."""

from collections.abc import Sequence
from math import prod
from typing import Annotated

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from sde_diffusion.networks import layers
from sde_diffusion.validate import Each, Integer, Share, arguments, integer

__all__ = ["MLP"]


class MLP(nn.Module):
    """Fully connected, with the noise condition concatenated to the data.

    Args:
        shape: shape of one sample, such as (2,) or (1, 28, 28); it is flattened inside.
        width: width of each hidden layer.
        depth: number of hidden layers.
        fourier: number of Fourier features of the noise condition; 0 for the plain number.
        cond: width of the cond vector, 0 for none.
        dropout: probability with which training sets a hidden number to 0.
    """

    @arguments
    def __init__(
        self,
        shape: Annotated[Sequence[int], Each(layers.Side, 8)] = (2,),
        width: layers.Width = 128,
        depth: Annotated[int, Integer(1, 1000)] = 3,
        fourier: Annotated[int, Integer(0, 2**16, multiple_of=2)] = 0,
        cond: layers.CondWidth = 0,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        if fourier == 2:
            raise ValueError("fourier must be 0 or at least 4; got 2")
        size = integer("prod(shape)", prod(shape), at_most=2**24)
        self.config = layers.arguments_of(MLP, locals())
        self.shape, self.cond = tuple(shape), cond
        self.float32_noise_input = bool(fourier)
        self.embed = layers.Fourier(fourier, max_frequency=50.0) if fourier else None
        hidden: list[nn.Module] = []
        wide = size + (fourier or 1) + cond
        for _ in range(depth):
            hidden += [nn.Linear(wide, width), nn.SiLU()]
            hidden += [layers.Dropout(dropout)] if dropout else []
            wide = width
        self.layers = nn.Sequential(*hidden, nn.Linear(width, size))

    def forward(
        self,
        x: Float[Tensor, " batch *shape"],
        c: Float[Tensor, " batch"],
        cond: Shaped[Tensor, "batch cond"] | None = None,
    ) -> Float[Tensor, " batch *shape"]:
        """x: noisy data; c: noise condition; cond: condition vectors."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"samples must have shape {self.shape}; got {tuple(x.shape[1:])}")
        layers.check_cond(cond, self.cond)
        noise = c[:, None] if self.embed is None else self.embed(c)
        extra = [noise] if cond is None else [noise, cond]
        flat = x.reshape(len(x), prod(self.shape))
        h = torch.cat([flat, *(value.to(x.dtype) for value in extra)], dim=1)
        return self.layers(h).reshape(x.shape)
