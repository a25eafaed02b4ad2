r"""Quality of samples: distances between made and real images in the features of a network.

Images are (B, C, H, W) in [-1, 1]; a network maps them to features (B, d), see features.py. Every
figure carries the sizes of both sets, since its bias depends on them, and is to be read beside its
`floor`: the same metric, at the same sizes, between two halves of the real data.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sde_diffusion import validate
from sde_diffusion.data.datasets import shuffled_indices
from sde_diffusion.files.npz import read_npz, write_npz
from sde_diffusion.files.storage import BadFile
from sde_diffusion.metrics.distances import (
    Figure,
    required,
)
from sde_diffusion.validate import T

__all__ = [
    "Gatherer",
    "PrecisionRecall",
    "Principal",
    "Statistics",
    "chunks",
    "extract",
    "floor",
    "frechet_distance",
    "gathered",
    "halves",
    "kid",
    "precision_recall",
    "principal",
    "statistics",
]

SYMMETRIC = 1e-6  # rounding of a covariance that was computed or kept in float32


class Gatherer(Protocol):
    """What an `accelerate.Accelerator` offers and `gathered` uses."""

    def gather(self, tensor: Any) -> Any: ...

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0) -> Any: ...


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean (d,) and covariance (d, d) of features, float64, and how many there were.

    Args:
        count: None where it is not known: the files of other programs do not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        validate.batch("mean", self.mean)
        validate.batch("covariance", self.covariance)
        d = len(self.mean) if self.mean.ndim == 1 else 0
        if d < 1 or self.covariance.shape != (d, d):
            raise ValueError(
                "mean and covariance must be (d,) and (d, d); got "
                f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            )
        for name in ("mean", "covariance"):
            value = getattr(self, name)
            if value.dtype != torch.float64 or not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite float64; got {value.dtype}")
        size = float(self.covariance.abs().max())
        if float((self.covariance - self.covariance.T).abs().max()) > SYMMETRIC * size:
            raise ValueError("covariance must be symmetric")
        least = float(torch.linalg.eigvalsh(self.covariance)[0])
        if least < -SYMMETRIC * d * size:
            raise ValueError(f"covariance must have no negative eigenvalue; got {least:.3g}")
        if self.count is not None:
            validate.integer("count", self.count, at_least=2)

    @staticmethod
    def of(features: Tensor) -> "Statistics":
        """Those of features (N, d); the covariance is the unbiased one.

        Raises:
            ValueError: if N < d: the covariance of so few samples is singular, and distances to it
                say more of N than of the samples.
        """
        x = checked_features("features", features)
        if len(x) < x.shape[1]:
            raise ValueError(
                f"{len(x)} samples are fewer than the {x.shape[1]} features: draw more"
            )
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
        return Statistics(mean, (covariance + covariance.T) / 2, len(x))

    def save(self, path: str | Path) -> None:
        """Write a .npz with `mu` and `sigma`, the exchange format of FID programs, and `count`."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path must end in .npz; got {path}")
        count = {} if self.count is None else {"count": self.count}
        mu, sigma = (value.cpu().numpy() for value in (self.mean, self.covariance))
        write_npz(path, mu=mu, sigma=sigma, **count)

    @staticmethod
    def load(path: str | Path) -> "Statistics":
        """Read what `save` or another program wrote, float32 or float64.

        Raises:
            storage.BadFile: naming the file and the reason.
        """
        path = Path(path)
        found = read_npz(path, ("mu", "sigma"), ("count",))
        count = found.get("count")
        try:
            for name in ("mu", "sigma"):
                validate.choice(f"dtype of {name}", str(found[name].dtype), ("float32", "float64"))
            if count is not None and (count.shape != () or count.dtype.kind not in "iu"):
                raise ValueError(f"count must be one integer; got {count.dtype} {count.shape}")
            mean, covariance = (torch.tensor(found[k]).double() for k in ("mu", "sigma"))
            return Statistics(mean, covariance, None if count is None else int(count))
        except (ValueError, TypeError, RuntimeError) as error:
            raise BadFile(f"{path}: {' '.join(str(error).split())}") from None


def statistics(
    images: Tensor, network: Callable[[Tensor], Tensor], batch_size: int = 128
) -> Statistics:
    """Statistics of the features of images (N, C, H, W) in [-1, 1]."""
    return Statistics.of(extract(images, network, batch_size))


def extract(images: Tensor, network: Callable[[Tensor], Tensor], batch_size: int = 128) -> Tensor:
    """Features (N, d) of images (N, C, H, W), `batch_size` at a time, without gradients.

    A module is asked in eval mode, and left in the mode it was in.
    """
    validate.batch("images", images)
    validate.kind("network", network, "a module or function of images", "__call__")
    validate.integer("batch_size", batch_size)
    if len(images) == 0:
        raise ValueError("images must hold at least one; got 0")
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite; they hold nan or infinity")
    with evaluating(network), torch.no_grad():
        found = [network(part) for part in images.split(batch_size)]
    for part, rows in zip(found, images.split(batch_size), strict=True):
        if part.ndim != 2 or len(part) != len(rows):
            raise ValueError(
                f"network must map {len(rows)} images to ({len(rows)}, d) features; "
                f"got shape {tuple(part.shape)}"
            )
    return torch.cat(found)


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Every part of the network in eval mode, for a while."""
    parts = list(network.modules()) if isinstance(network, nn.Module) else []
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def frechet_distance(real: Statistics, made: Statistics) -> Figure:
    r"""Squared Frechet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017).

    d^2 = |m - n|^2 + tr(S + T - 2 (S T)^(1/2)).  The eigenvalues of (S T)^(1/2) are the singular
    values of S^(1/2) T^(1/2), which are real and not negative whatever is rounded: the distance
    of a set to itself is rounding. On Inception's features this is the FID, and on no others.
    """
    for name, given in (("real", real), ("made", made)):
        validate.kind(name, given, "Statistics", "mean", "covariance", "count")
    if real.mean.shape != made.mean.shape:
        raise ValueError(
            f"real and made must have features alike; got {len(real.mean)} and {len(made.mean)}"
        )
    S, T = real.covariance, made.covariance
    overlap = torch.linalg.svdvals(root(S) @ root(T)).sum()
    shift = (real.mean - made.mean).square().sum()
    value = shift + S.trace() + T.trace() - 2 * overlap
    return Figure(max(0.0, float(value)), (real.count, made.count))


def root(S: Tensor) -> Tensor:
    """The symmetric R with R R = S; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh((S + S.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kid(real: Tensor, made: Tensor, subsets: int = 10, seed: int = 0) -> Figure:
    r"""Kernel distance of features (N, d) and (M, d) (Binkowski et al. 2018), by torchmetrics.

    The unbiased MMD^2 with the kernel  k(x, y) = (x . y / d + 1)^3, averaged over subsets. They are
    disjoint here, a permutation by `seed` cut in pieces, so that they are independent and the
    standard error is that of a mean. The size of a subset is min(N, M) // subsets, and does not
    bias the figure; it is the KID on Inception's features.
    """
    x, y = checked_features("real", real), checked_features("made", made)
    alike(x, y)
    validate.integer("subsets", subsets, at_least=2)
    size = min(len(x), len(y)) // subsets
    if size < 2:
        raise ValueError(
            f"{subsets} subsets of at least 2 need {2 * subsets} samples of each kind; "
            f"got {len(x)} real and {len(y)} made"
        )
    poly_mmd = required("torchmetrics.image.kid").poly_mmd
    parts = [
        part[shuffled_indices(seed + k, len(part), 0, subsets * size)].split(size)
        for k, part in enumerate((x, y))
    ]
    found = torch.stack([poly_mmd(a, b) for a, b in zip(*parts, strict=True)])
    error = float(found.std() / subsets**0.5)
    return Figure(float(found.mean()), (len(x), len(y)), error)


class PrecisionRecall(NamedTuple):
    """Share of made samples that could be real, and of real ones that could be made."""

    precision: Figure
    recall: Figure


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> PrecisionRecall:
    """Precision and recall over features (Kynkaanniemi et al. 2019, eq. 1), by torch-fidelity.

    A sample could be of a set if it lies in one of its balls: around each member, as wide as the
    distance to its k-th neighbour in the set. Both depend on the sizes: give as many of each kind.
    """
    x, y = checked_features("real", real), checked_features("made", made)
    alike(x, y)
    validate.integer("k", k)
    if min(len(x), len(y)) <= k:
        raise ValueError(f"k = {k} neighbours need more samples; got {len(x)} and {len(y)}")
    measure = required("torch_fidelity.metric_prc").prc_features_to_metric
    found = measure(y, x, prc_neighborhood=k, prc_batch_size=2048, save_cpu_ram=True, verbose=False)
    sizes = (len(x), len(y))
    return PrecisionRecall(Figure(found["precision"], sizes), Figure(found["recall"], sizes))


@dataclass(frozen=True, eq=False)
class Principal:
    """A projection to principal components: (x - mean) @ basis, (N, d) to (N, k)."""

    mean: Tensor
    basis: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return (checked_features("features", features) - self.mean) @ self.basis


def principal(real: Tensor, components: int = 64) -> Principal:
    """The directions in which the real features (N, d) vary most, N > components.

    What few samples allow where features are many: a Frechet distance on k components needs k
    samples, not d. Fit it on real images alone, and name it with its features and components.
    """
    x = checked_features("real", real)
    validate.integer("components", components, at_most=x.shape[1])
    if len(x) <= components:
        raise ValueError(f"{len(x)} samples have fewer than {components} principal components")
    mean = x.mean(0)
    basis = torch.linalg.svd(x - mean, full_matrices=False).Vh[:components].T
    return Principal(mean, basis)


def halves(real: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two disjoint halves of the rows of `real`, in an order that depends on the seed alone."""
    if len(real) < 2:
        raise ValueError(f"real must hold two samples or more; got {len(real)}")
    first, second = real[shuffled_indices(seed, len(real), 0, len(real))].tensor_split(2)
    return first, second


def floor(
    metric: Callable[[Tensor, Tensor], T],
    real: Tensor,
    count: int | None = None,
    seed: int = 0,
) -> T:
    """The metric between two halves of the real data: what perfect samples would get.

    Args:
        metric: called as metric(real, made), with one half as each.
        real: features or points (N, ...).
        count: how many of the second half are used; as many as were made [all].
    """
    first, second = halves(real, seed)
    if count is not None:
        validate.integer("count", count, at_most=len(second))
    return metric(first, second[:count])


def chunks(count: int, size: int, process: int = 0, processes: int = 1) -> list[range]:
    """The positions 0 .. count - 1 in chunks of `size`, and of those every one that is this
    process's: whole chunks are dealt, since a network's last bits depend on its batch."""
    validate.integer("count", count)
    validate.integer("size", size)
    validate.integer("processes", processes)
    validate.integer("process", process, 0, processes - 1)
    whole = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return whole[process::processes]


def gathered(values: Tensor, positions: Tensor, accelerator: Gatherer | None = None) -> Tensor:
    """The rows of all processes in the order of their positions: the same bits on every one.

    Args:
        values: this process's rows (n, ...); n may be 0, the other sizes and the dtype may not
            differ from those of the others.
        positions: what each row is in the whole, (n,) int64: 0 .. N - 1, each on one process.
        accelerator: an `accelerate.Accelerator`, or None where there is one process.
    """
    if positions.shape != values.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"positions must be ({len(values)},) int64; got {tuple(positions.shape)}, "
            f"{positions.dtype}"
        )
    if accelerator is not None:
        values = accelerator.gather(accelerator.pad_across_processes(values.contiguous()))
        positions = accelerator.gather(
            accelerator.pad_across_processes(positions, pad_index=-1).contiguous()
        )
    kept = positions >= 0
    values, positions = values[kept], positions[kept]
    places = positions.argsort()
    if not torch.equal(positions[places].cpu(), torch.arange(len(positions))):
        raise ValueError(f"positions must be 0 .. {len(positions) - 1}, each once")
    return values[places]


def checked_features(name: str, features: Tensor) -> Tensor:
    """Features as float64 (N, d), N > 1, on the CPU: not every device has float64."""
    validate.batch(name, features)
    if features.ndim != 2 or len(features) < 2 or features.shape[1] < 1:
        raise ValueError(f"{name} must be (N, d), N > 1; got shape {tuple(features.shape)}")
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name} must be finite; they hold nan or infinity")
    return features.detach().cpu().double()


def alike(real: Tensor, made: Tensor) -> None:
    if real.shape[1] != made.shape[1]:
        raise ValueError(
            f"real and made must have features alike; got {real.shape[1]} and {made.shape[1]}"
        )
