"""The denoiser: a network with what is needed to read it, and its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion import validate
from sde_diffusion.models import checkpoint, prediction
from sde_diffusion.models.derivatives import ordinary
from sde_diffusion.models.model import LogSNRRange, level_of, zero_null
from sde_diffusion.models.noise_inputs import ContinuousTime, NoiseInput
from sde_diffusion.models.parameterizations import Eps
from sde_diffusion.models.prediction import Parameterization, Prediction
from sde_diffusion.processes import Level, Process, Scalar
from sde_diffusion.processes.level import per_sample
from sde_diffusion.processes.process import IS_PROCESS
from sde_diffusion.validate import Cond, Kind

__all__ = ["Denoiser", "pretrained"]

IS_NETWORK = Kind("a torch module (adopt takes a plain function)", "parameters", "forward")
IS_MEANING = Kind("a parameterization such as Eps()", "x0", "eps", "target")
IS_RANGE = Kind("a LogSNRRange", "low", "high", "only")
IS_NOISE_INPUT = Kind("a noise input such as ContinuousTime()", "__call__")


class Denoiser(nn.Module):
    """A network with what is needed to interpret it: process, parameterization, noise input.

    Args:
        network: called as network(x, c), network(x, c, cond) for a tensor, or
            network(x, c, **cond) for a mapping; x (B, ...), c (B,). It returns a tensor shaped
            like x or with twice the channels (see `prediction.from_network`), or a tuple or a
            record that has it first or as `sample`.
        process: the process it is trained on.
        parameterization: the meaning of its output, Eps() by default.
        noise_input: the number that it is fed for the noise level, ContinuousTime() by default.
        null: the condition that stands for none: a tensor shaped like one sample's condition (a
            buffer), a Parameter (learned), or a mapping of these. Zeros by default where cond is
            a float vector (B, width); other conditions need one.
        trained: the log-SNRs it was trained at; None stands for everywhere.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        parameterization: Parameterization | None = None,
        noise_input: NoiseInput | None = None,
        *,
        null: Cond | None = None,
        trained: LogSNRRange | None = None,
    ) -> None:
        super().__init__()
        IS_NETWORK("network", network)
        IS_PROCESS("process", process)
        self.network = network
        self.process = process
        self.parameterization = IS_MEANING("parameterization", parameterization or Eps())
        self.noise_input = IS_NOISE_INPUT("noise_input", noise_input or ContinuousTime())
        self.null = None if null is None else NullCond(null)
        self.trained = trained if trained is None else IS_RANGE("trained", trained)

    def forward(self, x: Tensor, level: Level | Scalar, cond: Cond | None = None) -> Prediction:
        """The prediction for x (B, ...) at `level`, or at a time in [0, 1].

        The network runs in its own dtype, to which floating-point conditions are cast; integers
        and bools are not. The prediction has the dtype of x.
        """
        validate.batch("x", x)
        level = level_of(self.process, level, x)
        weights = self.network.parameters()
        dtype = next((p.dtype for p in weights if p.is_floating_point()), x.dtype)
        c = self.noise_input(level)
        if isinstance(c, Tensor):
            c = c.reshape(-1).expand(len(x)).to(x.device)
            c = c.to(dtype) if c.is_floating_point() else c
        else:
            c = torch.full((len(x),), c, dtype=dtype, device=x.device)
        scale = self.parameterization.input_scale(level)
        scaled = (x if is_one(scale) else x * scale).to(dtype)
        if cond is None:
            out = self.network(scaled, c)
        elif isinstance(cond, Tensor):
            out = self.network(scaled, c, fitted("cond", cond, x, dtype))
        else:
            entries = {k: fitted(f"cond[{k!r}]", v, x, dtype) for k, v in cond.items()}
            out = self.network(scaled, c, **entries)
        return prediction.from_network(x, out, level, self.parameterization)

    def with_null(self, cond: Cond, keep: Tensor) -> Cond:
        """The conditions where `keep`, and the null elsewhere: whole samples, whatever the shape.

        Args:
            cond: a tensor, or a mapping of tensors, of first axis B.
            keep: (B,) bool.
        """
        if isinstance(cond, Tensor):
            return replaced(cond, keep, self._null_of("cond", cond))
        return {k: replaced(v, keep, self._null_of(k, v)) for k, v in cond.items()}

    def null_like(self, cond: Cond) -> Cond:
        """The null for as many samples as cond has."""
        first = cond if isinstance(cond, Tensor) else next(iter(cond.values()))
        return self.with_null(cond, torch.zeros(len(first), dtype=torch.bool, device=first.device))

    def _null_of(self, name: str, cond: Tensor) -> Tensor:
        if self.null is not None:
            return self.null.entry(name, cond)
        return zero_null(name, cond)[0] if len(cond) else cond.new_zeros(cond.shape[1:])

    def save(self, path: str | Path, **record: object) -> None:
        """Write `path` (.safetensors) and, beside it, a JSON that describes it with its SHA-256.

        Args:
            record: facts for the JSON, such as the command that trained the network.
        """
        checkpoint.save_parts(Path(path), self, record)

    @staticmethod
    def load(
        path: str | Path,
        network: nn.Module | None = None,
        *,
        process: Process | None = None,
        parameterization: Parameterization | None = None,
        noise_input: NoiseInput | None = None,
    ) -> "Denoiser":
        """Read a file of `save`, in eval mode. Never runs code from the file.

        Memory and time are bounded by the size of the file, whatever its record describes.

        Args:
            path: the .safetensors file; its JSON stands beside it.
            network: the network to fill, needed if it is not one of this package's.
            process, parameterization, noise_input: likewise; they must be the saved ones.
        Raises:
            storage.BadFile: naming the file and the reason, if anything is missing or damaged; a
                given network is then unchanged.
        """
        parts = checkpoint.load_parts(path, network, process, parameterization, noise_input)
        return Denoiser(**parts).eval()


class NullCond(nn.Module):
    """The condition that stands for none, by name: parameters are learned, tensors are kept.

    Args:
        null: one tensor, under the name "cond", or a mapping.
    """

    def __init__(self, null: Cond) -> None:
        super().__init__()
        entries = dict(null) if isinstance(null, Mapping) else {"cond": null}
        for name, value in entries.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, validate.kind(name, value, "a tensor", "dtype"))

    def entry(self, name: str, cond: Tensor) -> Tensor:
        """The null of one entry of the condition; it must be shaped like one sample's."""
        value: Any = getattr(self, name, None)
        if value is None or value.shape != cond.shape[1:]:
            shape = None if value is None else tuple(value.shape)
            raise ValueError(
                f"null of {name} must have shape {tuple(cond.shape[1:])}, that of one sample's "
                f"condition; got {shape}"
            )
        return value


def replaced(cond: Tensor, keep: Tensor, null: Tensor) -> Tensor:
    """cond (B, ...) where keep (B,), and the null (...) elsewhere, in the dtype of cond."""
    return torch.where(per_sample(keep, cond), cond, null.to(cond.device, cond.dtype))


def fitted(name: str, cond: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A condition with one entry per sample of x; floats in the dtype of the network."""
    cond = validate.cond(name, cond, len(x))
    cond = ordinary(cond.to(x.device, dtype) if cond.is_floating_point() else cond.to(x.device))
    return cond if len(cond) == len(x) else cond.expand(len(x), *cond.shape[1:])


def is_one(scalar: Scalar) -> bool:
    """True for the float 1, by which a batch need not be multiplied."""
    return isinstance(scalar, float) and scalar == 1.0


def pretrained(name: str) -> Denoiser:
    """Load a denoiser whose weights come with the package.

    Args:
        name: "mnist_vp": 28x28 digits in [-1, 1], VP process. "mnist_conditional": the same with
            the digit as condition, one-hot (B, 10); see guidance.ClassifierFree.
    """
    folder = Path(__file__).parents[1] / "weights"
    validate.choice("name", name, sorted(path.stem for path in folder.glob("*.safetensors")))
    return Denoiser.load(folder / f"{name}.safetensors")
