"""A DDPM of the images in a folder: homework 2 of CMU 10-423, "Generative models of images".

    python experiments/ddpm_images.py --data_path ./data/train --save_folder ./results
    python experiments/ddpm_images.py --data_path ./data/train --load_path ./results --visualize

Cosine schedule, L1 loss on the noise, samples by the clamped ancestral chain: the sheet's equations
16 to 19 and Algorithms 1 and 2. Several processes as in common/run.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro
from common import flags
from tyro.constructors import PrimitiveConstructorSpec


def switched(words: list[str]) -> bool:
    """Return the value of a switch from the words after it; none is True."""
    if words not in ([], ["True"], ["False"]):
        raise ValueError(f"takes True, False or nothing; got {' '.join(words)}")
    return words != ["False"]


# The sheet gives `--fid` and `--fid False`; tyro has one or the other.
Switch: TypeAlias = Annotated[
    tyro.conf.FlagConversionOff[bool],
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[True|False]",
        instance_from_str=switched,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    ),
]

PERCENT = (0, 25, 50, 75, 99)  # of the chain: the images of the strips
AFHQ = ("cat", "dog", "wild")
AT_ONCE = 64  # images drawn together
NAME = "ddpm_images"
CLAMPED = "clamped"
SAMPLER_HELP = (
    f"{CLAMPED}: the sheet's Algorithm 2, all T steps with x0 held to [-1, 1]. {flags.SAMPLER_HELP}"
)


@dataclass(frozen=True)
class Sheet:
    """The sheet's flags, and those of sampling."""

    data_path: Path = Path("data/train")
    """folder of images, or of folders of images named after their classes"""
    data_class: Annotated[str | None, flags.default("cat on AFHQ, else all")] = None
    """class to learn"""
    save_folder: Path = Path("results")
    """folder of everything written"""
    load_path: Annotated[flags.ExistingPath | None, flags.default("none")] = None
    """a run, checkpoint or .safetensors file: drawn from with --visualize, else trained further"""
    image_size: int = 32
    """side of the square images, in pixels"""
    batch_size: int = 32
    """images per step"""
    time_steps: int = 50
    """T, the length of the chain"""
    train_steps: int = 10_000
    """optimizer steps"""
    learning_rate: float = 1e-3
    """learning rate, constant"""
    unet_dim: int = 16
    """width of the U-Net's first layer; those below have 2, 4 and 8 times as many"""
    save_and_sample_every: int = 1000
    """steps between sample grids and measurements"""
    fid: Switch = False
    """measure samples at the same steps, on --features"""
    visualize: Switch = False
    """draw the forward and the backward strip; with --load_path nothing is trained"""
    features: Annotated[flags.FeaturesName | None, flags.default("efficientnet")] = None
    """(fid) network of the features; only inception gives FID, only efficientnet comes by pip"""
    inception_weights: Annotated[flags.ExistingPath | None, flags.default("none")] = None
    """(fid) file of Inception's published weights"""
    fid_samples: Annotated[int | None, flags.default("256; 2,048 with inception")] = None
    """(fid) number of samples measured"""
    sampler: Annotated[
        str,
        flags.Names((CLAMPED, *flags.SAMPLER_NAMES)),
        tyro.conf.arg(metavar="NAME", help=SAMPLER_HELP),
    ] = CLAMPED
    steps: Annotated[int | None, flags.default("as in mnist_vp.py, or T")] = None
    """sampling steps of a fixed-step sampler other than clamped, at most T"""
    num_samples: int = 64
    """images in a sample grid"""
    seed: int = 0
    """seed of training; sample k depends on (seed, k) alone"""
    device: flags.Device = "auto"
    """where the network runs"""
    dtype: Annotated[Literal["float32", "bf16"] | None, flags.default("float32")] = None
    """the network's arithmetic in training"""


@dataclass(frozen=True)
class Config(flags.Flags, Sheet):  # dataclass fields: those of the last base come first
    """Learn the images of a folder and draw new ones; flags may have hyphens for underscores."""

    checkpoint_every: Annotated[int | None, flags.default("--save_and_sample_every")] = None
    """(train) steps between checkpoints"""

    @property
    def process(self) -> "sd.Discrete":
        """alpha_t = clip(abar_t / abar_(t-1), 0.001, 1), abar_t = f(t) / f(0), s = 0.008."""
        return sd.Discrete.cosine(self.time_steps)

    @property
    def times(self) -> "sd.losses.DiscreteTimes":
        return sd.losses.DiscreteTimes(self.time_steps)

    @property
    def recipe(self) -> "training.Recipe":
        recipe = training.Recipe(
            steps=self.train_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup=0,
            decay="constant",
            ema=training.EMA(0.995),
            seed=self.seed,
            dtype=run.dtype(self.dtype),
        )
        return run.extended(self, recipe)


if __name__ == "__main__":
    flags.check(Config, use_underscores=True)

import torch
from common import command, quality, run, samplers
from torch import Tensor
from tqdm import tqdm

import sde_diffusion as sd
from sde_diffusion import data, metrics, plots, training, validate
from sde_diffusion.files import storage


def main(config: Config) -> None:
    check(config)
    command.check_out(config.save_folder, "--save_folder")
    device = command.device(config.device)
    images = loaded_images(config)
    if config.load_path and config.visualize:
        denoiser = load(config, device)
    else:
        engine = run.engine(config, config.device, config.save_folder)
        denoiser = train(config, engine, images)
        run.finish(engine)
        if not engine.is_main_process:
            return
    if config.visualize:
        visualize(config, denoiser, images)


def check(config: Config) -> None:
    """Refuse values out of range, and flags that would have no effect."""
    run.check(config)
    least = {"image_size": 4, "time_steps": 2, "unet_dim": 8, "fid_samples": 2, "seed": 0}
    most = {"image_size": 1024, "time_steps": 10_000, "unet_dim": 1024, "seed": 2**31 - 1}
    for name in ("image_size", "batch_size", "time_steps", "train_steps", "unet_dim",
                 "save_and_sample_every", "fid_samples", "steps", "num_samples",
                 "seed"):  # fmt: skip
        value = getattr(config, name)
        if value is not None:
            validate.integer(f"--{name}", value, least.get(name, 1), most.get(name, 10**7))
    validate.number("--learning_rate", config.learning_rate, 0, 1, strict=True)
    if config.unet_dim % 8:
        raise ValueError(f"--unet_dim must be a multiple of 8; got {config.unet_dim}")
    check_sampler(config)
    if not config.fid:
        names = ("features", "inception_weights", "fid_samples")
        flags.unused(config, names, "without --fid", "--{}".format)
    if (config.features == "inception") != (config.inception_weights is not None):
        raise ValueError("--features inception and --inception_weights PATH go together")
    if config.load_path and config.visualize:
        names = ("save_and_sample_every", "fid", "num_samples",
                 "dtype", *(field.name for field in fields(flags.Flags)))  # fmt: skip
        why = "with --load_path and --visualize, which train nothing"
        flags.unused(config, names, why, "--{}".format)


def check_sampler(config: Config) -> None:
    """Refuse an unknown sampler, and steps that it or the chain does not have."""
    if config.sampler == CLAMPED:
        if config.steps is not None:
            raise ValueError(f"--steps has no effect with --sampler {CLAMPED}")
        return
    samplers.check(config.sampler, steps=config.steps)
    if steps(config) is not None:
        validate.integer("--steps", steps(config), at_most=config.time_steps)
        chosen(config).grid(config.process, steps(config))


def steps(config: Config) -> int | None:
    """Return the steps of a fixed-step sampler."""
    usual = samplers.usual_steps(config.sampler)
    if config.steps or usual is None:
        return config.steps
    return min(usual, config.time_steps)


def chosen(config: Config) -> sd.samplers.Sampler:
    """Return the sampler of --sampler other than the clamped chain, which is DDPM's own."""
    return samplers.sampler(config.sampler, steps(config))


def loaded_images(config: Config) -> data.Images:
    path, wanted = config.data_path, config.data_class
    if wanted is None and all((path / name).is_dir() for name in AFHQ):
        wanted = "cat"
    return data.image_folder(path, config.image_size, data_class=wanted)


# ---- the model --------------------------------------------------------------------------------


def new(config: Config) -> sd.Denoiser:
    """Return an untrained denoiser that predicts the noise."""
    network = sd.networks.UNet(
        in_channels=3,
        channels=[config.unet_dim * k for k in (1, 2, 4, 8)],
        blocks=1,
        attention=(2, 3),
        patch=1,
        embedding=4 * config.unet_dim,
    )
    return sd.Denoiser(network, config.process, sd.Eps())


def load(config: Config, device: torch.device) -> sd.Denoiser:
    """Return the denoiser of --load_path, which must fit the other flags."""
    path = weights_in(config.load_path or Path())
    denoiser, name = command.load(path, "--load_path"), f"--load_path {config.load_path}"
    if denoiser.process != config.process:
        length = getattr(denoiser.process, "num_steps", None)
        found = f"--time_steps {length}" if length else f"{denoiser.process}"
        raise ValueError(f"{name}: its process is that of {found:.80}, not of --time_steps "
                         f"{config.time_steps}")  # fmt: skip
    width = getattr(denoiser.network, "config", {}).get("channels", [config.unet_dim])[0]
    if width != config.unet_dim:
        raise ValueError(f"{name}: trained with --unet_dim {width}; got {config.unet_dim}")
    x = torch.zeros(1, 3, config.image_size, config.image_size)
    try:
        denoiser(x, denoiser.process.level(torch.ones(1), x))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: not of such images: {error}") from None
    return denoiser.to(device)


def weights_in(path: Path) -> Path:
    """Return the .safetensors file of a path: itself, or that of a checkpoint or of a run."""
    if not path.is_dir():
        return path
    newest = training.newest_checkpoint(path)
    for place in (path / "denoiser.safetensors", path / f"{NAME}.safetensors"):
        if place.is_file():
            return place
    if newest is None:
        raise ValueError(f"--load_path {path}: neither a checkpoint nor a folder that holds one")
    return newest / "denoiser.safetensors"


# ---- training ---------------------------------------------------------------------------------


def train(config: Config, engine: Any, images: data.Images) -> sd.Denoiser:
    """Train, writing checkpoints, sample grids, figures, metrics.csv, loss.png and the weights."""
    out, is_main = config.save_folder, engine.is_main_process
    torch.manual_seed(config.seed)  # the network's first weights
    denoiser = load(config, engine.device) if config.load_path else new(config)
    word = config.features or "efficientnet"
    count = config.fid_samples or (2048 if word == "inception" else 256)
    network = judge = None
    if config.fid and is_main:
        quality.check(word, len(images), count)
        network = quality.network(word, config.inception_weights).to(engine.device)
    names = [f"{name.file}.{kind}" for name in quality.NAMES.values() for kind in ("csv", "png")]
    state = training.TrainState(
        denoiser, config.recipe, config.times, penalty=sd.losses.L1(), engine=engine,
        bad=config.on_bad or "raise", facts={"data": data.fingerprint(images)},
    )  # fmt: skip
    run.begin(
        config, state, out, "metrics.csv", "loss.png", "sample-*.png", f"{NAME}.*", "forward.png",
        "backward.png", *names, flag="--save_folder",
    )  # fmt: skip
    if network:
        judge = quality.judge(word, network, images, count)
    record = {"image_size": config.image_size, **run.record(state)}
    if is_main:
        command.write_config(out, config)

    def report(step: int) -> None:
        if step % config.save_and_sample_every and step != state.recipe.steps:
            return
        averaged = state.averaged  # a call of all processes
        if not is_main:
            return
        images = drawn(config, averaged, max(config.num_samples, count if judge else 0))
        grid = plots.tiles(images[: config.num_samples])
        storage.replace(out / f"sample-{step:05d}.png", plots.png(grid))
        if judge:
            row = judge.row(step, images[:count])
            quality.add(out, judge, row)
            tqdm.write(judge.line(row))

    if state.step:  # an earlier run may have ended between a checkpoint and its report
        report(state.step)
    every = config.checkpoint_every or config.save_and_sample_every
    going = run.steps(replace(config, checkpoint_every=every), state, images, out, **record)
    for made in going:
        report(made.step)
    averaged = state.averaged
    if is_main:
        last = run.last_loss(out)
        averaged.save(out / f"{NAME}.safetensors", **record, **last)
        print(f"{state.step:,} steps, loss {sum(last.values()):.4f} -> {out}")
    return averaged


def drawn(config: Config, denoiser: sd.Denoiser, count: int) -> Tensor:
    """Return samples 0 .. count - 1 of the model, by --sampler."""
    size, device = config.image_size, next(denoiser.network.parameters()).device
    ddpm, parts = sd.DDPM(denoiser), list[Tensor]()
    with command.network_calls(denoiser.network, f"drawing {count}"):
        for chunk in metrics.chunks(count, AT_ONCE):
            seeds, shape = seeds_of(config, chunk), (len(chunk), 3, size, size)
            if config.sampler == CLAMPED:
                made = ddpm.sample(
                    shape, variance="posterior", clamp=1.0, seeds=seeds, device=device
                )
            else:
                x = sd.prior(denoiser, shape, seeds=seeds, device=device)
                made = command.sampled(
                    config.sampler, denoiser, chosen(config), x, steps=steps(config), seeds=seeds
                )
            parts.append(made)
    return command.finite(torch.cat(parts), config.sampler)


def seeds_of(config: Config, numbers: Sequence[int]) -> list[int]:
    return [config.seed * 2**32 + k for k in numbers]


# ---- strips -----------------------------------------------------------------------------------


def visualize(config: Config, denoiser: sd.Denoiser, images: data.Images) -> None:
    """Write forward.png of the first training batch; backward.png from the end of that."""
    device = next(denoiser.network.parameters()).device
    x0 = training.draw(images, config.recipe, config.times, 0).x0[:16].to(device)
    forward = forward_strip(config, denoiser, x0)
    backward = backward_strip(config, denoiser, forward[PERCENT[-1]])
    out = command.folder(config.save_folder)
    storage.replace(out / "forward.png", plots.png(strip(config, forward, "forward")))
    storage.replace(out / "backward.png", plots.png(strip(config, backward, "backward")))
    if not training.saved(out):  # whose config.json is that of training
        command.write_config(out, config)
    print(f"-> {out / 'forward.png'}, {out / 'backward.png'}")


def marks(config: Config) -> dict[int, int]:
    """Return the index i of the chain at each of PERCENT, rounded down; 0 is data."""
    return {percent: percent * config.time_steps // 100 for percent in PERCENT}


def forward_strip(config: Config, denoiser: sd.Denoiser, x0: Tensor) -> dict[int, Tensor]:
    """Return q_sample(x0, i) at each of PERCENT, all with the same noise."""
    ddpm = sd.DDPM(denoiser)
    seeds = seeds_of(config, range(len(x0)))
    eps = ddpm.process.prior(x0.shape, seeds=seeds, device=x0.device)
    return {p: ddpm.q_sample(x0, i, eps) if i else x0 for p, i in marks(config).items()}


def backward_strip(config: Config, denoiser: sd.Denoiser, x: Tensor) -> dict[int, Tensor]:
    """Sample from x = x_i, i at 99 %, down to 0; return the states at each of PERCENT."""
    start, seeds = marks(config)[PERCENT[-1]], seeds_of(config, range(len(x)))
    if config.sampler == CLAMPED:
        chain = sd.DDPM(denoiser).p_chain(x, start, variance="posterior", clamp=1.0, seeds=seeds)
    else:
        times = torch.arange(start, -1, -1, dtype=torch.float64) / config.time_steps
        path = sd.trajectory(denoiser, chosen(config), x, times=times, seeds=seeds)
        chain = (state.x for state in path)
    with command.unwarned():
        states = dict(zip(range(start, -1, -1), (x, *chain), strict=True))
    command.finite(states[0], config.sampler)
    return {percent: states[i] for percent, i in reversed(marks(config).items())}


def strip(config: Config, states: Mapping[int, Tensor], way: str) -> Any:
    """Draw one panel of images for each state, in their order."""
    from matplotlib.figure import Figure

    height = 0.8 + 0.75 * -(-len(next(iter(states.values()))) // 4)
    figure = Figure(figsize=(3 * len(states), height), layout="constrained")
    for axes, (percent, x) in zip(figure.subplots(1, len(states)), states.items(), strict=True):
        axes.imshow(plots.tiles(x, columns=4))
        axes.set(title=f"{percent} %, t = {marks(config)[percent]}", xticks=[], yticks=[])
    figure.suptitle(f"{way}, T = {config.time_steps}")
    return figure


if __name__ == "__main__":
    command.run(main, Config, use_underscores=True)
