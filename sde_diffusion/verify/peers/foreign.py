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
from sde_diffusion.processes import EDM, Level, Process, double
from sde_diffusion.processes.level import enter, leave
from sde_diffusion.samplers import Claims, Memory, SolverError
from sde_diffusion.samplers.sampler import check_down
from sde_diffusion.validate import Checked, Kind, Share
from sde_diffusion.verify.probe import NotAffine

OfEps = Callable[[Callable[[Tensor, Any], Tensor], Tensor], Tensor]  # f(eps_fn, x_T) -> x_0
SINGLE = 1e-4  # rounding of a run whose arithmetic is in float32, relative to its largest state

OTHER = {
    "rand", "rand_like", "randint", "randint_like", "randperm", "bernoulli", "bernoulli_",
    "multinomial", "poisson", "uniform_", "random_", "exponential_", "log_normal_", "cauchy_",
    "geometric_",
}  # fmt: skip


class Injection(TorchFunctionMode):
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
            why = "as Brownian trees do; its noise cannot be injected"
            raise NotAffine(f"{self.name} draws from a generator of its own, {why}")
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
            shapes = f"{tuple(like.shape)} for a batch of shape {tuple(self.x.shape)}"
            raise NotAffine(f"{self.name} draws noise of shape {shapes}")
        return self.noise(self.t, self.s, self.x).to(like)


@dataclass(frozen=True)
class PeerModel:
    """The model as a function of x = alpha x_0 + sigma eps in the peer's coordinates."""

    model: Model
    injected: Injection

    def __call__(self, x: Tensor, alpha: float, sigma: float) -> Prediction:
        there = peer_level(alpha, sigma)
        own = self.model.process.level_at(there.u)
        if abs(own.u - there.u) > 1e-3 * (1 - there.u):
            at = f"sigma/alpha = {sigma / alpha:.6g}"
            ends = f"{self.model.process} ends at {own.sigma / own.alpha:.6g}"
            use = "put the model on the sampler's own process, and keep churn below its start"
            raise ValueError(f"{self.injected.name} calls at {at}, and {ends}; {use}")
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
        of: (the model's process) -> both times.
    """

    of: Callable[[Process], list[float]]

    def times(self, process: Process, steps: int, start: float, least_ratio: float) -> Tensor:
        return torch.tensor(self.of(process), dtype=torch.float64)


class Remark(NamedTuple):
    """The memory of an adapter."""

    remark: str


class OneStep(Checked, ABC):
    """A sampler whose step runs a whole loop, with the noise injected into torch's normal draws.

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
        return Claims(
            self.order, noise=True, adaptive=True, rounding=self.rounding, differentiable=False
        )

    @abstractmethod
    def _loop(self, model: PeerModel, x: Tensor) -> tuple[Tensor, str]:
        """Run the code from x to its end; return a warning too."""

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        check_down(self, t, s)
        with Injection(str(self), noise, x, t.t, s.t) as injected, torch.no_grad():
            end, remark = self._loop(PeerModel(model, injected), x.clone())
        return end.to(x), Remark(remark)


class Foreign(OneStep):
    """A peer's loop as a sampler of one step, over all levels of the peer's choice.

    The loop runs in the peer's own coordinates.
    """

    @property
    def process(self) -> Process:
        """The peer's own process; by default EDM up to the noise at its start."""
        (alpha, sigma), _ = self.ends()
        return EDM(sigma / alpha)

    @abstractmethod
    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(alpha, sigma) of the peer's own coordinates at its start and at its end."""

    @property
    def grid(self) -> Grid:
        """The times at which the peer starts and ends."""
        ends = [peer_level(*end).u for end in self.ends()]
        return Between(lambda process: [process.level_at(u).t for u in ends])

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        first, last = (peer_level(*end) for end in self.ends())
        if abs(t.u - first.u) > 1e-3 * (1 - first.u) + 1e-9 or abs(s.u - last.u) > 1e-6:
            raise ValueError(f"{self} runs on levels of its own; leave out times")
        begin = leave(enter(x, t), first)
        try:
            end, memory = super().step(model, begin, t, s, noise, memory)
        except (ValueError, SolverError):
            raise
        except Exception as error:  # of the peer's own code
            text = " ".join(str(error).split())
            raise ValueError(f"{self} failed: {type(error).__name__}: {text:.200}") from error
        return leave(enter(end, last), s), memory


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

    function: Annotated[OfEps, Kind("a function f(eps_fn, x)", "__call__")]
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
        return Between(lambda process: [self.start, self.end])

    def _loop(self, model: PeerModel, x: Tensor) -> tuple[Tensor, str]:
        def eps(x: Tensor, t: Any) -> Tensor:
            time = torch.tensor([only(t, "t")], dtype=torch.float64)
            model.injected.t = float(time)
            return model.model(x, model.model.process.levels(time)[0]).eps

        end = self.function(eps, x)
        if getattr(end, "shape", None) != x.shape or not hasattr(end, "to"):
            raise ValueError(f"{self} must return a tensor of shape {tuple(x.shape)}")
        return end, ""


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
