"""The DDPM on MNIST as Ho et al. wrote it down, and other ways to sample the same network.

    python experiments/mnist_ddpm.py --data-root DATA
    python experiments/mnist_ddpm.py --data-root DATA --network mlp
    python experiments/mnist_ddpm.py --checkpoint runs/mnist_ddpm/mnist_ddpm.safetensors

Trains on the chain's own times with the eps-loss (Algorithm 1), draws 16 digits by Algorithm 2, and
the same 8 starts by ancestral sampling, DDIM, the reverse SDE and the probability-flow ODE.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from common import flags


@dataclass(frozen=True)
class Sampling:
    """Flags of sampling."""

    variance: Literal["beta", "posterior"] = "beta"
    """variance of the reverse steps of the 16 samples"""
    seed: int = 0
    """seed of the weights, the batches and the samples"""
    device: flags.Device = "auto"
    """where the network runs"""
    checkpoint: Annotated[flags.ExistingPath | None, flags.default("none: train")] = None
    """draw from this .safetensors file; nothing is trained"""
    out: Path = Path("runs/mnist_ddpm")
    """folder of everything written"""


@dataclass(frozen=True)
class Training:
    """Flags of training: they have no effect with --checkpoint."""

    network: Annotated[Literal["unet", "plain", "mlp"] | None, flags.default("unet")] = None
    """(train) unet: residual, with attention; plain: the exercise's; mlp: fully connected"""
    chain_steps: Annotated[int | None, flags.default("1,000")] = None
    """(train) length N of the chain, with linear betas from 1e-4 to 0.02"""
    epochs: Annotated[int | None, flags.default("20")] = None
    """(train) passes over the digits"""
    batch_size: Annotated[int | None, flags.default("128")] = None
    """(train) images per step"""
    learning_rate: Annotated[float | None, flags.default("2e-3")] = None
    """(train) its largest value; half a cosine to 0"""
    dtype: Annotated[Literal["float32", "bf16"] | None, flags.default("float32")] = None
    """(train) the network's arithmetic"""
    data_root: Annotated[Path | None, flags.default("$SDE_DIFFUSION_DATA, or data")] = None
    """(train) folder that holds MNIST/raw"""


@dataclass(frozen=True)
class Config(flags.Flags, Training, Sampling):  # fields: those of the last base come first
    """Train and draw; with --checkpoint, draw without training, and without flags of (train)."""


if __name__ == "__main__":
    flags.check(Config)

import time
from collections import deque

import torch
from common import command, run
from torch import Tensor, nn

import sde_diffusion as sd
from sde_diffusion import data, plots, training, validate
from sde_diffusion.files import storage

SIDE_BY_SIDE: dict[str, tuple[sd.samplers.Sampler, int | None]] = {
    "ancestral": (sd.Ancestral(), 1000),
    "DDIM": (sd.Ancestral(eta=0.0), 50),
    "reverse SDE": (sd.EulerMaruyama(), 250),
    "probability-flow ODE": (sd.AdaptiveODE(1e-3, 1e-3), None),
}


def main(config: Config) -> None:
    check(config)
    command.check_out(config.out)
    command.device(config.device)
    if config.checkpoint:
        denoiser = load(config.checkpoint).to(command.device(config.device))
    else:
        engine = run.engine(config, config.device, config.out)
        first = engine.is_main_process
        denoiser = train(config, engine)
        run.finish(engine)
        if not first:
            return
    draw(config, denoiser)


def check(config: Config) -> None:
    run.check(config)
    for name in ("chain_steps", "epochs", "batch_size"):
        if getattr(config, name) is not None:
            validate.integer(flags.flag(name), getattr(config, name), at_most=10**6)
    if config.learning_rate is not None:
        validate.number("--learning-rate", config.learning_rate, 0, 1, strict=True)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    if config.checkpoint:
        names = (field.name for field in (*fields(Training), *fields(flags.Flags)))
        flags.unused(config, names, "with --checkpoint")


def load(path: Path) -> sd.Denoiser:
    """Return the denoiser of a file, which must take 28x28 digits on a chain."""
    denoiser = command.load(path)
    x = torch.zeros(1, 1, 28, 28)
    try:
        sd.DDPM(denoiser).predict_x0(x, 1)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--checkpoint {path}: no DDPM of 28x28 digits: {error}") from None
    return denoiser


def train(config: Config, engine: training.Engine) -> sd.Denoiser:
    """Algorithm 1 of Ho et al.: t = i/N uniform in i, the error of eps."""
    torch.manual_seed(config.seed)  # the network's first weights
    networks: dict[str, nn.Module] = {
        "unet": sd.networks.UNet(channels=(32, 64), blocks=1),
        "plain": sd.networks.PlainUNet(),
        "mlp": sd.networks.MLP(shape=(1, 28, 28), width=1024, depth=4, fourier=64),
    }
    # A fully connected network does not learn to pass 784 noisy numbers through. Preconditioning
    # leaves it the unknown part of eps, for the same loss: 0.13, not 0.61, after 1,200 steps.
    reading = sd.models.Preconditioned(sigma_data=0.5) if config.network == "mlp" else sd.Eps()
    chain = sd.Discrete.linear(config.chain_steps or 1000)
    denoiser = sd.Denoiser(networks[config.network or "unet"], chain, reading)
    digits = data.mnist(config.data_root)
    batch_size = config.batch_size or 128
    epoch = -(-len(digits) // batch_size)
    recipe = training.Recipe(
        steps=(config.epochs or 20) * epoch,
        batch_size=batch_size,
        learning_rate=config.learning_rate or 2e-3,
        ema=training.EMA(0.999),
        seed=config.seed,
        dtype=run.dtype(config.dtype),
    )
    recipe = run.extended(config, recipe)
    times = sd.losses.DiscreteTimes(chain.num_steps)
    bad = config.on_bad or "raise"
    facts = {"data": data.fingerprint(digits)}
    state = training.TrainState(
        denoiser, recipe, times, sd.losses.Simple(), engine=engine, bad=bad, facts=facts
    )
    left = ("metrics.csv", "mnist_ddpm.*", "loss.png", "samples.png", "side_by_side.png")
    run.begin(config, state, config.out, *left)
    record = run.record(state)
    if engine.is_main_process:
        command.write_config(config.out, config)
    deque(run.steps(config, state, digits, config.out, **record), maxlen=0)
    made = state.averaged
    if engine.is_main_process:
        made.save(config.out / "mnist_ddpm.safetensors", **record, **run.last_loss(config.out))
    return made


def side_by_side(chain_steps: int) -> dict[str, tuple[sd.samplers.Sampler, int | None]]:
    """Return samplers and steps by a title with the steps, which are at most those of the chain."""
    runs: dict[str, tuple[sd.samplers.Sampler, int | None]] = {}
    for name, (sampler, most) in SIDE_BY_SIDE.items():
        steps = None if most is None else min(most, chain_steps)
        runs[name if steps is None else f"{name}, {steps:,}"] = sampler, steps
    return runs


def draw(config: Config, denoiser: sd.Denoiser) -> None:
    """Write samples.png by DDPM, and side_by_side.png by every formulation."""
    device = next(denoiser.parameters()).device
    ddpm = sd.DDPM(denoiser)
    seeds = [config.seed * 2**32 + k for k in range(16)]
    runs = side_by_side(ddpm.num_steps)
    print(f"16 digits by Algorithm 2, 8 by each of {', '.join(runs)} -> {config.out}", flush=True)
    start = time.perf_counter()
    bar = command.network_calls(denoiser.network, "Algorithm 2", ddpm.num_steps)
    with bar, command.unwarned():
        x = ddpm.sample((16, 1, 28, 28), variance=config.variance, seeds=seeds, device=device)
    command.finite(x, "Algorithm 2")
    print(f"16 digits in {ddpm.num_steps} steps, {time.perf_counter() - start:.1f} s")
    rows: dict[str, Tensor] = {}
    noise = ddpm.process.prior((8, 1, 28, 28), seeds=seeds[:8], device=device)
    for name, (sampler, steps) in runs.items():
        start = time.perf_counter()
        rows[name] = command.sampled(
            name, denoiser, sampler, noise, steps=steps, seeds=seeds[:8], progress=True
        )
        print(f"{name}: {time.perf_counter() - start:.1f} s")
    out = command.folder(config.out)
    storage.replace(out / "samples.png", plots.png(plots.tiles(x)))
    storage.replace(out / "side_by_side.png", plots.png(picture(rows)))
    print(f"-> {out / 'samples.png'}, {out / 'side_by_side.png'}")


def picture(rows: dict[str, Tensor]) -> object:
    """A row of digits for each sampler, all from the same noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.95 * len(rows)), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
        axes.imshow(plots.tiles(x))
        axes.set_title(name, fontsize=8, loc="left")
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    command.run(main, Config)
