"""Small training runs that tests compare bit for bit."""

import torch

from sde_diffusion.data import Images, Points
from sde_diffusion.denoiser import Denoiser
from sde_diffusion.networks import MLP, UNet
from sde_diffusion.prediction import V
from sde_diffusion.processes import VP
from sde_diffusion.times import UniformTimes
from sde_diffusion.toy import TwoGaussians
from sde_diffusion.training import EMA, Recipe, TrainState, draw

POINTS = Points(TwoGaussians().sample(50, 0))
PIXELS = torch.arange(40 * 36).reshape(40, 1, 6, 6) % 256
IMAGES = Images(PIXELS.to(torch.uint8), torch.zeros(40, dtype=torch.long))
RECIPE = Recipe(steps=12, batch_size=16, warmup=3, ema=EMA(0.9), weight_decay=0.01)
TIMES = UniformTimes()


def mlp():
    return MLP(width=16, depth=2)


def unet():
    return UNet(channels=(8, 16), blocks=1, embedding=8, heads=2)


RUNS = {"mlp": (mlp, POINTS), "unet": (unet, IMAGES)}


def fresh(network=mlp, recipe=RECIPE, seed=0, process=None):
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # initial weights are all that torch draws from its global state
        return TrainState(Denoiser(network(), process or VP(), V()), recipe)


def ran(steps, *, network=mlp, data=POINTS, recipe=RECIPE):
    state = fresh(network, recipe)
    for _ in range(steps):
        state.advance(draw(data, state.recipe, TIMES, state.step))
    return state


def content(state):
    """Everything that training changes: weights, average, moments and counters, copied."""
    tensors = {f"network.{k}": v for k, v in state.denoiser.network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.averaged.network.state_dict().items()}
    for number, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{slot}": value for slot, value in slots.items()}
    tensors |= {"skipped": torch.tensor(state.skipped), "step": torch.tensor(state.step)}
    return {name: value.clone() for name, value in tensors.items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
