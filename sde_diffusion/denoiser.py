"""Models: what a sampler sees, and the one that wraps a network.

Convention: a model is asked (x, level) and answers with a Prediction; x is (B, ...) of any rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sde_diffusion import descriptions, errors, networks, prediction, processes, storage
from sde_diffusion.descriptions import public
from sde_diffusion.prediction import Eps, Parameterization, Prediction
from sde_diffusion.processes import Level, Process, Scalar
from sde_diffusion.strict import near

__all__ = ["Condition", "Denoiser", "Index", "LogRatio", "LogSNR", "Model", "Time", "pretrained"]


class Model(Protocol):
    """All that a sampler ever sees."""

    @property
    def process(self) -> Process:
        """The process whose levels the model understands."""
        ...

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        """What the model says of the batch x (B, ...) at this level."""
        ...

    def rows(self, index: Tensor) -> "Model":
        """The same model for the samples `index` of the batch.

        Itself, unless the model holds per-sample state such as a condition.
        """
        ...


class Condition(Protocol):
    """How a network is told the noise level."""

    def __call__(self, level: Level) -> Scalar: ...


@dataclass(frozen=True)
class Time:
    """t in [0, 1]: finite at both ends. On a Discrete process it is i/N."""

    def __call__(self, level: Level) -> Scalar:
        return level.t


@dataclass(frozen=True)
class LogSNR:
    """log(alpha^2 / sigma^2), the same for every process; held to [-20, 20], as it is infinite at
    the ends, where no more can be told from a level with nothing but signal or noise."""

    def __call__(self, level: Level) -> Scalar:
        if isinstance(level.log_snr, Tensor):
            return level.log_snr.clamp(-20, 20)
        return min(max(level.log_snr, -20.0), 20.0)


@dataclass(frozen=True)
class LogRatio:
    """c_noise = log(sigma / alpha) / 4 of Karras et al. 2022, Table 1: -1/8 of LogSNR."""

    def __call__(self, level: Level) -> Scalar:
        return LogSNR()(level) / -8


@dataclass(frozen=True)
class Index:
    """t N - 1 + counts_from: the step of a chain as its network counts it, a real number.

    Args:
        num_steps: N.
        counts_from: the network's name of the first step, 0 (most libraries) or 1 (the papers).
    """

    num_steps: int
    counts_from: int = 0

    def __post_init__(self) -> None:
        errors.integer("num_steps", self.num_steps)
        errors.integer("counts_from", self.counts_from, 0, 1)

    def __call__(self, level: Level) -> Scalar:
        return level.t * self.num_steps - 1 + self.counts_from


CONDITIONS: list[type] = [Time, LogSNR, LogRatio, Index]
PARTS = ("network", "process", "parameterization", "condition")  # of a description
LONGEST = 10_000  # letters that describe a network
ADDED = {"dropout": 0.0}  # arguments that older files do not have, and what they were


class Denoiser(nn.Module):
    """A network with what is needed to read it: process, parameterization, condition.

    Args:
        network: called as network(x, c) or network(x, c, cond), x (B, ...), c (B,); it answers with
            a tensor shaped like x, or with twice the channels (see `prediction.read`).
        process: the process it is trained on.
        parameterization: the meaning of its output.
        condition: how it is told the noise level.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        parameterization: Parameterization | None = None,
        condition: Condition | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.parameterization = parameterization or Eps()
        self.condition = condition or Time()

    def forward(self, x: Tensor, level: Level, cond: Tensor | None = None) -> Prediction:
        """The prediction for x (B, ...) at `level`; cond (B, width) for conditional networks.

        The network runs in its own dtype; the prediction has that of x.
        """
        errors.batch("x", x)
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        c = self.condition(level)
        if isinstance(c, Tensor):
            c = c.reshape(-1).expand(len(x)).to(dtype)
        else:
            c = torch.full((len(x),), c, dtype=dtype, device=x.device)
        scale = self.parameterization.input_scale(level)
        seen = (x if is_one(scale) else x * scale).to(dtype)
        if cond is not None and len(cond) != len(x):
            raise ValueError(f"cond must hold one context per sample, {len(x)}; got {len(cond)}")
        inputs = (seen, c) if cond is None else (seen, c, cond.to(dtype))
        return prediction.read(x, self.network(*inputs), level, self.parameterization)

    def rows(self, index: Tensor) -> "Denoiser":
        return self

    def save(self, path: str | Path, **record: object) -> None:
        """Write `path` (.safetensors) and, beside it, a JSON that describes it with its SHA-256.

        Args:
            record: facts for the JSON, such as the command that trained the network.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors; got {path}")
        if "denoiser" in record:
            raise ValueError("denoiser: a name that the record keeps for itself")
        parts = {
            "network": described(self.network),
            "process": descriptions.describe(self.process),
            "parameterization": descriptions.describe(self.parameterization),
            "condition": descriptions.describe(self.condition),
        }
        storage.write(path, self.network.state_dict(), {"denoiser": parts, **record})

    @staticmethod
    def load(
        path: str | Path,
        network: nn.Module | None = None,
        *,
        process: Process | None = None,
        parameterization: Parameterization | None = None,
        condition: Condition | None = None,
    ) -> "Denoiser":
        """Read what `save` wrote, in eval mode. Never runs code from the file.

        Memory and time are bounded by the size of the file: whatever numbers its record holds, a
        network is only made once its outline has the tensors of the file.

        Args:
            path: the .safetensors file; its JSON stands beside it.
            network: the network to fill, needed if it is not one of this package's.
            process, parameterization, condition: likewise; they must be what was saved.
        Raises:
            storage.BadFile: naming the file and the reason, if anything is missing or damaged; a
                network that was given is then as it was.
        """
        if network is not None:
            errors.kind("network", network, "a torch module", "state_dict", "load_state_dict")
        if process is not None:
            errors.kind("process", process, "a process such as VP()", "log_alpha", "variance")
        if parameterization is not None:
            errors.kind("parameterization", parameterization, "one such as Eps()", "x0", "target")
        if condition is not None:
            errors.kind("condition", condition, "one such as Time()", "__call__")
        path = Path(path)
        saved = storage.examine(path)
        with storage.blaming_record(path):
            parts = checked_parts(saved.record)
            made = Denoiser(
                nn.Identity(),
                descriptions.build("process", public(processes), parts["process"], process),
                descriptions.build(
                    "parameterization",
                    public(prediction),
                    parts["parameterization"],
                    parameterization,
                ),
                descriptions.build("condition", CONDITIONS, parts["condition"], condition),
            )
            check_sound(made)
            if network is None:
                make = maker(parts["network"])
                outline = sketched(make, saved.outline)
            else:
                check_same(network, parts["network"])
                make, outline = None, network
            storage.check_fit(saved.outline, outline.state_dict())
        tensors = storage.load(saved)
        with storage.blaming_record(path), torch.random.fork_rng(devices=[]):
            made.network = make().to(dtype_of(saved.outline)) if make else outline
        with storage.blaming(path):
            made.network.load_state_dict(tensors)
        return made.eval()


def described(network: nn.Module) -> dict[str, Any]:
    """The class of a network and the arguments that it was made with, if it tells them."""
    return {"class": type(network).__name__, **getattr(network, "config", {})}


def checked_parts(record: dict[str, Any]) -> dict[str, Any]:
    """The four parts of the description of a denoiser."""
    if "denoiser" not in record:
        raise ValueError(f"describes no denoiser{near('denoiser', record)}")
    parts = record["denoiser"]
    if not isinstance(parts, dict):
        raise ValueError("its denoiser is not described by an object")
    for name in (*parts, *PARTS):
        if name not in PARTS:
            raise ValueError(f"a denoiser has no {name!r:.80}{near(name, PARTS)}")
        if name not in parts:
            raise ValueError(f"its denoiser has no {name!r}{near(name, parts)}")
    return parts


def maker(description: Any) -> Callable[[], nn.Module]:
    """What makes the network that a record describes, one of this package."""
    kind, arguments = descriptions.chosen("network", public(networks), description, ADDED)
    if len(repr(arguments)) > LONGEST:
        raise ValueError(f"its network is described in more than {LONGEST:,} letters")

    def make() -> nn.Module:
        network = kind(**arguments)
        descriptions.same("network", {"class": kind.__name__, **arguments}, described(network))
        return network

    return make


def check_same(network: nn.Module, description: Any) -> None:
    """Refuse a network that is not of the class, and with the arguments, of the one saved."""
    ours = described(network)
    older = {name: value for name, value in ADDED.items() if name in ours}
    if isinstance(description, dict):
        description = {**older, **description}
    descriptions.same("network", description, ours)


def sketched(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network on the meta device, where numbers take no memory.

    Raises:
        ValueError: if it is larger than these tensors, in the memory it would take or in the torch
            calls that make it: a record can say a number that a file cannot fill.
    """
    with torch.device("meta"), Calls(2000 + 20 * len(tensors)):
        network = make().to(dtype_of(tensors))
    takes = sum(held.nbytes for held in [*network.parameters(), *network.buffers()])
    has = sum(value.nbytes for value in tensors.values())
    if takes > 2 * has + 2**20:
        raise ValueError(f"its network takes {takes:,} bytes; the file has {has:,}")
    return network


class Calls(TorchFunctionMode):
    """At most so many calls of torch: what a constructor's loops may cost.

    A table of frequencies is made for real: what computes on the meta device loads the half of
    torch that compiles, for a second or two.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("its network has many more tensors than the file")
        kwargs = kwargs or {}
        if func is torch.linspace:
            steps = args[2] if len(args) > 2 else kwargs["steps"]
            errors.integer("the steps of a table", steps, at_most=2**16)
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a network with these tensors, which is one for all."""
    found = next(iter(tensors.values())).dtype if tensors else torch.float32
    if not found.is_floating_point:
        raise ValueError(f"its tensors are of {found}")
    return found


def check_sound(denoiser: Denoiser) -> None:
    """Refuse settings of which each is in range, and which together are not finite."""
    process, meaning = denoiser.process, denoiser.parameterization
    try:
        end = float(process.variance(torch.ones((), dtype=torch.float64)))
        level = process.levels(torch.tensor([0.1], dtype=torch.float64))[0]
        rows = [*meaning.x0(level), *meaning.eps(level)]
        told = [
            end,
            process.prior_std,
            meaning.input_scale(level),
            denoiser.condition(level),
            *rows,
        ]
        sound = all(map(math.isfinite, told)) and level.alpha > 0 and level.sigma > 0
    except ArithmeticError:  # floats of Python overflow by raising
        sound = False
    if not sound:
        raise ValueError("its process and parameterization give levels that are not finite, or 0")


def is_one(scalar: Scalar) -> bool:
    """True for the float 1, by which a batch need not be multiplied."""
    return isinstance(scalar, float) and scalar == 1.0


def pretrained(name: str) -> Denoiser:
    """A denoiser whose weights come with the package.

    Args:
        name: "mnist_vp": 28x28 digits in [-1, 1], VP process. "mnist_conditional": the same of the
            digit that is asked for, one-hot (B, 10); see guidance.ClassifierFree.
    """
    folder = Path(__file__).parent / "weights"
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    if name not in names:
        raise ValueError(f"no packaged weights {name!r}; there are: {', '.join(names) or 'none'}")
    return Denoiser.load(folder / f"{name}.safetensors")
