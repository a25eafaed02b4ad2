"""Conditions of models: a tensor, or several tensors by name; the first axis is B or 1."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import Level
from sde_diffusion.validate import Cond

__all__ = ["entries", "evaluate", "expanded", "map_entries", "null_of", "takes_cond", "zero_null"]


def evaluate(model: Any, x: Tensor, level: Level, cond: Cond | None) -> Prediction:
    """Return model(x, level), or model(x, level, cond) if there is a condition."""
    return model(x, level) if cond is None else model(x, level, cond)


def takes_cond(model: Any) -> bool:
    """Return True for a model that can be called as model(x, level, cond)."""
    own = getattr(model, "takes_cond", None)  # of a wrapper: whether the model inside does
    if own is not None:
        return own
    called = inspect.signature(getattr(model, "forward", model.__call__))
    try:
        called.bind(None, None, None)
    except TypeError:
        return False
    return True


def entries(cond: Cond) -> Mapping[str, Tensor]:
    """Return the tensors of a condition by name; a single tensor has the name "cond"."""
    return cond if isinstance(cond, Mapping) else {"cond": cond}


def map_entries(function: Callable[[str, Tensor], Tensor], cond: Cond) -> Cond:
    """Apply function(name, tensor) to each tensor of a condition."""
    made = {name: function(name, value) for name, value in entries(cond).items()}
    return made if isinstance(cond, Mapping) else made["cond"]


def expanded(cond: Cond, count: int) -> Cond:
    """Return a condition with one entry per sample; entries of first axis 1 are repeated."""
    return map_entries(lambda _, v: v.expand(count, *v.shape[1:]) if len(v) == 1 else v, cond)


def null_of(model: Any, cond: Cond) -> Cond:
    """Return the null condition, shaped like cond: the model's own, or zeros.

    Raises:
        ValueError: if the model has no null and cond is not a float vector (B, width).
    """
    own = getattr(model, "null_like", None)
    return map_entries(zero_null, cond) if own is None else own(cond)


def zero_null(name: str, cond: Tensor) -> Tensor:
    """Return zeros shaped like a float vector (B, width), the default null condition."""
    if not (cond.is_floating_point() and cond.ndim == 2):
        one = f"torch.zeros({tuple(cond.shape[1:])}, dtype={cond.dtype})"
        what = f"{name} of shape {tuple(cond.shape)}, {cond.dtype}"
        raise ValueError(f"null must be given for {what}; got None; e.g. Denoiser(..., null={one})")
    return torch.zeros_like(cond)
