"""The Gaussian frame of MNIST: mean and covariance of the dequantized training digits.

    python experiments/mnist_frame.py --data-root DIR

Writes mnist.safetensors with its JSON; a copy comes with the package and is read by
`frames.GaussianFrame.pretrained("mnist")`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common import flags


@dataclass(frozen=True)
class Config:
    """Compute and write the frame."""

    rank: int = 128
    """number of eigenvectors kept; the other directions share the mean of their variances"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where eigenvectors are computed, in float64"""
    data_root: Annotated[Path | None, flags.default("$SDE_DIFFUSION_DATA, or data")] = None
    """folder that holds MNIST/raw"""
    out: Path = Path("runs/mnist_frame")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

from common import command

from sde_diffusion import data, validate
from sde_diffusion.grids import frames


def main(config: Config) -> None:
    validate.integer("--rank", config.rank, 1, 784)
    command.check_out(config.out)
    device = command.device(config.device)
    digits = data.mnist(config.data_root)
    mean, covariance = (moment.to(device) for moment in data.moments(digits))
    frame = frames.GaussianFrame.of(mean, covariance, rank=config.rank, floor=data.DEQUANTIZATION)
    explained = float(frame.variances.sum() / covariance.trace())
    out = command.folder(config.out)
    record = {"command": command.command(), "commit": command.commit(), "images": len(digits)}
    frame.save(out / "mnist.safetensors", **record, explained=explained)
    print(f"{config.rank} of 784 directions hold {explained:.2%} of the variance")
    print(f"-> {out / 'mnist.safetensors'}")


if __name__ == "__main__":
    command.run(main, Config)
