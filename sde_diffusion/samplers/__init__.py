"""Samplers: how a batch is moved from a noise level to a lower one."""

from sde_diffusion.samplers.adams import Adams
from sde_diffusion.samplers.ancestral import Ancestral
from sde_diffusion.samplers.ode import Heun, ScipyODE, TorchODE
from sde_diffusion.samplers.sde import AdaptiveTorchSDE, EulerMaruyama, TorchSDE

__all__ = [
    "Adams",
    "AdaptiveTorchSDE",
    "Ancestral",
    "EulerMaruyama",
    "Heun",
    "ScipyODE",
    "TorchODE",
    "TorchSDE",
]
