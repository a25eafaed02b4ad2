"""Digits from the VP process.

Samples 64 digits with the packaged weights:      python experiments/mnist_vp.py --sampler ode
Trains on MNIST, then samples:                    python experiments/mnist_vp.py --train
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from common import command, run, samplers
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import data, plots, training, validate
from sde_diffusion.files import storage


@dataclass(frozen=True)
class Config(run.Flags):
    """Draw digits, or train and then draw. --resume to --tracker and those marked (train) need
    --train."""

    sampler: samplers.Word = "ode"
    """ode: dopri5 on the probability flow; sde: Euler-Maruyama of the reverse SDE; dpm2, dpm3:
    DPM-Solver++; multistep: stochastic, by velocities; langevin: ancestral with corrections"""
    steps: int | None = None
    """steps of a fixed-step sampler [heun 18; adams, dpm2, dpm3 20; churn, sde-dpm2, multistep 50;
    langevin 125; the others 250]"""
    frame: samplers.FrameWord | None = None
    """in which adams and adaptive-ode integrate: gaussian knows mean and covariance of MNIST
    [straight]"""
    rtol: float | None = None
    """relative tolerance of ode, adaptive-ode [1e-3] and adaptive-sde [1e-2]"""
    atol: float | None = None
    """absolute tolerance of the same"""
    num_samples: int = 64
    seed: int = 0
    """sample k depends on (seed, k) alone"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["float32", "bf16"] | None = None
    """the network's arithmetic [float32]; states and weights stay float32"""
    batch_size: int = 128
    """samples drawn at once; (train) images per step"""
    out: Path = Path("runs/mnist_vp")
    """folder of everything written"""
    checkpoint: Path | None = None
    """a .safetensors file to sample from [the packaged weights]; (train) to start from"""
    gif: bool = False
    """write trajectory.gif too"""
    train: bool = False
    """train first, then sample"""
    epochs: int | None = None
    """(train) passes over the 60,000 digits"""
    train_steps: int | None = None
    """(train) optimizer steps [20,000]"""
    learning_rate: float | None = None
    """(train) its largest value [2e-3]"""
    log_snr_mean: float | None = None
    """(train) mean of the log-SNR of the levels trained on [0]"""
    log_snr_std: float | None = None
    """(train) its standard deviation [2.8]"""
    network: Literal["unet", "mlp"] | None = None
    """(train) what to train [unet]"""
    data_root: Path | None = None
    """(train) folder that holds MNIST/raw [$SDE_DIFFUSION_DATA, or data]"""
    download: bool = False
    """(train) fetch MNIST into the data root if it is not there"""


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
            validate.integer(flag(name), getattr(config, name), at_most=10**7)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    for name in ("rtol", "atol", "learning_rate"):
        if getattr(config, name) is not None:
            validate.number(flag(name), getattr(config, name), 0, 1, strict=True)
    validate.number("--log-snr-mean", config.log_snr_mean or 0.0, -20, 20)
    if config.log_snr_std is not None:
        validate.number("--log-snr-std", config.log_snr_std, 0, 20, strict=True)
    unused = ("steps",) if config.sampler in samplers.TOLERANCES else ("rtol", "atol")
    for name in unused if config.sampler in samplers.FRAMED else (*unused, "frame"):
        if getattr(config, name) is not None:
            raise ValueError(f"{flag(name)} has no effect with --sampler {config.sampler}")
    if config.checkpoint and config.network:
        raise ValueError("--network has no effect with --checkpoint, which has its own")
    needs_train = ("epochs", "train_steps", "learning_rate", "log_snr_mean", "log_snr_std",
                   "network", "data_root", "download",
                   *(field.name for field in fields(run.Flags)))  # fmt: skip
    for name in needs_train if not config.train else ():
        value = getattr(config, name)
        if value is not None and value is not False:  # 0.0 is a value given
            raise ValueError(f"{flag(name)} has no effect without --train")
    if config.epochs and config.train_steps:
        raise ValueError("give --epochs or --train-steps, not both")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def load(config: Config, device: torch.device) -> sd.Denoiser:
    """The packaged denoiser, or the one of --checkpoint, which must be of 28x28 digits too."""
    if not config.checkpoint:
        return sd.pretrained("mnist_vp").to(device)
    denoiser = sd.Denoiser.load(config.checkpoint)
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
    chosen, steps = sampler(config), config.steps or samplers.STEPS.get(config.sampler)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = denoiser.network.register_forward_hook(count)
    seeds = [config.seed * 2**32 + k for k in range(config.num_samples)]
    chunks = [seeds[k : k + config.batch_size] for k in range(0, len(seeds), config.batch_size)]
    bf16 = torch.autocast(device.type, torch.bfloat16)
    start, drawn, film = time.perf_counter(), [], []
    with bf16 if config.dtype == "bf16" else nullcontext():
        for chunk in chunks:
            states = list(path(config, denoiser, chosen, chunk, steps, device))
            drawn.append(states[-1].cpu())
            film = film or [plots.tiles(x[:64]) for x in states if config.gif]
    seconds = time.perf_counter() - start
    hook.remove()
    x, out = torch.cat(drawn), command.folder(config.out)
    storage.replace(out / "samples.safetensors", safetensors.torch.save({"samples": x}))
    storage.replace(out / "samples.png", plots.png(plots.tiles(x[:256])))
    if config.gif:
        storage.replace(out / "trajectory.gif", plots.gif(film))
    facts = {"sampler": repr(chosen), "network_calls": calls, "seconds": round(seconds, 3)}
    command.write_config(out, config, device=str(device), **facts)
    batches = "" if len(chunks) == 1 else f" in {len(chunks)} batches"
    print(f"{config.sampler}: {len(x)} digits, {calls} network calls{batches}, {seconds:.1f} s")
    print(f"{chosen} -> {out / 'samples.png'}")


def path(
    config: Config,
    denoiser: sd.Denoiser,
    chosen: sd.samplers.Sampler,
    seeds: list[int],
    steps: int | None,
    device: torch.device,
) -> Iterator[Tensor]:
    """The states worth keeping: the last one, or with --gif about 30 on the way to it."""
    x = denoiser.process.prior((len(seeds), 1, 28, 28), seeds=seeds, device=device)
    times = None
    if config.gif and config.sampler == "ode":  # one step would be one frame: cut the path
        times = sd.grids.Power()(denoiser.process, 30)
    states = sd.trajectory(denoiser, chosen, x, steps=steps, times=times, seeds=seeds)
    every = max(1, (steps or 30) // 30)
    kept = x
    for k, state in enumerate(states):
        if config.gif and k % every == 0:
            yield kept
        kept = state.x
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
    mean, std = config.log_snr_mean or 0.0, config.log_snr_std or 2.8
    times = sd.losses.NormalLogSNR(denoiser.process, mean, std)
    state = training.TrainState(
        denoiser, recipe, times, engine=engine, bad=config.on_bad or "raise",
        facts={"data": data.fingerprint(digits)},
    )  # fmt: skip
    run.begin(config, state, config.out, "metrics.csv", "mnist_vp.*", "loss.png")
    record = {"command": command.command(), "commit": command.commit(), **state.settings}
    if engine.is_main_process:
        command.write_config(config.out, config)
    deque(run.steps(config, state, digits, config.out, **record), maxlen=0)
    if engine.is_main_process:
        loss = run.mean_loss(config.out)
        state.averaged.save(
            config.out / "mnist_vp.safetensors", **record, loss_of_last_1000_steps=loss
        )
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
