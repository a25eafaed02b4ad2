"""Dropout whose masks belong to the samples of a batch and not to the batch."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion import validate
from sde_diffusion.noise.counter import uniforms

__all__ = ["Dropout"]


class Dropout(nn.Module):
    """Zeroes each number with probability p and divides the others by 1 - p, while training.

    Row k of the mask is a function of keys[k], which training sets for each step: the same in any
    batch, on any number of processes. Without keys it is torch's own dropout, which draws from the
    global generator.

    Args:
        p: the probability, in [0, 1).
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = validate.number("p", p, 0, 1)
        if p == 1:
            raise ValueError("p must be below 1; got 1")
        self.keys: Tensor | None = None

    def forward(self, x: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
        """x: (B, ...)."""
        if not self.training or not self.p:
            return x
        if self.keys is None:
            return F.dropout(x, self.p)
        if len(self.keys) != len(x):
            raise ValueError(f"keys must be one per sample, {len(x)}; got {len(self.keys)}")
        kept = uniforms(self.keys, x.shape[1:]) >= self.p
        return x * kept.to(x.dtype).div_(1 - self.p)
