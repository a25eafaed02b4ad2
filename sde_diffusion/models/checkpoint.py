"""Denoisers in files: the steps of `Denoiser.save` and `Denoiser.load`.

Loading parses the record, makes the parts that it describes (the network on the meta device, which
allocates no memory), compares them with the header of the tensors, and only then reads the tensors.
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
from sde_diffusion.models.model import LogSNRRange
from sde_diffusion.models.noise_inputs import NoiseInput
from sde_diffusion.models.prediction import Parameterization
from sde_diffusion.processes import Process
from sde_diffusion.validate import Kind, arguments

__all__ = ["PARTS", "load_parts", "save_parts"]

PARTS = ("network", "process", "parameterization", "noise_input")  # of a description
OPTIONAL = ("trained", "null")
EXTRA = "+"  # prefix of tensors outside the network: +null.cond, +process.rate
ADDED = {"dropout": 0.0}  # arguments that older files lack, with their values at that time


def save_parts(path: Path, denoiser: Any, record: dict[str, object]) -> None:
    """Write the tensors of a denoiser, and a record of its network and other parts."""
    if "denoiser" in record:
        raise ValueError("record must not hold the reserved name denoiser")
    parts: dict[str, Any]
    parts = {name: describe.to_record(getattr(denoiser, name)) for name in PARTS[1:]}
    parts["network"] = network_record(denoiser.network)
    if denoiser.trained is not None:
        low, high, only = denoiser.trained
        parts["trained"] = [*(x if math.isfinite(x) else None for x in (low, high)), only]
    if denoiser.null is not None:
        learned = dict(denoiser.null.named_parameters())
        parts["null"] = {name: name in learned for name in denoiser.null.state_dict()}
    tensors = {
        name.removeprefix("network.") if name.startswith("network.") else EXTRA + name: value
        for name, value in denoiser.state_dict().items()
    }
    storage.write(path, tensors, {"denoiser": parts, **record})


@arguments
def load_parts(
    path: str | Path,
    network: Annotated[nn.Module, Kind("a torch module", "state_dict", "load_state_dict")] | None,
    process: Annotated[Process, Kind("a process such as VP()", "log_alpha", "variance")] | None,
    parameterization: Annotated[Parameterization, Kind("one such as Eps()", "x0", "target")] | None,
    noise_input: Annotated[NoiseInput, Kind("one such as ContinuousTime()", "__call__")] | None,
) -> dict[str, Any]:
    """Return the parts of a saved denoiser by name; given parts must equal the saved ones."""
    path = Path(path)
    saved = storage.examine(path)
    with storage.as_bad_file(path.with_suffix(".json")):
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
        trained, learned = trained_of(parts), learned_of(parts)
        filled = network if network is not None else empty_network(parts["network"])
        check_same(filled, parts["network"])
        wanted = filled.state_dict()
        if network is None:
            dtype = common_dtype(
                {name: value for name, value in saved.outline.items() if name[:1] != EXTRA}
            )
            wanted = {name: value.to(dtype) for name, value in wanted.items()}
        state = made["process"].state_dict() if isinstance(made["process"], nn.Module) else {}
        wanted |= {f"{EXTRA}process.{name}": value for name, value in state.items()}
        names = [f"{EXTRA}null.{name}" for name in learned]
        storage.check_names("tensor", saved.outline, names, others=True)
        storage.check_fit(saved.outline, wanted | {name: saved.outline[name] for name in names})
    tensors = storage.load(saved)
    with storage.as_bad_file(path):
        # Cloned, as the tensors of a file are not aligned in memory.
        own = {name: value.clone() if network is None else value
               for name, value in tensors.items() if not name.startswith(EXTRA)}  # fmt: skip
        filled.load_state_dict(own, assign=network is None)
        if state:
            state = {name: tensors[f"{EXTRA}process.{name}"] for name in state}
            made["process"].load_state_dict(state)
    null = {name: nn.Parameter(tensors[full].clone()) if learned[name] else tensors[full].clone()
            for name, full in zip(learned, names, strict=True)}  # fmt: skip
    return {"network": filled, **made, "trained": trained, "null": null or None}


def trained_of(parts: dict[str, Any]) -> LogSNRRange | None:
    """Return the range of log-SNRs in a record, or None."""
    given = parts.get("trained")
    if given is None:
        return None
    if not describe.matches_type(given, tuple[float | None, float | None, bool]):
        raise ValueError("trained must be [low, high, only], numbers or null and a bool")
    low, high, only = given
    return LogSNRRange(
        -math.inf if low is None else float(low), math.inf if high is None else float(high), only
    )


def learned_of(parts: dict[str, Any]) -> dict[str, bool]:
    """Return the names of the null's entries, and whether each is a parameter."""
    given = parts.get("null", {})
    if not isinstance(given, dict) or not all(
        name.isidentifier() and isinstance(learned, bool) for name, learned in given.items()
    ):
        raise ValueError("null must map identifiers to true (learned) or false")
    return given


def network_record(network: nn.Module) -> dict[str, Any]:
    """Return the class of a network and, for those of this package, its constructor's arguments."""
    return {"class": type(network).__name__, **getattr(network, "config", {})}


def described_parts(record: dict[str, Any]) -> dict[str, Any]:
    """Return the descriptions of the parts of a denoiser in a record."""
    storage.check_names("entry", record, ["denoiser"], others=True)
    parts = record["denoiser"]
    describe.check_object("denoiser", parts)
    needed = [name for name in parts if name not in OPTIONAL]
    storage.check_names("denoiser part", needed, PARTS)
    return parts


def empty_network(description: Any) -> nn.Module:
    """Make the network that a record describes, its parameters on the meta device.

    The constructors of networks limit their integers, so this takes less than a second.
    """
    kind, given = describe.class_and_arguments("network", public(networks), description, ADDED)
    with torch.device("meta"):
        return kind(**given)


def check_same(network: nn.Module, description: Any) -> None:
    """Refuse a network whose class or arguments differ from the saved ones."""
    ours = network_record(network)
    older = {name: value for name, value in ADDED.items() if name in ours}
    if isinstance(description, dict):
        description = {**older, **description}
    describe.same("network", description, ours)


def check_levels(
    process: Process, parameterization: Parameterization, noise_input: NoiseInput
) -> None:
    """Refuse settings that are valid one by one but together give levels that are not finite."""
    try:
        end = float(process.variance(torch.ones((), dtype=torch.float64)))
        level = process.levels(torch.tensor([0.1], dtype=torch.float64))[0]
        values = [end, process.prior_std, parameterization.input_scale(level), noise_input(level)]
        values += [*parameterization.x0(level), *parameterization.eps(level)]
        finite = all(map(math.isfinite, values)) and level.alpha > 0 and level.sigma > 0
    except ArithmeticError:  # Python floats raise an exception when they overflow
        finite = False
    if not finite:
        raise ValueError("its process and parameterization give levels that are not finite, or 0")


def common_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Return the floating-point dtype of a network with these tensors."""
    dtype = next(iter(tensors.values())).dtype if tensors else torch.float32
    if not dtype.is_floating_point:
        raise ValueError(f"tensors of a network must be floating-point; got {dtype}")
    return dtype
