"""*How data becomes noise.* Each process is two formulas; `process.py` derives the rest."""

from sde_diffusion.processes.continuous import EDM, OU, VE, VP, Cosine, RectifiedFlow, SubVP
from sde_diffusion.processes.discrete import Discrete, Interpolated, discretize, interpolate
from sde_diffusion.processes.level import Level, RatedLevel, Scalar, double, forward_kernel
from sde_diffusion.processes.process import Process, VariancePreserving

__all__ = [
    "CATALOGUE",
    "EDM",
    "OU",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "Interpolated",
    "Level",
    "Process",
    "RatedLevel",
    "RectifiedFlow",
    "Scalar",
    "SubVP",
    "VariancePreserving",
    "discretize",
    "double",
    "forward_kernel",
    "interpolate",
]

# At their published parameters: tests, certificates, docs and the command line run over these.
SMOOTH = VP(), SubVP(), VE(), OU(), Cosine(), EDM(), RectifiedFlow()
CHAIN = Discrete.linear()
CATALOGUE: tuple[Process, ...] = (*SMOOTH, CHAIN, interpolate(CHAIN))
