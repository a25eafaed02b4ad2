"""The digit classifier whose features compare MNIST samples, and the statistics of MNIST in them.

    python experiments/mnist_features.py --data-root DIR

Writes mnist.safetensors with its JSON: the weights, mean and covariance of the features of the
60,000 training and the 10,000 test digits, and the features of 2,000 of these. A copy comes with
the package and is read by `features.MnistFeatures()`. About five minutes on one core.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common import flags


@dataclass(frozen=True)
class Config:
    """Train and write the classifier."""

    epochs: int = 12
    """passes over the 60,000 digits"""
    batch_size: int = 128
    """digits per step"""
    learning_rate: float = 4e-3
    """largest learning rate"""
    seed: int = 0
    """seed of the first weights and the order of the digits"""
    device: flags.Device = "auto"
    """where the classifier is trained"""
    data_root: Annotated[Path | None, flags.default("$SDE_DIFFUSION_DATA, or data")] = None
    """folder that holds MNIST/raw"""
    out: Path = Path("runs/mnist_features")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import math

import torch
from common import command
from torch import Tensor, nn

from sde_diffusion import data, metrics, progress, validate
from sde_diffusion.files import storage
from sde_diffusion.metrics import features
from sde_diffusion.noise.sources import Purpose, stream

EXAMPLES = 2000  # test digits whose features are kept, in 16 bits
SHIFT = 2  # pixels that a digit is moved by at most while it is trained on


def shifted(x: Tensor, by: Tensor) -> Tensor:
    """Move digits (B, 1, 28, 28) by `by` (B, 2) pixels; new pixels are black."""
    index = torch.arange(28) + SHIFT
    rows, columns = (index + by[:, k, None] for k in range(2))
    padded = nn.functional.pad(x, [SHIFT] * 4, value=-1.0)[:, 0]
    which = torch.arange(len(x))[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]][:, None]


def rate(config: Config, step: int, steps: int) -> float:
    """Return a line up over a tenth of the steps, then half a cosine down to 0."""
    warm, done = steps / 10, step + 1
    if done < warm:
        return config.learning_rate * done / warm
    return config.learning_rate * (1 + math.cos(math.pi * (done - warm) / (steps - warm))) / 2


def train(config: Config, digits: data.Images, device: torch.device) -> features.DigitClassifier:
    """Return the classifier, on the CPU."""
    torch.manual_seed(config.seed)  # the network's first weights
    network = features.DigitClassifier().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = config.epochs * -(-len(digits) // config.batch_size)
    for step in progress.bar(range(steps)):
        start = step * config.batch_size
        index = data.shuffled_indices(config.seed, len(digits), start, config.batch_size)
        numbers = stream(config.seed, Purpose.BATCH, step)
        by = torch.from_numpy(numbers.integers(-SHIFT, SHIFT + 1, (len(index), 2)))
        x = data.dequantize(digits.pixels[index], torch.tensor(0.5))
        labels = digits.labels[index].to(device)
        loss = nn.functional.cross_entropy(network.logits(shifted(x, by).to(device)), labels)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(config, step, steps)
        optimizer.step()
    return network.cpu().eval().requires_grad_(False)


def images(digits: data.Images) -> Tensor:
    """Return all digits in [-1, 1], each pixel in the middle of its interval."""
    return data.dequantize(digits.pixels, torch.tensor(0.5))


def standardize(network: features.DigitClassifier, x: Tensor) -> None:
    """Give every feature mean 0 and variance 1 over the digits x."""
    found = metrics.extract(x, network).double()
    network.center.copy_(found.mean(0))
    network.scale.copy_(found.std(0))


def main(config: Config) -> None:
    validate.integer("--epochs", config.epochs, at_most=1000)
    validate.integer("--batch-size", config.batch_size, at_least=2, at_most=60_000)
    validate.integer("--seed", config.seed, at_least=0, at_most=2**63 - 1)
    validate.number("--learning-rate", config.learning_rate, 0, 1, strict=True)
    command.check_out(config.out)
    device = command.device(config.device)
    sets = {part: data.mnist(config.data_root, train=part == "train") for part in ("train", "test")}
    print(f"{config.epochs} epochs on {device} -> {config.out}", flush=True)
    network = train(config, sets["train"], device)
    standardize(network, images(sets["train"]))
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    facts: dict[str, dict[str, object]] = {}
    for part, digits in sets.items():
        x = images(digits)
        found = metrics.statistics(x, network)
        tensors |= {f"{part}.mean": found.mean, f"{part}.covariance": found.covariance}
        guessed = metrics.extract(x, network.logits).argmax(1)
        facts[part] = {
            "count": len(digits),
            "classes": torch.bincount(digits.labels, minlength=10).tolist(),
            "accuracy": float((guessed == digits.labels).double().mean()),
        }
        if part == "test":
            chosen = data.shuffled_indices(config.seed, len(digits), 0, EXAMPLES)
            tensors["test.examples"] = metrics.extract(x[chosen], network).half()
        print(f"{part}: {facts[part]['accuracy']:.2%} of {len(digits)} digits")
    out = command.folder(config.out)
    record = {"command": command.command(), "commit": command.commit(), **facts}
    storage.write(out / "mnist.safetensors", tensors, record)
    print(f"-> {out / 'mnist.safetensors'}")


if __name__ == "__main__":
    command.run(main, Config)
