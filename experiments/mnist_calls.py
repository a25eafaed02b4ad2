"""Digits from the same noise at 5, 10, 20 and 50 network calls.

    python experiments/mnist_calls.py

Every digit starts from the same noise and follows the same flow in each block. Writes
mnist_calls.png and mnist_calls.json: RMS and median distance, per pixel, to the flow at 200 calls.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import flags


@dataclass(frozen=True)
class Config:
    """Draw the digits and write the picture."""

    calls: tuple[int, ...] = (5, 10, 20, 50)
    """numbers of network calls, a block each; each solver makes one call a step"""
    num_samples: int = 16
    """number of digits"""
    seed: int = 0
    """digit k depends on (seed, k) alone"""
    device: flags.Device = "auto"
    """where the network runs"""
    out: Path = Path("runs/mnist_calls")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import json
import math

import torch
from common import command
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import plots, validate
from sde_diffusion.files import storage
from sde_diffusion.grids import frames

REFERENCE = 200


def samplers(calls: int) -> dict[str, sd.samplers.Sampler]:
    """Return solvers of the flow that make this number of calls, one a step."""
    return {
        "DDIM": sd.Ancestral(eta=0.0),
        "DPM-Solver++(2M)": sd.DPMSolver(2),
        "Adams": sd.Adams.auto(calls),
        "Adams, Gaussian frame": sd.Adams.auto(calls, frames.GaussianFrame.pretrained("mnist")),
    }


def distances(made: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the root mean square and the median of the digits' distances to the flow."""
    each = (made - reference).flatten(1).square().mean(1)
    return {"rms": float(each.mean().sqrt()), "median": float(each.sqrt().median())}


def picture(drawn: dict[str, dict[int, Tensor]]) -> Any:
    """Draw a row of blocks per solver, a block per number of calls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.25 * len(drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), len(next(iter(drawn.values()))), squeeze=False)
    for row, (name, blocks) in zip(axes, drawn.items(), strict=True):
        for axis, (calls, digits) in zip(row, blocks.items(), strict=True):
            axis.imshow(
                plots.tiles(digits, math.isqrt(len(digits) - 1) + 1), cmap="gray", vmin=0, vmax=255
            )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if name == next(iter(drawn)):
                axis.set_title(f"{calls} calls")
        row[0].set_ylabel(name)
    return figure


def main(config: Config) -> None:
    for calls in config.calls:
        validate.integer("--calls", calls, at_most=1000)
    validate.integer("--num-samples", config.num_samples, at_most=1000)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    command.check_out(config.out)
    device = command.device(config.device)
    denoiser = sd.pretrained("mnist_vp").to(device)
    print(f"{config.num_samples} digits on {device} -> {config.out}", flush=True)
    seeds = [config.seed * 2**32 + k for k in range(config.num_samples)]
    x = sd.prior(denoiser, (config.num_samples, 1, 28, 28), seeds=seeds, device=device)
    flow = sd.Adams.auto(REFERENCE)
    reference = command.sampled("the flow", denoiser, flow, x, steps=REFERENCE, progress=True)
    drawn: dict[str, dict[int, Tensor]] = {}
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for calls in config.calls:
        for name, sampler in samplers(calls).items():
            made = command.sampled(name, denoiser, sampler, x, steps=calls)
            drawn.setdefault(name, {})[calls] = made
            found = figures.setdefault(name, {})[calls] = distances(made, reference)
            print(f"{name:24s}{calls:4d} calls: RMS {found['rms']:.3f}, "
                  f"median {found['median']:.4f}", flush=True)  # fmt: skip
    out = command.folder(config.out)
    storage.replace(out / "mnist_calls.png", plots.png(picture(drawn)))
    storage.replace(out / "mnist_calls.json", (json.dumps(figures, indent=1) + "\n").encode())
    command.write_config(out, config, device=str(device))
    print(f"-> {out / 'mnist_calls.png'}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    command.run(main, Config)
