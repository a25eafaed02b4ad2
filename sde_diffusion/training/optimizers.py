"""Optimizers for training: any of torch.optim, saved by its own state."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion import validate
from sde_diffusion.training.engine import like_ours
from sde_diffusion.training.recipe import Recipe

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# Entries of a parameter group that choose an implementation, not a result.
IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}


def adamw(recipe: Recipe) -> MakeOptimizer:
    """The default: AdamW with the recipe's rate and weight decay."""
    return lambda parameters: torch.optim.AdamW(
        parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )


def rehearsed(
    make: MakeOptimizer, parameters: list[nn.Parameter]
) -> tuple[Any, dict[str, str], dict[str, str]]:
    """Make an optimizer, and take one step with gradients of 0, which is undone.

    Returns:
        the optimizer, and the outlines of its state before and after its first step.
    Raises:
        ValueError: if it cannot train these parameters, or its state cannot be saved.
    """
    if not callable(make):
        raise TypeError(f"optimizer must be a function of parameters; got {validate.shown(make)}")
    optimizer = make(parameters)
    validate.kind("optimizer", optimizer, "a function that returns a torch optimizer", "state_dict")
    moved = parameters_of(optimizer)
    if not {id(p) for p in moved} <= {id(p) for p in parameters}:
        raise ValueError(
            "optimizer must hold parameters of the denoiser that require gradients, and no others"
        )
    before = copy.deepcopy(optimizer.state_dict())
    first = {name: outline(value) for name, value in flat(optimizer).items()}
    values = [p.detach().clone() for p in moved]
    try:
        for p in moved:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    except Exception as error:
        rule, found = "step on dense gradients without a closure", type(optimizer).__name__
        raise ValueError(f"optimizer must {rule}; got {found}: {error}") from error
    finally:
        for p, value in zip(moved, values, strict=True):
            p.grad = None
            p.data.copy_(value)
    after = flat(optimizer)
    for name, value in after.items():
        if not isinstance(value, Tensor | int | float | None):
            found = f"{outline(value)}, {name}"
            raise ValueError(f"optimizer must keep tensors and numbers; got {found}")
    load_state(optimizer, before["state"])
    for group, old in zip(optimizer.param_groups, before["param_groups"], strict=True):
        changed = [key for key in old if key != "params" and group[key] != old[key]]
        if changed:
            raise ValueError(
                f"optimizer must keep its state per parameter; a step changed {changed[0]!r} of a "
                f"group, which a checkpoint does not hold"
            )
    return optimizer, first, {name: outline(value) for name, value in after.items()}


def load_state(optimizer: Any, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Replace the state of an optimizer by what its state_dict had, bit for bit."""
    moved = parameters_of(optimizer)
    ours = {
        index: {slot: placed(value, moved[index]) for slot, value in slots.items()}
        for index, slots in state.items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": ours, "param_groups": groups})
    for index, slots in ours.items():  # torch casts each slot to the dtype of its parameter
        loaded = optimizer.state[moved[index]]
        for slot, value in slots.items():
            if isinstance(value, Tensor) and loaded[slot].dtype != value.dtype:
                loaded[slot] = value.to(loaded[slot].device)


def placed(value: Any, parameter: Tensor) -> Any:
    """A slot in the memory format of its parameter, and sharded like it, if it has its shape."""
    same = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    return like_ours(value, parameter) if same else value


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    """The parameters of an optimizer in the order of their indices in its state_dict."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def flat(optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer, `optimizer.<index of the parameter>.<slot>` -> value."""
    return {
        f"optimizer.{index}.{slot}": value
        for index, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
    }


def outline(value: Any) -> str:
    """Shape and dtype of a tensor, or the type of a number."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return type(value).__name__


def hyperparameters(optimizer: Any) -> str:
    """Class, hyperparameters and number of parameters of each group, in one line.

    Entries that are 0, False or None are left out: a later torch may add more of them.
    """
    rows = [
        ", ".join(f"{k}={v}" for k, v in group.items() if k not in IMPLEMENTATION and v)
        + f" for {len(group['params'])} parameters"
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}: {'; '.join(rows)}"
