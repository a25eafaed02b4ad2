"""Denoisers in files: the steps of `Denoiser.save` and `Denoiser.load`.

Loading parses the record, makes the parts that it describes (the network on the meta device, which
allocates no memory), compares them with the header of the tensors, and only then reads the tensors.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion import networks, processes
from sde_diffusion.files import describe, storage
from sde_diffusion.models import noise_inputs, parameterizations
from sde_diffusion.models.model import LogSNRRange
from sde_diffusion.models.prediction import Parameterization

__all__ = ["load_denoiser", "save_denoiser"]

# The parts of a denoiser that are dataclasses, with the modules of their classes.
PARTS = {"process": processes, "parameterization": parameterizations, "noise_input": noise_inputs}
OPTIONAL = ("trained", "null")
EXTRA = "+"  # prefix of tensors outside the network: +null.cond, +process.rate
ADDED = {"dropout": 0.0}  # arguments that older files lack, with their values at that time


def save_denoiser(path: Path, denoiser: Any, record: dict[str, object]) -> None:
    """Write the tensors of a denoiser, and a record of its network and other parts."""
    if "denoiser" in record:
        raise ValueError("record must not hold the reserved name denoiser")
    parts: dict[str, Any] = {"network": network_record(denoiser.network)}
    parts |= {name: describe.to_record(getattr(denoiser, name)) for name in PARTS}
    if denoiser.trained is not None:
        low, high, only = denoiser.trained
        parts["trained"] = [*(x if math.isfinite(x) else None for x in (low, high)), only]
    if denoiser.null is not None:
        learned = dict(denoiser.null.named_parameters())
        parts["null"] = {name: name in learned for name in denoiser.null.state_dict()}
    tensors = {in_file(name): value for name, value in denoiser.state_dict().items()}
    storage.write(path, tensors, {"denoiser": parts, **record}, buffers_of(denoiser))


def buffers_of(denoiser: nn.Module) -> set[str]:
    """Return the names in a file of the buffers of a denoiser, in which inf is a value."""
    return {in_file(name) for name, _ in denoiser.named_buffers(remove_duplicate=False)}


def in_file(name: str) -> str:
    """Return the name in a file of a tensor of a denoiser: without a prefix for the network's."""
    return name.removeprefix("network.") if name.startswith("network.") else EXTRA + name


def load_denoiser(
    make: Callable[..., Any], path: Path, network: nn.Module | None, given: Sequence[Any]
) -> Any:
    """Return the denoiser in a file.

    Args:
        make: the class, called with the parts by name.
        path: the .safetensors file.
        network: a network that receives the weights; None makes the one described.
        given: the PARTS, each None or equal to the saved one.
    """
    saved = storage.examine(path)
    with storage.as_bad_file(path.with_suffix(".json")):
        parts = described_parts(saved.record)
        made = {
            name: describe.from_record(name, describe.public(module), parts[name], own)
            for (name, module), own in zip(PARTS.items(), given, strict=True)
        }
        check_levels(**made)
        filled = network if network is not None else empty_network(parts["network"])
        check_same(filled, parts["network"])
        null = empty_null(parts, saved.outline)
        denoiser = make(filled, **made, trained=trained_of(parts), null=null or None)
        wanted = {in_file(name): value for name, value in denoiser.state_dict().items()}
        if network is None:
            wanted |= in_saved_dtype(filled.state_dict(), saved.outline)
        storage.check_fit(saved.outline, wanted)
    tensors = storage.load(saved, buffers_of(denoiser))
    with storage.as_bad_file(path):
        # Cloned, as the tensors of a file are not aligned in memory.
        state = {name: tensors[in_file(name)].clone() for name in denoiser.state_dict()}
        denoiser.load_state_dict(state, assign=network is None)
    return denoiser


def trained_of(parts: dict[str, Any]) -> LogSNRRange | None:
    """Return the range of log-SNRs in a record, or None."""
    given = parts.get("trained")
    if given is None:
        return None
    if not describe.matches_type(given, tuple[float | None, float | None, bool]):
        raise ValueError("trained must be [low, high, only], numbers or null and a bool")
    low, high, only = given
    ends = {"low": low, "high": high}
    return LogSNRRange(**{name: float(x) for name, x in ends.items() if x is not None}, only=only)


def empty_null(parts: dict[str, Any], outline: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the null that a record describes, without values; parameters where it is learned."""
    given = parts.get("null", {})
    if not isinstance(given, dict) or not all(
        name.isidentifier() and isinstance(learned, bool) for name, learned in given.items()
    ):
        raise ValueError("null must map identifiers to true (learned) or false")
    storage.check_names("tensor", outline, [f"{EXTRA}null.{name}" for name in given], others=True)
    null = {name: torch.empty_like(outline[f"{EXTRA}null.{name}"], device="cpu") for name in given}
    return {name: nn.Parameter(value) if given[name] else value for name, value in null.items()}


def network_record(network: nn.Module) -> dict[str, Any]:
    """Return the class of a network and, for those of this package, its constructor's arguments."""
    return {"class": type(network).__name__, **getattr(network, "config", {})}


def described_parts(record: dict[str, Any]) -> dict[str, Any]:
    """Return the descriptions of the parts of a denoiser in a record."""
    storage.check_names("entry", record, ["denoiser"], others=True)
    parts = record["denoiser"]
    describe.check_object("denoiser", parts)
    needed = [name for name in parts if name not in OPTIONAL]
    storage.check_names("denoiser part", needed, ["network", *PARTS])
    return parts


def empty_network(description: Any) -> nn.Module:
    """Make the network that a record describes, its parameters on the meta device.

    The constructors of networks limit their integers, so this takes less than a second.
    """
    known = describe.public(networks)
    kind, given = describe.class_and_arguments("network", known, description, ADDED)
    with torch.device("meta"):
        return kind(**given)


def check_same(network: nn.Module, description: Any) -> None:
    """Refuse a network whose class or arguments differ from the saved ones."""
    describe.check_object("network", description)
    ours = network_record(network)
    older = {name: value for name, value in ADDED.items() if name in ours}
    describe.same("network", older | description, ours)


def check_levels(
    process: processes.Process,
    parameterization: Parameterization,
    noise_input: noise_inputs.NoiseInput,
) -> None:
    """Refuse settings that are valid one by one but together give levels that are not finite."""
    try:
        end = process.variance(torch.ones((), dtype=torch.float64)).item()
        level = process.levels(torch.tensor([0.1], dtype=torch.float64))[0]
        values = [end, process.prior_std, parameterization.input_scale(level), noise_input(level)]
        values += [*parameterization.x0(level), *parameterization.eps(level)]
        finite = all(map(math.isfinite, values)) and level.alpha > 0 and level.sigma > 0
    except ArithmeticError:  # Python floats raise an exception when they overflow
        finite = False
    if not finite:
        raise ValueError("its process and parameterization give levels that are not finite, or 0")


def in_saved_dtype(state: dict[str, Tensor], outline: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a network in the dtype of the first of them that a file holds."""
    dtype = next((outline[name].dtype for name in state if name in outline), torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"tensors of a network must be floating-point; got {dtype}")
    return {name: value.to(dtype) for name, value in state.items()}
