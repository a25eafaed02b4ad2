"""Weights of another program, saved with torch.save, in a network of this package.

    python experiments/import_weights.py --weights FILE.pt --like CHECKPOINT.safetensors \\
        --key ema --rename model.= --out OUT.safetensors

CHECKPOINT defines the network, process, parameterization and noise input; its own weights are not
kept. The file must hold every tensor of the network, and no other. No code of either file runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common import flags


@dataclass(frozen=True)
class Config:
    """Fill the network that a checkpoint describes with the tensors of another file."""

    weights: flags.ExistingPath
    """the .pt, .pth or .ckpt file"""
    like: flags.ExistingPath
    """a .safetensors checkpoint of this package with the same network"""
    out: Path
    """the .safetensors file to write, and its .json; neither may exist"""
    key: Annotated[str | None, flags.default("the top level")] = None
    """where the tensors are in the file, such as model, ema or state_dict"""
    rename: tuple[str, ...] = ()
    """OLD=NEW: names that begin with OLD begin with NEW instead; in this order"""
    sha256: Annotated[str | None, flags.default("not checked")] = None
    """expected SHA-256 of --weights; needed for files of torch before 1.6"""


if __name__ == "__main__":
    flags.check(Config)

import hashlib
import os

from common import command
from torch import Tensor

from sde_diffusion.files import storage, torch_archives


def main(config: Config) -> None:
    check_out(config.out)
    command.check_name(config.out.with_name(config.out.name + ".part"))
    command.check_out(config.out.parent)
    pairs = [pair(text) for text in config.rename]
    denoiser = command.load(config.like, "--like")
    tensors = torch_archives.import_weights(config.weights, key=config.key, sha256=config.sha256)
    for old, new in pairs:
        tensors = torch_archives.rename(tensors, old, new)
    wanted = denoiser.network.state_dict()
    tensors = converted(tensors, wanted)
    try:
        storage.check_fit(tensors, wanted)
    except ValueError as error:
        raise ValueError(f"--weights {config.weights}: {error}") from None
    denoiser.network.load_state_dict(tensors)
    denoiser.save(
        config.out,
        command=command.command(),
        commit=command.commit(),
        weights=config.weights.name,
        weights_sha256=hashlib.sha256(config.weights.read_bytes()).hexdigest(),
    )
    print(f"{len(tensors)} tensors of {config.weights} -> {config.out}")


def check_out(out: Path) -> None:
    """Refuse an --out that cannot be written, before anything is read."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: its name must end in .safetensors")
    for path in (out, out.with_suffix(".json")):
        if os.path.lexists(path):
            raise ValueError(f"--out {path}: there already; give another name")


def pair(text: str) -> tuple[str, str]:
    """Split OLD=NEW."""
    old, sign, new = text.partition("=")
    if not sign or not old:
        raise ValueError(f"--rename {text}: not OLD=NEW")
    return old, new


def converted(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert floating-point tensors to the network's dtype, and print each conversion."""
    made: dict[str, Tensor] = {}
    changes: set[str] = set()
    for name, value in tensors.items():
        like = wanted.get(name, value)
        floats = value.is_floating_point() and like.is_floating_point()
        if floats and value.dtype != like.dtype:
            changes.add(f"{value.dtype} -> {like.dtype}")
        made[name] = value.to(like.dtype) if floats else value
    for change in sorted(changes):
        print(f"converted: {change}")
    return made


if __name__ == "__main__":
    command.run(main, Config)
