"""Training as an iterator: what happens between steps is the caller's `for` body.

    for metrics in training.train(state, data):
        ...

Data order, dequantization, times, noise and dropout are functions of (seed, step, position in the
global batch) and of nothing else, so a run resumed from a checkpoint goes on as if it had never
stopped, and several processes or accumulated parts draw the numbers that one process draws.
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
