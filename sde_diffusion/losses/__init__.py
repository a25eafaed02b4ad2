"""*What is minimized, and at which levels.* The denoising loss, its weights, the laws of t.

denoising        the loss and its penalties
weights          functions of the level, each with the space of its errors
times            laws of t, given by their quantile functions
score_matching   losses that need no clean data
"""

from sde_diffusion.losses import score_matching as score_matching
from sde_diffusion.losses.denoising import *
from sde_diffusion.losses.times import *
from sde_diffusion.losses.weights import *
