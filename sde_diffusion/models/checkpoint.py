"""Denoisers in files: the stages of `Denoiser.save` and `Denoiser.load`.

Loading parses the record, makes the parts that it describes (the network on the meta device, where
it takes no memory), checks them against the header of the tensors, and only then reads the tensors.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sde_diffusion import networks, processes
from sde_diffusion.files import describe, storage
from sde_diffusion.files.describe import public
from sde_diffusion.models import noise_inputs, parameterizations
from sde_diffusion.models.noise_inputs import NoiseInput
from sde_diffusion.models.prediction import Parameterization
from sde_diffusion.processes import Process
from sde_diffusion.validate import Kind, arguments

__all__ = ["PARTS", "load_parts", "save_parts"]

PARTS = ("network", "process", "parameterization", "noise_input")  # of a description


ADDED = {"dropout": 0.0}  # arguments that older files lack, with the values that they had then


def save_parts(path: Path, denoiser: Any, record: dict[str, object]) -> None:
    """Write the tensors of a denoiser's network, and a record with its four parts."""
    if "denoiser" in record:
        raise ValueError("record must not hold the reserved name denoiser")
    parts = {name: describe.to_record(getattr(denoiser, name)) for name in PARTS[1:]}
    parts["network"] = network_record(denoiser.network)
    storage.write(path, denoiser.network.state_dict(), {"denoiser": parts, **record})


@arguments
def load_parts(
    path: str | Path,
    network: Annotated[nn.Module, Kind("a torch module", "state_dict", "load_state_dict")] | None,
    process: Annotated[Process, Kind("a process such as VP()", "log_alpha", "variance")] | None,
    parameterization: Annotated[Parameterization, Kind("one such as Eps()", "x0", "target")] | None,
    noise_input: Annotated[NoiseInput, Kind("one such as ContinuousTime()", "__call__")] | None,
) -> dict[str, Any]:
    """Return the four parts of a saved denoiser by name; those given must be the saved ones."""
    path = Path(path)
    saved = storage.examine(path)
    with storage.as_bad_record(path):
        parts = described_parts(saved.record)
        made = {
            name: describe.from_record(name, public(module), parts[name], given)
            for name, module, given in (
                ("process", processes, process),
                ("parameterization", parameterizations, parameterization),
                ("noise_input", noise_inputs, noise_input),
            )
        }
        check_levels(**made)
        filled = network if network is not None else empty_network(parts["network"])
        check_same(filled, parts["network"])
        wanted = filled.state_dict()
        if network is None:
            dtype = common_dtype(saved.outline)
            wanted = {name: value.to(dtype) for name, value in wanted.items()}
        storage.check_fit(saved.outline, wanted)
    tensors = storage.load(saved)
    with storage.as_bad_file(path):
        if network is None:  # copied, as the bytes of a file are not aligned
            tensors = {name: value.clone() for name, value in tensors.items()}
        filled.load_state_dict(tensors, assign=network is None)
    return {"network": filled, **made}


def network_record(network: nn.Module) -> dict[str, Any]:
    """Return the class of a network and, for those of this package, its constructor's arguments."""
    return {"class": type(network).__name__, **getattr(network, "config", {})}


def described_parts(record: dict[str, Any]) -> dict[str, Any]:
    """Return the descriptions of the four parts of a denoiser."""
    storage.check_names("entry", record, ["denoiser"], others=True)
    parts = record["denoiser"]
    describe.check_object("denoiser", parts)
    storage.check_names("denoiser part", parts, PARTS)
    return parts


def empty_network(description: Any) -> nn.Module:
    """Make the network that a record describes, its parameters on the meta device.

    Its constructor limits its integers, so that this takes less than a second and no memory.
    """
    kind, given = describe.class_and_arguments("network", public(networks), description, ADDED)
    with torch.device("meta"):
        return kind(**given)


def check_same(network: nn.Module, description: Any) -> None:
    """Refuse a network whose class or arguments are not the saved ones."""
    ours = network_record(network)
    older = {name: value for name, value in ADDED.items() if name in ours}
    if isinstance(description, dict):
        description = {**older, **description}
    describe.same("network", description, ours)


def check_levels(
    process: Process, parameterization: Parameterization, noise_input: NoiseInput
) -> None:
    """Refuse settings that are each in range and together give levels that are not finite."""
    try:
        end = float(process.variance(torch.ones((), dtype=torch.float64)))
        level = process.levels(torch.tensor([0.1], dtype=torch.float64))[0]
        values = [end, process.prior_std, parameterization.input_scale(level), noise_input(level)]
        values += [*parameterization.x0(level), *parameterization.eps(level)]
        finite = all(map(math.isfinite, values)) and level.alpha > 0 and level.sigma > 0
    except ArithmeticError:  # floats of Python overflow by raising
        finite = False
    if not finite:
        raise ValueError("its process and parameterization give levels that are not finite, or 0")


def common_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Return the floating-point dtype of a network with these tensors."""
    dtype = next(iter(tensors.values())).dtype if tensors else torch.float32
    if not dtype.is_floating_point:
        raise ValueError(f"tensors of a network must be floating-point; got {dtype}")
    return dtype
