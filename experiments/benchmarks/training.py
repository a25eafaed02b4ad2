"""Images a second in training: this package against a loop written by hand, and other libraries.

    python experiments/benchmarks/training.py
    python experiments/benchmarks/training.py --network mlp --batch-size 256

All train the same network from the same weights on the same images. They take turns, a few steps
each, in a new order every round; reported is the median over the rounds of each one's speed over
that of the loop by hand in the same round. Needs the extra `peers` for the other libraries.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file: its modules are there

from common import flags


@dataclass(frozen=True)
class Config:
    """Write benchmark_training.json and print its table."""

    network: Literal["unet", "small", "mlp"] = "unet"
    """unet: that of the packaged weights; small: a third of it; mlp: fully connected"""
    batch_size: int = 32
    """images per step"""
    size: int = 28
    """side of the images"""
    rounds: int = 15
    """number of rounds"""
    train_steps: int = 4
    """optimizer steps of each loop in a round"""
    threads: Annotated[int | None, flags.default("torch's")] = None
    """number of torch's threads"""
    dtype: Literal["float32", "bf16"] = "float32"
    """the network's arithmetic"""
    compile: bool = False
    """add this package with a compiled network, after warming it up"""
    device: flags.Device = "auto"
    """where the network runs"""
    out: Path = Path("runs/training")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import copy
import importlib
import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from statistics import median

import torch
from common import command
from torch import Tensor, nn
from torch.nn import functional as F

import sde_diffusion as sd
from sde_diffusion import data, progress, training, validate
from sde_diffusion.files import storage

BY_HAND = "loop by hand"
PEERS = {"azula": "azula", "smalldiffusion": "smalldiffusion",
         "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}  # fmt: skip


def main(config: Config) -> None:
    for name in ("batch_size", "size", "rounds", "train_steps"):
        validate.integer(flags.flag(name), getattr(config, name), at_most=10**5)
    if config.threads is not None:
        torch.set_num_threads(validate.integer("--threads", config.threads, at_most=1024))
    command.check_out(config.out)
    device = command.device(config.device)
    print(f"{config.rounds} rounds on {device} -> {config.out}", flush=True)
    torch.manual_seed(0)  # weights and images
    network = made(config).to(device)
    pixels = torch.randint(0, 256, (4096, 1, config.size, config.size), dtype=torch.uint8)
    images = data.Images(pixels, torch.zeros(len(pixels), dtype=torch.long))
    loops = {name: make(copy.deepcopy(network), images, config, device)
             for name, make in contenders(config).items()}  # fmt: skip
    seconds = timed(loops, config, device)
    images_per_second = {
        name: config.batch_size * config.train_steps / median(times)
        for name, times in seconds.items()
    }
    ratios = {
        name: [a / b for a, b in zip(seconds[BY_HAND], times, strict=True)]
        for name, times in seconds.items()
    }
    print(f"{'':30s}  images/s   over the loop by hand (quartiles)")
    for name, each in ratios.items():
        low, middle, high = quartiles(each)
        print(f"{name:30s}  {images_per_second[name]:8.1f}   {middle:.3f} ({low:.3f}-{high:.3f})")
    record = {
        "images_per_second": images_per_second,
        "ratios": ratios,
        "median_ratio": {name: median(each) for name, each in ratios.items()},
        "hardware": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PEERS if find_spec(PEERS[name])},
    }
    out = command.folder(config.out)
    storage.replace(out / "benchmark_training.json", json.dumps(record, indent=1).encode())
    command.write_config(out, config)


def made(config: Config) -> nn.Module:
    """Return the network that all loops train."""
    if config.network == "mlp":
        return sd.networks.MLP(shape=(1, config.size, config.size), width=512, depth=3, fourier=64)
    if config.network == "small":
        return sd.networks.UNet(channels=(16, 32), blocks=1)
    return sd.networks.UNet(channels=(32, 64), blocks=2)


def timed(
    loops: dict[str, Iterator[object]], config: Config, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    shuffled = random.Random(0)
    for round_ in progress.bar(range(config.rounds + 1), desc="rounds"):
        names = list(loops)
        shuffled.shuffle(names)
        for name in names:
            start = time.perf_counter()
            for _ in islice(loops[name], config.train_steps):
                pass
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(values: list[float]) -> list[float]:
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def contenders(config: Config) -> dict[str, Callable[..., Iterator[object]]]:
    """Return functions that make an endless training loop of (network, images, config, device)."""
    loops: dict[str, Callable[..., Iterator[object]]] = {BY_HAND: by_hand, "sde_diffusion": ours}
    if config.compile:
        loops["sde_diffusion, compiled"] = ours_compiled
    peers = {"azula": azula, "smalldiffusion": smalldiffusion,
             "denoising-diffusion-pytorch": denoising_diffusion}  # fmt: skip
    return loops | {name: loop for name, loop in peers.items() if find_spec(PEERS[name])}


# ---- this package ------------------------------------------------------------------------------


def ours(
    network: nn.Module, images: data.Images, config: Config, device: torch.device
) -> Iterator[training.Metrics]:
    denoiser = sd.Denoiser(network, sd.Discrete.linear())
    recipe = training.Recipe(
        steps=10**9, batch_size=config.batch_size, decay="constant", dtype=config.dtype
    )
    times = sd.losses.DiscreteTimes(1000)
    return training.train(training.TrainState(denoiser, recipe, times), images)


def ours_compiled(
    network: nn.Module, images: data.Images, config: Config, device: torch.device
) -> Iterator[training.Metrics]:
    network.compile()
    steps = ours(network, images, config, device)
    for _ in islice(steps, 3):
        pass
    return steps


# ---- the loop by hand, and the same around the losses of others --------------------------------


def loop(
    network: nn.Module,
    images: data.Images,
    config: Config,
    device: torch.device,
    loss_of: Callable[[Tensor], Tensor],
) -> Iterator[float]:
    """A tutorial's loop: AdamW, clipping, an average of the weights, the loss as a number."""
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    bf16 = torch.autocast(device.type, torch.bfloat16)
    pixels = images.pixels.float() / 127.5 - 1
    while True:
        for index in torch.randperm(len(images)).split(config.batch_size):
            if len(index) < config.batch_size:
                break
            x0 = pixels[index].to(device)
            with bf16 if config.dtype == "bf16" else nullcontext():
                loss = loss_of(x0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
                    mean.mul_(0.9995).add_(weight, alpha=0.0005)
            yield loss.item()


def by_hand(
    network: nn.Module, images: data.Images, config: Config, device: torch.device
) -> Iterator[float]:
    """Ho et al. 2020, Algorithm 1."""
    betas = torch.linspace(1e-4, 0.02, 1000, device=device)
    abar = (1 - betas).cumprod(0)

    def loss_of(x0: Tensor) -> Tensor:
        i = torch.randint(0, 1000, (len(x0),), device=device)
        eps = torch.randn_like(x0)
        a = abar[i][:, None, None, None]
        return F.mse_loss(network(a.sqrt() * x0 + (1 - a).sqrt() * eps, (i + 1) / 1000), eps)

    return loop(network, images, config, device, loss_of)


def azula(
    network: nn.Module, images: data.Images, config: Config, device: torch.device
) -> Iterator[float]:
    denoise, noise = (importlib.import_module(f"azula.{name}") for name in ("denoise", "noise"))
    denoiser: Any = denoise.KarrasDenoiser(network, noise.VPSchedule()).to(device)

    def loss_of(x0: Tensor) -> Tensor:
        return denoiser.loss(x0, torch.rand(len(x0), device=device)).mean()

    return loop(network, images, config, device, loss_of)


def smalldiffusion(
    network: nn.Module, images: data.Images, config: Config, device: torch.device
) -> Iterator[float]:
    library: Any = importlib.import_module("smalldiffusion")
    diffusion: Any = importlib.import_module("smalldiffusion.diffusion")

    class Model(nn.Module, library.ModelMixin):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return self.network(x, sigma.flatten().log() / 4)

    model: Any = Model()
    schedule = library.ScheduleDDPM()

    def loss_of(x0: Tensor) -> Tensor:
        return model.get_loss(*diffusion.generate_train_sample(x0, schedule))

    return loop(network, images, config, device, loss_of)


def denoising_diffusion(
    network: nn.Module, images: data.Images, config: Config, device: torch.device
) -> Iterator[float]:
    library: Any = importlib.import_module("denoising_diffusion_pytorch")

    class Model(nn.Module):
        channels, out_dim, self_condition = 1, 1, False

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, i: Tensor, x_self_cond: Any = None) -> Tensor:
            return self.network(x, i / 1000)

    made = library.GaussianDiffusion(
        Model(), image_size=config.size, objective="pred_noise", auto_normalize=False
    ).to(device)
    return loop(network, images, config, device, made)


if __name__ == "__main__":
    command.run(main, Config)
