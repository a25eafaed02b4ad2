r"""Quality of samples: distances between made and real images in the features of a network.

Images are (B, C, H, W) in [-1, 1]; a network maps them to features (B, d), see features.py. Every
figure carries the sizes of both sets, as its bias depends on them. Compare it with its `floor`: the
same metric, at the same sizes, between two halves of the real data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import data, validate
from sde_diffusion.files import npz, storage
from sde_diffusion.metrics import distances
from sde_diffusion.metrics.distances import Features, Figure, Samples
from sde_diffusion.models.model import evaluating, finite, modules_of
from sde_diffusion.validate import Checked, Count, FloatBatch, Integer, Kind, T, arguments, shown

__all__ = [
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

SYMMETRIC = 1e-6  # rounding of a covariance that was computed or stored in float32


def float64(name: str, value: Tensor) -> None:
    """Rule of tensors in float64."""
    if value.dtype != torch.float64:
        raise ValueError(f"{name} must be float64; got {value.dtype}")


FiniteDouble = Annotated[FloatBatch, float64, finite]
Network = Annotated[Callable[[Tensor], Tensor], Kind("a module or function of images", "__call__")]


@dataclass(frozen=True, eq=False)
class Statistics(Checked):
    """Mean (d,) and covariance (d, d) of features, float64, and the number of samples.

    Args:
        count: None where unknown: the files of other programs do not hold it.
    """

    mean: FiniteDouble
    covariance: FiniteDouble
    count: Annotated[int, Integer(2)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        d, mean, cov = len(self.mean), tuple(self.mean.shape), tuple(self.covariance.shape)
        if not d or mean != (d,) or cov != (d, d):
            raise ValueError(f"mean and covariance must be (d,) and (d, d); got {mean} and {cov}")
        size = float(self.covariance.abs().max())
        if float((self.covariance - self.covariance.T).abs().max()) > SYMMETRIC * size:
            raise ValueError("covariance must be symmetric")
        least = float(torch.linalg.eigvalsh(self.covariance)[0])
        if least < -SYMMETRIC * d * size:
            raise ValueError(f"covariance must have no negative eigenvalue; got {least:.3g}")

    @staticmethod
    @arguments
    def of(features: Features) -> "Statistics":
        """Compute the mean and the unbiased covariance of features (N, d).

        Raises:
            ValueError: if N < d: the covariance is then singular, and distances to it depend more
                on N than on the samples.
        """
        x = features.detach().cpu().double()
        n, d = x.shape
        if n < d:
            raise ValueError(f"{n} samples are fewer than the {d} features: draw more")
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / (n - 1)
        return Statistics(mean, (covariance + covariance.T) / 2, n)

    def save(self, path: str | Path) -> None:
        """Write a .npz with `mu` and `sigma`, the exchange format of FID programs, and `count`."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path must end in .npz; got {path}")
        count = {} if self.count is None else {"count": self.count}
        mean, covariance = self.mean.cpu().numpy(), self.covariance.cpu().numpy()
        npz.write_npz(path, mu=mean, sigma=covariance, **count)

    @staticmethod
    def load(path: str | Path) -> "Statistics":
        """Read a file of `save` or of another program, float32 or float64.

        Raises:
            storage.BadFile: naming the file and the reason.
        """
        path = Path(path)
        found = npz.read_npz(path, ("mu", "sigma"), ("count",))
        count = found.get("count")
        with storage.as_bad_file(path):
            for name in ("mu", "sigma"):
                validate.choice(f"dtype of {name}", str(found[name].dtype), ("float32", "float64"))
            if count is not None and (count.shape != () or count.dtype.kind not in "iu"):
                raise ValueError(f"count must be one integer; got {count.dtype} {count.shape}")
            mean, covariance = (torch.tensor(found[k]).double() for k in ("mu", "sigma"))
            return Statistics(mean, covariance, None if count is None else int(count))


def statistics(images: Tensor, network: Network, batch_size: int = 128) -> Statistics:
    """Compute the statistics of the features of images (N, C, H, W) in [-1, 1]."""
    return Statistics.of(extract(images, network, batch_size))


@arguments
def extract(images: Samples, network: Network, batch_size: Count = 128) -> Tensor:
    """Compute features (N, d) of images (N, C, H, W) in batches, without gradients.

    Modules run in eval mode; afterwards each is in the mode that it was in before.
    """
    batches = images.split(batch_size)
    with torch.no_grad(), evaluating(modules_of(network)):
        found = [network(batch) for batch in batches]
    for part, n in zip(found, map(len, batches), strict=True):
        if part.ndim != 2 or len(part) != n:
            raise ValueError(f"network must map {n} images to ({n}, d) features; got {shown(part)}")
    return torch.cat(found)


Known = Annotated[Statistics, Kind("Statistics", "mean", "covariance", "count")]


@arguments
def frechet_distance(real: Known, made: Known) -> Figure:
    r"""Squared Frechet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017).

    d^2 = |m - n|^2 + tr(S + T - 2 (S T)^(1/2)).  The eigenvalues of (S T)^(1/2) are the singular
    values of S^(1/2) T^(1/2), which stay real and not negative under rounding: the distance of a
    set to itself is of the order of rounding. On Inception's features, and only there, it is the
    FID.
    """
    distances.check_widths(len(real.mean), len(made.mean))
    S, T = real.covariance, made.covariance
    overlap = torch.linalg.svdvals(root(S) @ root(T)).sum()
    shift = (real.mean - made.mean).square().sum()
    value = shift + S.trace() + T.trace() - 2 * overlap
    return Figure(max(0.0, float(value)), (real.count, made.count))


def root(S: Tensor) -> Tensor:
    """Return the symmetric R with R R = S; eigenvalues below 0, by rounding, count as 0."""
    values, vectors = torch.linalg.eigh((S + S.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@arguments
def kid(
    real: Features, made: Features, subsets: Annotated[int, Integer(2)] = 10, seed: int = 0
) -> Figure:
    r"""Kernel distance of features (N, d) and (M, d) (Binkowski et al. 2018), by torchmetrics.

    The unbiased MMD^2 with the kernel  k(x, y) = (x . y / d + 1)^3, averaged over subsets. These
    are disjoint parts of a permutation by `seed`, hence independent, and the standard error is the
    one of a mean. A subset has min(N, M) // subsets samples, at least 2; its size does not bias the
    figure. On Inception's features it is the KID.
    """
    x, y = distances.as_points(real, made)
    smaller = min(len(x), len(y))
    validate.integer("subsets", subsets, 2, smaller // 2)
    size = smaller // subsets
    poly_mmd = distances.required("torchmetrics.image.kid").poly_mmd
    a = x[data.shuffled_indices(seed, len(x), 0, subsets * size)].split(size)
    b = y[data.shuffled_indices(seed + 1, len(y), 0, subsets * size)].split(size)
    found = torch.stack(list(map(poly_mmd, a, b)))
    error = float(found.std() / subsets**0.5)
    return Figure(float(found.mean()), (len(x), len(y)), error)


class PrecisionRecall(NamedTuple):
    """Shares of made samples inside the real set, and of real samples inside the made set."""

    precision: Figure
    recall: Figure


@arguments
def precision_recall(real: Features, made: Features, k: Count = 3) -> PrecisionRecall:
    """Precision and recall over features (Kynkaanniemi et al. 2019, eq. 1), by torch-fidelity.

    A sample is inside a set if it lies in one of the balls around its members, whose radius is the
    distance to the k-th neighbour in the set. Both shares depend on the sizes: use equal ones.
    """
    x, y = distances.as_points(real, made)
    validate.integer("k", k, at_most=min(len(x), len(y)) - 1)
    measure = distances.required("torch_fidelity.metric_prc").prc_features_to_metric
    found = measure(y, x, prc_neighborhood=k, prc_batch_size=2048, save_cpu_ram=True, verbose=False)
    sizes = (len(x), len(y))
    return PrecisionRecall(Figure(found["precision"], sizes), Figure(found["recall"], sizes))


@dataclass(frozen=True, eq=False)
class Principal:
    """A projection to principal components: (x - mean) @ basis, (N, d) to (N, k)."""

    mean: Tensor
    basis: Tensor

    @arguments
    def __call__(self, features: Features) -> Tensor:
        return (features.detach().cpu().double() - self.mean) @ self.basis


@arguments
def principal(real: Features, components: int = 64) -> Principal:
    """Fit the directions in which the real features (N, d) vary most, N > components.

    For few samples of many features: a Frechet distance on k components needs k samples, not d.
    Fit it on real images alone, and report it with the names of features and components.
    """
    x = real.detach().cpu().double()
    validate.integer("components", components, at_most=min(x.shape[1], len(x) - 1))
    mean = x.mean(0)
    basis = torch.linalg.svd(x - mean, full_matrices=False).Vh[:components].T
    return Principal(mean, basis)


def halves(real: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split the rows of `real` in two halves, in an order that depends on the seed alone."""
    validate.integer("len(real)", len(real), at_least=2)
    first, second = real[data.shuffled_indices(seed, len(real), 0, len(real))].tensor_split(2)
    return first, second


def floor(
    metric: Callable[[Tensor, Tensor], T], real: Tensor, count: int | None = None, seed: int = 0
) -> T:
    """Compute a metric between two halves of the real data: its value for perfect samples.

    Args:
        metric: called as metric(real, made), with one half as each.
        real: features or points (N, ...).
        count: number of rows of the second half to use: as many as there are samples [all].
    """
    first, second = halves(real, seed)
    if count is not None:
        validate.integer("count", count, at_most=len(second))
    return metric(first, second[:count])


@arguments
def chunks(count: Count, size: Count, process: int = 0, processes: Count = 1) -> list[range]:
    """Cut the positions 0 .. count - 1 in chunks of `size` and return those of this process.

    Whole chunks are dealt out, as the last bits of a network's output depend on its batch.
    """
    validate.integer("process", process, 0, processes - 1)
    whole = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return whole[process::processes]


def gathered(values: Tensor, positions: Tensor, accelerator: Any = None) -> Tensor:
    """Gather the rows of all processes in the order of their positions, bit-equal on each.

    Args:
        values: rows of this process (n, ...); n may be 0, the other sizes and the dtype must be
            equal on all processes.
        positions: index of each row in the whole, (n,) int64: 0 .. N - 1, each on one process.
        accelerator: an `accelerate.Accelerator`, or None for one process.
    """
    if positions.shape != values.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(f"positions must be ({len(values)},) int64; got {shown(positions)}")
    if accelerator is not None:
        values = accelerator.gather(accelerator.pad_across_processes(values.contiguous()))
        padded = accelerator.pad_across_processes(positions, pad_index=-1)
        positions = accelerator.gather(padded.contiguous())
        values, positions = values[positions >= 0], positions[positions >= 0]
    places = positions.argsort()
    if not torch.equal(positions[places].cpu(), torch.arange(len(positions))):
        raise ValueError(f"positions must be 0 .. {len(positions) - 1}, each once")
    return values[places]
