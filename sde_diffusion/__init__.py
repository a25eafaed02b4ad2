"""Continuous-time SDE and score-based diffusion, with the DDPM as its Euler discretization."""

import importlib
from typing import TYPE_CHECKING, Any

from sde_diffusion import grids, losses, models, networks, noise, processes, samplers, sampling
from sde_diffusion.ddpm import DDPM
from sde_diffusion.losses import denoising_loss
from sde_diffusion.models import ClassifierFree, Denoiser, adopt, exact, match, pretrained
from sde_diffusion.models.parameterizations import X0, Eps, Score, V, Velocity
from sde_diffusion.processes import EDM, OU, VE, VP, Cosine, Discrete, RectifiedFlow, SubVP
from sde_diffusion.samplers import Adams, AdaptiveODE, AdaptiveSDE, Ancestral, EulerMaruyama, Heun
from sde_diffusion.samplers.exponential import DPMSolver, VelocityMultistep
from sde_diffusion.samplers.external import TorchODE
from sde_diffusion.samplers.sampler import SolverError
from sde_diffusion.sampling import encode, prior, sample, trajectory

if TYPE_CHECKING:
    from sde_diffusion import data, files, inverse, metrics, plots, training, verify

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "EDM",
    "OU",
    "VE",
    "VP",
    "X0",
    "Adams",
    "AdaptiveODE",
    "AdaptiveSDE",
    "Ancestral",
    "ClassifierFree",
    "Cosine",
    "DPMSolver",
    "Denoiser",
    "Discrete",
    "Eps",
    "EulerMaruyama",
    "Heun",
    "RectifiedFlow",
    "Score",
    "SolverError",
    "SubVP",
    "TorchODE",
    "V",
    "Velocity",
    "VelocityMultistep",
    "adopt",
    "data",
    "denoising_loss",
    "encode",
    "exact",
    "files",
    "grids",
    "inverse",
    "losses",
    "match",
    "metrics",
    "models",
    "networks",
    "noise",
    "plots",
    "pretrained",
    "prior",
    "processes",
    "sample",
    "samplers",
    "sampling",
    "training",
    "trajectory",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # a room that is imported at its first use
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
