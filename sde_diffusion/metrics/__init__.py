"""*Distances between sets of samples.* In the plane, and in the features of a network."""

from sde_diffusion.metrics.distances import (
    Figure,
    MissingExtra,
    energy_distance,
    mmd,
    required,
    sliced_wasserstein,
    wasserstein,
)
from sde_diffusion.metrics.quality import (
    PrecisionRecall,
    Principal,
    Statistics,
    chunks,
    extract,
    floor,
    frechet_distance,
    gathered,
    halves,
    kid,
    precision_recall,
    principal,
    statistics,
)

__all__ = [
    "Figure",
    "MissingExtra",
    "PrecisionRecall",
    "Principal",
    "Statistics",
    "chunks",
    "energy_distance",
    "extract",
    "floor",
    "frechet_distance",
    "gathered",
    "halves",
    "kid",
    "mmd",
    "precision_recall",
    "principal",
    "required",
    "sliced_wasserstein",
    "statistics",
    "wasserstein",
]
