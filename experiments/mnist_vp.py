"""Digits from the VP process.

Samples 64 digits with the packaged weights:      python experiments/mnist_vp.py --sampler ode
Trains on MNIST, then samples:                    python experiments/mnist_vp.py --train
"""

import csv
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import command
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

import sde_diffusion as sd
from sde_diffusion import data, errors, frames, plots, storage, training

STEPS = {
    "ancestral": 250, "ddim": 250, "sde": 250, "torchsde": 250, "langevin": 125, "heun": 18,
    "churn": 50, "adams": 20, "dpm2": 20, "dpm3": 20, "sde-dpm2": 50, "multistep": 50,
}  # fmt: skip
TOLERANCES = {"ode": (1e-3, 1e-3), "adaptive-ode": (1e-3, 1e-3), "adaptive-sde": (0.01, 0.01)}
FRAMED = ("adams", "adaptive-ode")


@dataclass(frozen=True)
class Config:
    """Draw digits, or train and then draw. Flags marked (train) need --train."""

    sampler: Literal[
        "ancestral", "ddim", "sde", "torchsde", "langevin", "heun", "churn", "adams", "dpm2",
        "dpm3", "sde-dpm2", "multistep", "ode", "adaptive-ode", "adaptive-sde",
    ] = "ode"  # fmt: skip
    """ode: dopri5 on the probability flow; sde: Euler-Maruyama of the reverse SDE; dpm2, dpm3:
    DPM-Solver++; multistep: stochastic, by velocities; langevin: ancestral with corrections"""
    steps: int | None = None
    """steps of a fixed-step sampler [heun 18; adams, dpm2, dpm3 20; churn, sde-dpm2, multistep 50;
    langevin 125; the others 250]"""
    frame: Literal["straight", "gaussian"] | None = None
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
    dtype: Literal["float32", "bf16"] = "float32"
    """the network's arithmetic; states and weights stay float32"""
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
    checkpoint_every: int | None = None
    """(train) steps between checkpoints [500]"""
    resume: bool = False
    """(train) go on from the newest checkpoint in --out"""
    overwrite: bool = False
    """(train) delete the run in --out first"""
    data_root: Path | None = None
    """(train) folder that holds MNIST/raw [$SDE_DIFFUSION_DATA, or data]"""
    download: bool = False
    """(train) fetch MNIST into the data root if it is not there"""


def main(config: Config) -> None:
    check(config)
    command.check_out(config.out)
    device = command.device(config.device)
    denoiser = train(config, device) if config.train else load(config, device)
    draw(config, denoiser, device)


def check(config: Config) -> None:
    """Refuse values out of range, and flags that would have no effect."""
    for name in ("steps", "train_steps", "epochs", "checkpoint_every", "num_samples", "batch_size"):
        if getattr(config, name) is not None:
            errors.integer(flag(name), getattr(config, name), at_most=10**7)
    errors.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    for name in ("rtol", "atol", "learning_rate"):
        if getattr(config, name) is not None:
            errors.number(flag(name), getattr(config, name), 0, 1, strict=True)
    errors.number("--log-snr-mean", config.log_snr_mean or 0.0, -20, 20)
    if config.log_snr_std is not None:
        errors.number("--log-snr-std", config.log_snr_std, 0, 20, strict=True)
    unused = ("steps",) if config.sampler in TOLERANCES else ("rtol", "atol")
    for name in unused if config.sampler in FRAMED else (*unused, "frame"):
        if getattr(config, name) is not None:
            raise ValueError(f"{flag(name)} has no effect with --sampler {config.sampler}")
    if config.checkpoint and config.network:
        raise ValueError("--network has no effect with --checkpoint, which has its own")
    needs_train = ("epochs", "train_steps", "learning_rate", "log_snr_mean", "log_snr_std",
                   "network", "checkpoint_every", "resume", "overwrite", "data_root",
                   "download")  # fmt: skip
    for name in needs_train if not config.train else ():
        value = getattr(config, name)
        if value is not None and value is not False:  # 0.0 is a value given
            raise ValueError(f"{flag(name)} has no effect without --train")
    if config.epochs and config.train_steps:
        raise ValueError("give --epochs or --train-steps, not both")
    if config.resume and config.overwrite:
        raise ValueError("give --resume or --overwrite, not both")


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


def sampler(config: Config) -> sd.Sampler:
    """The one place where a word becomes a sampler."""
    frame = frames.Gaussian.pretrained("mnist") if config.frame == "gaussian" else frames.Straight()
    rtol, atol = TOLERANCES.get(config.sampler, (1.0, 1.0))
    rtol, atol = config.rtol or rtol, config.atol or atol
    made: dict[str, sd.Sampler] = {
        "ancestral": sd.Ancestral(),
        "ddim": sd.Ancestral(eta=0.0),
        "sde": sd.EulerMaruyama(),
        "torchsde": sd.TorchSDE(),
        "langevin": sd.Langevin(sd.Ancestral()),
        "heun": sd.Heun(),
        "churn": sd.Churn(sd.Heun()),
        "adams": sd.Adams.auto(config.steps or STEPS["adams"], frame),
        "dpm2": sd.DPMSolver(2),
        "dpm3": sd.DPMSolver(3),
        "sde-dpm2": sd.SDEDPMSolver(),
        "multistep": sd.VelocityMultistep(),
        "ode": sd.TorchODE(rtol=rtol, atol=atol),
        "adaptive-ode": sd.AdaptiveODE(rtol, atol, frame),
        "adaptive-sde": sd.AdaptiveSDE(rtol, atol),
    }
    return made[config.sampler]


def draw(config: Config, denoiser: sd.Denoiser, device: torch.device) -> None:
    """Sample in chunks and write samples.png, samples.safetensors, config.json."""
    chosen, steps = sampler(config), config.steps or STEPS.get(config.sampler)
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
    chosen: sd.Sampler,
    seeds: list[int],
    steps: int | None,
    device: torch.device,
) -> Iterator[Tensor]:
    """The states worth keeping: the last one, or with --gif about 30 on the way to it."""
    x = denoiser.process.prior((len(seeds), 1, 28, 28), seeds=seeds, device=device)
    times = None
    if config.gif and config.sampler == "ode":  # one step would be one frame: cut the path
        times = frames.grid(denoiser.process, 30)
    states = sd.trajectory(denoiser, chosen, x, steps=steps, times=times, seeds=seeds)
    every = max(1, (steps or 30) // 30)
    kept = x
    for k, state in enumerate(states):
        if config.gif and k % every == 0:
            yield kept
        kept = state.x
    yield kept


def train(config: Config, device: torch.device) -> sd.Denoiser:
    """Train, writing checkpoints, metrics.csv, loss.png and the averaged weights."""
    torch.manual_seed(config.seed)  # the network's first weights
    denoiser = load(config, device) if config.checkpoint else new(config).to(device)
    digits = data.mnist(config.data_root, download=config.download)
    out = prepared(config)  # last: what cannot start must not delete the run before it
    epoch = -(-len(digits) // config.batch_size)
    recipe = training.Recipe(
        steps=config.train_steps or (config.epochs * epoch if config.epochs else 20_000),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate or 2e-3,
        seed=config.seed,
        dtype=config.dtype,
    )
    mean, std = config.log_snr_mean or 0.0, config.log_snr_std or 2.8
    times = sd.NormalLogSNR(denoiser.process, mean, std)
    state = training.TrainState(denoiser, recipe, times)
    newest = training.newest_checkpoint(out)
    if config.resume and newest:
        state.restore(newest)
        print(f"resuming at step {state.step}")
    elif config.resume:
        print(f"no checkpoint in {out}: starting at step 0")
    run_training(config, state, digits, out)
    return state.averaged


def new(config: Config) -> sd.Denoiser:
    """An untrained denoiser."""
    if config.network == "mlp":
        network = sd.networks.MLP(shape=(1, 28, 28), width=512, depth=3, fourier=64)
    else:
        network = sd.networks.UNet(channels=(32, 64), blocks=2)
    return sd.Denoiser(network, sd.VP(), sd.V())


def prepared(config: Config) -> Path:
    """--out, ready for a run that is new, resumed or to be replaced."""
    out = command.folder(config.out)
    own = [*training.checkpoints(out), *out.glob("metrics.csv"), *out.glob("mnist_vp.*")]
    if config.overwrite:
        for path in own:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif own and not config.resume:
        raise ValueError(f"--out {out} holds a run: give --resume, --overwrite or another folder")
    return out


def run_training(
    config: Config, state: training.TrainState, digits: data.Images, out: Path
) -> None:
    record = {"command": command.command(), "commit": command.commit(), **state.settings}
    command.write_config(out, config)
    rows = read_rows(out / "metrics.csv")[: state.step]
    lines = [",".join(row) for row in [list(training.Metrics._fields), *rows]]
    storage.replace(out / "metrics.csv", "".join(line + "\n" for line in lines).encode())
    bar = tqdm(training.train(state, digits), total=state.recipe.steps, initial=state.step)
    with open(out / "metrics.csv", "a", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        for metrics in bar:
            table.writerow(metrics)
            rows.append([str(value) for value in metrics])
            bar.set_postfix(loss=f"{metrics.loss:.3f}", refresh=False)
            every = config.checkpoint_every or 500
            if metrics.step % every == 0 or metrics.step == state.recipe.steps:
                file.flush()
                state.save(out, **record)
    loss = sum(float(row[1]) for row in rows[-1000:]) / max(1, len(rows[-1000:]))
    state.averaged.save(out / "mnist_vp.safetensors", **record, loss_of_last_1000_steps=loss)
    draw_loss(out / "loss.png", rows)


def read_rows(path: Path) -> list[list[str]]:
    """The whole rows of an earlier metrics.csv, steps 1, 2, ...; a kill may have cut the last."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(training.Metrics._fields)]
    return [row for step, row in enumerate(rows[1:], 1) if row[0] == str(step)]


def draw_loss(path: Path, rows: list[list[str]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    plots.loss_curve(
        figure.subplots(), [int(row[0]) for row in rows], [float(row[1]) for row in rows]
    )
    storage.replace(path, plots.png(figure))


if __name__ == "__main__":
    command.run(main, Config)
