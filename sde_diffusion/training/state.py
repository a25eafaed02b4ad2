"""One optimizer step, and the state that it changes."""

import copy
import dis
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from types import CellType
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sde_diffusion import validate
from sde_diffusion.data.datasets import Data, named_tensors
from sde_diffusion.data.rules import warn_of_size
from sde_diffusion.files import storage
from sde_diffusion.losses import L2, Penalty, TimeDistribution, UniformTimes, Weight, denoising_loss
from sde_diffusion.losses.times import support_of
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.networks import Dropout
from sde_diffusion.noise.sources import Purpose
from sde_diffusion.processes.level import double
from sde_diffusion.training.batches import Batch, draw, mask, stretches, to_device, words
from sde_diffusion.training.engine import Alone, Engine, full
from sde_diffusion.training.optimizers import MakeOptimizer, adamw, hyperparameters, rehearsed
from sde_diffusion.training.recipe import Recipe

__all__ = ["Metrics", "TrainState", "train"]

LAW = validate.Kind("a callable, see losses and times", "__call__")
ENGINE = validate.Kind("an Engine such as launched()", "prepare", "reduce")
DATA = validate.Kind("a data set such as Images or Points", "batch", "shape", "__len__")
FOREIGN = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Metrics(NamedTuple):
    """Report of one step.

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
    """A denoiser in training: parameters, their average, the optimizer, the number of steps done.

    Its tensors have one flat list of names: `tensors` has those of the denoiser (`network.*`, and
    those of its process and null where they have any) and `average.*`; the optimizer's own state
    has the names `optimizer.<index>.<slot>`.

    The average is kept in float32 at least: a step of (1 - decay) would round to 0 in bfloat16. For
    a parameter in bfloat16 it takes 4 bytes, and the averaged denoiser 2 more.

    Args:
        denoiser: trained in place; on the device where training is to happen. Parameters that do
            not require gradients stay as they are. Its `trained` becomes the range of the law of t,
            unless it has one, or its process is learned and may leave this range.
        recipe: the settings of the run.
        times: the law of t; uniform by default.
        weight, penalty: of the loss, see `losses.denoising_loss`.
        engine: this process alone by default; `engine.launched()` for as many as were launched.
        bad: at a loss or gradient that is not finite, "raise" a FloatingPointError, or "skip" the
            step and count it.
        facts: further settings that a resumed run must share, such as
            {"data": data.fingerprint(images)}.
        optimizer: function of the list of trained parameters that returns a torch optimizer, such
            as torch.optim.Adafactor; AdamW with the recipe's rate and weight decay by default. The
            recipe's schedule multiplies the initial rate of each of its groups.

    Attributes:
        changes: settings changed on purpose in a resumed run: the step, and the old and the new
            value of each, see `resume`.
    """

    @validate.arguments
    def __init__(
        self,
        denoiser: Annotated[Denoiser, validate.Kind("a Denoiser", "network", "parameterization")],
        recipe: Annotated[Recipe, validate.Kind("a Recipe", "settings", "factor")],
        times: Annotated[TimeDistribution, LAW] | None = None,
        weight: Annotated[Weight, LAW] | None = None,
        penalty: Annotated[Penalty, LAW] | None = None,
        engine: Annotated[Engine, ENGINE] | None = None,
        bad: Literal["raise", "skip"] = "raise",
        facts: Mapping[str, object] | None = None,
        optimizer: MakeOptimizer | None = None,
    ) -> None:
        check_tensors(denoiser)
        laws = {"times": times, "weight": weight, "penalty": penalty}
        check_learned(denoiser, laws)
        network = denoiser.network
        self.denoiser, self.recipe = denoiser, recipe
        self.engine = engine or Alone(next(denoiser.parameters()).device)
        self.times, self.weight, self.penalty = times or UniformTimes(), weight, penalty or L2()
        self.bad, self.step, self.skipped, self.facts = bad, 0, 0, dict(facts or {})
        self.changes: list[dict[str, Any]] = []
        self._begun = False
        if denoiser.trained is None and not learned(denoiser.process):
            denoiser.trained = support_of(self.times, denoiser.process)
        denoiser.to(self.engine.device)
        gains = self.engine.device.type != "cpu" or recipe.dtype == "float32"
        if gains and not getattr(self.engine, "is_fsdp2", False):  # FSDP shards contiguous weights
            # A CPU's step of the packaged U-Net takes 0.92 to 0.95 of the time; 1.8 times in bf16.
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._masked = [m for m in network.modules() if isinstance(m, Dropout) and m.p]
        self._foreign = any(isinstance(m, FOREIGN) for m in network.modules())
        trained = [p for p in denoiser.parameters() if p.requires_grad and p.numel()]
        made, self.first_slots, self.slots = rehearsed(optimizer or adamw(recipe), trained)
        self._optimized = hyperparameters(made)
        self._rates = [float(group["lr"]) for group in made.param_groups]
        self.shadow = copied(denoiser).requires_grad_(False)
        # Wrapped or sharded, the parameters of the network stay those of denoiser.network.
        self._wrapped, self.optimizer = self.engine.prepare(network, made)
        self._trained = around(denoiser, self._wrapped)
        parameters = dict(denoiser.named_parameters())
        self._outside = [p for name, p in parameters.items() if not name.startswith("network.")]
        if self._outside and any(hasattr(p, "full_tensor") for p in parameters.values()):
            raise ValueError("engine must not shard a denoiser with parameters outside its network")
        self.average: dict[str, Tensor] = {}
        self._copied = list(zip(self.shadow.buffers(), denoiser.buffers(), strict=True))
        for (name, ours), whole in zip(parameters.items(), self.shadow.parameters(), strict=True):
            dtype = torch.promote_types(ours.dtype, torch.float32)
            if not ours.is_floating_point():
                self._copied.append((whole, ours))
            else:
                apart = dtype != ours.dtype or hasattr(ours, "full_tensor")  # each has its shards
                self.average[name] = ours.detach().to(dtype, copy=True) if apart else whole.data
        if (count := len(self.tensors) + len(self.slots)) > storage.TENSORS:
            rule = f"at most {storage.TENSORS:,} tensors in a checkpoint"
            raise ValueError(f"denoiser must need {rule}; got {count:,}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the denoiser, and the averages, by name; not copied.

        Buffers that are not persistent are here, too: they may change in training.
        """
        averages = {f"average.{name}": value for name, value in self.average.items()}
        return {**self.buffers, **self.denoiser.state_dict(), **averages}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the denoiser by name; inf is a value in them, as in a mask of attention."""
        return kept_buffers(self.denoiser)

    @property
    def settings(self) -> dict[str, object]:
        """Settings that a resumed run must share with the one that it continues."""
        laws = {name: named(getattr(self, name)) for name in ("times", "weight", "penalty")}
        return {**self.facts, **self.recipe.settings, **laws, "optimizer": self._optimized}

    @property
    def averaged(self) -> Denoiser:
        """The denoiser with the averaged weights, in eval mode: the one to sample from.

        It is one object, which later steps change; copy it to keep it.
        Where weights are sharded this is a call of all processes.
        """
        parameters = dict(self.shadow.named_parameters())
        for name, mean in self.average.items():
            parameters[name].copy_(full(mean))
        return self.shadow.eval()

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each sample, (B,), with the masks of this step."""
        recipe, device = self.recipe, self.engine.device
        weights = self.denoiser.network.parameters()
        dtype = next((p.dtype for p in weights if p.is_floating_point()), batch.x0.dtype)
        mask(self._masked, recipe, self.step, batch, device)
        x0, eps = (value.to(device, dtype) for value in (batch.x0, batch.eps))
        given = batch.cond, batch.keep, batch.mask
        cond, keep, known = (to_device(value, device) for value in given)
        bf16 = recipe.dtype == "bf16"
        half = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        with half, torch.random.fork_rng(enabled=self._foreign):
            if self._foreign:
                # Dropout of torch's own draws from the global generator: numbers of this address.
                address = words(recipe.seed, Purpose.FOREIGN, self.step, 1)[0] + batch.first
                torch.manual_seed(address % 2**63)
            return denoising_loss(self._trained, x0, batch.t, eps, cond=cond, keep=keep, mask=known,
                                  weight=self.weight, penalty=self.penalty)  # fmt: skip

    def advance(self, *parts: Batch) -> Metrics:
        """One optimizer step on one global batch.

        Args:
            parts: the batch, in one or more pieces whose gradients are added up; where there are
                several processes, this one's share of `recipe.batch_size` positions.
        Raises:
            FloatingPointError: if the loss or its gradient is not finite and bad="raise"; weights,
                average and optimizer are unchanged.
            ValueError: after the last step of the recipe.
        """
        engine, recipe = self.engine, self.recipe
        factor = recipe.factor(self.step)
        if not parts:
            raise ValueError("parts must hold at least one part of a batch; got none")
        for part in parts:
            validate.kind("each part", part, "a Batch such as draw() makes", "x0", "eps", "t")
        if not self._begun:
            warn_of_size("x0 of the first batch", parts[0].x0)
            self._begun = True
        mine = sum(len(part.x0) for part in parts)
        total = mine if engine.num_processes == 1 else recipe.batch_size
        if not self.denoiser.network.training:
            self.denoiser.train()
        buffers = [(buffer, buffer.clone()) for buffer in self.denoiser.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        each: list[Tensor] = []
        for k, part in enumerate(parts, 1):
            with nullcontext() if k == len(parts) else engine.no_sync(self._wrapped):
                losses = self.losses(part)
                # DDP and FSDP take the mean over the processes.
                (losses.sum() * (engine.num_processes / total)).backward()
            each.append(losses.detach())
        self._share_gradients()
        norm = engine.clip_grad_norm_(self.denoiser.parameters(), recipe.clip)
        loss = engine.reduce(sum(double(losses).sum() for losses in each) / total, "sum")
        value, size = float(loss), float(full(norm))
        if not (math.isfinite(value) and math.isfinite(size)):
            for buffer, before in buffers:
                buffer.copy_(before)
            self.optimizer.zero_grad(set_to_none=True)
            if self.bad == "raise":
                found = f"{value} with gradient norm {size} at step {self.step}"
                raise FloatingPointError(f"loss {found}{blame(parts, each)}; weights unchanged")
            self.step, self.skipped = self.step + 1, self.skipped + 1
            return Metrics(self.step, value, size, 0.0, self.skipped)
        rates = [rate * factor for rate in self._rates]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.step()
        self._follow()
        self.step += 1
        return Metrics(self.step, value, size, rates[0], self.skipped)

    def _share_gradients(self) -> None:
        """Take the mean over the processes of gradients outside the network, which DDP leaves."""
        for p in self._outside if self.engine.num_processes > 1 else ():
            used = torch.tensor(float(p.grad is not None), device=p.device)
            mine = torch.zeros_like(p) if p.grad is None else p.grad
            mean = self.engine.reduce(mine, "mean")
            p.grad = mean if float(self.engine.reduce(used, "sum")) else None

    @torch.no_grad()
    def _follow(self) -> None:
        """mean += (1 - decay) (weights - mean); buffers are copied."""
        decay = self.recipe.ema.decay_at(self.step - self.skipped)
        parameters = dict(self.denoiser.named_parameters())
        means = list(self.average.values())
        values = [parameters[name].detach().to(mean.dtype) for name, mean in self.average.items()]
        get_ema_multi_avg_fn(decay)(means, values, 0)
        self.copy_buffers()

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Give the averaged denoiser the values that are not averaged: buffers, and integers."""
        for theirs, ours in self._copied:
            theirs.copy_(ours)


def kept_buffers(denoiser: Denoiser) -> dict[str, Tensor]:
    """The buffers of a denoiser, without complex ones that are not persistent: tables of RoPE."""
    saved, every = denoiser.state_dict(), denoiser.named_buffers(remove_duplicate=False)
    return {name: value for name, value in every if name in saved or not value.is_complex()}


def check_tensors(denoiser: Denoiser) -> None:
    """Refuse a denoiser without a trained parameter, or with values that cannot be saved."""
    buffers = kept_buffers(denoiser)
    parameters = dict(denoiser.named_parameters(remove_duplicate=False))
    saved = denoiser.state_dict()
    for name, value in {**buffers, **parameters, **saved}.items():
        if reason := unsuitable(value):
            rule = "initialized tensors of real numbers, each with memory of its own"
            raise ValueError(f"denoiser must hold {rule}; got {name}{reason}")
        if not storage.allowed(f"average.{name}"):
            raise ValueError(f"denoiser must have short, printable names; got {name!r:.80}")
    if other := {*parameters} - {*saved} | {*saved} - {*parameters} - {*buffers}:
        rule = "a state_dict of its parameters and persistent buffers"
        raise ValueError(f"denoiser must have {rule}; got a difference: {min(other)}")
    if not any(p.requires_grad and p.numel() for p in denoiser.parameters()):
        raise ValueError("denoiser must have a parameter that requires a gradient; got none")
    sparse = [name for name, m in denoiser.named_modules() if getattr(m, "sparse", False) is True]
    if sparse:
        raise ValueError(f"denoiser must have dense gradients; got sparse=True in {sparse[0]}")
    try:
        storage.check_numbers({**buffers, **saved}, infinite=buffers)
    except ValueError as error:
        raise ValueError(f"denoiser must be finite, but for inf in buffers; {error}") from None


def unsuitable(value: Any) -> str:
    """The reason why a value cannot be saved, or be written to by a resumed run; "" if it can."""
    if not isinstance(value, Tensor):
        return f" of {type(value).__name__}"
    if value.dtype not in storage.DTYPES.values() or nn.parameter.is_lazy(value):
        return f" of {value.dtype}"
    if value.layout != torch.strided:
        return f", {value.layout}"
    shared = any(step == 0 and n > 1 for step, n in zip(value.stride(), value.shape, strict=True))
    faults = {
        "without values": value.is_meta,
        "of inference mode": value.is_inference(),
        "an expanded tensor": shared and value.numel() > 0,
    }
    return next((f", {fault}" for fault, present in faults.items() if present), "")


def learned(part: object) -> list[nn.Parameter]:
    """The parameters to be trained in an object, its fields, and the variables of a function."""
    owner = getattr(part, "__self__", part)  # of a method
    held = [owner, *getattr(owner, "__dict__", {}).values()]
    if inspect.isfunction(part):
        loads = {each.argval for each in dis.get_instructions(part) if each.opname == "LOAD_GLOBAL"}
        held += [cell.cell_contents for cell in part.__closure__ or () if cell != CellType()]
        held += [part.__globals__.get(name) for name in loads]
    inside = [p for m in held if isinstance(m, nn.Module) for p in m.parameters()]
    return [p for p in (*held, *inside) if isinstance(p, nn.Parameter) and p.requires_grad]


def check_learned(denoiser: Denoiser, laws: Mapping[str, object]) -> None:
    """Refuse parameters outside the denoiser: no optimizer would move them, and no file hold them.

    A process with parameters belongs to the denoiser if it is a module.
    """
    known = {id(p) for p in denoiser.parameters()}
    names = ("process", "parameterization", "noise_input")
    for name, part in {**{name: getattr(denoiser, name, None) for name in names}, **laws}.items():
        if any(id(p) not in known for p in learned(part)):
            rule = "be an nn.Module" if name in names else "use parameters of the denoiser only"
            advice = "freeze fixed ones by requires_grad_(False)"
            rule = f"{rule}, so that its parameters are trained"
            raise ValueError(f"{name} must {rule}; got others; {advice}")


def copied(denoiser: Denoiser) -> Denoiser:
    """A copy for the averages."""
    try:
        return copy.deepcopy(denoiser)
    except Exception as error:
        reason = str(error).split(".")[0]
        advice = "for weight_norm, take that of torch.nn.utils.parametrizations"
        raise ValueError(f"denoiser must allow copy.deepcopy; got: {reason}; {advice}") from error


def around(denoiser: Denoiser, network: nn.Module) -> Denoiser:
    """Return a denoiser that shares all parts but calls its network through a wrapper."""
    twin = copy.copy(denoiser)
    twin.__dict__["_modules"] = {**denoiser.__dict__["_modules"], "network": network}
    return twin


def named(law: object) -> str:
    """A text that is equal in all processes: the name of a function, or the repr of an object."""
    name = getattr(law, "__qualname__", None)
    return repr(law) if name is None else f"{getattr(law, '__module__', '?')}.{name}"


def blame(parts: tuple[Batch, ...], each: list[Tensor]) -> str:
    """Name the first samples of this process that are not finite, or whose loss is not."""
    for part, losses in zip(parts, each, strict=True):
        cond = {f"cond {name}".strip(): value for name, value in named_tensors(part.cond).items()}
        x0 = part.x0 if part.mask is None else part.x0.where(part.mask, 0)
        fields = {"x0": x0, **cond, "eps": part.eps, "t": part.t, "loss": losses}
        for name, value in fields.items():
            finite = value.isfinite().reshape(len(value), -1).all(1)
            if not bool(finite.all()):
                bad = (~finite).nonzero().flatten().cpu()
                more = ", ..." if len(bad) > 5 else ""
                positions = ", ".join(map(str, (bad[:5] + part.first).tolist())) + more
                if part.rows is None:
                    return f": {name} of position {positions}"
                rows = ", ".join(map(str, part.rows.cpu()[bad[:5]].tolist())) + more
                return f": {name} of data row {rows} (position {positions})"
    return ""


@validate.arguments
def train(
    state: Annotated[TrainState, validate.Kind("a TrainState", "advance", "recipe")],
    data: Annotated[Data, DATA],
    parts: validate.Count = 1,
) -> Iterator[Metrics]:
    """Train from the present step of `state` to the end of its recipe, one Metrics a step.

    Args:
        state: advanced in place; it may be saved between any two steps.
        data: the training set.
        parts: pieces of each process's share of a batch, whose gradients are added up.
    """
    validate.check_threads()
    engine, recipe = state.engine, state.recipe
    mine = list(stretches(recipe, engine.num_processes, engine.process_index, parts))
    while state.step < recipe.steps:
        step, device = state.step, engine.device
        yield state.advance(*(draw(data, recipe, state.times, step, p, device) for p in mine))
