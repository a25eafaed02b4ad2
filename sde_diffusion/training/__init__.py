"""*Reproducible training*: an iterator of steps; the body of the loop belongs to the caller.

    for metrics in training.train(state, data):
        ...

Data order, dequantization, times, noise and dropout are functions of (seed, step, position in the
global batch) alone. So a resumed run is the uninterrupted one, bit for bit, and several processes
or accumulated parts draw the numbers of one process.
"""

from sde_diffusion.training.batches import *
from sde_diffusion.training.checkpoints import *
from sde_diffusion.training.engine import *
from sde_diffusion.training.journal import *
from sde_diffusion.training.recipe import *
from sde_diffusion.training.state import *
