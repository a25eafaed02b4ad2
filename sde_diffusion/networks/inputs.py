"""Rules of what a network is made from and called with.

The upper limits keep a record in a file from describing a network that no file could fill.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Annotated, Any

from torch import Tensor

from sde_diffusion.validate import Each, Integer

Side = Integer(1, 2**16)

Width = Annotated[int, Side]
CondWidth = Annotated[int, Integer(0, 2**16)]
Widths = Annotated[Sequence[int], Each(Side, 16, 1)]


def arguments_of(network: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network's constructor as JSON has them, from its local values."""
    given = {name: values[name] for name in signature(network).parameters}
    return {name: list(v) if isinstance(v, Sequence) else v for name, v in given.items()}


def check_images(x: Tensor, channels: int) -> None:
    """Raise ValueError unless x is (B, channels, H, W)."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be (B, {channels}, H, W); got shape {tuple(x.shape)}")


def check_cond(cond: Tensor | None, width: int) -> None:
    """Raise ValueError unless cond is (B, width), or None where width is 0."""
    found = 0 if cond is None else cond.shape[-1]
    if found and not width:
        raise ValueError(f"cond must be None: the network has no condition; got width {found}")
    if found != width:
        got = "None" if cond is None else f"{found}, shape {tuple(cond.shape)}"
        raise ValueError(f"cond must have width {width}; got {got}")
