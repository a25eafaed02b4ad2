"""Processes: how data becomes noise. Each is two formulas; `process.py` derives the rest."""

from sde_diffusion.processes.continuous import EDM, OU, VE, VP, Cosine, RectifiedFlow, SubVP
from sde_diffusion.processes.discrete import Discrete, Interpolated, kernel_variances
from sde_diffusion.processes.process import (
    Level,
    Process,
    Scalar,
    VariancePreserving,
    ascent,
    double,
)

__all__ = [
    "EDM",
    "OU",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "Interpolated",
    "Level",
    "Process",
    "RectifiedFlow",
    "Scalar",
    "SubVP",
    "VariancePreserving",
    "ascent",
    "double",
    "kernel_variances",
]
