"""*Through which levels.* Frames in which the flow is integrated, and grids of times in them."""

from sde_diffusion.grids import frames
from sde_diffusion.processes.spacings import karras, power, uniform

__all__ = ["frames", "karras", "power", "uniform"]
