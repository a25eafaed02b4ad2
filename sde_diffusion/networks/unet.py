"""U-Nets for images: a residual one with attention, and one of plain convolutions."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks import layers
from sde_diffusion.validate import Each, Integer, Share, arguments, integer

__all__ = ["PlainUNet", "UNet"]


class UNet(nn.Module):
    """Residual U-Net with attention (Ho et al. 2020, App. B; Dhariwal & Nichol 2021, sec. 3).

    Conditioned on the noise level and optionally on a cond vector. The first layer folds patch x
    patch pixels into channels, so that on 28x28 digits nearly all of the work happens at 14x14 and
    7x7: about four times cheaper than a U-Net that starts at full resolution.

    Args:
        in_channels: image channels; the output has as many.
        channels: width of each resolution, finest first; each further one halves the image.
        blocks: residual blocks per resolution, on the way down and again on the way up.
        attention: indices into `channels` of the resolutions with attention.
        patch: side of the square of pixels folded into channels before the first convolution.
        embedding: width of the vector that carries the condition into each block.
        cond: width of the cond vector, 0 for none.
        heads: attention heads; must divide the widths with attention.
        dropout: probability with which training sets an input of each block's last convolution
            to 0.

    Images whose sides are not divisible by patch * 2^(len(channels) - 1) are padded by repeating
    the border, and the output is cropped to match.
    """

    float32_noise_input = True

    @arguments
    def __init__(
        self,
        in_channels: layers.Width = 1,
        channels: Annotated[Sequence[int], Each(Integer(8, 2**16, 8), 10, 1)] = (32, 64),
        blocks: Annotated[int, Integer(1, 32)] = 2,
        attention: Annotated[Sequence[int], Each(Integer(0, 9), 10)] = (1,),
        patch: Annotated[int, Integer(1, 512)] = 2,
        embedding: Annotated[int, Integer(4, 2**16, 2)] = 128,
        cond: layers.CondWidth = 0,
        heads: layers.Width = 4,
        dropout: Share = 0.0,
    ) -> None:
        super().__init__()
        integer("max(attention)", max(attention, default=0), 0, len(channels) - 1)
        if any(channels[level] % heads for level in attention):
            raise ValueError(f"heads must divide the widths with attention; got {heads}")
        self.stride = patch * 2 ** (len(channels) - 1)
        integer("patch * 2^(len(channels) - 1)", self.stride, at_most=512)
        self.config = layers.arguments_of(UNet, locals())
        self.patch = patch
        features = layers.Fourier(embedding)
        self.noise = nn.Sequential(features, nn.Linear(embedding, embedding), nn.SiLU())
        self.context = nn.Linear(cond, embedding) if cond else None
        self.enter = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)

        def block(width_in: int, width_out: int, level: int) -> nn.ModuleList:
            parts: list[nn.Module] = [Residual(width_in, width_out, embedding, dropout)]
            if level in attention:
                parts.append(Attention(width_out, heads))
            return nn.ModuleList(parts)

        self.down, skips, width = nn.ModuleList(), [channels[0]], channels[0]
        for level, target in enumerate(channels):
            if level:
                self.down.append(nn.ModuleList([Halve(width)]))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(block(width, target, level))
                skips.append(width := target)

        first = Residual(width, width, embedding, dropout)
        attend = Attention(width, heads if width % heads == 0 else 1)
        last = Residual(width, width, embedding, dropout)
        self.middle = nn.ModuleList([first, attend, last])

        self.up = nn.ModuleList()
        for level, target in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.up.append(block(width + skips.pop(), target, level))
                width = target
            if level:
                self.up.append(nn.ModuleList([Double(width)]))

        leave = zero(nn.Conv2d(width, in_channels * patch**2, 3, padding=1))
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), leave)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        c: Float[Tensor, " batch"],
        cond: Shaped[Tensor, "batch cond"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """x: noisy images; c: noise condition in [0, 1]; cond: condition vectors."""
        layers.check_images(x, self.config["in_channels"])
        layers.check_cond(cond, self.config["cond"])
        if not len(x):  # torch folds no pixels of an empty batch
            return x
        embed, *rest = self.noise
        e = embed(c).to(x.dtype)
        for layer in rest:
            e = layer(e)
        if self.context is not None and cond is not None:
            e = e + self.context(cond.to(e.dtype))
        e = F.silu(e)

        height, width = x.shape[-2:]
        h = self.enter(F.pixel_unshuffle(pad(x, self.stride), self.patch))
        skips = [h]
        for parts in self.down:
            for part in parts:  # type: ignore[union-attr]
                h = part(h, e)
            skips.append(h)
        for part in self.middle:
            h = part(h, e)
        for parts in self.up:
            if not isinstance(parts[0], Double):  # type: ignore[index]
                h = torch.cat([h, skips.pop()], dim=1)
            for part in parts:  # type: ignore[union-attr]
                h = part(h, e)
        return F.pixel_shuffle(self.leave(h), self.patch)[..., :height, :width]


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
    def __init__(
        self, in_channels: layers.Width = 1, channels: layers.Widths = (32, 64, 128, 256, 256)
    ) -> None:
        super().__init__()
        self.config = layers.arguments_of(PlainUNet, locals())
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
        layers.check_images(x, self.config["in_channels"])
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


class Residual(nn.Module):
    """x + conv(silu(modulated norm(conv(silu(norm(x)))))), modulated by the condition."""

    def __init__(self, width_in: int, width_out: int, embedding: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * width_out)
        self.norm2 = nn.GroupNorm(8, width_out)
        self.dropout = layers.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(width_out, width_out, 3, padding=1))
        self.skip = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(e)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over pixels, added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b (n h d) y x -> n b h (y x) d", n=3, h=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = rearrange(attended, "b h (y x) d -> b (h d) y x", y=x.shape[2])
        return x + self.out(attended)


class Halve(nn.Module):
    """Half the resolution by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.conv(x)


class Double(nn.Module):
    """Twice the resolution by repeating pixels, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def pad(x: Tensor, stride: int) -> Tensor:
    """Repeat the right and lower border until both sides are divisible by `stride`."""
    down, right = -x.shape[-2] % stride, -x.shape[-1] % stride
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x


def zero(module: nn.Module) -> nn.Module:
    """Set the parameters of a module to 0, so that its block starts as the identity; return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
