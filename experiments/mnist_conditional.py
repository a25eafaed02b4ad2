"""Digits of the class that is asked for, by classifier-free guidance.

    python experiments/mnist_conditional.py --scale 0 1 2 4 --out runs/mnist_conditional
    python experiments/mnist_conditional.py --classes 3 8 --num-samples 10
    python experiments/mnist_conditional.py --train --data-root DATA

Draws digits of each class at each scale w into grid.png, with the packaged weights or, with
--train, with those of a network that it trains on MNIST with context dropout. w = 1 is the
conditional model, 0 the unconditional one.
"""

import time
from collections import deque
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from common import command, run, samplers
from torch import Tensor
from torch.nn import functional as F

import sde_diffusion as sd
from sde_diffusion import data, plots, training, validate
from sde_diffusion.files import storage
from sde_diffusion.models import guidance

CLASSES = 10


@dataclass(frozen=True)
class Config(run.Flags):
    """Draw digits by class, or train and then draw. --resume to --tracker and those marked (train)
    need --train."""

    scale: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """w: a row of the grid for each"""
    classes: tuple[int, ...] = tuple(range(CLASSES))
    """digits wanted: a column for each"""
    num_samples: int = 4
    """of each class at each scale"""
    low: float = 0.0
    """guidance acts where sigma / alpha is above this ..."""
    high: float = float("inf")
    """... and below this"""
    sampler: samplers.Word = "adams"
    """see mnist_vp.py"""
    steps: int | None = None
    """steps of a fixed-step sampler [as in mnist_vp.py]"""
    seed: int = 0
    """sample k of each class depends on (seed, k) alone, at any scale"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    checkpoint: Path | None = None
    """a .safetensors file to sample from [the packaged weights]; (train) to start from, which may
    be an unconditional one: the context's weights are then 0 at first"""
    out: Path = Path("runs/mnist_conditional")
    """folder of everything written"""
    train: bool = False
    """train first, then draw"""
    train_steps: int | None = None
    """(train) optimizer steps [20,000]"""
    batch_size: int | None = None
    """(train) images per step [128]"""
    learning_rate: float | None = None
    """(train) its largest value [2e-3]"""
    cond_dropout: float | None = None
    """(train) probability that a step does not see a digit's class [0.2]"""
    dtype: Literal["float32", "bf16"] | None = None
    """(train) the network's arithmetic [float32]"""
    data_root: Path | None = None
    """(train) folder that holds MNIST/raw [$SDE_DIFFUSION_DATA, or data]"""


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
            validate.integer("--" + name.replace("_", "-"), getattr(config, name), at_most=10**7)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    for name in ("scale", "classes"):
        if not getattr(config, name):
            raise ValueError(f"--{name} needs at least one value")
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
            flag = "--" + name.replace("_", "-")
            validate.number(flag, getattr(config, name), 0, top, strict=name == "learning_rate")
    if config.steps is not None and config.sampler in samplers.TOLERANCES:
        raise ValueError(f"--steps has no effect with --sampler {config.sampler}")
    training_only = ("train_steps", "batch_size", "learning_rate", "cond_dropout", "dtype",
                     "data_root", *(field.name for field in fields(run.Flags)))  # fmt: skip
    for name in training_only if not config.train else ():
        given = getattr(config, name)
        if given is not None and given is not False:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --train")


def load(path: Path | None) -> sd.Denoiser:
    """The packaged conditional denoiser, or that of a file, of 28x28 digits too."""
    if path is None:
        return sd.pretrained("mnist_conditional")
    denoiser = sd.Denoiser.load(path)
    x = torch.zeros(1, 1, 28, 28)
    try:
        denoiser(x, denoiser.process.level(torch.full((1,), 0.5), x), torch.zeros(1, CLASSES))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--checkpoint {path}: no model of digits by class: {error}") from None
    return denoiser


def draw(config: Config, denoiser: sd.Denoiser) -> None:
    """grid.png, samples.safetensors, config.json."""
    device = next(denoiser.parameters()).device
    chosen = samplers.sampler(config.sampler, config.steps)
    steps = config.steps or samplers.STEPS.get(config.sampler)
    labels = torch.tensor(config.classes).repeat(config.num_samples)
    cond = F.one_hot(labels, CLASSES).float().to(device)
    # The same start for every class and scale: columns and rows differ by what was asked for alone.
    seeds = [config.seed * 2**32 + k for k in range(config.num_samples) for _ in config.classes]
    x = denoiser.process.prior((len(seeds), 1, 28, 28), seeds=seeds, device=device)
    start, rows = time.perf_counter(), {}
    for w in config.scale:
        model = guidance.ClassifierFree(denoiser, cond, scale=w, interval=(config.low, config.high))
        rows[w] = sd.sample(model, chosen, x, steps=steps, seeds=seeds).cpu()
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
    print(f"{config.sampler}: {made.shape[0] * made.shape[1]} digits, {seconds:.1f} s")
    print(f"{chosen} -> {out / 'grid.png'}")


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
    denoiser = sd.Denoiser.load(config.checkpoint) if config.checkpoint else fresh()
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
    state = training.TrainState(
        denoiser, recipe, sd.losses.NormalLogSNR(denoiser.process, 0.0, 2.8), engine=engine,
        bad=config.on_bad or "raise", facts={"data": data.fingerprint(digits)},
    )  # fmt: skip
    run.begin(config, state, config.out, "metrics.csv", "mnist_conditional.*", "loss.png")
    record = {"command": command.command(), "commit": command.commit(), **state.settings}
    if engine.is_main_process:
        command.write_config(config.out, config)
    deque(run.steps(config, state, digits, config.out, **record), maxlen=0)
    made = state.averaged
    if engine.is_main_process:
        loss = run.mean_loss(config.out)
        path = config.out / "mnist_conditional.safetensors"
        made.save(path, **record, loss_of_last_1000_steps=loss)
    return made


def fresh() -> sd.Denoiser:
    """An untrained denoiser."""
    network = sd.networks.UNet(channels=(32, 64), blocks=2, cond=CLASSES)
    return sd.Denoiser(network, sd.VP(), sd.V())


def widened(denoiser: sd.Denoiser) -> sd.Denoiser:
    """A U-Net that takes a class: itself, or one that says the same of any class at first."""
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
