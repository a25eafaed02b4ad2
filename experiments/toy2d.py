"""Train a fully connected network on points in the plane, and sample it in three ways.

For TwoGaussians and Chequerboard: the data, 4,000 samples by ancestral sampling, the reverse SDE
and the probability-flow ODE from the same starts, and some of the ODE's paths.

    python experiments/toy2d.py
    python experiments/toy2d.py --process edm --weight min-snr
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import flags


@dataclass(frozen=True)
class Config:
    """Train on points in the plane, sample, and draw toy2d.png."""

    data: Literal["both", "two-gaussians", "chequerboard"] = "both"
    """the points"""
    process: flags.ProcessName = "vp"
    num_samples: int = 4000
    """points drawn by each sampler"""
    seed: int = 0
    """seed of the data, the weights and the samples"""
    device: flags.Device = "auto"
    """where the network runs"""
    out: Path = Path("runs/toy2d")
    """folder of everything written"""
    weight: Literal["none", "simple", "likelihood", "snr", "min-snr", "edm", "vlb"] = "none"
    """weight of a level in the loss; none: 1 on the network's output; vlb needs --process ddpm"""
    penalty: Literal["l2", "l1", "huber"] = "l2"
    """penalty of an error in the loss"""
    train_steps: int = 6000
    """optimizer steps for each data set"""
    batch_size: int = 512
    """points per step"""


if __name__ == "__main__":
    flags.check(Config)

import time

import torch
from common import command, words
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import data, plots, progress, training, validate
from sde_diffusion.data import toy
from sde_diffusion.files import storage
from sde_diffusion.grids import frames
from sde_diffusion.sampling import start_time

CHAIN = sd.Discrete.linear()
TOYS: dict[str, toy.Toy] = {
    "two-gaussians": toy.TwoGaussians(),
    "chequerboard": toy.Chequerboard(),
}
WEIGHTS: dict[str, sd.losses.Weight | None] = {
    "none": None,
    "simple": sd.losses.Simple(),
    "snr": sd.losses.SNR(),
    "min-snr": sd.losses.MinSNR(),
    "edm": sd.losses.EDMWeight(sigma_data=1.0),
    "vlb": sd.losses.VLB(CHAIN),
}
PENALTIES: dict[str, sd.losses.Penalty] = {
    "l2": sd.losses.L2(),
    "l1": sd.losses.L1(),
    "huber": sd.losses.Huber(),
}
SAMPLERS: dict[str, sd.samplers.Sampler] = {
    "ancestral": sd.Ancestral(),
    "reverse SDE": sd.EulerMaruyama(),
    "probability flow ODE": sd.TorchODE(rtol=1e-4, atol=1e-4),
}
STEPS = {"ancestral": 250, "reverse SDE": 250, "probability flow ODE": None}


def main(config: Config) -> None:
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 2)
    for name in ("train_steps", "batch_size", "num_samples"):
        validate.integer(flags.flag(name), getattr(config, name), at_most=10**7)
    words.match("--process", config.process, command.PROCESSES)
    if config.weight == "vlb" and command.PROCESSES[config.process] != CHAIN:
        raise ValueError("--weight vlb belongs to a chain: give --process ddpm")
    command.check_out(config.out)
    device = command.device(config.device)
    print(f"training and sampling on {device} -> {config.out}", flush=True)
    chosen = TOYS if config.data == "both" else {config.data: TOYS[config.data]}
    columns, losses = {}, {}
    for name, distribution in chosen.items():
        denoiser, losses[name] = train(config, name, distribution, device)
        columns[name] = draw(config, denoiser, distribution, device)
    out = command.folder(config.out)
    storage.replace(out / "toy2d.png", plots.png(picture(columns)))
    command.write_config(out, config, device=str(device), losses=losses)
    print(f"-> {out / 'toy2d.png'}")


def train(
    config: Config, name: str, distribution: toy.Toy, device: torch.device
) -> tuple[sd.Denoiser, float]:
    """Return a denoiser of 50,000 points, and its mean loss over the last tenth of the run."""
    points = data.Points(distribution.sample(50_000, config.seed))
    torch.manual_seed(config.seed)  # the network's first weights
    network = sd.networks.MLP(shape=(2,), width=128, depth=4, fourier=16)
    process = command.PROCESSES[config.process]
    if process.prior_std > 1:  # keep levels of 50 or 80 out of the network, and t as their measure
        denoiser = sd.Denoiser(
            network, process, sd.models.Preconditioned(sigma_data=1.0), sd.models.CNoise()
        )
    else:
        denoiser = sd.Denoiser(network, process, sd.V())
    denoiser = denoiser.to(device)
    recipe = training.Recipe(
        steps=config.train_steps,
        batch_size=config.batch_size,
        learning_rate=3e-3,
        warmup=min(200, config.train_steps // 10),
        ema=training.EMA(0.995),
        seed=config.seed,
    )
    times: sd.losses.TimeDistribution = sd.losses.NormalLogSNR(process, mean=0.0, std=3.0)
    if process == CHAIN:
        times = sd.losses.DiscreteTimes(CHAIN.num_steps)
    elif config.weight == "likelihood":  # g^2 is not defined above t_max
        times = sd.losses.UniformTimes(t_min=1e-3, t_max=process.t_max)
    penalty = PENALTIES[config.penalty]
    if config.weight == "likelihood":
        weight = sd.losses.Likelihood(process)
    else:
        weight = WEIGHTS[config.weight]
    state = training.TrainState(denoiser, recipe, times, weight, penalty)
    steps = progress.bar(training.train(state, points), total=recipe.steps, desc=name)
    losses = [metrics.loss for metrics in steps][-max(1, recipe.steps // 10) :]
    return state.averaged, sum(losses) / len(losses)


def draw(
    config: Config, denoiser: sd.Denoiser, distribution: toy.Toy, device: torch.device
) -> dict[str, Tensor]:
    """Return title -> points (N, 2) of each column; the flow's paths are (steps, N, 2).

    Paths are drawn as x / (alpha + sigma): where noise reaches 80, x would leave the picture.
    """
    n = config.num_samples
    seeds = [config.seed * 2**32 + k for k in range(n)]
    x = sd.prior(denoiser, (n, 2), seeds=seeds, device=device)
    columns = {"data": distribution.sample(n, config.seed + 1)}
    for name, sampler in SAMPLERS.items():
        start = time.perf_counter()
        columns[name] = command.sampled(
            name, denoiser, sampler, x, steps=STEPS[name], seeds=seeds, progress=True
        )
        print(f"{name}: {n} points, {time.perf_counter() - start:.1f} s")
    few = x[:200]
    states = [(few, start_time(denoiser))]
    path = sd.trajectory(denoiser, sd.Heun(), few, steps=40, grid=sd.grids.Power())
    states += [(state.x, state.t) for state in path]
    levels = denoiser.process.levels(torch.tensor([t for _, t in states], dtype=torch.float64))
    columns["paths (straight frame)"] = torch.stack(
        [frames.enter(x, level) for (x, _), level in zip(states, levels, strict=True)]
    )
    return columns


def picture(rows: dict[str, dict[str, Tensor]]) -> object:
    """One row per data set, one column per way to sample it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 5, squeeze=False)
    for axes, (name, columns) in zip(grid, rows.items(), strict=True):
        for axis, (title, x) in zip(axes, columns.items(), strict=True):
            if x.ndim == 3:
                plots.paths(axis, x[0], x[1:], title)
            else:
                plots.scatter(axis, x, title)
        axes[0].set_ylabel(name)
    return figure


if __name__ == "__main__":
    command.run(main, Config)
