"""A U-Net of plain convolutions, the shape that course exercises use on MNIST."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion import validate

__all__ = ["PlainUNet"]


class PlainUNet(nn.Module):
    """Convolution and pooling down, convolution and repetition up; the condition is a channel.

    No normalization, no attention, no residual blocks: with its default widths the network of the
    DTU exercise 3.5, after the score-based tutorial of M. F. Kasim. Images of any size are halved
    with the last row and column kept, so 28x28 goes to 14, 7, 4 and 2.

    Args:
        in_channels: image channels; the output has as many.
        channels: width at each resolution, finest first.
    """

    def __init__(
        self, in_channels: int = 1, channels: Sequence[int] = (32, 64, 128, 256, 256)
    ) -> None:
        super().__init__()
        validate.integer("in_channels", in_channels)
        for width in channels:
            validate.integer("the widths of channels", width)
        if not channels:
            raise ValueError("channels must hold at least one width")
        self.config = {"in_channels": in_channels, "channels": list(channels)}
        widths = [in_channels + 1, *channels]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(
            nn.Conv2d(a + b, b, 3, padding=1) for a, b in pairwise(reversed(channels))
        )
        self.leave = nn.Conv2d(channels[0], in_channels, 3, padding=1)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        c: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """x: noisy images; c: noise condition, best in [0, 1]."""
        if x.shape[1] != self.config["in_channels"]:
            raise ValueError(
                f"this network takes images of {self.config['in_channels']} channels; "
                f"got {x.shape[1]}"
            )
        h = torch.cat([x, c[:, None, None, None].expand(-1, 1, *x.shape[2:])], dim=1)
        skips: list[Tensor] = []
        for layer in self.down:
            h = F.max_pool2d(h, 2, ceil_mode=True) if skips else h
            skips.append(h := F.silu(layer(h)))
        skips.pop()
        for layer in self.up:
            skip = skips.pop()
            h = F.interpolate(h, size=skip.shape[2:], mode="nearest")
            h = F.silu(layer(torch.cat([h, skip], dim=1)))
        return self.leave(h)
