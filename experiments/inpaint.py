"""Digits completed from one half, with the packaged weights.

    python experiments/inpaint.py
    python experiments/inpaint.py --data-root DATA --route mean --num-images 10 --completions 8

The figure of the Haifa sheet: images, of the first half the top is visible and of the others the
bottom, and completions of each by `inpainting.complete_image`, in inpaint.png. The images are test
digits of MNIST, those of --data-root or, where there is no MNIST, a few that come with the package.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common import flags


@dataclass(frozen=True)
class Config:
    """Complete halves of digits."""

    num_images: int = 6
    """number of test digits; the top of the first half is visible, the bottom of the others"""
    completions: int = 5
    """completions of each digit"""
    route: Literal["network", "mean"] = "network"
    """network: gradient with respect to x_t, through the network; mean: to the mean of x_(t-1)"""
    scale: Annotated[float | None, flags.default("300; 2 with --route mean")] = None
    """step size s of the rule"""
    clip: bool = False
    """hold x0_hat to [-1, 1]"""
    steps: int = 250
    """sampling steps of the ancestral chain"""
    seed: int = 0
    """completion k of image i depends on (seed, i, k) alone"""
    data_root: Annotated[Path | None, flags.default("$SDE_DIFFUSION_DATA, or data")] = None
    """folder that holds MNIST/raw"""
    device: flags.Device = "auto"
    """where the network runs"""
    out: Path = Path("runs/inpaint")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import time

import torch
from common import command
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import data, plots, validate
from sde_diffusion.files import storage
from sde_diffusion.inverse import corrections, inpainting

ROUTES: dict[str, inpainting.Route] = {
    "network": corrections.BackpropCorrection,
    "mean": corrections.PosteriorMeanCorrection,
}
MOST = 10_000  # images, completions, steps
SCALES = {"network": 300.0, "mean": 2.0}


def main(config: Config) -> None:
    check(config)
    command.check_out(config.out)
    device = command.device(config.device)
    images, where = digits(config)
    print(f"{len(images)} test digits {where}")
    print(f"{config.completions} completions of each on {device} -> {config.out}", flush=True)
    y, mask = images.to(device), halves(images).to(device)
    model = sd.pretrained("mnist_vp").to(device)
    start = time.perf_counter()
    with command.unwarned(), command.network_calls(model.network, "inpaint", config.steps):
        made = inpainting.complete_image(
            model,
            y.repeat_interleave(config.completions, dim=0),
            mask.repeat_interleave(config.completions, dim=0),
            SCALES[config.route] if config.scale is None else config.scale,
            route=ROUTES[config.route],
            clip=config.clip,
            steps=config.steps,
            seeds=[
                config.seed * 2**32 + i * MOST + k
                for i in range(len(y))
                for k in range(config.completions)
            ],
        )
    seconds = time.perf_counter() - start
    command.finite(made, "inpaint")
    out = command.folder(config.out)
    each = made.reshape(len(y), config.completions, *y.shape[1:])
    storage.replace(out / "inpaint.png", plots.png(picture(y, mask, each)))
    command.write_config(out, config, seconds=round(seconds, 3))
    print(f"{len(made)} completions in {config.steps} steps, {seconds:.1f} s")
    print(f"-> {out / 'inpaint.png'}")


def check(config: Config) -> None:
    """Refuse values out of range."""
    for name in ("num_images", "completions", "steps"):
        validate.integer(flags.flag(name), getattr(config, name), at_most=MOST)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    if config.scale is not None:
        validate.number("--scale", config.scale)


def digits(config: Config) -> tuple[Tensor, str]:
    """Return test digits in [-1, 1], and where they are from."""
    try:
        images = data.mnist(config.data_root, train=False)
        where = f"of {data.data_root(config.data_root)}"
    except data.DataNotFound as error:
        if config.data_root or isinstance(error, data.DataDamaged):
            raise
        images, where = data.sample_digits(), "that come with the package: there is no MNIST here"
    if config.num_images > len(images):
        raise ValueError(f"--num-images must be at most {len(images)}; got {config.num_images}")
    pixels = images.pixels[: config.num_images]
    return data.dequantize(pixels, torch.full(pixels.shape, 0.5)), where


def halves(images: Tensor) -> Tensor:
    """Return a mask, 1 on the top of the first half of the images and the bottom of the others."""
    mask = torch.zeros_like(images)
    middle, first = images.shape[2] // 2, (len(images) + 1) // 2
    mask[:first, :, :middle] = 1
    mask[first:, :, middle:] = 1
    return mask


def picture(y: Tensor, mask: Tensor, made: Tensor) -> object:
    """Draw rows of the images, of their visible parts, and of the completions (N, K, C, H, W)."""
    from matplotlib.figure import Figure

    visible = torch.where(mask == 1, y, 0.0)  # gray
    rows = {"image": y, "visible": visible}
    rows |= {f"completion {k + 1}": made[:, k] for k in range(made.shape[1])}
    figure = Figure(figsize=(0.3 + 0.7 * len(y), 0.85 * len(rows)), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
        axes.imshow(plots.tiles(x, columns=len(x)))
        axes.set_title(name, fontsize=8, loc="left")
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    command.run(main, Config)
