"""*What is clean, what is noise.* Networks, exact models, guidance: all map (x, level) to both.

model               what a model is, and what models around another model share
prediction          x0, eps, score, v and velocity of a batch
parameterizations   the meaning of a network's output
noise_inputs        a network's input for the noise level
denoiser            a network with all of these, and its file
exact               models in closed form
guidance            models modified by a condition
adapt               networks of other programs, and models on another process
"""

from sde_diffusion.models import exact as exact
from sde_diffusion.models import guidance as guidance
from sde_diffusion.models.adapt import *
from sde_diffusion.models.denoiser import *
from sde_diffusion.models.guidance import *
from sde_diffusion.models.model import *
from sde_diffusion.models.noise_inputs import *
from sde_diffusion.models.parameterizations import *
from sde_diffusion.models.prediction import *
