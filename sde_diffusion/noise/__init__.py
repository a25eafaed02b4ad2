"""*Where random numbers come from.* No global generator is read or advanced."""

from sde_diffusion.noise.brownian import Brownian
from sde_diffusion.noise.sources import Generated, Noise, Purpose, Seeded, stream

__all__ = ["Brownian", "Generated", "Noise", "Purpose", "Seeded", "stream"]
