"""Quality of samples during training: a row for each measurement, a curve, a floor.

Samples are compared with one half of the real images. The floor is the same figure for as many
images of the other half: the figure of perfect samples, with its standard deviation over splits of
the real images. It is FID on Inception's features only.
"""

import csv
import io
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.flags import FeaturesName as Word
from torch import Tensor

from sde_diffusion import data, metrics, plots
from sde_diffusion.files import storage
from sde_diffusion.metrics import features

COMPONENTS = 64  # of EfficientNet's 1,280 features, which would need as many samples
BATCH = 16  # images at once: with 128, a CPU needs three times as long for each
MOST = 2000  # real images used with EfficientNet
SPLITS = 5  # of the real images, for the error of the floor


@dataclass(frozen=True)
class Names:
    """Names of the figures on the features of a network."""

    file: str
    frechet: str
    kid: str
    frechet_title: str
    kid_title: str


NAMES: dict[Word, Names] = {
    "efficientnet": Names(
        "efficientnet_lite0",
        "frechet_efficientnet_lite0_64_components",
        "kid_efficientnet_lite0",
        f"Frechet distance on {COMPONENTS} principal components of EfficientNet-Lite0 features",
        "KID on EfficientNet-Lite0 features",
    ),
    "inception": Names("fid", "fid", "kid", "FID", "KID"),
}


@dataclass(frozen=True)
class Judge:
    """The real images, in the features in which samples are compared.

    Args:
        network: from images (B, 3, H, W) in [-1, 1] to features (B, d).
        project: from features to those of the Frechet distance.
        real, held_out: features of the two halves of the real images.
    """

    names: Names
    network: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    real: Tensor
    held_out: Tensor

    @staticmethod
    def of(
        names: Names, network: Callable[[Tensor], Tensor], images: Tensor, components: int | None
    ) -> "Judge":
        """Return the judge of real images (N, 3, H, W); None: in all components."""
        real, held_out = metrics.halves(metrics.extract(images, network, BATCH))
        return Judge(
            names,
            network,
            same if components is None else metrics.principal(real, components),
            real,
            held_out,
        )

    def row(self, step: int, samples: Tensor) -> dict[str, float]:
        """Measure samples (N, 3, H, W), and the floor of each figure."""
        made = metrics.extract(samples, self.network, BATCH)
        names, kid = self.names, metrics.kid(self.real, made)
        return {
            "step": step,
            names.frechet: self.frechet(self.real, made),
            names.kid: float(kid),
            "kid_standard_error": kid.standard_error or 0.0,
            **self.floors(len(made)),
            "num_samples": len(made),
            "num_real": len(self.real),
        }

    def frechet(self, real: Tensor, made: Tensor) -> float:
        sides = (metrics.Statistics.of(self.project(x)) for x in (real, made))
        return float(metrics.frechet_distance(*sides))

    def floors(self, count: int) -> dict[str, float]:
        """Return the figures of `count` held-out images, and their deviations over SPLITS splits.

        The deviation is that of figures of samples from the data's own law, by permutation.
        """
        every = torch.cat([self.real, self.held_out])
        others = [metrics.halves(every, seed) for seed in range(1, SPLITS)]
        pairs = [(a, b[:count]) for a, b in ((self.real, self.held_out), *others)]
        frechet = [self.frechet(*pair) for pair in pairs]
        kid = [float(metrics.kid(*pair)) for pair in pairs]
        row: dict[str, float] = {}
        for name, values in ((self.names.frechet, frechet), (self.names.kid, kid)):
            row[f"{name}_floor"] = values[0]
            row[f"{name}_floor_deviation"] = statistics.stdev(values)
        return row

    def line(self, row: dict[str, float]) -> str:
        """Return a row as one line."""
        names = self.names
        parts = [
            f"{title} {row[name]:.4g} "
            f"(floor {row[f'{name}_floor']:.2g} ± {row[f'{name}_floor_deviation']:.1g})"
            for title, name in ((names.frechet_title, names.frechet), (names.kid_title, names.kid))
        ]
        sizes = f"N = {row['num_samples']:.0f} against {row['num_real']:.0f}"
        return f"step {row['step']:.0f}: {', '.join(parts)}, {sizes}"


def check(word: Word, images: int, count: int) -> int:
    """Return the number of real images to use, half of them to compare `count` samples with.

    Raises:
        ValueError: if there are too few of either.
    """
    least = 2048 if word == "inception" else COMPONENTS + 1
    usable = images if word == "inception" else min(images, MOST)
    for what, given in (("samples", count), ("images in each half of the data", usable // 2)):
        if given < least:
            raise ValueError(f"{NAMES[word].frechet_title} needs {least:,} {what}; got {given:,}")
    if count > usable // 2:
        raise ValueError(
            f"{count:,} samples are more than the {usable // 2:,} images of half the data, which "
            f"give the floor: measure fewer"
        )
    return usable


def network(word: Word, weights: Path | None) -> torch.nn.Module:
    """Return the network of a word; `weights` is the file of Inception's."""
    if word == "inception":
        return features.InceptionFeatures(weights)
    return features.EfficientNetFeatures()


def judge(word: Word, network: torch.nn.Module, images: data.Images, count: int) -> Judge:
    """Return the judge of `count` samples by these images, on the network's device."""
    device = next(network.parameters()).device
    kept = data.shuffled_indices(0, len(images), 0, check(word, len(images), count))
    real = data.dequantize(images.pixels[kept], torch.tensor(0.5)).to(device)
    return Judge.of(NAMES[word], network, real, None if word == "inception" else COMPONENTS)


def same(x: Tensor) -> Tensor:
    return x


def add(out: Path, judge: Judge, row: dict[str, float]) -> None:
    """Add a row to the table of `out`; it replaces rows of later steps, which will come again."""
    path = out / f"{judge.names.file}.csv"
    rows = [old for old in read(path, list(row)) if old["step"] < row["step"]] + [row]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    storage.replace(path, text.getvalue().encode())
    storage.replace(path.with_suffix(".png"), plots.png(picture(judge.names, rows)))


def read(path: Path, columns: list[str]) -> list[dict[str, float]]:
    """Return the rows of a table, which must have these columns; none if there is no table."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if table.fieldnames != columns:
            raise storage.BadFile(f"{path}: its columns are not {', '.join(columns)}")
        try:
            return [{name: json.loads(value) for name, value in row.items()} for row in table]
        except (TypeError, ValueError):
            raise storage.BadFile(f"{path}: holds what is not a number") from None


def picture(names: Names, rows: list[dict[str, float]]) -> Any:
    """Draw both figures against steps, with their floors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    steps, last = [row["step"] for row in rows], rows[-1]
    titles = {names.frechet: names.frechet_title, names.kid: names.kid_title}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        values = [row[name] for row in rows]
        errors = [row["kid_standard_error"] if name == names.kid else 0.0 for row in rows]
        axes.errorbar(steps, values, errors, marker="o", markersize=3, label="samples")
        floor, spread = last[f"{name}_floor"], last[f"{name}_floor_deviation"]
        label = f"real images: {floor:.2g} ± {spread:.1g}"
        axes.axhline(floor, color="0.5", linewidth=1, label=label)
        axes.axhspan(floor - 2 * spread, floor + 2 * spread, color="0.5", alpha=0.2, linewidth=0)
        axes.set(xlabel="optimizer step", ylim=(min(0.0, floor), None))
        axes.set_title(title.replace(" of ", "\nof ").replace(" on ", "\non "), fontsize="medium")
        axes.set_ylabel(title.split(" on ")[0])
        axes.legend(frameon=False)
    sizes = f"{last['num_samples']:.0f} samples against {last['num_real']:.0f} real images"
    figure.suptitle(sizes, fontsize="medium")
    return figure
