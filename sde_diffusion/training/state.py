"""One optimizer step, and the state that it moves."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sde_diffusion import validate
from sde_diffusion.data.datasets import Data
from sde_diffusion.losses.denoising import L2, Penalty, denoising_loss
from sde_diffusion.losses.times import TimeDistribution, UniformTimes
from sde_diffusion.losses.weights import Weight
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.networks import Dropout
from sde_diffusion.noise.sources import Purpose
from sde_diffusion.training.batches import Batch, draw, mask, stretches, words
from sde_diffusion.training.engine import Alone, Engine, full
from sde_diffusion.training.recipe import Recipe

__all__ = ["Metrics", "TrainState", "train"]

FOREIGN = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Metrics(NamedTuple):
    """What one step reports.

    Attributes:
        step: steps done.
        loss: mean over the global batch.
        gradient_norm: before clipping.
        learning_rate: of this step; 0 where it was skipped.
        skipped: steps so far that were skipped.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    skipped: int = 0


class TrainState:
    """The denoiser in training, its average, its optimizer and the number of steps done.

    Args:
        denoiser: trained in place; on the device where training is to happen.
        recipe: the settings of the run.
        times: the law of t; uniform by default.
        weight, penalty: of the loss, see `losses.denoising_loss`.
        engine: this process alone by default; `engine.launched()` for as many as were launched.
        bad: what happens at a loss or gradient that is not finite: "raise" a FloatingPointError,
            or "skip" the step and count it.
        facts: what else a resumed run must have in common with this one, such as
            {"data": data.fingerprint(images)}.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        recipe: Recipe,
        times: TimeDistribution | None = None,
        weight: Weight | None = None,
        penalty: Penalty | None = None,
        engine: Engine | None = None,
        bad: Literal["raise", "skip"] = "raise",
        facts: Mapping[str, object] | None = None,
    ) -> None:
        validate.kind("denoiser", denoiser, "a Denoiser", "network", "parameterization")
        validate.kind("recipe", recipe, "a Recipe", "settings", "rate")
        for name, law in (("times", times), ("weight", weight), ("penalty", penalty)):
            if law is not None:
                validate.kind(name, law, "a callable, see losses and times", "__call__")
        if engine is not None:
            validate.kind("engine", engine, "an Engine such as launched()", "prepare", "reduce")
        validate.choice("bad", bad, ("raise", "skip"))
        if next(denoiser.network.parameters(), None) is None:
            raise ValueError("denoiser has a network without parameters: nothing to train")
        device = next(denoiser.network.parameters()).device
        self.denoiser, self.recipe, self.engine = denoiser, recipe, engine or Alone(device)
        self.times, self.weight, self.penalty = times or UniformTimes(), weight, penalty or L2()
        self.bad, self.step, self.skipped, self.facts = bad, 0, 0, dict(facts or {})
        network = denoiser.network.to(self.engine.device)
        gains = self.engine.device.type != "cpu" or recipe.dtype == "float32"
        if gains and not getattr(self.engine, "is_fsdp2", False):  # FSDP shards contiguous weights
            # A CPU's step of the packaged U-Net takes 0.92 to 0.95 of the time; 1.8 times in bf16.
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        parts = list(network.modules())
        self._masked = [part for part in parts if isinstance(part, Dropout) and part.p]
        self._foreign = any(isinstance(part, FOREIGN) for part in parts)
        shadow = copy.deepcopy(network).requires_grad_(False)
        optimizer = torch.optim.AdamW(
            network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.network = network  # wrapped or sharded, its parameters stay this module's
        self._wrapped, self.optimizer = self.engine.prepare(network, optimizer)
        self._trained = Denoiser(
            self._wrapped, denoiser.process, denoiser.parameterization, denoiser.noise_input
        )
        # Of weights that are sharded, each process averages its own shards.
        self.shadow, self._sharded = shadow, any(hasattr(p, "full_tensor") for p in self.weights)
        held = self.weights if self._sharded else shadow.parameters()
        self.average = [p.detach().clone() if self._sharded else p.data for p in held]

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters of the network in training."""
        return list(self.network.parameters())

    @property
    def settings(self) -> dict[str, object]:
        """What a resumed run must have in common with the one that it goes on from."""
        laws = {name: named(getattr(self, name)) for name in ("times", "weight", "penalty")}
        return {**self.facts, **self.recipe.settings, **laws}

    @property
    def averaged(self) -> Denoiser:
        """The denoiser with the averaged weights, in eval mode: the one to sample from.

        Where weights are sharded this is a call of all processes.
        """
        if self._sharded:
            for whole, shard in zip(self.shadow.parameters(), self.average, strict=True):
                whole.copy_(full(shard))
        ours = self.denoiser
        return Denoiser(self.shadow, ours.process, ours.parameterization, ours.noise_input).eval()

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each sample, (B,), with the masks of this step."""
        recipe, device = self.recipe, self.engine.device
        dtype = next(self.network.parameters()).dtype
        mask(self._masked, recipe, self.step, batch, device)
        bf16 = torch.autocast(device.type, torch.bfloat16)
        with (
            bf16 if recipe.dtype == "bf16" else nullcontext(),
            torch.random.fork_rng(enabled=self._foreign),
        ):
            if self._foreign:
                # Dropout of torch's own draws from the global generator: numbers of this address.
                address = words(recipe.seed, Purpose.FOREIGN, self.step, 1)[0] + batch.first
                torch.manual_seed(address % 2**63)
            return denoising_loss(
                self._trained,
                batch.x0.to(device, dtype),
                batch.t,
                batch.eps.to(device, dtype),
                cond=None if batch.cond is None else batch.cond.to(device),
                weight=self.weight,
                penalty=self.penalty,
            )

    def advance(self, *parts: Batch) -> Metrics:
        """One optimizer step on one global batch.

        Args:
            parts: the batch, in one or more pieces whose gradients are added up; where there are
                several processes, this one's share of `recipe.batch_size` positions.
        Raises:
            FloatingPointError: if the loss or its gradient is not finite and bad="raise"; weights,
                average and optimizer are unchanged.
        """
        engine, recipe = self.engine, self.recipe
        if not parts:
            raise ValueError("advance needs at least one part of a batch")
        for part in parts:
            validate.kind("each part", part, "a Batch such as draw() makes", "x0", "eps", "t")
        mine = sum(len(part.x0) for part in parts)
        total = mine if engine.num_processes == 1 else recipe.batch_size
        if not self.network.training:
            self.network.train()
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        each: list[Tensor] = []
        for k, part in enumerate(parts, 1):
            with nullcontext() if k == len(parts) else engine.no_sync(self._wrapped):
                losses = self.losses(part)
                # DDP and FSDP take the mean over the processes.
                (losses.sum() * (engine.num_processes / total)).backward()
            each.append(losses.detach())
        norm = engine.clip_grad_norm_(self._wrapped.parameters(), recipe.clip)
        loss = engine.reduce(sum(losses.double().sum() for losses in each) / total, "sum")
        value, size = float(loss), float(full(norm))
        if not (math.isfinite(value) and math.isfinite(size)):
            for buffer, before in buffers:
                buffer.copy_(before)
            self.optimizer.zero_grad(set_to_none=True)
            if self.bad == "raise":
                raise FloatingPointError(
                    f"loss {value} with gradient norm {size} at step {self.step}"
                    f"{blame(parts, each)}; weights unchanged"
                )
            self.step, self.skipped = self.step + 1, self.skipped + 1
            return Metrics(self.step, value, size, 0.0, self.skipped)
        rate = recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._follow()
        self.step += 1
        return Metrics(self.step, value, size, rate, self.skipped)

    @torch.no_grad()
    def _follow(self) -> None:
        """mean += (1 - decay) (weights - mean); buffers are copied."""
        decay = self.recipe.ema.decay_at(self.step - self.skipped)
        get_ema_multi_avg_fn(decay)(self.average, [p.detach() for p in self.weights], 0)
        for mean, value in zip(self.shadow.buffers(), self.network.buffers(), strict=True):
            mean.copy_(value)


def named(law: object) -> str:
    """The same in every process: a function by its name, all else as it prints itself."""
    name = getattr(law, "__qualname__", None)
    return repr(law) if name is None else f"{getattr(law, '__module__', '?')}.{name}"


def blame(parts: tuple[Batch, ...], each: list[Tensor]) -> str:
    """Which of this process's samples are not finite, or whose loss is not."""
    for part, losses in zip(parts, each, strict=True):
        fields = {"x0": part.x0, "cond": part.cond, "eps": part.eps, "t": part.t, "loss": losses}
        for name, value in fields.items():
            if value is None:
                continue
            finite = value.isfinite().reshape(len(value), -1).all(1)
            if not bool(finite.all()):
                rows = (~finite).nonzero().flatten().add(part.first).tolist()
                more = ", ..." if len(rows) > 5 else ""
                return f": {name} of position {', '.join(map(str, rows[:5]))}{more}"
    return ""


def train(state: TrainState, data: Data, parts: int = 1) -> Iterator[Metrics]:
    """Steps from where `state` stands to the end of its recipe, one Metrics each.

    Args:
        state: advanced in place; save it whenever it pleases.
        data: what to learn.
        parts: into how many pieces each process cuts its share of a batch, to add up gradients.
    """
    validate.kind("state", state, "a TrainState", "advance", "recipe")
    validate.kind("data", data, "a data set such as Images or Points", "batch", "shape", "__len__")
    validate.integer("parts", parts)
    engine, recipe = state.engine, state.recipe
    mine = list(stretches(recipe, engine.num_processes, engine.process_index, parts))
    while state.step < recipe.steps:
        yield state.advance(
            *(draw(data, recipe, state.times, state.step, part, engine.device) for part in mine)
        )
