r"""The probe: runs a sampler's real code on chosen inputs, and writes down all that it does.

A run is given a start, something in each noise draw and something on top of each of the network's
answers. For a model that is affine in x, every linear scheme is affine in all of these together,
and they are handed out here: by a noise source and by a model that stands in front of the true one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.model import Model
from sde_diffusion.models.prediction import Prediction, truth
from sde_diffusion.noise.sources import Purpose, stream
from sde_diffusion.processes import Level, Process
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.sampling import trajectory

__all__ = [
    "Asked",
    "Basis",
    "Inputs",
    "NotAffine",
    "Probe",
    "Trial",
    "check_affine",
    "run",
    "sizes",
]

C, D = 0.37, -0.61  # no whole multiples: a quantized output must not look affine
LARGE = 100.0  # size of the second trial input; thresholds of the field lie well below


class NotAffine(ValueError):
    """The sampler has no Gaussian law: it clips, couples samples or draws elsewhere."""


class Inputs(Protocol):
    """What the rows of a batch are given, each (rows, d)."""

    @property
    def rows(self) -> int: ...

    def start(self, d: int) -> Tensor: ...

    def draw(self, index: int, d: int) -> Tensor: ...

    def answer(self, index: int, d: int) -> Tensor | None:
        """What is added to the network's answer; None for nothing."""
        ...


@dataclass(frozen=True)
class Basis(Inputs):
    """Row 0: nothing. Then d rows with a unit start, and d with a unit impulse for each draw."""

    d: int
    draws: int

    @property
    def rows(self) -> int:
        return 1 + self.d + self.d * self.draws

    def start(self, d: int) -> Tensor:
        return self._impulse(1)

    def draw(self, index: int, d: int) -> Tensor:
        return self._impulse(1 + self.d + index * self.d)

    def answer(self, index: int, d: int) -> None:
        return None

    def _impulse(self, first: int) -> Tensor:
        made = torch.zeros(self.rows, self.d, dtype=torch.float64)
        made[first : first + self.d] = torch.eye(self.d, dtype=torch.float64)
        return made


@dataclass(frozen=True)
class Trial(Inputs):
    """Rows that are given nothing; some A; some B, a hundred times larger; A + B; C A + D B.

    A and B are fixed numbers in the start, each draw and each answer, normal ones kept from 0.

    Args:
        parts: which of the five rows, and in what order.
    """

    parts: tuple[int, ...] = (0, 1, 2, 3, 4)

    @property
    def rows(self) -> int:
        return len(self.parts)

    def start(self, d: int) -> Tensor:
        return self._numbers(0, 0, d)

    def draw(self, index: int, d: int) -> Tensor:
        return self._numbers(1, index, d)

    def answer(self, index: int, d: int) -> Tensor:
        return self._numbers(2, index, d)

    def _numbers(self, kind: int, index: int, d: int) -> Tensor:
        source = stream(0, Purpose.PATH, step=index, position=kind)
        a, b = torch.from_numpy(source.standard_normal((2, d)))
        a, b = a + 0.5 * a.sign(), LARGE * (b + b.sign())
        return torch.stack([a * 0, a, b, a + b, C * a + D * b])[list(self.parts)]


class Asked(NamedTuple):
    """One network call: where, and about what.

    Attributes:
        level: its level.
        x: the batch it was asked about, (rows, d).
    """

    level: Level[float]
    x: Tensor


@dataclass
class Probe:
    """A model and a noise source in one, that hands out `inputs` and keeps what it was asked.

    Attributes:
        asked: the calls.
        draws: for each noise draw, the number of calls made before it.
    """

    model: Model
    inputs: Inputs
    asked: list[Asked] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        """The model's answer, its x0 and eps moved along x = alpha x0 + sigma eps."""
        if len(x) != self.inputs.rows:
            raise NotAffine("a sampler that splits its batch has steps of its own: no affine map")
        index = len(self.asked)
        self.asked.append(Asked(level, coordinates(x).clone()))
        prediction = self.model(x, level)
        more = self.inputs.answer(index, x.shape[1:].numel())
        if more is None:
            return prediction
        if level.sigma == 0:
            return prediction
        more = more.reshape(x.shape).to(x)
        return truth(prediction.x0 + more, prediction.eps - level.alpha / level.sigma * more, level)

    def noise(self, t: float, s: float, like: Tensor) -> Tensor:
        if like.numel() and len(like) != self.inputs.rows:
            raise NotAffine(f"it drew noise for {len(like)} rows of a batch of {self.inputs.rows}")
        made = self.inputs.draw(len(self.draws), like.shape[1:].numel())
        self.draws.append(len(self.asked))
        return made.reshape(like.shape).to(like)


class Run(NamedTuple):
    """What one run showed.

    Attributes:
        asked: its calls.
        draws: the number of calls before each draw.
        end: (rows, d).
        remark: what an adapter noticed on the way.
    """

    asked: list[Asked]
    draws: list[int]
    end: Tensor
    remark: str


def sizes(data: Model, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one sample; an exact model knows its own, and one coordinate will do else."""
    own = getattr(data, "shape", ()) if shape is None else validate.shape("shape", shape)
    return tuple(own) or (1,)


def run(
    sampler: Sampler,
    data: Model,
    inputs: Inputs,
    shape: tuple[int, ...],
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
) -> Run:
    """One run of the sampler on these inputs."""
    probe = Probe(data, inputs)
    x = inputs.start(prod(shape)).reshape(inputs.rows, *shape)
    path = trajectory(probe, sampler, x, steps=steps, times=times, noise=probe.noise)
    try:
        *_, last = path
    except NotAffine as refusal:
        known = str(refusal).startswith(str(sampler))
        raise refusal if known else NotAffine(f"{sampler}: {refusal}") from None
    if not torch.equal(x, inputs.start(prod(shape)).reshape(x.shape)):
        raise NotAffine(f"{sampler} changes the batch that it is given")
    if not probe.asked:
        raise NotAffine(f"{sampler} never asked the network")
    remark = getattr(last.memory, "remark", "")
    return Run(probe.asked, probe.draws, coordinates(last.x), remark)


def check_affine(
    sampler: Sampler,
    data: Model,
    shape: tuple[int, ...],
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
) -> None:
    """Refuse a sampler that is not an affine map of each row for itself.

    Raises:
        NotAffine: naming the sampler and where it shows: if two runs on the same inputs differ, a
            row depends on its batch mates, or the map from start, draws and answers to the state
            at any call or to the end is not affine.
    """
    validate.kind("sampler", sampler, "a Sampler", "claims", "grid", "step")
    validate.kind("data", data, "a Model, such as exact.Gaussian", "process", "__call__")
    if sampler.claims.order is None:
        raise NotAffine(
            f"{sampler} chooses its own steps, so its map is not affine: verify.tolerances tells "
            f"the error of an ODE solver, verify.bias that of an SDE solver"
        )
    tolerance: float = sampler.claims.rounding  # of the sampler's own arithmetic

    def trial(*parts: int) -> Run:
        return run(sampler, data, Trial(parts), shape, steps, times)

    def compare(which: list[int], other: Run, what: str) -> None:
        where = differs([state[which] for state in states(whole)], states(other), tolerance)
        if where is not None:
            raise NotAffine(f"{sampler}: {what}, first {place(whole, where)}")

    whole = trial(0, 1, 2, 3, 4)
    for index, state in enumerate(states(whole)):
        if not bool(state.isfinite().all()):
            raise NotAffine(f"{sampler} is not finite, first {place(whole, index)}")
    compare(
        [0, 1, 2, 3, 4], trial(0, 1, 2, 3, 4),
        "two runs on the same start and noise differ; it draws random numbers that were not "
        "injected, or keeps a state between runs",
    )  # fmt: skip
    for parts in ([1], [3, 2]):
        compare(
            parts, trial(*parts),
            "a sample depends on its batch mates, by a step size or a norm for the whole batch or "
            "by random numbers drawn elsewhere",
        )  # fmt: skip
    sums = [
        torch.stack([a + b - nothing, nothing + C * (a - nothing) + D * (b - nothing)])
        for nothing, a, b, *_ in states(whole)
    ]
    where = differs(sums, [state[3:] for state in states(whole)], tolerance)
    if where is not None:
        by = float((sums[where] - states(whole)[where][3:]).abs().max())
        share = by / (float(states(whole)[where].abs().max()) + 1.0)
        why = "is it in float32? then give rounding=1e-4" if share < 1e-4 else "does it clip?"
        raise NotAffine(
            f"{sampler} is not affine on {type(data).__name__}, first {place(whole, where)}, by "
            f"{share:.1e} of its size: it has no Gaussian law ({why})"
        )


def states(made: Run) -> list[Tensor]:
    return [*(asked.x for asked in made.asked), made.end]


def differs(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> int | None:
    """Index of the first state that differs by more than rounding, if any does."""
    if len(ours) != len(theirs):
        return min(len(ours), len(theirs)) - 1
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = float(torch.maximum(a.abs().max(), b.abs().max())) + 1.0
        if not bool(((a - b).abs() <= tolerance * scale).all()):
            return index
    return None


def place(made: Run, index: int) -> str:
    if index >= len(made.asked):
        return "in the samples it ends with"
    return f"in call {index + 1} of {len(made.asked)}, at t={made.asked[index].level.t:.4g}"


def one_line(sampler: Any) -> str:
    """A sampler in one line."""
    return " ".join(str(sampler).split())
