"""Distances between Gaussians, in closed form."""

import torch
from torch import Tensor


def w2(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    r"""Wasserstein-2 distance of two Gaussians (Dowson & Landau 1982).

    W^2 = |m - m'|^2 + min_U |S^(1/2) - S'^(1/2) U|^2 over orthogonal U. The usual form, tr(S + S' -
    2 (S^(1/2) S' S^(1/2))^(1/2)), is the same minimum, but as a difference, which
    loses every W < 1e-8.
    """
    root_a, root_b = matrix_root(a[1]), matrix_root(b[1])
    left, _, right = torch.linalg.svd(root_b.T @ root_a)
    bures = (root_a - root_b @ left @ right).square().sum()
    return float(((a[0] - b[0]).square().sum() + bures).sqrt())


def kl(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    r"""KL(a || b) of two Gaussians in nats; inf where a has no density.

    KL = (tr(S'^-1 S) - d - ln det(S'^-1 S) + (m - m')^T S'^-1 (m - m')) / 2
    """
    if not bool((torch.linalg.eigvalsh(b[1]) > 0).all()):
        raise ValueError("covariance must be positive definite for KL")
    root = torch.linalg.cholesky(b[1])
    inner = torch.linalg.solve_triangular(root, a[1], upper=False)
    inner = torch.linalg.solve_triangular(root, inner.T, upper=False)
    ratios = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0)
    shift = torch.linalg.solve_triangular(root, (a[0] - b[0])[:, None], upper=False)
    ratios[ratios < 1e-13 * ratios.max()] = 0.0  # rounding of a law without a density
    excess = ratios - 1
    return float((excess - torch.log1p(excess)).sum() + shift.square().sum()) / 2


def matrix_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
