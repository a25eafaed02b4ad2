"""Digits from the VP process.

    python experiments/mnist_vp.py --sampler ode
    python experiments/mnist_vp.py --sampler adams --steps 20 --num-samples 16
    python experiments/mnist_vp.py --train --data-root DATA

Samples 64 digits with the packaged weights, or trains on MNIST and then samples.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from common import flags


@dataclass(frozen=True)
class Sampling:
    """Flags of sampling."""

    sampler: flags.SamplerName = "ode"
    steps: Annotated[int | None, flags.default(flags.USUAL_STEPS)] = None
    """sampling steps of a fixed-step sampler"""
    frame: Annotated[flags.FrameName | None, flags.default("straight")] = None
    """coordinates of adams and adaptive-ode; gaussian: by mean and covariance of MNIST"""
    rtol: Annotated[float | None, flags.default("1e-3; adaptive-sde 2e-2")] = None
    """relative tolerance of a sampler that chooses its own steps"""
    atol: Annotated[float | None, flags.default("as --rtol")] = None
    """absolute tolerance of a sampler that chooses its own steps"""
    num_samples: int = 64
    """number of digits"""
    seed: int = 0
    """sample k depends on (seed, k) alone"""
    device: flags.Device = "auto"
    """where the network runs"""
    dtype: Annotated[Literal["float32", "bf16"] | None, flags.default("float32")] = None
    """the network's arithmetic; states and weights stay float32"""
    batch_size: int = 128
    """samples drawn at once; (train) images per step"""
    checkpoint: Annotated[flags.ExistingPath | None, flags.default("the packaged weights")] = None
    """a .safetensors file to sample from; (train) to start from"""
    gif: bool = False
    """write trajectory.gif too"""
    out: Path = Path("runs/mnist_vp")
    """folder of everything written"""


@dataclass(frozen=True)
class Training:
    """Flags of training: they need --train."""

    train: bool = False
    """train first, then sample"""
    epochs: Annotated[int | None, flags.default("see --train-steps")] = None
    """(train) passes over the 60,000 digits"""
    train_steps: Annotated[int | None, flags.default("20,000")] = None
    """(train) optimizer steps"""
    learning_rate: Annotated[float | None, flags.default("2e-3")] = None
    """(train) its largest value"""
    log_snr_mean: Annotated[float | None, flags.default("0")] = None
    """(train) mean of the log-SNR of the training levels"""
    log_snr_std: Annotated[float | None, flags.default("2.8")] = None
    """(train) standard deviation of the log-SNR of the training levels"""
    network: Annotated[Literal["unet", "mlp"] | None, flags.default("unet")] = None
    """(train) network"""
    data_root: Annotated[Path | None, flags.default("$SDE_DIFFUSION_DATA, or data")] = None
    """(train) folder that holds MNIST/raw"""
    download: bool = False
    """(train) download MNIST into the data root if it is not there"""


@dataclass(frozen=True)
class Config(flags.Flags, Training, Sampling):  # fields: those of the last base come first
    """Draw digits, or train and then draw. Flags marked (train) need --train."""


if __name__ == "__main__":
    flags.check(Config)

import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext

import safetensors.torch
import torch
from common import command, run, samplers
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import data, plots, training, validate
from sde_diffusion.files import storage


def main(config: Config) -> None:
    check(config)
    command.check_out(config.out)
    device = command.device(config.device)
    if config.train:
        engine = run.engine(config, config.device, config.out)
        main, device = engine.is_main_process, engine.device
        denoiser = train(config, engine)
        run.finish(engine)
        if not main:
            return
    else:
        denoiser = load(config, device)
    draw(config, denoiser, device)


def check(config: Config) -> None:
    """Refuse values out of range, and flags that would have no effect."""
    run.check(config)
    for name in ("steps", "train_steps", "epochs", "num_samples", "batch_size"):
        if getattr(config, name) is not None:
            validate.integer(flags.flag(name), getattr(config, name), at_most=10**7)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    for name in ("rtol", "atol", "learning_rate"):
        if getattr(config, name) is not None:
            validate.number(flags.flag(name), getattr(config, name), 0, 1, strict=True)
    validate.number("--log-snr-mean", config.log_snr_mean or 0.0, -20, 20)
    if config.log_snr_std is not None:
        validate.number("--log-snr-std", config.log_snr_std, 0, 20, strict=True)
    given = {name: getattr(config, name) for name in ("steps", "frame", "rtol", "atol")}
    samplers.check(config.sampler, **given)
    if config.checkpoint and config.network:
        raise ValueError("--network has no effect with --checkpoint, which has its own")
    if not config.train:
        names = (field.name for field in (*fields(Training), *fields(flags.Flags)))
        flags.unused(config, names, "without --train")
    if config.epochs and config.train_steps:
        raise ValueError("give --epochs or --train-steps, not both")


def load(config: Config, device: torch.device) -> sd.Denoiser:
    """Return the packaged denoiser, or the one of --checkpoint, which must take 28x28 digits."""
    if not config.checkpoint:
        return sd.pretrained("mnist_vp").to(device)
    denoiser = command.load(config.checkpoint)
    x = torch.zeros(1, 1, 28, 28)
    try:
        denoiser(x, denoiser.process.level(torch.full((1,), 0.5), x))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--checkpoint {config.checkpoint}: not of 28x28 digits: {error}"
        ) from None
    return denoiser.to(device)


def sampler(config: Config) -> sd.samplers.Sampler:
    return samplers.sampler(config.sampler, config.steps, config.frame, config.rtol, config.atol)


def draw(config: Config, denoiser: sd.Denoiser, device: torch.device) -> None:
    """Sample in chunks and write samples.png, samples.safetensors, config.json."""
    chosen, steps = sampler(config), config.steps or samplers.usual_steps(config.sampler)
    print(f"{config.num_samples} digits by {chosen} on {device} -> {config.out}", flush=True)
    seeds = [config.seed * 2**32 + k for k in range(config.num_samples)]
    chunks = [seeds[k : k + config.batch_size] for k in range(0, len(seeds), config.batch_size)]
    bf16 = torch.autocast(device.type, torch.bfloat16)
    start, drawn, film = time.perf_counter(), [], []
    with (
        bf16 if config.dtype == "bf16" else nullcontext(),
        command.unwarned(),
        command.network_calls(denoiser.network, config.sampler) as bar,
    ):
        for chunk in chunks:
            states = list(path(config, denoiser, chosen, chunk, steps, device, bar))
            drawn.append(states[-1].cpu())
            film = film or states
        calls = bar.n
    seconds = time.perf_counter() - start
    x = command.finite(torch.cat(drawn), config.sampler)
    out = command.folder(config.out)
    storage.replace(out / "samples.safetensors", safetensors.torch.save({"samples": x}))
    storage.replace(out / "samples.png", plots.png(plots.tiles(x[:256])))
    if config.gif:
        storage.replace(out / "trajectory.gif", plots.gif([plots.tiles(x[:64]) for x in film]))
    facts = {"sampler": repr(chosen), "network_calls": calls, "seconds": round(seconds, 3)}
    command.write_config(out, config, device=str(device), **facts)
    batches = "" if len(chunks) == 1 else f" in {len(chunks)} batches"
    print(f"{config.sampler}: {len(x)} digits, {calls} network calls{batches}, {seconds:.1f} s")
    print(f"-> {out / 'samples.png'}")


def path(
    config: Config,
    denoiser: sd.Denoiser,
    chosen: sd.samplers.Sampler,
    seeds: list[int],
    steps: int | None,
    device: torch.device,
    bar: Any,
) -> Iterator[Tensor]:
    """Return the last state, and with --gif about 30 on the way to it."""
    x = sd.prior(denoiser, (len(seeds), 1, 28, 28), seeds=seeds, device=device)
    times = None
    if config.gif and steps is None:  # one step would be one frame: cut the path
        times = sd.grids.Power()(denoiser.process, 30)
    states = sd.trajectory(denoiser, chosen, x, steps=steps, times=times, seeds=seeds)
    every = max(1, (steps or 30) // 30)
    kept = x
    for k, state in enumerate(states):
        if config.gif and k % every == 0:
            yield kept
        kept = state.x
        if steps:
            bar.set_postfix_str(f"step {k + 1} of {steps}", refresh=False)
    yield kept


def train(config: Config, engine: training.Engine) -> sd.Denoiser:
    """Train, writing checkpoints, metrics.csv, loss.png and the averaged weights."""
    torch.manual_seed(config.seed)  # the network's first weights
    denoiser = load(config, engine.device) if config.checkpoint else new(config)
    if engine.is_main_process and config.download:
        data.mnist(config.data_root, download=True)
    engine.wait_for_everyone()
    digits = data.mnist(config.data_root)
    epoch = -(-len(digits) // config.batch_size)
    recipe = training.Recipe(
        steps=config.train_steps or (config.epochs * epoch if config.epochs else 20_000),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate or 2e-3,
        seed=config.seed,
        dtype=run.dtype(config.dtype),
    )
    recipe = run.extended(config, recipe)
    mean, std = config.log_snr_mean or 0.0, config.log_snr_std or 2.8
    times = sd.losses.NormalLogSNR(denoiser.process, mean, std)
    state = training.TrainState(
        denoiser, recipe, times, engine=engine, bad=config.on_bad or "raise",
        facts={"data": data.fingerprint(digits)},
    )  # fmt: skip
    run.begin(config, state, config.out, "metrics.csv", "mnist_vp.*", "loss.png")
    record = run.record(state)
    if engine.is_main_process:
        command.write_config(config.out, config)
    deque(run.steps(config, state, digits, config.out, **record), maxlen=0)
    if engine.is_main_process:
        last = run.last_loss(config.out)
        state.averaged.save(config.out / "mnist_vp.safetensors", **record, **last)
    return state.averaged


def new(config: Config) -> sd.Denoiser:
    """An untrained denoiser."""
    if config.network == "mlp":
        network = sd.networks.MLP(shape=(1, 28, 28), width=512, depth=3, fourier=64)
    else:
        network = sd.networks.UNet(channels=(32, 64), blocks=2)
    return sd.Denoiser(network, sd.VP(), sd.V())


if __name__ == "__main__":
    command.run(main, Config)
