r"""Least squares with the derivative of an operator at a point."""

from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.models.derivatives import leaf, recorded
from sde_diffusion.processes.level import Scalar, coordinates, double, per_sample

__all__ = ["Linearized", "conjugate_gradients", "least_squares"]

SMALL = 4096  # entries of the largest matrix that is decomposed as a whole
ROUNDS = 200  # of conjugate gradients, at most


class Linearized:
    """The derivative A of an operator at x0 (B, ...), for each sample.

    Raises:
        ValueError: if the operator cannot be differentiated.
    """

    def __init__(self, operator: Callable[[Tensor], Tensor], x0: Tensor) -> None:
        with recorded():
            self.x0 = leaf(x0)
            self.seen = operator(self.x0)
            if self.seen.requires_grad:
                self.dual = torch.zeros_like(self.seen).requires_grad_()
                self.pulled = self.transposed(self.dual, twice=True)
        if not (self.seen.requires_grad and self.pulled.requires_grad):
            raise ValueError("operator must be differentiable; got one without derivatives")

    def transposed(self, v: Tensor, *, twice: bool = False) -> Tensor:
        """Return A^T v, shaped like x0, by back-propagation; differentiable in v if `twice`."""
        return torch.autograd.grad(self.seen, self.x0, v, retain_graph=True, create_graph=twice)[0]

    def applied(self, v: Tensor) -> Tensor:
        """Return A v, shaped like the operator's output, as the derivative of A^T v by v."""
        return torch.autograd.grad(self.pulled, self.dual, v, retain_graph=True)[0]

    def matrix(self) -> Tensor:
        """Return A of each sample, (B, m, d) float64; (1, m, d) if all are equal."""
        m = self.seen.shape[1:].numel()
        basis = torch.eye(m, dtype=self.seen.dtype, device=self.seen.device)
        rows = [self.transposed(v.reshape(self.seen.shape[1:]).expand_as(self.seen)) for v in basis]
        made = torch.stack([coordinates(row) for row in rows], dim=1).double()
        return made[:1] if bool((made == made[:1]).all()) else made


def least_squares(
    operator: Callable[[Tensor], Tensor], x0: Tensor, r: Tensor, spread: Scalar, ridge: Scalar
) -> tuple[Tensor, Tensor]:
    r"""Solve  (spread A A^T + ridge I) z = r;  return  d = A^T z  and  ridge z = r - spread A d.

    A is the operator's derivative at x0 (B, ...); r is shaped like its output. For ridge = 0 this
    is least squares: the part of r outside the range of A is ignored. If spread is 0 too, d = 0.
    A small A is decomposed by singular values. For a large one, conjugate gradients solve
    (spread A^T A + ridge I) d = A^T r  in at most 200 rounds, which is an approximation if A is
    ill-conditioned and ridge = 0.
    """
    at = Linearized(operator, x0)
    small = r.shape[1:].numel() * x0.shape[1:].numel() <= SMALL
    return (by_singular_values if small else by_conjugate_gradients)(at, r, spread, ridge)


def by_singular_values(
    at: Linearized, r: Tensor, spread: Scalar, ridge: Scalar
) -> tuple[Tensor, Tensor]:
    """Solve `least_squares` in float64; singular values at the level of rounding count as 0."""
    a, flat = at.matrix(), coordinates(r).double()
    if not bool(a.isfinite().all()):
        raise ValueError("operator must have a finite derivative; got nan or infinity")
    s, e = (double(v).to(a).reshape(-1, 1) for v in (spread, ridge))
    u, w, vt = (part.expand(len(r), *part.shape[1:]) for part in torch.linalg.svd(a, False))
    counts = w > max(a.shape[1:]) * torch.finfo(w.dtype).eps * w.amax(1, keepdim=True)
    counts = counts & (s * w**2 + e > 0)
    share = torch.where(counts, w / torch.where(counts, s * w**2 + e, 1), 0)
    d = torch.einsum("bkd,bk,bmk,bm->bd", vt, share, u, flat)
    rest = flat - s * torch.einsum("bmd,bd->bm", a.expand(len(r), -1, -1), d)
    return d.reshape(at.x0.shape).to(at.x0.dtype), rest.reshape(r.shape)


def by_conjugate_gradients(
    at: Linearized, r: Tensor, spread: Scalar, ridge: Scalar
) -> tuple[Tensor, Tensor]:
    """Solve `least_squares` without the matrix, with two back-propagations per round."""
    s, e = per_sample(spread, at.x0), per_sample(ridge, at.x0)

    def normal(p: Tensor) -> Tensor:
        return s * at.transposed(at.applied(p)) + e * p

    d = conjugate_gradients(normal, at.transposed(r), ROUNDS)
    return d, r - per_sample(spread, r) * at.applied(d)


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, rounds: int) -> Tensor:
    """Solve M z = b, for each sample, with a symmetric positive semi-definite M; from z = 0.

    Args:
        matrix: M, a function of a batch shaped like b.
        b: (B, ...), in the range of M.
        rounds: the most; a sample is finished when its residual is that of rounding.
    """
    z, g = torch.zeros_like(b), b.clone()
    p = g.clone()
    size = coordinates(g).square().sum(1)
    enough = size * (16 * torch.finfo(size.dtype).eps) ** 2
    for _ in range(rounds):
        going = ~(size <= enough)  # nan continues, and reaches the result
        if not bool(going.any()):
            break
        m = matrix(p)
        bend = coordinates(p * m).sum(1)
        step = per_sample(torch.where(going & (bend != 0), size / bend, 0), p)
        z, g = z + step * p, g - step * m
        before, size = size, coordinates(g).square().sum(1)
        p = g + per_sample(torch.where(going, size / before, 0), p) * p
    return z
