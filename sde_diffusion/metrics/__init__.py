"""*Distances between sets of samples.* In the plane, and in the features of a network.

distances   exact and sliced Wasserstein, MMD and energy distance of points
quality     Frechet distance, KID, precision and recall of features
features    networks that map images to features; imported by its own name
"""

from sde_diffusion.metrics.distances import *
from sde_diffusion.metrics.quality import *
