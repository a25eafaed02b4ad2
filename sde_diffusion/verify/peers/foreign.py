r"""Foreign samplers: the base of the adapters, and the adapter for a function.

An adapter runs the peer's whole loop as one step over [s, t]. Peers keep a batch in coordinates of
their own, x' = alpha' x_0 + sigma' eps. The model is called at its own level of equal ratio
sigma / alpha, on the rescaled batch; x0 and eps do not depend on the coordinates.

The injected noise replaces torch's normal draws. Any other random number, from another distribution
or from a generator of the peer's own, is refused by name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sde_diffusion.grids import Ends, Grid
from sde_diffusion.models import Model, Prediction
from sde_diffusion.noise import Noise
from sde_diffusion.processes import Level, Process, double
from sde_diffusion.processes.level import enter, leave
from sde_diffusion.samplers import Claims, Memory, SolverError
from sde_diffusion.validate import Checked, Kind, Share
from sde_diffusion.verify.probe import NotAffine

SINGLE = 1e-4  # rounding of a run whose arithmetic is in float32, relative to its largest state

OTHER = {
    "rand", "rand_like", "randint", "randint_like", "randperm", "bernoulli", "bernoulli_",
    "multinomial", "poisson", "uniform_", "random_", "exponential_", "log_normal_", "cauchy_",
    "geometric_",
}  # fmt: skip


class Injected(TorchFunctionMode):
    """Replaces torch's normal draws by `noise` for the batch x, at the time of the last call."""

    NORMAL = ("randn", "randn_like", "normal", "normal_")

    def __init__(self, name: str, noise: Noise, x: Tensor, t: float, s: float) -> None:
        super().__init__()
        self.name, self.noise, self.x, self.t, self.s = name, noise, x, t, s

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        called = getattr(func, "__name__", "")
        if called in OTHER:
            raise NotAffine(f"{self.name} draws by torch.{called}: only normal draws are injected")
        if called not in self.NORMAL:
            return func(*args, **kwargs)
        if kwargs.pop("generator", None) is not None:
            raise NotAffine(
                f"{self.name} draws from a generator of its own, as Brownian trees do; its noise "
                f"cannot be injected"
            )
        return getattr(self, called)(*args, **kwargs)

    def randn(self, *size: Any, **kind: Any) -> Tensor:
        """Replacement of torch.randn, as the methods below are of functions of the same names."""
        return self._unit(torch.empty(*size, **kind))

    def randn_like(self, like: Tensor, **kind: Any) -> Tensor:
        return self._unit(torch.empty_like(like, **kind))

    def normal(self, mean: Any = 0.0, std: Any = 1.0, size: Any = None, **kind: Any) -> Tensor:
        like = torch.as_tensor(mean + 0 * std) if size is None else torch.empty(size, **kind)
        return mean + std * self._unit(like)

    def normal_(self, tensor: Tensor, mean: Any = 0.0, std: Any = 1.0) -> Tensor:
        return tensor.copy_(mean + std * self._unit(tensor))

    def _unit(self, like: Tensor) -> Tensor:
        if like.shape != self.x.shape:
            own = tuple(self.x.shape)
            raise NotAffine(
                f"{self.name} draws noise of shape {tuple(like.shape)} for a batch of shape {own}"
            )
        return self.noise(self.t, self.s, self.x).to(like)


@dataclass(frozen=True)
class PeerModel:
    """The model as a function of x = alpha x_0 + sigma eps in the peer's coordinates."""

    model: Model
    injected: Injected

    def __call__(self, x: Tensor, alpha: float, sigma: float) -> Prediction:
        there = peer_level(alpha, sigma)
        own = self.model.process.level_at(there.u)
        if abs(own.u - there.u) > 1e-3 * (1 - there.u):
            raise ValueError(
                f"{self.injected.name} calls at sigma/alpha = {sigma / alpha:.6g}, and "
                f"{self.model.process} ends at {own.sigma / own.alpha:.6g}; put the model on "
                f"the sampler's own process, and keep churn below its start"
            )
        self.injected.t = own.t
        own_x = leave(enter(x.to(self.injected.x), there), own)
        return self.model(own_x, own)


def peer_level(alpha: float, sigma: float) -> Level[float]:
    """A level of a peer."""
    return Level(math.nan, alpha, sigma, math.nan)


@dataclass(frozen=True)
class Between(Ends):
    """The start and the end of a loop that chooses its own levels.

    Args:
        first, last: u = sigma / (alpha + sigma) at both.
    """

    first: float
    last: float

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        ends = [process.level_at(u).t for u in (self.first, self.last)]
        return torch.tensor(ends, dtype=torch.float64)


@dataclass(frozen=True)
class FromTo(Ends):
    """The times at which a function starts and ends."""

    first: float
    last: float

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        return torch.tensor([self.first, self.last], dtype=torch.float64)


class Remark(NamedTuple):
    """The memory of an adapter."""

    remark: str


class OneStep(Checked):
    """A sampler whose step runs a whole loop.

    Attributes:
        declared: its order, if it is known.
        rounding: of its arithmetic, relative.
    """

    declared: int | None
    rounding: float

    @property
    def order(self) -> int | None:
        """The declared order, or 1, which every consistent method has."""
        return 1 if self.declared is None else self.declared

    @property
    def claims(self) -> Claims:
        return Claims(self.order, noise=True, adaptive=True, rounding=self.rounding)


class Foreign(OneStep, ABC):
    """A peer's loop as a sampler of one step, over all levels of the peer's choice."""

    @property
    @abstractmethod
    def process(self) -> Process:
        """The peer's own process."""

    @abstractmethod
    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(alpha, sigma) of the peer's own coordinates at its start and at its end."""

    @abstractmethod
    def loop(self, model: PeerModel, x: Tensor) -> tuple[Tensor, str]:
        """Run the peer's code from x to its end, in its own coordinates; return a warning too."""

    @property
    def grid(self) -> Grid:
        """The times at which the peer starts and ends."""
        first, last = (peer_level(*end).u for end in self.ends())
        return Between(first, last)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        first, last = (peer_level(*end) for end in self.ends())
        if abs(t.u - first.u) > 1e-3 * (1 - first.u) + 1e-9 or abs(s.u - last.u) > 1e-6:
            raise ValueError(f"{self} runs on levels of its own; leave out times")
        begin = leave(enter(x, t), first)
        with Injected(str(self), noise, x, t.t, s.t) as injected, torch.no_grad():
            try:
                end, remark = self.loop(PeerModel(model, injected), begin)
            except (ValueError, SolverError):
                raise
            except Exception as error:  # of the peer's own code
                text = " ".join(str(error).split())
                raise ValueError(f"{self} failed: {type(error).__name__}: {text:.200}") from error
        return leave(enter(end.to(x), last), s), Remark(remark)


@dataclass(frozen=True)
class Function(OneStep):
    """A plain function f(eps_fn, x_T) -> x_0, on the model's own process.

    It calls eps_fn(x, t), t a time in [0, 1] (i / N on a chain), and draws by torch.

    Args:
        function: f.
        start, end: the times of x_T and of the result of f.
        declared: its order, if it is known.
        rounding: of its arithmetic, relative; 1e-4 if that is in float32.
    """

    function: Annotated[
        Callable[[Callable[[Tensor, Any], Tensor], Tensor], Tensor],
        Kind("a function f(eps_fn, x)", "__call__"),
    ]
    start: Share = 1.0
    end: Share = 0.0
    declared: int | None = None
    rounding: float = 1e-9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end >= self.start:
            raise ValueError(f"end must be below start; got end={self.end}, start={self.start}")

    def __str__(self) -> str:
        return f"function {name_of(self.function)}"

    @property
    def grid(self) -> Grid:
        return FromTo(self.start, self.end)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        def eps(x: Tensor, t: Any) -> Tensor:
            time = torch.tensor([only(t, "t")], dtype=torch.float64)
            injected.t = float(time)
            return model(x, model.process.levels(time)[0]).eps

        with Injected(str(self), noise, x, t.t, s.t) as injected, torch.no_grad():
            end = self.function(eps, x.clone())
        if getattr(end, "shape", None) != x.shape or not hasattr(end, "to"):
            raise ValueError(f"{self} must return a tensor of shape {tuple(x.shape)}")
        return end.to(x), None


def only(value: Any, name: str) -> float:
    """Return a value that must be one number for the whole batch."""
    flat = double(value, name).flatten()
    if not len(flat) or not bool((flat == flat[0]).all()):
        raise NotAffine(f"{name} must be one number for the whole batch; got {value!r:.80}")
    return float(flat[0])


def name_of(function: Any) -> str:
    """The name of a function or of a partial of one."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)
