"""*Data sets to learn.* Tensors, and batches that are functions of seed and position."""

from sde_diffusion.data import toy
from sde_diffusion.data.datasets import (
    DEQUANTIZATION,
    Data,
    Images,
    Points,
    dequantize,
    fingerprint,
    moments,
    shuffled_indices,
    to_uint8,
)
from sde_diffusion.data.image_files import (
    DataNotFound,
    data_root,
    fashion_mnist,
    image_folder,
    mnist,
    sample_digits,
)

__all__ = [
    "DEQUANTIZATION",
    "Data",
    "DataNotFound",
    "Images",
    "Points",
    "data_root",
    "dequantize",
    "fashion_mnist",
    "fingerprint",
    "image_folder",
    "mnist",
    "moments",
    "sample_digits",
    "shuffled_indices",
    "to_uint8",
    "toy",
]
