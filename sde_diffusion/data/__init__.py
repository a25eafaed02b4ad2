"""*Data sets to learn.* Tensors, and batches that are functions of seed and position.

datasets      images and points as tensors, their order and their dequantization
image_files   MNIST, Fashion-MNIST, folders of images
scaling       standardization, and its inverse for samples
rules         types, shapes and ranges of data
toy           distributions in the plane
"""

from sde_diffusion.data import toy as toy
from sde_diffusion.data.datasets import *
from sde_diffusion.data.image_files import *
from sde_diffusion.data.scaling import *
