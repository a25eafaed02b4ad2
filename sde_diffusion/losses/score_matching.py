r"""Score matching without the clean data: a check on any model from noisy batches alone.

For a model's score s and x ~ p_t, integration by parts gives (Hyvarinen 2005, Theorem 1)

    E |s - grad log p_t|^2 = E[ |s|^2 + 2 div s ] + constant,

and the denoising loss in Score() space is equal up to another constant (Vincent 2011): all three
have one gradient in the model's parameters. Losses are means over coordinates, as in `denoising`.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from sde_diffusion.models.model import IS_MODEL, Model
from sde_diffusion.processes.level import Scalar, coordinates, wide
from sde_diffusion.validate import FloatBatch, arguments, batch

__all__ = ["implicit_loss", "sliced_loss"]


@arguments
def implicit_loss(model: Annotated[Model, IS_MODEL], x: FloatBatch, t: Scalar) -> Tensor:
    """Mean over coordinates of |s|^2 + 2 div s, with the exact divergence.

    One backward pass for each of the d coordinates of a sample: for small d.

    Args:
        model: the model under test; samples must be independent (no batch norm).
        x: noisy batch (B, ...), drawn from p_t.
        t: its times, a float, () or (B,), with sigma(t) > 0.
    Returns:
        (B,) losses, at least float32, differentiable in the model's parameters.
    """
    basis = torch.eye(x.shape[1:].numel(), dtype=x.dtype, device=x.device)
    directions = [row.reshape(1, *x.shape[1:]) for row in basis]
    score, slopes = score_and_slopes(model, x, t, directions)
    return coordinates(score**2).mean(1) + 2 * torch.stack(slopes).sum(0) / len(basis)


@arguments
def sliced_loss(
    model: Annotated[Model, IS_MODEL],
    x: FloatBatch,
    t: Scalar,
    probes: Sequence[Tensor],
) -> Tensor:
    """Mean over coordinates and probes v of |s|^2 + 2 v' (ds/dx) v (Song et al. 2019, SSM-VR).

    Unbiased for `implicit_loss` with probes of unit covariance (Hutchinson 1990); one backward pass
    a probe. Random signs, +1 or -1, have the least variance.

    Args:
        model, x, t: as in `implicit_loss`.
        probes: at least one v, shaped like x or, shared by the batch, (1, ...).
    Returns:
        (B,) losses, at least float32, differentiable in the model's parameters.
    """
    shapes = [tuple(batch("each of probes", v).shape) for v in probes]
    allowed = (tuple(x.shape), (1, *x.shape[1:]))
    if not shapes or not set(shapes) <= set(allowed):
        rule = f"at least one tensor shaped like x, {allowed[0]}, or {allowed[1]}"
        raise ValueError(f"probes must hold {rule}; got {shapes}")
    score, slopes = score_and_slopes(model, x, t, probes)
    divergence = torch.stack(slopes).mean(0)
    return coordinates(score**2).mean(1) + 2 * divergence / x.shape[1:].numel()


def score_and_slopes(
    model: Model, x: Tensor, t: Scalar, directions: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The score s and, for each direction v, v' (ds/dx) v of every sample, (B,)."""
    with torch.inference_mode(False), torch.enable_grad():
        x = wide(x.detach().clone()).requires_grad_()
        score = model(x, model.process.level(t, x)).score
        slopes: list[Tensor] = []
        for v in directions:
            v = wide(v).expand_as(x)
            along = torch.autograd.grad((score * v).sum(), x, create_graph=True)[0]
            slopes.append(coordinates(along * v).sum(1))
    return score, slopes
