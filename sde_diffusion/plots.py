"""Plots. Functions of matplotlib axes return the axes; `png` and `gif` return bytes."""

import io
import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.model import finite

__all__ = ["gif", "log_scale", "loss_curve", "paths", "png", "scatter", "tiles"]


@validate.arguments
def tiles(x: Annotated[Tensor, finite], columns: int = 8, zoom: int = 3) -> Any:
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


def log_scale(axes: Any, sides: str = "xy", linthresh: float | None = None) -> Any:
    """Make axes logarithmic, with plain numbers at their ticks: 0.05, 0.1434, 20, 1e-05.

    matplotlib's own ticks within a decade read 1.434 x 10^-1.

    Args:
        sides: x, y or both.
        linthresh: for axes with both signs: linear below it (matplotlib's symlog).
    """
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:.8g}" if super().__call__(x, pos) else ""

    linear = {} if linthresh is None else {"linthresh": linthresh}
    for side in sides:
        getattr(axes, f"set_{side}scale")("symlog" if linear else "log", **linear)
        axis = getattr(axes, f"{side}axis")
        axis.set_major_formatter(Plain(linthresh=linthresh))
        axis.set_minor_formatter(Plain(linthresh=linthresh))
    return axes


def loss_curve(axes: Any, steps: Sequence[int], losses: Sequence[float]) -> Any:
    """Plot finite losses against steps, with a running mean over a fiftieth of the run.

    The window is at least 20 steps, or a fifth of the run if that is less. The axis is logarithmic
    if the losses are positive and span a factor of 10.
    """
    curve = [(k, loss) for k, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    shown, values = [k for k, _ in curve], [loss for _, loss in curve]
    window = max(len(values) // 50, min(20, len(values) // 5))
    axes.plot(shown, values, color="0.8", linewidth=0.5, marker="." if len(values) < 20 else "",
              label="batch")  # fmt: skip
    if window > 1:
        total = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
        mean = (total[window:] - total[:-window]) / window
        axes.plot(shown[window - 1 :], mean, color="C0", label=f"mean of {window}")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel="loss")
    if values and min(values) > 0 and max(values) >= 10 * min(values):
        log_scale(axes, "y")
    return axes


@validate.arguments
def scatter(axes: Any, x: Annotated[Tensor, finite], title: str = "", limit: float = 2.5) -> Any:
    """Plot points (N, 2)."""
    x = x.detach().cpu()
    axes.scatter(x[:, 0], x[:, 1], s=1.0, alpha=0.5, linewidths=0)
    return square(axes, title, limit)


@validate.arguments
def paths(
    axes: Any,
    start: Annotated[Tensor, finite],
    states: Annotated[Tensor, finite],
    title: str = "",
    limit: float = 2.5,
) -> Any:
    """Plot paths from their start (N, 2) through the states (steps, N, 2) of a `trajectory`."""
    states = torch.cat([start[None], states]).detach().cpu()
    axes.plot(states[:, :, 0], states[:, :, 1], color="0.6", linewidth=0.4, alpha=0.6)
    axes.scatter(*states[0].T, s=2.0, color="C1", linewidths=0, label="start")
    axes.scatter(*states[-1].T, s=2.0, color="C0", linewidths=0, label="end")
    axes.legend(loc="upper right", frameon=False, markerscale=3)
    return square(axes, title, limit)


def square(axes: Any, title: str, limit: float) -> Any:
    """Show [-limit, limit]^2 without ticks."""
    ends = (-limit, limit)
    axes.set(xlim=ends, ylim=ends, aspect="equal", title=title, xticks=[], yticks=[])
    return axes
