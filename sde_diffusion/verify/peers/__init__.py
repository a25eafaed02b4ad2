"""Adapters: samplers of other libraries, run by their own code, as samplers of this package."""

from sde_diffusion.verify.peers.azula import Azula
from sde_diffusion.verify.peers.diffusers import Diffusers
from sde_diffusion.verify.peers.foreign import Function
from sde_diffusion.verify.peers.k_diffusion import KDiffusion, ratios

__all__ = ["Azula", "Diffusers", "Function", "KDiffusion", "ratios"]
