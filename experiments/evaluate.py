"""Quality of digits against network calls, for every sampler: table, JSON and picture.

    python experiments/evaluate.py --samplers adams ddim --steps 5 10 20 50
    torchrun --nproc_per_node 2 experiments/evaluate.py ...    the same figures in half the time

Real digits are MNIST's training digits, in two halves by --seed: samples are compared with the
first; the second gives the floor, the figures of as many perfect samples, with its deviation over
other splits: a sampler within two of these cannot be told from real digits. Each process computes
on one thread, since the last bits of a sum depend on the number of threads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from common import flags


@dataclass(frozen=True)
class Config:
    """Draw digits with every sampler, and measure them."""

    samplers: Annotated[
        tuple[flags.SamplerName, ...],
        tyro.conf.arg(metavar="NAME ...", help=flags.SAMPLER_HELP),
    ] = ("ancestral", "ddim", "dpm2", "adams")
    steps: tuple[int, ...] = (5, 10, 20, 50)
    """numbers of sampling steps of the fixed-step samplers"""
    tolerances: Annotated[
        tuple[float, ...] | None,
        tyro.conf.arg(metavar="FLOAT ...", help_behavior_hint="(default: 0.1 0.01 0.001)"),
    ] = None
    """relative and absolute tolerances of the samplers that choose their own steps"""
    frame: Annotated[flags.FrameName | None, flags.default("straight")] = None
    """coordinates in which adams and adaptive-ode integrate"""
    num_samples: int = 10_000
    """digits drawn with each sampler and setting"""
    checkpoint: Annotated[flags.ExistingPath | None, flags.default("the packaged weights")] = None
    """a .safetensors file of 28x28 digits"""
    num_real: Annotated[int | None, flags.default("all")] = None
    """number of real digits used, the first ones"""
    features: Literal["mnist", "inception", "efficientnet"] = "mnist"
    """the network whose features are compared"""
    inception_weights: Annotated[flags.ExistingPath | None, flags.default("none")] = None
    """file of Inception's published weights"""
    download: bool = False
    """download Inception's weights"""
    seed: int = 0
    """sample k depends on (seed, k) alone"""
    batch_size: int = 128
    """samples drawn at once; each batch belongs to one process"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks run"""
    data_root: Annotated[Path | None, flags.default("$SDE_DIFFUSION_DATA, or data")] = None
    """folder that holds MNIST/raw"""
    out: Path = Path("runs/evaluate")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import json
import math
import statistics
from collections.abc import Callable, Sequence
from datetime import timedelta

import mnist_vp
import torch
from common import command
from common import samplers as words
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import data, metrics, plots, progress, training, validate
from sde_diffusion.files import storage
from sde_diffusion.metrics import distances, features

COMPONENTS = 64  # of EfficientNet's 1,280 features, which would need as many samples
TITLES = {
    "mnist": "Frechet distance on 64 features of a digit classifier",
    "inception": "FID",
    "efficientnet": "Frechet distance on 64 principal components of EfficientNet-Lite0 features",
}


@dataclass(frozen=True)
class Run:
    """One sampler at one setting: a row of the table."""

    word: str
    sampler: sd.samplers.Sampler
    steps: int | None
    tolerance: float | None

    @property
    def setting(self) -> str:
        return f"{self.steps} steps" if self.tolerance is None else f"tol {self.tolerance:g}"


def check(config: Config) -> None:
    """Refuse values out of range, and flags that would have no effect."""
    for name in ("num_samples", "batch_size", "num_real"):
        value = getattr(config, name)
        if value is not None:
            validate.integer(flags.flag(name), value, 2, 10**7)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    for steps in config.steps:
        validate.integer("--steps", steps, at_most=10**5)
    for tolerance in config.tolerances or ():
        validate.number("--tolerances", tolerance, 0, 1, strict=True)
    for word in config.samplers:
        words.check(word, "--samplers")
    used = set[str]().union(*map(words.settings, config.samplers))
    if config.tolerances and "rtol" not in used:
        raise ValueError("--tolerances has no effect without a sampler that chooses its own steps")
    if "steps" not in used:
        flags.unused(config, ("steps",), "on samplers that choose their own steps")
    if config.frame and "frame" not in used:
        raise ValueError("--frame has no effect without a sampler that has one, such as adams")
    given = config.inception_weights is not None or config.download
    if given != (config.features == "inception") or (config.inception_weights and config.download):
        raise ValueError("--features inception takes --inception-weights PATH or --download")


def runs(config: Config) -> list[Run]:
    """Every sampler at each of its settings."""
    made: list[Run] = []
    for word in config.samplers:
        if "steps" not in words.settings(word):
            for tol in config.tolerances or (0.1, 0.01, 0.001):
                chosen = words.sampler(word, None, config.frame, tol, tol)
                made.append(Run(word, chosen, None, tol))
        else:
            for steps in config.steps:
                chosen = words.sampler(word, steps, config.frame)
                made.append(Run(word, chosen, steps, None))
    return made


class Share:
    """This process's part of the work, in whole batches; every process gets all results."""

    def __init__(self, config: Config) -> None:
        device = command.device(config.device)
        # Between two gathers a process may draw a whole batch more than another.
        self.accelerator = training.launched(device, patience=timedelta(hours=12))
        self.device = self.accelerator.device
        self.batch_size = config.batch_size

    def each(self, count: int, make: Callable[[range], Tensor]) -> Tensor:
        """make(positions) over 0 .. count - 1, in the order of the positions, on the CPU."""
        world = self.accelerator
        mine = metrics.chunks(count, self.batch_size, world.process_index, world.num_processes)
        whole = make(range(0)) if not mine else torch.cat([make(chunk) for chunk in mine])
        positions = torch.tensor([k for chunk in mine for k in chunk], dtype=torch.int64)
        everywhere = metrics.gathered(whole, positions.to(whole.device), world)
        return everywhere.cpu()


def drawn(config: Config, share: Share, denoiser: sd.Denoiser, run: Run) -> tuple[Tensor, float]:
    """Return the samples of a run, and the network calls of each."""
    bar = progress.bar(
        desc=f"{run.word}, {run.setting}", total=config.num_samples, unit=" samples", leave=False,
        disable=not share.accelerator.is_main_process,
    )  # fmt: skip

    def make(chunk: range) -> Tensor:
        seeds = [config.seed * 2**32 + k for k in chunk]
        calls = 0

        def count(module: object, inputs: tuple[Tensor, ...], output: object) -> None:
            nonlocal calls
            calls += len(inputs[0])

        x = sd.prior(denoiser, (len(seeds), 1, 28, 28), seeds=seeds, device=share.device)
        hook = denoiser.network.register_forward_hook(count)
        try:
            with command.unwarned():
                if seeds:
                    x = sd.sample(denoiser, run.sampler, x, steps=run.steps, seeds=seeds)
        except sd.SolverError:  # it is in the row; raised here, the other processes would wait
            x = torch.full_like(x, math.nan)
        finally:
            hook.remove()
        bar.update(len(seeds) * share.accelerator.num_processes)
        each = calls / max(1, len(seeds))
        return torch.cat([x.flatten(1), x.new_full((len(seeds), 1), each)], dim=1)

    with bar:
        found = share.each(config.num_samples, make)
    return found[:, :-1].reshape(-1, 1, 28, 28), float(found[:, -1].double().mean())


def spread(share: Share, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the network's outputs for images, each batch on one process."""

    def make(chunk: range) -> Tensor:
        if not chunk:  # a process without a batch: no rows, but of the right width
            return make(range(1))[:0]
        part = images[chunk.start : chunk.stop].to(share.device)
        return metrics.extract(part, network, share.batch_size)

    return share.each(len(images), make)


@dataclass(frozen=True)
class Judge:
    """The real digits, in the features in which samples are compared.

    Args:
        reference: the features (N, d) of one half.
        project: from features to those of the Frechet distance.
        statistics: of the reference in these.
        shares: of the ten classes among real digits, (10,).
    """

    reference: Tensor
    project: Callable[[Tensor], Tensor]
    statistics: metrics.Statistics
    shares: Tensor

    @staticmethod
    def of(config: Config, found: Tensor, shares: Tensor, split: int = 0) -> "Judge":
        """Return the judge of one half of the real features (N, d); split 0 is that of --seed."""
        reference, _ = halves(config, found, split)
        few = config.features == "efficientnet"
        project = metrics.principal(reference, COMPONENTS) if few else whole
        return Judge(reference, project, metrics.Statistics.of(project(reference)), shares.double())

    def row(self, made: Tensor, probabilities: Tensor) -> dict[str, Any]:
        """Return the figures of samples with features (N, d) and class probabilities (N, 10)."""
        own = metrics.Statistics.of(self.project(made))
        distance = metrics.frechet_distance(self.statistics, own)
        kid = metrics.kid(self.reference, made)
        alike = metrics.precision_recall(self.reference[: len(made)], made)
        largest = probabilities.double().max(1)
        classes = torch.bincount(largest.indices, minlength=10)
        variation = (classes / len(made) - self.shares).abs().sum() / 2
        return {
            "num_samples": len(made),
            "frechet": float(distance),
            "kid": float(kid),
            "kid_standard_error": kid.standard_error,
            "precision": float(alike.precision),
            "recall": float(alike.recall),
            "confidence": float(largest.values.mean()),
            "confident": float((largest.values > 0.9).double().mean()),
            "classes": classes.tolist(),
            "total_variation": float(variation),
        }


def halves(config: Config, x: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Split the rows of real digits in two halves."""
    return metrics.halves(x, (config.seed + split) % 2**63)


def floors(
    config: Config, found: Tensor, probabilities: Tensor, shares: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures of as many real digits as samples, and their standard deviations.

    The figures are those of the split by --seed, the deviations those over SPLITS random splits:
    the permutation distribution of figures of samples from the data's own law.

    Args:
        found, probabilities: features (N, d) and class probabilities (N, 10) of the real digits.
    """
    rows: list[dict[str, Any]] = []
    for split in range(SPLITS):
        perfect, likely = (
            halves(config, x, split)[1][: config.num_samples] for x in (found, probabilities)
        )
        rows.append(Judge.of(config, found, shares, split).row(perfect, likely))
    spreads = {name: statistics.stdev(row[name] for row in rows) for name in FLOORS}
    return rows[0], {"splits": SPLITS, "num_samples": rows[0]["num_samples"], **spreads}


Network = features.MnistFeatures | features.EfficientNetFeatures | features.InceptionFeatures


def network(config: Config) -> Network:
    """Return the network of --features."""
    if config.features == "mnist":
        return features.MnistFeatures()
    if config.features == "efficientnet":
        return features.EfficientNetFeatures()
    return features.InceptionFeatures(config.inception_weights, download=config.download)


def whole(x: Tensor) -> Tensor:
    return x


def check_sizes(config: Config, real: int, width: int) -> None:
    """Refuse too few digits before any is drawn: a Frechet distance needs as many as features.

    Its bias depends on the number of samples, so that the floor needs as many too.
    """
    least = {"--num-samples": config.num_samples, "half of --num-real": real // 2}
    for name, count in least.items():
        if count < width:
            raise ValueError(f"{name}: {count} samples are fewer than the {width} features")
    if config.num_samples > real // 2:
        raise ValueError(
            f"--num-samples must be at most {real // 2}, half of the real digits, which give the "
            f"floor; got {config.num_samples}"
        )


def main(config: Config) -> None:
    check(config)
    command.check_out(config.out)
    for library in ("torchmetrics.image.kid", "torch_fidelity.metric_prc"):
        distances.required(library)  # now, and not after an hour of drawing
    torch.set_num_threads(1)
    chosen = network(config)
    digits = data.mnist(config.data_root)
    real = data.dequantize(digits.pixels[: config.num_real], torch.tensor(0.5))
    shares = torch.bincount(digits.labels[: config.num_real], minlength=10) / len(real)
    few = config.features == "efficientnet"
    check_sizes(config, len(real), COMPONENTS + 1 if few else chosen.num_features)
    given = mnist_vp.Config(checkpoint=config.checkpoint)
    denoiser = mnist_vp.load(given, torch.device("cpu"))
    share = Share(config)
    main_process = share.accelerator.is_main_process
    classifier = features.MnistFeatures().to(share.device)
    chosen = chosen.to(share.device)
    denoiser = denoiser.to(share.device)

    found = spread(share, chosen, real)
    judge = Judge.of(config, found, shares)
    floor, errors = floors(config, found, spread(share, classifier.probabilities, real), shares)
    count = len(judge.reference)
    if main_process:
        print(f"{TITLES[config.features]}, against {count:,} real digits -> {config.out}")
        print(table_header())
        print(table_line("real digits", "floor", floor))
        print(table_line("", f"± {SPLITS} splits", errors), flush=True)
    rows: list[dict[str, Any]] = []
    for run in runs(config):
        made, calls = drawn(config, share, denoiser, run)
        row: dict[str, Any] = {
            "sampler": run.word, "steps": run.steps, "tolerance": run.tolerance, "calls": calls
        }  # fmt: skip
        failed = int((~made.flatten(1).isfinite().all(1)).sum())
        if failed:
            row["failed"] = failed
        else:
            probabilities = spread(share, classifier.probabilities, made)
            row |= judge.row(spread(share, chosen, made), probabilities)
        rows.append(row)
        if main_process:
            print(table_line(run.word, run.setting, row), flush=True)
    if main_process:
        write(config, floor, errors, rows, count, shares)
    share.accelerator.end_training()
    failed = [f"{row['sampler']}" for row in rows if "failed" in row]
    if failed:
        raise FloatingPointError(f"samples that are not finite: {', '.join(failed)}")


SPLITS = 5  # of the real digits, for the error of the floor
COLUMNS = {
    "frechet": "Frechet", "kid": "KID", "kid_standard_error": "±", "precision": "precision",
    "recall": "recall", "confidence": "confidence", "confident": "> 0.9",
    "total_variation": "classes",
}  # fmt: skip


FLOORS = [name for name in COLUMNS if name != "kid_standard_error"]


def table_header() -> str:
    names = "".join(f"{name:>11s}" for name in COLUMNS.values())
    return f"{'sampler':14s}{'':11s}{'N':>7s}{'calls':>8s}{names}"


def table_line(word: str, setting: str, row: dict[str, Any]) -> str:
    calls = f"{row['calls']:8.1f}" if "calls" in row else f"{'':8s}"
    start = f"{word:14s}{setting:11s}"
    if "failed" in row:
        return f"{start}{'':7s}{calls}   {row['failed']} samples are not finite"
    cells = "".join(f"{row[name]:11.4g}" if name in row else f"{'':11s}" for name in COLUMNS)
    return f"{start}{row['num_samples']:7,d}{calls}{cells}"


def write(
    config: Config,
    floor: dict[str, Any],
    errors: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    count: int,
    shares: Tensor,
) -> None:
    out = command.folder(config.out)
    record = {
        "features": config.features,
        "frechet_is": TITLES[config.features],
        "reference_count": count,
        "data_class_shares": shares.tolist(),
        "floor": floor,
        "floor_standard_deviations": errors,
        "rows": list(rows),
    }
    storage.replace(out / "evaluate.json", (json.dumps(record, indent=1) + "\n").encode())
    storage.replace(out / "evaluate.png", plots.png(picture(config, floor, errors, rows)))
    command.write_config(out, config)
    print(f"-> {out / 'evaluate.png'}")


def picture(
    config: Config,
    floor: dict[str, Any],
    errors: dict[str, Any],
    rows: Sequence[dict[str, Any]],
) -> Any:
    """Draw four figures against calls, a line for each sampler, and the floor with two errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    titles = {
        "frechet": "Frechet distance",
        "kid": "KID, ± a standard error",
        "precision": "precision (full) and recall (dashed)",
        "total_variation": "classes, total variation to the data's",
    }
    measured = [row for row in rows if "failed" not in row]
    for axis, name in zip(figure.subplots(2, 2).flat, titles, strict=True):
        plots.log_scale(axis, "x")
        if name == "kid":  # unbiased, so that it may be negative
            plots.log_scale(axis, "y", linthresh=max(4 * floor["kid_standard_error"], 1e-9))
        elif name != "precision":
            plots.log_scale(axis, "y")
        for number, word in enumerate(config.samplers):
            mine = [row for row in measured if row["sampler"] == word]
            mine.sort(key=lambda row: row["calls"])
            calls, color = [row["calls"] for row in mine], f"C{number % 10}"
            bars = [row["kid_standard_error"] for row in mine] if name == "kid" else None
            values = [row[name] for row in mine]
            axis.errorbar(calls, values, bars, color=color, fmt="o-", ms=3, lw=1.2, label=word)
            if name == "precision":
                axis.plot(calls, [row["recall"] for row in mine], "o--", color=color, ms=3, lw=1.2)
        pair = {"precision": "-", "recall": "--"} if name == "precision" else {name: "-"}
        for each, style in pair.items():
            label = "real digits, ± 2 standard deviations" if style == "-" else None
            axis.axhline(floor[each], color="0.5", lw=1, ls=style, label=label)
            low, high = (floor[each] + sign * 2 * errors[each] for sign in (-1, 1))
            axis.axhspan(low, high, color="0.5", alpha=0.2, lw=0)
        axis.set(xlabel="network calls", title=titles[name])
        ticks = sorted({round(row["calls"]) for row in measured})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_formatter("")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{TITLES[config.features]}, N = {config.num_samples:,}", fontsize="medium")
    return figure


if __name__ == "__main__":
    command.run(main, Config)
