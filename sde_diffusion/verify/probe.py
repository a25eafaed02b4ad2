r"""The probe: run a sampler's real code on chosen inputs, and record its calls and draws.

The inputs of a run are its start, each noise draw, and an addition to each network output. For a
model that is affine in x, every linear scheme is affine in all of these together. A noise source
and a wrapper of the model supply them.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models import Model, Prediction, truth
from sde_diffusion.noise import Purpose, stream
from sde_diffusion.processes import Level, Process
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers import Sampler
from sde_diffusion.sampling import trajectory

__all__ = ["NotAffine"]

C, D = 0.37, -0.61  # no whole multiples: a quantized output must not look affine
LARGE = 100.0  # size of the second trial input; thresholds of the field lie well below
HIDDEN = "two runs on the same start and noise differ; it draws elsewhere, or keeps a state"
COUPLED = "a sample depends on its batch mates, by a norm of all or by noise drawn elsewhere"

# Arguments of the checks, with their rules.
ASampler = Annotated[Sampler, validate.Kind("a Sampler", "claims", "grid", "step")]
AModel = Annotated[Model, validate.Kind("a Model, such as exact.Gaussian", "process", "__call__")]
AProcess = Annotated[Process, validate.Kind("a Process", "log_alpha", "variance")]


class OrMaker(validate.Kind):
    """An object of a kind, or a function that makes one."""

    def __call__(self, name: str, value: Any) -> Any:
        attributes = self.attributes if hasattr(value, self.attributes[0]) else ("__call__",)
        return validate.kind(name, value, self.what, *attributes)


class NotAffine(ValueError):
    """The sampler has no Gaussian law: it clips, couples samples or draws noise of its own."""


class Inputs(NamedTuple):
    """The inputs of a run by row of the batch, each (rows, d).

    Attributes:
        rows: their number.
        draw: (index, d) -> the noise of draw 0, 1, ...; the start for index -1.
        shift: (index, d) -> an addition to the x0 of a network call; None for nothing.
    """

    rows: int
    draw: Callable[[int, int], Tensor]
    shift: Callable[[int, int], Tensor] | None = None


def basis(block: Tensor, draws: int) -> Inputs:
    """Row 0: zeros. Then the rows of `block` as starts, and again as impulses in each draw.

    Args:
        block: (k, d), such as the unit vectors.
        draws: number of draws with impulses; later ones are 0.
    """

    def draw(index: int, d: int) -> Tensor:
        made = torch.zeros(1 + draws, len(block), d, dtype=torch.float64)
        made[1 + index : 2 + index] = block
        return torch.cat([made.new_zeros(1, d), made.flatten(0, 1)])

    return Inputs(1 + len(block) * (1 + draws), draw)


def trial(*parts: int) -> Inputs:
    """Rows with inputs of 0; A; B, a hundred times larger; A + B; C A + D B.

    A and B are fixed numbers in the start, each draw and each network output: normal, bounded away
    from 0.

    Args:
        parts: indices of the rows, in order.
    """

    def numbers(kind: int, index: int, d: int) -> Tensor:
        source = stream(0, Purpose.PATH, step=index, position=kind)
        a, b = torch.from_numpy(source.standard_normal((2, d)))
        a, b = a + 0.5 * a.sign(), LARGE * (b + b.sign())
        return torch.stack([a * 0, a, b, a + b, C * a + D * b])[list(parts)]

    def draw(index: int, d: int) -> Tensor:
        return numbers(int(index >= 0), max(index, 0), d)

    return Inputs(len(parts), draw, partial(numbers, 2))


class Call(NamedTuple):
    """One network call.

    Attributes:
        level: its level.
        x: its batch, (rows, d).
    """

    level: Level[float]
    x: Tensor


@dataclass
class Probe:
    """A model and a noise source in one, that supplies `inputs` and records the calls.

    Args:
        keep: False drops the batches of the calls, to save memory.

    Attributes:
        calls: the network calls.
        draws: for each noise draw, the number of calls before it.
        end: the batch at the end of a run, (rows, d).
        remark: a warning of an adapter.
    """

    model: Model
    inputs: Inputs
    keep: bool = True
    calls: list[Call] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)
    end: Tensor = field(init=False)
    remark: str = ""

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        """The model's prediction, its x0 and eps moved along x = alpha x0 + sigma eps."""
        if len(x) != self.inputs.rows:
            raise NotAffine("a sampler that splits its batch has steps of its own: no affine map")
        index = len(self.calls)
        self.calls.append(Call(level, coordinates(x if self.keep else x[:0]).clone()))
        prediction = self.model(x, level)
        if self.inputs.shift is None or level.sigma == 0:
            return prediction
        more = self.inputs.shift(index, x.shape[1:].numel()).reshape(x.shape).to(x)
        return truth(prediction.x0 + more, prediction.eps - level.alpha / level.sigma * more, level)

    def noise(self, t: float, s: float, like: Tensor) -> Tensor:
        if like.numel() and len(like) != self.inputs.rows:
            raise NotAffine(f"it draws noise for {len(like)} rows of a batch of {self.inputs.rows}")
        made = self.inputs.draw(len(self.draws), like.shape[1:].numel())
        self.draws.append(len(self.calls))
        return made.reshape(like.shape).to(like)

    @property
    def states(self) -> list[Tensor]:
        """The batch at each call, and at the end."""
        return [*(call.x for call in self.calls), self.end]

    def place(self, index: int) -> str:
        """The place of a state, for a message."""
        if index >= len(self.calls):
            return "in the samples it ends with"
        return f"in call {index + 1} of {len(self.calls)}, at t={self.calls[index].level.t:.4g}"


def on_process_of(data: Any, sampler: Any, process: Process | None) -> Any:
    """The data on `process`, or else on the sampler's own if it has one, or else on their own."""
    if process is not None and not hasattr(data, "on"):
        got = f"{type(data).__name__}; leave out process"
        raise TypeError(f"data must be an exact.Gaussian to change its process; got {got}")
    process = process or getattr(sampler, "process", None)
    return data.on(process) if process is not None and hasattr(data, "on") else data


def sizes(data: Model, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one sample; by default that of an exact model, or else one coordinate."""
    own = getattr(data, "shape", ()) if shape is None else validate.shape("shape", shape)
    return tuple(own) or (1,)


def run(
    sampler: Sampler,
    data: Model,
    inputs: Inputs,
    shape: tuple[int, ...],
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
) -> Probe:
    """The record of one run of the sampler on these inputs."""
    probe = Probe(data, inputs)
    x = inputs.draw(-1, prod(shape)).reshape(inputs.rows, *shape).clone()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not finite", RuntimeWarning)  # `check_affine` does
            *_, last = trajectory(probe, sampler, x, steps=steps, times=times, noise=probe.noise)
    except NotAffine as refusal:
        known = str(refusal).startswith(str(sampler))
        raise refusal if known else NotAffine(f"{sampler}: {refusal}") from None
    if not probe.calls:
        raise NotAffine(f"{sampler} never calls the network")
    probe.end, probe.remark = coordinates(last.x), getattr(last.memory, "remark", "")
    return probe


def check_affine(
    sampler: Sampler,
    data: Model,
    shape: tuple[int, ...],
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
) -> None:
    """Refuse a sampler that is not an affine map of each row by itself.

    Raises:
        NotAffine: naming the sampler and the first state that shows it: if two runs on the same
            inputs differ, a row depends on its batch mates, or the map from start, draws and
            network outputs to the state at any call or to the end is not affine.
    """
    if sampler.claims.order is None:
        use = "verify.tolerances for an ODE solver, verify.bias for an SDE solver"
        raise NotAffine(f"{sampler} chooses its own steps, so its map is not affine; use {use}")
    tolerance: float = sampler.claims.rounding or 1e-9  # of the sampler's own arithmetic

    def made(*parts: int) -> Probe:
        return run(sampler, data, trial(*parts), shape, steps, times)

    whole = made(0, 1, 2, 3, 4)
    for index, state in enumerate(whole.states):
        if not bool(state.isfinite().all()):
            raise NotAffine(f"{sampler} is not finite, first {whole.place(index)}")
    for parts, reason in (([0, 1, 2, 3, 4], HIDDEN), ([1], COUPLED), ([3, 2], COUPLED)):
        found = [state[parts] for state in whole.states]
        where = differs(found, made(*parts).states, tolerance)
        if where is not None:
            raise NotAffine(f"{sampler}: {reason}, first {whole.place(where)}")
    rows = [state[:3] for state in whole.states]  # of inputs 0, A, B
    sums = [torch.stack([a + b - o, o + C * (a - o) + D * (b - o)]) for o, a, b in rows]
    where = differs(sums, [state[3:] for state in whole.states], tolerance)
    if where is not None:
        state = whole.states[where]
        share = float((sums[where] - state[3:]).abs().max()) / (float(state.abs().max()) + 1.0)
        why = "is it in float32? then give rounding=1e-4" if share < 1e-4 else "does it clip?"
        by = f"first {whole.place(where)}, by {share:.1e} of its size: it has no Gaussian law"
        raise NotAffine(f"{sampler} is not affine on {type(data).__name__}, {by} ({why})")


def differs(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> int | None:
    """Index of the first state that differs by more than rounding, if any does."""
    if len(ours) != len(theirs):
        return min(len(ours), len(theirs)) - 1
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (a, b) in pairs if not near(a, b, tolerance)), None)


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """True if two batches differ by rounding only, relative to 1 + the largest number."""
    scale = float(torch.maximum(a.abs().max(), b.abs().max())) + 1.0
    return bool(((a - b).abs() <= tolerance * scale).all())


def one_line(sampler: Any) -> str:
    """A sampler in one line."""
    return " ".join(str(sampler).split())
