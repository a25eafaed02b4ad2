"""*Samples given a measurement.* Operators, measurements, and the methods that use them."""

from sde_diffusion.inverse import corrections, inpainting, operators
from sde_diffusion.inverse.inpainting import MaskedMSE, RePaint, Replacement, complete_image
from sde_diffusion.inverse.measurements import LogLikelihood, Measurement, Observation
from sde_diffusion.inverse.methods import DPS, DiffPIR, PiGDM
from sde_diffusion.inverse.smc import SMC

__all__ = [
    "DPS",
    "SMC",
    "DiffPIR",
    "LogLikelihood",
    "MaskedMSE",
    "Measurement",
    "Observation",
    "PiGDM",
    "RePaint",
    "Replacement",
    "complete_image",
    "corrections",
    "inpainting",
    "operators",
]
