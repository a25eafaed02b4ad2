"""*Where random numbers come from.* Nothing here reads or moves a global generator."""

from sde_diffusion.noise.brownian import Brownian
from sde_diffusion.noise.sources import Generated, Noise, Purpose, Seeded, stream

__all__ = ["Brownian", "Generated", "Noise", "Purpose", "Seeded", "stream"]
