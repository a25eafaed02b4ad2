"""A U-Net of plain convolutions, the shape that course exercises use on MNIST."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks.inputs import Width, Widths, arguments_of, check_images
from sde_diffusion.validate import arguments

__all__ = ["PlainUNet"]


class PlainUNet(nn.Module):
    """Convolution and pooling down, convolution and repetition up; the condition is a channel.

    No normalization, no attention, no residual blocks. With its default widths it is the network
    of the DTU exercise 3.5, after the score-based tutorial of M. F. Kasim. Odd sides are rounded
    up when they are halved, so 28x28 goes to 14, 7, 4 and 2.

    Args:
        in_channels: image channels; the output has as many.
        channels: width at each resolution, finest first.
    """

    @arguments
    def __init__(self, in_channels: Width = 1, channels: Widths = (32, 64, 128, 256, 256)) -> None:
        super().__init__()
        self.config = arguments_of(PlainUNet, locals())
        widths = [in_channels + 1, *channels]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        pairs = pairwise(reversed(channels))
        self.up = nn.ModuleList(nn.Conv2d(a + b, b, 3, padding=1) for a, b in pairs)
        self.leave = nn.Conv2d(channels[0], in_channels, 3, padding=1)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        c: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """x: noisy images; c: noise condition, best in [0, 1]."""
        check_images(x, self.config["in_channels"])
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
