"""Dropout with one mask per sample, independent of the rest of the batch."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.noise.counter import uniforms
from sde_diffusion.validate import Share, arguments

__all__ = ["Dropout"]


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
