"""Samplers: how a batch is moved from a noise level to a lower one."""

from sde_diffusion.samplers.adams import Adams
from sde_diffusion.samplers.adaptive import AdaptiveODE
from sde_diffusion.samplers.adaptive_sde import AdaptiveSDE
from sde_diffusion.samplers.ancestral import Ancestral
from sde_diffusion.samplers.correctors import Churn, Langevin
from sde_diffusion.samplers.exponential import DPMSolver, SDEDPMSolver, VelocityMultistep
from sde_diffusion.samplers.ode import Heun, ScipyODE, TorchODE
from sde_diffusion.samplers.sde import AdaptiveTorchSDE, EulerMaruyama, TorchSDE

__all__ = [
    "Adams",
    "AdaptiveODE",
    "AdaptiveSDE",
    "AdaptiveTorchSDE",
    "Ancestral",
    "Churn",
    "DPMSolver",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "SDEDPMSolver",
    "ScipyODE",
    "TorchODE",
    "TorchSDE",
    "VelocityMultistep",
]
