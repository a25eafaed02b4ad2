"""A denoiser's description, and the network that one describes, made no larger than its file."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sde_diffusion import networks, validate
from sde_diffusion.files import describe
from sde_diffusion.files.describe import public
from sde_diffusion.files.strict_json import near

PARTS = ("network", "process", "parameterization", "noise_input")  # of a description


LONGEST = 10_000  # letters that describe a network


ADDED = {"dropout": 0.0}  # arguments that older files do not have, and what they were


def described(network: nn.Module) -> dict[str, Any]:
    """The class of a network and the arguments that it was made with, if it tells them."""
    return {"class": type(network).__name__, **getattr(network, "config", {})}


def checked_parts(record: dict[str, Any]) -> dict[str, Any]:
    """The four parts of the description of a denoiser."""
    if "denoiser" not in record:
        raise ValueError(f"describes no denoiser{near('denoiser', record)}")
    parts = record["denoiser"]
    if not isinstance(parts, dict):
        raise ValueError("its denoiser is not described by an object")
    for name in (*parts, *PARTS):
        if name not in PARTS:
            raise ValueError(f"a denoiser has no {name!r:.80}{near(name, PARTS)}")
        if name not in parts:
            raise ValueError(f"its denoiser has no {name!r}{near(name, parts)}")
    return parts


def maker(description: Any) -> Callable[[], nn.Module]:
    """What makes the network that a record describes, one of this package."""
    kind, arguments = describe.class_and_arguments("network", public(networks), description, ADDED)
    if len(repr(arguments)) > LONGEST:
        raise ValueError(f"its network is described in more than {LONGEST:,} letters")

    def make() -> nn.Module:
        network = kind(**arguments)
        describe.same("network", {"class": kind.__name__, **arguments}, described(network))
        return network

    return make


def check_same(network: nn.Module, description: Any) -> None:
    """Refuse a network that is not of the class, and with the arguments, of the one saved."""
    ours = described(network)
    older = {name: value for name, value in ADDED.items() if name in ours}
    if isinstance(description, dict):
        description = {**older, **description}
    describe.same("network", description, ours)


def sketched(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network on the meta device, where numbers take no memory.

    Raises:
        ValueError: if it is larger than these tensors, in the memory it would take or in the torch
            calls that make it: a record can say a number that a file cannot fill.
    """
    with torch.device("meta"), Calls(2000 + 20 * len(tensors)):
        network = make().to(dtype_of(tensors))
    takes = sum(held.nbytes for held in [*network.parameters(), *network.buffers()])
    has = sum(value.nbytes for value in tensors.values())
    if takes > 2 * has + 2**20:
        raise ValueError(f"its network takes {takes:,} bytes; the file has {has:,}")
    return network


class Calls(TorchFunctionMode):
    """At most so many calls of torch: what a constructor's loops may cost.

    A table of frequencies is made for real: what computes on the meta device loads the half of
    torch that compiles, for a second or two.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("its network has many more tensors than the file")
        kwargs = kwargs or {}
        if func is torch.linspace:
            steps = args[2] if len(args) > 2 else kwargs["steps"]
            validate.integer("the steps of a table", steps, at_most=2**16)
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a network with these tensors, which is one for all."""
    found = next(iter(tensors.values())).dtype if tensors else torch.float32
    if not found.is_floating_point:
        raise ValueError(f"its tensors are of {found}")
    return found
