"""Distances of Gaussians in closed form, and how a result is put into lines."""

import textwrap

import torch
from torch import Tensor

__all__ = ["ending", "gaussian_kl", "gaussian_w2", "listed_numbers", "matrix_root", "thinned"]


def gaussian_w2(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    r"""Wasserstein-2 distance of two Gaussians (Dowson & Landau 1982).

    W^2 = |m - m'|^2 + min_U |S^(1/2) - S'^(1/2) U|^2 over orthogonal U. The usual form, tr(S + S' -
    2 (S^(1/2) S' S^(1/2))^(1/2)), is the same minimum, but as a difference: it knows no W < 1e-8.
    """
    root_a, root_b = matrix_root(a[1]), matrix_root(b[1])
    left, _, right = torch.linalg.svd(root_b.T @ root_a)
    bures = (root_a - root_b @ left @ right).square().sum()
    return float(((a[0] - b[0]).square().sum() + bures).sqrt())


def gaussian_kl(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    r"""KL(a || b) of two Gaussians in nats; inf where a has no density.

    KL = (tr(S'^-1 S) - d - ln det(S'^-1 S) + (m - m')^T S'^-1 (m - m')) / 2
    """
    if not bool((torch.linalg.eigvalsh(b[1]) > 0).all()):
        raise ValueError("KL needs a positive definite covariance to be told against")
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


def listed_numbers(values: Tensor) -> str:
    """A few numbers in one line; of many, the first four."""
    shown = " ".join(f"{value:.8g}" for value in values.flatten()[:4].tolist())
    return shown if values.numel() <= 4 else f"{shown} ... ({values.numel()} in all)"


def thinned(n: int, most: int) -> list[int]:
    """At most so many of the indices 0 .. n - 1, evenly spread, the ends among them."""
    if n <= most:
        return list(range(n))
    return sorted({round(k * (n - 1) / (most - 1)) for k in range(most)})


def ending(verdict: str, unproven: str) -> list[str]:
    """The last lines of a report: its verdict, and what it leaves open."""
    texts = (f"verdict: {verdict}", f"does not prove: {unproven}")
    return [
        line
        for text in texts
        for line in textwrap.wrap(
            text, 92, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    ]
