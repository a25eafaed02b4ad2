"""*Reproducible training*: an iterator of steps; the body of the loop belongs to the caller.

    for metrics in training.train(state, data):
        ...

Data order, dequantization, times, noise and dropout are functions of (seed, step, position in the
global batch) alone. So a resumed run is the uninterrupted one, bit for bit, and several processes
or accumulated parts draw the numbers of one process.
"""

from sde_diffusion.training.batches import *  # noqa: F403
from sde_diffusion.training.checkpoints import *  # noqa: F403
from sde_diffusion.training.engine import *  # noqa: F403
from sde_diffusion.training.journal import *  # noqa: F403
from sde_diffusion.training.recipe import *  # noqa: F403
from sde_diffusion.training.state import *  # noqa: F403
