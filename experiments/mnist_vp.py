"""Digits from the VP process: sample with the packaged weights, or train with --train."""

import csv
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import sde_diffusion as sd
from sde_diffusion import data, training


@dataclass(frozen=True)
class Config:
    """Flags of the experiment."""

    train: bool = False
    """train on MNIST instead of sampling"""
    resume: bool = False
    """with --train: go on from the newest checkpoint in --out"""
    overwrite: bool = False
    """with --train: replace the run in --out"""
    train_steps: int = 20_000
    """with --train: optimizer steps"""
    batch_size: int = 128
    learning_rate: float = 2e-3
    checkpoint_every: int = 500
    """with --train: steps between checkpoints"""
    data_root: Path | None = None
    seed: int = 0
    dtype: str = "float32"
    out: Path = Path("runs/mnist_vp")


def train(config: Config) -> None:
    """Train, writing checkpoints, metrics.csv and the averaged weights under --out."""
    digits = data.mnist(config.data_root)
    torch.manual_seed(config.seed)
    network = sd.networks.UNet(channels=(32, 64), blocks=2)
    denoiser = sd.Denoiser(network, sd.VP(), sd.V())
    recipe = training.Recipe(
        steps=config.train_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        dtype=config.dtype,
    )
    record = {"command": " ".join(["python", *sys.argv]), "commit": commit(), **asdict(recipe)}
    state = training.TrainState(denoiser, recipe)
    config.out.mkdir(parents=True, exist_ok=True)
    newest = training.newest_checkpoint(config.out)
    if config.resume and newest:
        state.restore(newest)
    times = sd.NormalLogSNR(denoiser.process, mean=0.0, std=2.8)
    bar = tqdm(training.train(state, digits, times), total=recipe.steps, initial=state.step)
    with open(config.out / "metrics.csv", "a", newline="") as file:
        rows = csv.writer(file)
        for metrics in bar:
            rows.writerow(metrics)
            bar.set_postfix(loss=f"{metrics.loss:.3f}")
            if metrics.step % config.checkpoint_every == 0 or metrics.step == recipe.steps:
                file.flush()
                state.save(config.out, **record)
    state.averaged.save(config.out / "mnist_vp.safetensors", **record)


def commit() -> str:
    """The commit of the working tree, or `unknown`."""
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    import tyro

    train(tyro.cli(Config))
