r"""Least squares with the derivative of an operator at a point."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.models.derivatives import leaf, recorded
from sde_diffusion.processes.level import Scalar, coordinates, double, per_sample

__all__ = ["Linearized", "conjugate_gradients", "least_squares"]

SMALL = 4096  # entries of the largest matrix that is decomposed as a whole
ROUNDS = 200  # of conjugate gradients, at most


Map = Callable[[Tensor], Tensor]


class Linearized:
    """The derivative A of an operator at x0 (B, ...), for each sample.

    Raises:
        ValueError: if the operator cannot be differentiated.
    """

    def __init__(self, operator: Map, x0: Tensor) -> None:
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

    def check_linear(self) -> None:
        """Refuse an operator whose A depends on x0: A is a constant in derivatives."""
        with recorded():
            pulled = self.transposed(unequal(self.seen), twice=True)
        if not pulled.requires_grad:
            return
        (slope,) = torch.autograd.grad(
            pulled, self.x0, unequal(pulled), retain_graph=True, materialize_grads=True
        )
        if bool((slope != 0).any()):
            raise ValueError("operator must be linear to differentiate the solution; got another")

    def matrix(self) -> Tensor:
        """Return A of each sample, (B, m, d) float64; (1, m, d) if all are equal."""
        m = self.seen.shape[1:].numel()
        basis = torch.eye(m, dtype=self.seen.dtype, device=self.seen.device)
        rows = [self.transposed(v.reshape(self.seen.shape[1:]).expand_as(self.seen)) for v in basis]
        made = torch.stack([coordinates(row) for row in rows], dim=1).double()
        return made[:1] if bool((made == made[:1]).all()) else made


def unequal(like: Tensor) -> Tensor:
    """Return different numbers, shaped like `like`, whose products do not cancel."""
    return torch.linspace(1, 2, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)


class LinearMap(torch.autograd.Function):
    """A linear map of v, whose derivative is its transpose; both can be differentiated."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, at: Linearized, made: Map, transposed: Map) -> Tensor:
        ctx.maps = at, made, transposed
        return made(v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        at, made, transposed = ctx.maps
        at.check_linear()
        return LinearMap.apply(gradients[0], at, transposed, made), None, None, None


def least_squares(
    operator: Map, x0: Tensor, r: Tensor, spread: Scalar, ridge: Scalar
) -> tuple[Tensor, Tensor]:
    r"""Solve  (spread A A^T + ridge I) z = r;  return  d = A^T z  and  ridge z = r - spread A d.

    A is the operator's derivative at x0 (B, ...); r is shaped like its output. For ridge = 0 this
    is least squares: the part of r outside the range of A is ignored. If spread is 0 too, d = 0.
    A small A is decomposed by singular values. For a large one, conjugate gradients solve
    (spread A^T A + ridge I) d = A^T r  in at most 200 rounds, which is an approximation if A is
    ill-conditioned and ridge = 0. Where r requires a gradient, d and the rest have one, for a
    linear operator; for any other the backward pass raises ValueError.
    """
    at = Linearized(operator, x0)
    small = r.shape[1:].numel() * x0.shape[1:].numel() <= SMALL
    solve, transposed = (by_singular_values if small else by_conjugate_gradients)(at, spread, ridge)
    if not (torch.is_grad_enabled() and r.requires_grad):
        return solve(r)
    d = LinearMap.apply(r, at, lambda r: solve(r)[0], transposed)
    return d, r - per_sample(spread, r) * LinearMap.apply(d, at, at.applied, at.transposed)


def by_singular_values(
    at: Linearized, spread: Scalar, ridge: Scalar
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Map]:
    """Return r -> (d, rest) and g -> M^T g for d = M r, in float64.

    Singular values at the level of rounding count as 0.
    """
    a, n = at.matrix(), len(at.seen)
    if not bool(a.isfinite().all()):
        raise ValueError("operator must have a finite derivative; got nan or infinity")
    s, e = (double(v).to(a).reshape(-1, 1) for v in (spread, ridge))
    u, w, vt = (part.expand(n, *part.shape[1:]) for part in torch.linalg.svd(a, False))
    counts = w > max(a.shape[1:]) * torch.finfo(w.dtype).eps * w.amax(1, keepdim=True)
    counts = counts & (s * w**2 + e > 0)
    share = torch.where(counts, w / torch.where(counts, s * w**2 + e, 1), 0)

    def solve(r: Tensor) -> tuple[Tensor, Tensor]:
        flat = coordinates(r).double()
        d = torch.einsum("bkd,bk,bmk,bm->bd", vt, share, u, flat)
        rest = flat - s * torch.einsum("bmd,bd->bm", a.expand(n, -1, -1), d)
        return d.reshape(at.x0.shape).to(at.x0.dtype), rest.reshape(r.shape)

    def transposed(g: Tensor) -> Tensor:
        z = torch.einsum("bmk,bk,bkd,bd->bm", u, share, vt, coordinates(g).double())
        return z.reshape(at.seen.shape).to(g.dtype)

    return solve, transposed


def by_conjugate_gradients(
    at: Linearized, spread: Scalar, ridge: Scalar
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Map]:
    """Return the maps of `by_singular_values` without the matrix of A.

    Two back-propagations per round: M = (spread A^T A + ridge)^-1 A^T, and its transpose is
    (spread A A^T + ridge)^-1 A.
    """
    s, e = per_sample(spread, at.x0), per_sample(ridge, at.x0)
    s_r, e_r = per_sample(spread, at.seen), per_sample(ridge, at.seen)

    def normal(p: Tensor) -> Tensor:
        return s * at.transposed(at.applied(p)) + e * p

    def normal_of_seen(p: Tensor) -> Tensor:
        return s_r * at.applied(at.transposed(p)) + e_r * p

    def solve(r: Tensor) -> tuple[Tensor, Tensor]:
        d = conjugate_gradients(normal, at.transposed(r), ROUNDS)
        return d, r - s_r * at.applied(d)

    def transposed(g: Tensor) -> Tensor:
        return conjugate_gradients(normal_of_seen, at.applied(g), ROUNDS)

    return solve, transposed


def conjugate_gradients(matrix: Map, b: Tensor, rounds: int) -> Tensor:
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
