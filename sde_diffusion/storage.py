"""Files: safetensors for numbers, JSON for words, SHA-256 to notice damage, rename to be whole.

Nothing read from a file is executed: class names are looked up in fixed tables.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from sde_diffusion.denoiser import Denoiser

__all__ = ["BadFile", "load_denoiser", "read", "save_denoiser", "write"]

FORMAT = 1


class BadFile(ValueError):
    """A file that cannot be used; the message names it and says why, in one line."""


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write path (.safetensors) and its JSON, each whole or not at all."""
    from safetensors.torch import save

    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    record = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **record}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, data)
    replace(path.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record that `write` wrote, or BadFile."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        record = json.loads(path.with_suffix(".json").read_bytes())
    except OSError as error:
        raise BadFile(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise BadFile(f"{path.with_suffix('.json')}: not JSON ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BadFile(f"{path.with_suffix('.json')}: not a record of format {FORMAT}")
    if hashlib.sha256(data).hexdigest() != record.get("sha256"):
        raise BadFile(f"{path}: truncated or damaged (its SHA-256 is not the recorded one)")
    try:
        return load(data), record
    except (SafetensorError, ValueError) as error:
        raise BadFile(f"{path}: not a safetensors file ({error})") from None


def replace(path: Path, data: bytes) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it over `path`."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_denoiser(denoiser: "Denoiser", path: Path, record: Mapping[str, Any]) -> None:
    """See Denoiser.save."""
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors; got {path}")
    described = {
        "network": {
            "class": type(denoiser.network).__name__,
            **getattr(denoiser.network, "config", {}),
        },
        "process": describe(denoiser.process),
        "parameterization": describe(denoiser.parameterization),
        "condition": describe(denoiser.condition),
    }
    write(path, denoiser.network.state_dict(), {"denoiser": described, **record})


def load_denoiser(path: Path, network: nn.Module | None) -> "Denoiser":
    """See Denoiser.load."""
    from sde_diffusion import denoiser, networks, prediction, processes

    tensors, record = read(path)
    try:
        parts = record["denoiser"]
        made = denoiser.Denoiser(
            network or build(networks, parts["network"]),
            build(processes, parts["process"]),
            build(prediction, parts["parameterization"]),
            build(denoiser, parts["condition"]),
        )
        made.network.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise BadFile(f"{path.with_suffix('.json')}: {reason}") from None
    return made.eval()


def describe(value: Any) -> dict[str, Any]:
    """A frozen dataclass as JSON."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} must be a dataclass to be saved")
    return {"class": type(value).__name__, **asdict(value)}


def build(module: Any, description: Any) -> Any:
    """The inverse of `describe`, for the public classes of one module only."""
    arguments = dict(description)
    name = arguments.pop("class")
    made = getattr(module, name, None) if name in module.__all__ else None
    if not isinstance(made, type) or not (is_dataclass(made) or issubclass(made, nn.Module)):
        raise ValueError(f"unknown {module.__name__.rpartition('.')[2]} class {name!r}")
    if is_dataclass(made):
        unknown = arguments.keys() - {field.name for field in fields(made)}
        if unknown:
            raise ValueError(f"{name} has no argument {', '.join(sorted(unknown))}")
    return made(**arguments)
