"""Derivatives with respect to a batch, in whatever gradient mode a sampler runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_differentiable",
    "gradient",
    "in_graph",
    "leaf",
    "one_per_sample",
    "ordinary",
    "point_of",
    "recorded",
]


@contextmanager
def recorded() -> Iterator[None]:
    """Record operations for differentiation, even inside no_grad or inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(x: Any) -> Any:
    """Return x; a copy that autograd may save, if it is a tensor made in torch.inference_mode."""
    if not isinstance(x, Tensor) or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def leaf(x: Tensor) -> Tensor:
    """Return x as a leaf that requires a gradient; to be called within `recorded`."""
    return ordinary(x.detach()).requires_grad_()


def in_graph(x: Tensor) -> bool:
    """Return True if the caller records gradients by x: derivatives must then have one, too."""
    return torch.is_grad_enabled() and x.requires_grad


def point_of(x: Tensor, graph: bool) -> Tensor:
    """Return x, to differentiate a function there: in the graph of x, or a leaf."""
    return x.view_as(x) if graph else leaf(x)


def gradient(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values (B,) of a function of each sample, and its gradient, shaped like x.

    Where the caller records gradients by x, both can be differentiated.
    """
    graph = in_graph(x)
    with recorded():
        point = point_of(x, graph)
        value = function(point)
        if not value.requires_grad:
            raise ValueError(f"{name} must be differentiable in x; got a constant")
        (slope,) = torch.autograd.grad(value.sum(), point, create_graph=graph)
    return value if graph else value.detach(), slope


def check_differentiable(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Refuse a function without a derivative J in x, such as one that rounds.

    Autograd returns zeros for its J^T v, which do not depend on v.
    """
    with recorded():
        point = leaf(x)
        value = function(point)
        v = torch.ones_like(value).requires_grad_()
        pulled = pull(value, point, v, create_graph=True) if value.requires_grad else None
        if pulled is not None and not bool(pulled.any()):
            linked = pulled.requires_grad and pull(pulled, v, torch.zeros_like(pulled)) is not None
            pulled = pulled if linked else None
    if pulled is None:
        raise ValueError(f"{name} must be differentiable; got one without derivatives")


def pull(value: Tensor, x: Tensor, v: Tensor, *, create_graph: bool = False) -> Tensor | None:
    """Return J^T v with J = d value / dx; None if `value` does not depend on x."""
    keep: Any = {"create_graph": create_graph, "retain_graph": True, "allow_unused": True}
    return torch.autograd.grad(value, x, v, **keep)[0]


def one_per_sample(name: str, value: Tensor, x: Tensor) -> Tensor:
    """Return `value`, which the function `name` returned for x (B, ...), if it is (B,)."""
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name} must return shape {tuple(x.shape[:1])}; got {tuple(value.shape)}")
    return value
