"""Digits of a given class, by classifier-free guidance.

    python experiments/mnist_conditional.py --scale 0 1 2 4 --out runs/mnist_conditional
    python experiments/mnist_conditional.py --classes 3 8 --num-samples 10
    python experiments/mnist_conditional.py --train --data-root DATA

Draws digits of each class at each scale w into grid.png, with the packaged weights or, with
--train, with those of a network that it trains on MNIST with context dropout. w = 1 is the
conditional model, 0 the unconditional one.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from common import flags

CLASSES = 10


@dataclass(frozen=True)
class Sampling:
    """Flags of sampling."""

    scale: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """guidance scales w: a block of the grid for each"""
    classes: tuple[int, ...] = tuple(range(CLASSES))
    """digits to draw: a column for each"""
    num_samples: int = 4
    """number of digits of each class at each scale"""
    low: float = 0.0
    """guidance acts where sigma / alpha is above this ..."""
    high: float = float("inf")
    """... and below this"""
    sampler: flags.SamplerName = "adams"
    steps: Annotated[int | None, flags.default(flags.USUAL_STEPS)] = None
    """sampling steps of a fixed-step sampler"""
    seed: int = 0
    """sample k of each class depends on (seed, k) alone, at any scale"""
    device: flags.Device = "auto"
    """where the network runs"""
    checkpoint: Annotated[flags.ExistingPath | None, flags.default("the packaged weights")] = None
    """a .safetensors file to sample from; (train) to start from, unconditional ones too"""
    out: Path = Path("runs/mnist_conditional")
    """folder of everything written"""


@dataclass(frozen=True)
class Training:
    """Flags of training: they need --train."""

    train: bool = False
    """train first, then draw"""
    train_steps: Annotated[int | None, flags.default("20,000")] = None
    """(train) optimizer steps"""
    batch_size: Annotated[int | None, flags.default("128")] = None
    """(train) images per step"""
    learning_rate: Annotated[float | None, flags.default("2e-3")] = None
    """(train) its largest value"""
    cond_dropout: Annotated[float | None, flags.default("0.2")] = None
    """(train) probability that a step drops a digit's class"""
    dtype: Annotated[Literal["float32", "bf16"] | None, flags.default("float32")] = None
    """(train) the network's arithmetic"""
    data_root: Annotated[Path | None, flags.default("$SDE_DIFFUSION_DATA, or data")] = None
    """(train) folder that holds MNIST/raw"""


@dataclass(frozen=True)
class Config(flags.Flags, Training, Sampling):  # fields: those of the last base come first
    """Draw digits by class, or train and then draw. Flags marked (train) need --train."""


if __name__ == "__main__":
    flags.check(Config)

import time
from collections import deque

import safetensors.torch
import torch
from common import command, run, samplers
from torch import Tensor
from torch.nn import functional as F

import sde_diffusion as sd
from sde_diffusion import data, plots, training, validate
from sde_diffusion.files import storage
from sde_diffusion.models import guidance


def main(config: Config) -> None:
    check(config)
    command.check_out(config.out)
    device = command.device(config.device)
    if config.train:
        engine = run.engine(config, config.device, config.out)
        first = engine.is_main_process
        denoiser = train(config, engine)
        run.finish(engine)
        if not first:
            return
    else:
        denoiser = load(config.checkpoint).to(device)
    draw(config, denoiser)


def check(config: Config) -> None:
    """Refuse values out of range, and flags that would have no effect."""
    run.check(config)
    for name in ("num_samples", "steps", "train_steps", "batch_size"):
        if getattr(config, name) is not None:
            validate.integer(flags.flag(name), getattr(config, name), at_most=10**7)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    for w in config.scale:
        validate.number("--scale", w)
    for digit in config.classes:
        validate.integer("--classes", digit, 0, CLASSES - 1)
    if not 0 <= config.low < config.high:
        raise ValueError(
            f"--low and --high must be 0 <= low < high; got {config.low}, {config.high}"
        )
    for name, top in (("learning_rate", 1.0), ("cond_dropout", 1.0)):
        if getattr(config, name) is not None:
            flag = flags.flag(name)
            validate.number(flag, getattr(config, name), 0, top, strict=name == "learning_rate")
    samplers.check(config.sampler, steps=config.steps)
    if not config.train:
        names = (field.name for field in (*fields(Training), *fields(flags.Flags)))
        flags.unused(config, names, "without --train")


def load(path: Path | None) -> sd.Denoiser:
    """Return the packaged conditional denoiser, or that of a file, which must take 28x28 digits."""
    if path is None:
        return sd.pretrained("mnist_conditional")
    denoiser = command.load(path)
    x = torch.zeros(1, 1, 28, 28)
    try:
        denoiser(x, denoiser.process.level(torch.full((1,), 0.5), x), torch.zeros(1, CLASSES))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--checkpoint {path}: no model of digits by class: {error}") from None
    return denoiser


def draw(config: Config, denoiser: sd.Denoiser) -> None:
    """Sample, and write grid.png, samples.safetensors and config.json."""
    device = next(denoiser.parameters()).device
    chosen = samplers.sampler(config.sampler, config.steps)
    steps = config.steps or samplers.usual_steps(config.sampler)
    labels = torch.tensor(config.classes).repeat(config.num_samples)
    cond = F.one_hot(labels, CLASSES).float().to(device)
    count = len(config.scale) * len(labels)
    print(f"{count} digits by {chosen} on {device} -> {config.out}", flush=True)
    # The same start for every class and scale: columns and rows differ by class and scale alone.
    seeds = [config.seed * 2**32 + k for k in range(config.num_samples) for _ in config.classes]
    x = sd.prior(denoiser, (len(seeds), 1, 28, 28), seeds=seeds, device=device)
    start, rows = time.perf_counter(), {}
    for w in config.scale:
        model = guidance.ClassifierFree(denoiser, scale=w, interval=(config.low, config.high))
        rows[w] = command.sampled(
            f"{config.sampler} at scale {w:g}", model, chosen, x, steps=steps, cond=cond,
            seeds=seeds, progress=True,
        ).cpu()  # fmt: skip
    seconds = time.perf_counter() - start
    out = command.folder(config.out)
    made = torch.stack(list(rows.values()))
    storage.replace(
        out / "samples.safetensors",
        safetensors.torch.save(
            {"samples": made, "classes": labels, "scale": torch.tensor(config.scale)}
        ),
    )
    storage.replace(out / "grid.png", plots.png(picture(config, rows)))
    command.write_config(out, config, device=str(device), seconds=round(seconds, 3))
    print(f"{config.sampler}: {count} digits, {seconds:.1f} s")
    print(f"-> {out / 'grid.png'}")


def picture(config: Config, rows: dict[float, Tensor]) -> object:
    """A block for each scale, a column for each class, both named."""
    from matplotlib.figure import Figure

    count, width = config.num_samples, len(config.classes)
    figure = Figure(
        figsize=(0.6 + 0.45 * width, (0.3 + 0.45 * count) * len(rows)), layout="constrained"
    )
    for axes, (w, x) in zip(
        figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True
    ):
        image = plots.tiles(x, columns=width)
        axes.imshow(image)
        side = image.size[0] / width
        axes.set_xticks([side * (k + 0.5) for k in range(width)], list(map(str, config.classes)))
        axes.tick_params(
            length=0, labelsize=7, top=True, labeltop=True, bottom=False, labelbottom=False
        )
        axes.set_yticks([])
        axes.set_ylabel(f"w = {w:g}", fontsize=8)
        axes.spines[:].set_visible(False)
    return figure


def train(config: Config, engine: training.Engine) -> sd.Denoiser:
    """Train with context dropout, writing checkpoints, metrics.csv, loss.png and the average."""
    torch.manual_seed(config.seed)  # the network's first weights
    denoiser = command.load(config.checkpoint) if config.checkpoint else fresh()
    denoiser = widened(denoiser)
    digits = replace(data.mnist(config.data_root), classes=CLASSES)
    recipe = training.Recipe(
        steps=config.train_steps or 20_000,
        batch_size=config.batch_size or 128,
        learning_rate=config.learning_rate or 2e-3,
        seed=config.seed,
        cond_dropout=0.2 if config.cond_dropout is None else config.cond_dropout,
        dtype=run.dtype(config.dtype),
    )
    recipe = run.extended(config, recipe)
    state = training.TrainState(
        denoiser, recipe, sd.losses.NormalLogSNR(denoiser.process, 0.0, 2.8), engine=engine,
        bad=config.on_bad or "raise", facts={"data": data.fingerprint(digits)},
    )  # fmt: skip
    run.begin(config, state, config.out, "metrics.csv", "mnist_conditional.*", "loss.png")
    record = run.record(state)
    if engine.is_main_process:
        command.write_config(config.out, config)
    deque(run.steps(config, state, digits, config.out, **record), maxlen=0)
    made = state.averaged
    if engine.is_main_process:
        path = config.out / "mnist_conditional.safetensors"
        made.save(path, **record, **run.last_loss(config.out))
    return made


def fresh() -> sd.Denoiser:
    """An untrained denoiser."""
    network = sd.networks.UNet(channels=(32, 64), blocks=2, cond=CLASSES)
    return sd.Denoiser(network, sd.VP(), sd.V())


def widened(denoiser: sd.Denoiser) -> sd.Denoiser:
    """Return a U-Net that takes a class; a new context has no effect at first."""
    network = denoiser.network
    settings = getattr(network, "config", {})
    if not isinstance(network, sd.networks.UNet) or settings["cond"] not in (0, CLASSES):
        raise ValueError(
            f"--checkpoint: to train on classes it must hold a UNet without a context, or with one "
            f"of width {CLASSES}"
        )
    if settings["cond"]:
        return denoiser
    wider = sd.networks.UNet(**{**settings, "cond": CLASSES})
    assert wider.context is not None
    with torch.no_grad():
        wider.load_state_dict(network.state_dict(), strict=False)
        wider.context.weight.zero_()
        wider.context.bias.zero_()
    ours = denoiser
    return sd.Denoiser(wider, ours.process, ours.parameterization, ours.noise_input)


if __name__ == "__main__":
    command.run(main, Config)
