"""*Reproducible training*: an iterator of steps; the body of the loop belongs to the caller.

    for metrics in training.train(state, data):
        ...

Data order, dequantization, times, noise and dropout are functions of (seed, step, position in the
global batch) alone. So a resumed run is the uninterrupted one, bit for bit, and several processes
or accumulated parts draw the numbers of one process.
"""

from sde_diffusion.training.batches import Batch, draw
from sde_diffusion.training.checkpoints import (
    Otherwise,
    checkpoints,
    newest_checkpoint,
    restore,
    resume,
    save,
)
from sde_diffusion.training.engine import Alone, Engine, accumulation, launched, precision
from sde_diffusion.training.journal import Journal, Stop, history
from sde_diffusion.training.recipe import EMA, Average, PowerEMA, Recipe
from sde_diffusion.training.state import Metrics, TrainState, train

__all__ = [
    "EMA",
    "Alone",
    "Average",
    "Batch",
    "Engine",
    "Journal",
    "Metrics",
    "Otherwise",
    "PowerEMA",
    "Recipe",
    "Stop",
    "TrainState",
    "accumulation",
    "checkpoints",
    "draw",
    "history",
    "launched",
    "newest_checkpoint",
    "precision",
    "restore",
    "resume",
    "save",
    "train",
]
