"""The exercises' fully connected network on (x, t in [0, 1])."""

from math import prod

import torch
from jaxtyping import Float, Shaped
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
        cond: width of the cond vector, 0 for none.
        dropout: share of the hidden numbers that a training step leaves out.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | list[int] = (2,),
        width: int = 128,
        depth: int = 3,
        fourier: int = 0,
        cond: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for side in shape:
            validate.integer("the sides of shape", side)
        validate.integer("width", width)
        validate.integer("depth", depth)
        validate.integer("cond", cond, 0)
        if validate.integer("fourier", fourier, 0) % 2 or fourier == 2:
            raise ValueError(f"fourier must be 0, or even and at least 4; got {fourier}")
        self.config = {
            "shape": list(shape),
            "width": width,
            "depth": depth,
            "fourier": fourier,
            "cond": cond,
            "dropout": dropout,
        }
        self.shape, self.cond = tuple(shape), cond
        self.embed = Fourier(fourier, max_frequency=50.0) if fourier else None
        layers: list[nn.Module] = []
        wide = prod(shape) + (fourier or 1) + cond
        for _ in range(depth):
            layers += [nn.Linear(wide, width), nn.SiLU()]
            layers += [Dropout(dropout)] if dropout else []
            wide = width
        self.layers = nn.Sequential(*layers, nn.Linear(width, prod(shape)))

    def forward(
        self,
        x: Float[Tensor, " batch *shape"],
        c: Float[Tensor, " batch"],
        cond: Shaped[Tensor, "batch cond"] | None = None,
    ) -> Float[Tensor, " batch *shape"]:
        """x: noisy data; c: noise condition; cond: condition vectors."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"samples must have shape {self.shape}; got {tuple(x.shape[1:])}")
        given = 0 if cond is None else cond.shape[-1]
        if given != self.cond:
            raise ValueError(f"this network takes a cond of width {self.cond}; got {given}")
        parts = [
            x.reshape(len(x), prod(self.shape)),
            self.embed(c) if self.embed is not None else c[:, None],
        ]
        if cond is not None:
            parts.append(cond.to(x.dtype))
        return self.layers(torch.cat(parts, dim=1)).reshape(x.shape)
