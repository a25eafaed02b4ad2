"""Derivatives at a point, in whatever gradient mode a sampler runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["leaf", "ordinary", "recorded"]


@contextmanager
def recorded() -> Iterator[None]:
    """Operations in it can be differentiated, whatever mode it is entered in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(x: Any) -> Any:
    """x; a copy that back-propagation may hold, if it is a tensor made in torch.inference_mode."""
    if not isinstance(x, Tensor) or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def leaf(x: Tensor) -> Tensor:
    """x as the point to differentiate at; to be asked for within `recorded`."""
    return ordinary(x.detach()).requires_grad_()
