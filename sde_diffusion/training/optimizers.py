"""Optimizers for training: any of torch.optim, saved by its own state."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion import validate
from sde_diffusion.files.storage import kind_of
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
    """Make an optimizer, and take one step of a copy with gradients of 0.

    Returns:
        the optimizer, and the outlines of its state before and after its first step.
    Raises:
        ValueError: if it cannot train these parameters, or its state cannot be saved.
    """
    if not callable(make):
        raise TypeError(f"optimizer must be a function of parameters; got {validate.shown(make)}")
    optimizer = make(parameters)
    validate.kind("optimizer", optimizer, "a function that returns a torch optimizer", "state_dict")
    if not {id(p) for p in parameters_of(optimizer)} <= {id(p) for p in parameters}:
        rule = "parameters of the denoiser that require gradients, and no others"
        raise ValueError(f"optimizer must hold {rule}; got others")
    # copy.deepcopy(optimizer) would leave out the attributes that only its own class has.
    trial = object.__new__(type(optimizer))
    try:
        trial.__dict__ = copy.deepcopy(vars(optimizer), {id(optimizer): trial})
        for p in parameters_of(trial):
            p.grad = torch.zeros_like(p)
        trial.step()
    except Exception as error:
        rule, found = "step on dense gradients without a closure", type(optimizer).__name__
        raise ValueError(f"optimizer must {rule}; got {found}: {error}") from error
    first, after = flat(optimizer), flat(trial)
    for name, value in after.items():
        if not isinstance(value, Tensor | int | float | None):
            found = f"{kind_of(value)}, {name}"
            raise ValueError(f"optimizer must keep tensors and numbers; got {found}")
    for group, old in zip(trial.param_groups, optimizer.param_groups, strict=True):
        changed = [key for key in old if key != "params" and group[key] != old[key]]
        if changed:
            got = f"a step changed {changed[0]!r} of a group, which a checkpoint does not hold"
            raise ValueError(f"optimizer must keep its state per parameter; {got}")
    return optimizer, kinds_of(first), kinds_of(after)


def load_state(optimizer: Any, values: Mapping[str, Any]) -> None:
    """Replace the state of an optimizer by one that `flat` returned, bit for bit."""
    moved = parameters_of(optimizer)
    state: dict[int, dict[str, Any]] = {}
    for name in sorted(values):  # sharding is a call of all processes, in one order
        _, index, slot = name.split(".", 2)
        state.setdefault(int(index), {})[slot] = placed(values[name], moved[int(index)])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for index, slots in state.items():  # torch casts each slot to the dtype of its parameter
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


def kinds_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The kind of each value: shape and dtype of a tensor, or the type of a number."""
    return {name: kind_of(value) for name, value in values.items()}


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
