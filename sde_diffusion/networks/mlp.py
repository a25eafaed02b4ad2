"""The exercises' fully connected network on (x, t in [0, 1])."""

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sde_diffusion import validate
from sde_diffusion.networks.dropout import Dropout
from sde_diffusion.networks.embeddings import Fourier

__all__ = ["MLP"]


class MLP(nn.Module):
    """Fully connected, with the noise condition concatenated to the data.

    Args:
        shape: shape of one sample, such as (2,) or (1, 28, 28); it is flattened inside.
        width: width of each hidden layer.
        depth: number of hidden layers.
        fourier: number of Fourier features of the condition, 0 to feed the number itself.
        context: width of the context vector, 0 for none.
        dropout: share of the hidden numbers that a training step leaves out.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | list[int] = (2,),
        width: int = 128,
        depth: int = 3,
        fourier: int = 0,
        context: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for side in shape:
            validate.integer("the sides of shape", side)
        validate.integer("width", width)
        validate.integer("depth", depth)
        validate.integer("context", context, 0)
        if validate.integer("fourier", fourier, 0) % 2 or fourier == 2:
            raise ValueError(f"fourier must be 0, or even and at least 4; got {fourier}")
        self.config = {
            "shape": list(shape),
            "width": width,
            "depth": depth,
            "fourier": fourier,
            "context": context,
            "dropout": dropout,
        }
        self.shape, self.context = tuple(shape), context
        self.embed = Fourier(fourier, max_frequency=50.0) if fourier else None
        layers: list[nn.Module] = []
        wide = prod(shape) + (fourier or 1) + context
        for _ in range(depth):
            layers += [nn.Linear(wide, width), nn.SiLU()]
            layers += [Dropout(dropout)] if dropout else []
            wide = width
        self.layers = nn.Sequential(*layers, nn.Linear(width, prod(shape)))

    def forward(
        self,
        x: Float[Tensor, " batch *shape"],
        c: Float[Tensor, " batch"],
        context: Float[Tensor, "batch context"] | None = None,
    ) -> Float[Tensor, " batch *shape"]:
        """x: noisy data; c: noise condition; context: condition vectors."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"samples must have shape {self.shape}; got {tuple(x.shape[1:])}")
        given = 0 if context is None else context.shape[-1]
        if given != self.context:
            raise ValueError(f"this network takes a context of width {self.context}; got {given}")
        parts = [
            x.reshape(len(x), prod(self.shape)),
            self.embed(c) if self.embed is not None else c[:, None],
        ]
        if context is not None:
            parts.append(context)
        return self.layers(torch.cat(parts, dim=1)).reshape(x.shape)
