"""Plots. Functions of matplotlib axes return the axes; `png` and `gif` return bytes."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gif", "loss_curve", "paths", "png", "scatter", "tiles"]


def tiles(x: Tensor, columns: int = 8, zoom: int = 3) -> Any:
    """Arrange images (N, C, H, W) in [-1, 1], clipped, side by side in a PIL image."""
    from PIL import Image
    from torchvision.utils import make_grid

    seen = x.detach().float().cpu()
    grid = make_grid(seen, columns, normalize=True, value_range=(-1, 1), pad_value=0.5)
    grid = grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    return Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def png(image: Any) -> bytes:
    """Encode a PIL image or matplotlib figure as PNG."""
    buffer = io.BytesIO()
    if hasattr(image, "savefig"):
        image.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    else:
        image.save(buffer, format="png")
    return buffer.getvalue()


def gif(images: Sequence[Any], seconds: float = 3.0) -> bytes:
    """Encode PIL images as an endless GIF that shows the last one for a second."""
    buffer = io.BytesIO()
    pace = [int(1000 * seconds / len(images))] * (len(images) - 1) + [1000]
    images[0].save(buffer, "gif", save_all=True, append_images=images[1:], duration=pace, loop=0)
    return buffer.getvalue()


def loss_curve(axes: Any, steps: Sequence[int], losses: Sequence[float]) -> Any:
    """Plot losses against steps, with a running mean over a fiftieth of the run.

    The window is at least 20 steps, or a fifth of the run if that is less. The axis is logarithmic
    if the losses are positive and span a factor of 10: it would have no round labels otherwise.
    """
    window = max(len(losses) // 50, min(20, len(losses) // 5))
    axes.plot(steps, losses, color="0.8", linewidth=0.5, marker="." if len(losses) < 20 else "",
              label="batch")  # fmt: skip
    if window > 1:
        total = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
        mean = (total[window:] - total[:-window]) / window
        axes.plot(steps[window - 1 :], mean, color="C0", label=f"mean of {window}")
        axes.legend(frameon=False)
    wide = min(losses) > 0 and max(losses) >= 10 * min(losses)
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log" if wide else "linear")
    return axes


def scatter(axes: Any, x: Tensor, title: str = "", limit: float = 2.5) -> Any:
    """Plot points (N, 2)."""
    x = x.detach().cpu()
    axes.scatter(x[:, 0], x[:, 1], s=1.0, alpha=0.5, linewidths=0)
    return square(axes, title, limit)


def paths(axes: Any, states: Tensor, title: str = "", limit: float = 2.5) -> Any:
    """Plot trajectories (steps, N, 2) from noise (light) to data (dark)."""
    states = states.detach().cpu()
    axes.plot(states[:, :, 0], states[:, :, 1], color="0.6", linewidth=0.4, alpha=0.6)
    axes.scatter(*states[0].T, s=2.0, color="C1", linewidths=0, label="t = 1")
    axes.scatter(*states[-1].T, s=2.0, color="C0", linewidths=0, label="t = 0")
    axes.legend(loc="upper right", frameon=False, markerscale=3)
    return square(axes, title, limit)


def square(axes: Any, title: str, limit: float) -> Any:
    """Show [-limit, limit]^2 without ticks."""
    ends = (-limit, limit)
    axes.set(xlim=ends, ylim=ends, aspect="equal", title=title, xticks=[], yticks=[])
    return axes
