"""*Samples given a measurement.* Operators, measurements, and the methods that use them."""

from sde_diffusion.inverse import corrections as corrections
from sde_diffusion.inverse import inpainting as inpainting
from sde_diffusion.inverse import operators as operators
from sde_diffusion.inverse.inpainting import *
from sde_diffusion.inverse.measurements import *
from sde_diffusion.inverse.methods import *
from sde_diffusion.inverse.smc import *
