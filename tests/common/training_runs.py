"""Small training runs that tests compare bit for bit."""

import gzip
import struct
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits

from sde_diffusion.data.datasets import Images, Points
from sde_diffusion.data.toy import TwoGaussians
from sde_diffusion.losses.times import UniformTimes
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.parameterizations import V
from sde_diffusion.networks import MLP, UNet
from sde_diffusion.processes import VP
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


def mlp_dropout():
    return MLP(width=16, depth=2, dropout=0.2)


def unet_dropout():
    """Its last convolutions are 0 at first: as it is, a gradient would hardly reach the rest."""
    network = UNet(channels=(8, 16), blocks=1, embedding=8, heads=2, dropout=0.2)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


@dataclass(eq=False)
class Learned(torch.nn.Module):
    """VP with sigma times exp(gain), a process with a parameter."""

    start: float = 0.1

    def __post_init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(self.start))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(VP(), name)

    def level(self, t, x0):
        level = VP().level(t, x0)
        return level._replace(sigma=level.sigma * self.gain.exp().to(x0.dtype))


def fresh(network=mlp, recipe=RECIPE, seed=0, process=None, dtype=torch.float32, **others):
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # initial weights are all that torch draws from its global state
        return TrainState(Denoiser(network().to(dtype), process or VP(), V()), recipe, **others)


def small_mnist(folder):
    """scikit-learn's 8x8 digits, tripled and framed to 28x28, in MNIST's files; the data root."""
    digits = load_digits()
    pixels = np.pad(digits.images.repeat(3, 1).repeat(3, 2) * 15.9, ((0, 0), (2, 2), (2, 2)))
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
        images = pixels[rows].astype(np.uint8)
        labels = digits.target[rows].astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            path = raw / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def ran(steps, *, network=mlp, data=POINTS, recipe=RECIPE, **others):
    state = fresh(network, recipe, **others)
    for _ in range(steps):
        state.advance(draw(data, state.recipe, TIMES, state.step))
    return state


def content(state):
    """Everything that training changes: weights, average, moments and counters, copied."""
    tensors = dict(state.tensors)
    tensors |= {f"averaged.{k}": v for k, v in state.averaged.state_dict().items()}
    for number, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{slot}": torch.as_tensor(float("nan") if v is None else v)
                    for slot, v in slots.items()}  # fmt: skip
    tensors |= {"skipped": torch.tensor(state.skipped), "step": torch.tensor(state.step)}
    return {name: value.clone() for name, value in tensors.items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
