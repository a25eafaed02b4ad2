"""*Through which levels.* Grids of times, and the frames in which the flow is integrated."""

from sde_diffusion.grids import frames
from sde_diffusion.grids.grid import Ends, FromTMax, Grid, Karras, Power, Uniform, Usual

__all__ = ["Ends", "FromTMax", "Grid", "Karras", "Power", "Uniform", "Usual", "frames"]
