"""Training as an iterator: what happens between steps is the caller's `for` body.

Data order, dequantization, times and noise are functions of (seed, step, position in the global
batch) and of nothing else, so a run resumed from a checkpoint goes on as if it had never stopped,
and several processes or accumulated micro-batches draw the numbers that one process draws.
"""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sde_diffusion import errors, storage
from sde_diffusion.data import Data, order
from sde_diffusion.denoiser import Denoiser
from sde_diffusion.losses import L2, Penalty, Weight, denoising_loss
from sde_diffusion.noise import Purpose, stream
from sde_diffusion.times import TimeDistribution, UniformTimes, stratified

__all__ = ["EMA", "Batch", "Metrics", "Recipe", "TrainState", "draw", "newest_checkpoint", "train"]

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Recipe:
    """The numbers that decide a training run; data, network and the law of t come beside it."""

    steps: int = 10_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 500  # steps of linear growth; then a half cosine down to 0
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.9995  # largest decay of the averaged weights
    seed: int = 0
    dtype: str = "float32"  # or bf16: the network's arithmetic; weights stay float32

    def __post_init__(self) -> None:
        errors.integer("steps", self.steps)
        errors.integer("batch_size", self.batch_size)
        errors.integer("warmup", self.warmup, 0)
        errors.integer("seed", self.seed, 0)
        errors.number("learning_rate", self.learning_rate, 0, strict=True)
        errors.number("weight_decay", self.weight_decay, 0)
        if not self.clip > 0:  # inf clips nothing
            raise ValueError(f"clip must be positive; got {self.clip}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1); got {self.ema}")
        errors.choice("dtype", self.dtype, ("float32", "bf16"))

    def rate(self, step: int) -> float:
        """Learning rate of the step that starts after `step` steps."""
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class EMA:
    """Exponential moving average whose decay grows from 0: min(decay, (1 + n) / (10 + n))."""

    decay: float

    def __call__(self, averaged: Any, current: Any, updates: Tensor | int) -> None:
        n = int(updates)
        rate = 1 - min(self.decay, (1 + n) / (10 + n))
        for mean, value in zip(averaged, current, strict=True):
            mean.lerp_(value, rate)


class Batch(NamedTuple):
    """One step's worth of data and noise: all of its randomness."""

    x0: Tensor
    t: Tensor
    eps: Tensor
    cond: Tensor | None


class Metrics(NamedTuple):
    """What one step reports."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float


def draw(
    data: Data, recipe: Recipe, times: TimeDistribution, step: int, positions: range | None = None
) -> Batch:
    """The part `positions` of the global batch of `step`, a function of its arguments alone.

    Each position owns the same number of random words of the step's stream, so any run of
    positions is one draw that starts in the right place; eps is the normal quantile of its word.
    """
    everything = range(recipe.batch_size)
    positions = everything if positions is None else positions
    if positions != everything[positions.start : positions.stop] or not positions:
        raise ValueError(f"positions must be a stretch of {everything}; got {positions}")
    start = step * recipe.batch_size
    index = order(recipe.seed, len(data), start + positions.start, len(positions))
    size = math.prod(data.shape)
    blocks = math.ceil(2 * size / 4)  # words for eps and for dequantization
    numbers = stream(recipe.seed, Purpose.BATCH, step, block=positions.start * blocks)
    words = torch.from_numpy(numbers.random((len(positions), 4 * blocks)))
    shape = (len(positions), *data.shape)
    eps = torch.special.ndtri(words[:, :size].clamp(2**-54, 1 - 2**-53)).float().reshape(shape)
    uniform = words[:, size : 2 * size].reshape(shape)
    places = torch.arange(positions.start, positions.stop)
    offset = stream(recipe.seed, Purpose.TIMES, step).random()
    t = times(stratified(offset, places, recipe.batch_size))
    x0, cond = data.batch(index, uniform)
    return Batch(x0, t, eps, cond)


class TrainState:
    """The denoiser in training, its average, its optimizer and the number of steps done.

    Args:
        denoiser: trained in place; on the device where training is to happen.
        recipe: the settings of the run.
        times: the law of t; uniform by default.
        weight, penalty: of the loss, see `losses.denoising_loss`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        recipe: Recipe,
        times: TimeDistribution | None = None,
        weight: Weight | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        self.denoiser, self.recipe, self.step = denoiser, recipe, 0
        self.times, self.weight, self.penalty = times or UniformTimes(), weight, penalty or L2()
        if next(denoiser.network.parameters()).is_cuda:
            # CPUs do not gain: a step of the packaged U-Net took 1.2 to 1.7 times as long there.
            denoiser.network.to(memory_format=torch.channels_last)
        self.ema = AveragedModel(denoiser.network, multi_avg_fn=EMA(recipe.ema))
        parameters = list(denoiser.network.parameters())
        self.optimizer = torch.optim.AdamW(
            parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )

    @property
    def settings(self) -> dict[str, object]:
        """What a resumed run must have in common with the one that it goes on from."""
        laws = {name: repr(getattr(self, name)) for name in ("times", "weight", "penalty")}
        return {**asdict(self.recipe), **laws}

    @property
    def averaged(self) -> Denoiser:
        """The denoiser with the averaged weights: the one to sample from."""
        network = self.ema.module
        made = Denoiser(
            network, self.denoiser.process, self.denoiser.parameterization, self.denoiser.condition
        )
        return made.eval()

    def advance(self, batch: Batch) -> Metrics:
        """One optimizer step on one global batch.

        Raises:
            FloatingPointError: if the loss is not finite; the weights are unchanged.
        """
        network, recipe = self.denoiser.network.train(), self.recipe
        parameter = next(network.parameters())
        device = parameter.device
        x0, eps = batch.x0.to(device, parameter.dtype), batch.eps.to(device, parameter.dtype)
        cond = None if batch.cond is None else batch.cond.to(device)
        bf16 = torch.autocast(device.type, torch.bfloat16)
        with bf16 if recipe.dtype == "bf16" else nullcontext():
            losses = denoising_loss(
                self.denoiser, x0, batch.t, eps,
                cond=cond, weight=self.weight, penalty=self.penalty,
            )  # fmt: skip
            loss = losses.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        value, size = float(loss.detach()), float(norm)
        if not math.isfinite(value) or not math.isfinite(size):
            raise FloatingPointError(
                f"loss {value} with gradient norm {size} at step {self.step}; weights unchanged"
            )
        rate = recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.ema.update_parameters(network)
        self.step += 1
        return Metrics(self.step, value, size, rate)

    def save(self, folder: Path, **record: object) -> Path:
        """Write a checkpoint under `folder`, whole or not at all; keep it and the one before.

        A checkpoint is a folder: denoiser.safetensors, the averaged denoiser that
        `Denoiser.load` reads, and training.safetensors, what it takes to go on.
        """
        target = folder / f"{PREFIX}{self.step:08d}"
        scratch = folder / f".{target.name}.part"
        shutil.rmtree(scratch, ignore_errors=True)
        self.averaged.save(scratch / "denoiser.safetensors", step=self.step, **record)
        tensors = {f"network.{k}": v for k, v in self.denoiser.network.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{slot}": value for slot, value in slots.items()}
        progress = {"step": self.step, "settings": self.settings}
        storage.write(scratch / "training.safetensors", tensors, progress)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch, target)
        sync_folder(folder)
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(old)
        return target

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            storage.BadFile: if it is damaged, or was made with another recipe or network.
        """
        path = checkpoint / "training.safetensors"
        tensors, record = storage.read(path)
        ours, theirs = self.settings, record.get("settings", {})
        changed = [f"{k} {theirs.get(k)} -> {v}" for k, v in ours.items() if theirs.get(k) != v]
        if changed:
            raise storage.BadFile(f"{path}: the run was started otherwise: {', '.join(changed)}")
        step = record.get("step")
        if not isinstance(step, int):
            raise storage.BadFile(f"{path.with_suffix('.json')}: says nothing of the step")
        network = {k[8:]: v for k, v in tensors.items() if k.startswith("network.")}
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, slot = name.split(".")
                slots.setdefault(int(number), {})[slot] = value
        Denoiser.load(
            checkpoint / "denoiser.safetensors",
            self.averaged.network,
            process=self.denoiser.process,
            parameterization=self.denoiser.parameterization,
            condition=self.denoiser.condition,
        )
        try:
            self.denoiser.network.load_state_dict(network)
        except RuntimeError as error:
            raise storage.BadFile(f"{path}: {' '.join(str(error).split())}") from None
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.step = step
        self.ema.n_averaged.fill_(self.step)


def train(state: TrainState, data: Data) -> Iterator[Metrics]:
    """Steps from where `state` stands to the end of its recipe, one Metrics each.

    Args:
        state: advanced in place; save it whenever it pleases.
        data: what to learn.
    """
    while state.step < state.recipe.steps:
        yield state.advance(draw(data, state.recipe, state.times, state.step))


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under `folder`, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir()]
    steps = {path: path.name.removeprefix(PREFIX) for path in found}
    return sorted((p for p in found if steps[p].isdecimal()), key=lambda path: int(steps[path]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint under `folder`, or None."""
    return checkpoints(folder)[-1] if checkpoints(folder) else None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
