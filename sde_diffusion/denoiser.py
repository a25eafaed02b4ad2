"""Models: what a sampler sees, and the one that wraps a network.

Convention: a model is asked (x, level) and answers with a Prediction; x is (B, ...) of any rank.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sde_diffusion import errors, networks, prediction, processes, storage
from sde_diffusion.prediction import Eps, Parameterization, Prediction
from sde_diffusion.processes import Level, Process, Scalar
from sde_diffusion.storage import public

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
        inputs = (seen, c) if cond is None else (seen, c, cond)
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
        config = getattr(self.network, "config", {})
        described = {
            "network": {"class": type(self.network).__name__, **config},
            "process": storage.describe(self.process),
            "parameterization": storage.describe(self.parameterization),
            "condition": storage.describe(self.condition),
        }
        storage.write(path, self.network.state_dict(), {"denoiser": described, **record})

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

        Args:
            path: the .safetensors file; its JSON stands beside it.
            network: the network to fill, needed if it is not one of this package's.
            process, parameterization, condition: likewise; they must be what was saved.
        Raises:
            storage.BadFile: naming the file and the reason, if anything is missing or damaged.
        """
        path = Path(path)
        tensors, record = storage.read(path)
        try:
            parts = record["denoiser"]
            if network is None:
                built: nn.Module = storage.build("network", public(networks), parts["network"])
                dtype = next((value.dtype for value in tensors.values()), torch.float32)
                network = built.to(dtype)
            made = Denoiser(
                network,
                storage.build("process", public(processes), parts["process"], process),
                storage.build(
                    "parameterization",
                    public(prediction),
                    parts["parameterization"],
                    parameterization,
                ),
                storage.build("condition", CONDITIONS, parts["condition"], condition),
            )
            made.network.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise storage.BadFile(f"{path.with_suffix('.json')}: {reason}") from None
        return made.eval()


def is_one(scalar: Scalar) -> bool:
    """True for the float 1, by which a batch need not be multiplied."""
    return isinstance(scalar, float) and scalar == 1.0


def pretrained(name: str) -> Denoiser:
    """A denoiser whose weights come with the package.

    Args:
        name: "mnist_vp": 28x28 digits in [-1, 1], VP process.
    """
    folder = Path(__file__).parent / "weights"
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    if name not in names:
        raise ValueError(f"no packaged weights {name!r}; there are: {', '.join(names) or 'none'}")
    return Denoiser.load(folder / f"{name}.safetensors")
