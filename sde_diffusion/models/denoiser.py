"""The denoiser: a network, the meaning of its inputs and output, and its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sde_diffusion import validate
from sde_diffusion.models import checkpoint, conditions, prediction
from sde_diffusion.models.derivatives import ordinary
from sde_diffusion.models.model import LogSNRRange, level_of
from sde_diffusion.models.noise_inputs import ContinuousTime, NoiseInput
from sde_diffusion.models.parameterizations import Eps
from sde_diffusion.models.prediction import Parameterization, Prediction
from sde_diffusion.processes.level import Level, Scalar, onto, per_sample, readable
from sde_diffusion.processes.process import IS_PROCESS, Process
from sde_diffusion.validate import Cond, Kind, arguments

__all__ = ["Denoiser", "pretrained"]

ROUNDED = (
    "noise inputs coincide in {}, the dtype of the network; a network that accepts them in float32 "
    "sets float32_noise_input = True"
)

IS_NETWORK = Kind("a torch module (adopt takes a plain function)", "parameters", "forward")
IS_MEANING = Kind("a parameterization such as Eps()", "x0", "eps", "target")
IS_RANGE = Kind("a LogSNRRange", "low", "high", "only")
IS_NOISE_INPUT = Kind("a noise input such as ContinuousTime()", "__call__")


class Denoiser(nn.Module):
    """A network with its process, parameterization and noise input.

    Args:
        network: called as network(x, c), network(x, c, cond) if cond is a tensor, or
            network(x, c, **cond) if it is a mapping; x (B, ...), c (B,). It returns a tensor
            shaped like x or with twice the channels (see `prediction.from_network`), a tuple that
            has this tensor first, or an object that has it as `sample`.
        process: the process of the training data.
        parameterization: the meaning of the network's output, Eps() by default.
        noise_input: the network's input c for a noise level, ContinuousTime() by default.
        null: the condition that replaces a dropped one: a tensor shaped like one sample's
            condition (a buffer), a Parameter (learned), or a mapping of these. Zeros by default
            if cond is a float vector (B, width); required for other conditions.
        trained: the log-SNRs at which the network was trained; None means all.
    """

    @arguments
    def __init__(
        self,
        network: Annotated[nn.Module, IS_NETWORK],
        process: Annotated[Process, IS_PROCESS],
        parameterization: Annotated[Parameterization, IS_MEANING] | None = None,
        noise_input: Annotated[NoiseInput, IS_NOISE_INPUT] | None = None,
        *,
        null: Cond | None = None,
        trained: Annotated[LogSNRRange, IS_RANGE] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.parameterization = parameterization or Eps()
        self.noise_input = noise_input or ContinuousTime()
        self.null = None if null is None else NullCond(null)
        self.trained = trained
        self._last_input = 0.0  # of a network that rounds it

    def forward(self, x: Tensor, level: Level | Scalar, cond: Cond | None = None) -> Prediction:
        """Predict x0 and eps for x (B, ...) at `level`, or at a time in [0, 1].

        The network runs in its own dtype. Floating-point conditions are cast to it; integers and
        bools are not. The prediction has the dtype of x.

        A noise input in half precision merges levels (998 and 1000 in bfloat16). A network with the
        attribute `float32_noise_input = True` receives it in float32, and casts its features.

        Warns:
            UserWarning: if noise inputs of a batch or of two calls coincide in half precision.
        """
        validate.batch("x", x)
        level = level_of(self.process, level, x)
        weights = self.network.parameters()
        dtype = next((p.dtype for p in weights if p.is_floating_point()), x.dtype)
        c = self.noise_input(level)
        precise = torch.promote_types(dtype, torch.float32)
        if precise != dtype and not getattr(self.network, "float32_noise_input", False):
            precise = dtype
            if isinstance(c, Tensor):
                check_distinct(c, dtype)
            else:
                if c != self._last_input:
                    check_distinct(torch.tensor([self._last_input, c]), dtype)
                self._last_input = float(c)
        if isinstance(c, Tensor):
            c = c.reshape(-1).expand(len(x))
            c = onto(c, x, precise if c.is_floating_point() else c.dtype)
        else:
            c = torch.full((len(x),), c, dtype=precise, device=x.device)
        scale = self.parameterization.input_scale(level)
        unscaled = isinstance(scale, float) and scale == 1.0
        scaled = (x if unscaled else x * scale).to(dtype)
        if cond is None:
            out = self.network(scaled, c)
        else:
            cond = conditions.map_entries(lambda name, value: cond_for(name, value, x, dtype), cond)
            named = isinstance(cond, Mapping)
            out = self.network(scaled, c, **cond) if named else self.network(scaled, c, cond)
        return prediction.from_network(x, out, level, self.parameterization)

    def with_null(self, cond: Cond, keep: Tensor) -> Cond:
        """Replace the conditions of the samples where `keep` is False by the null.

        Args:
            cond: a tensor, or a mapping of tensors, of first axis B.
            keep: (B,) bool.
        """

        def kept(name: str, value: Tensor) -> Tensor:
            own = self.null
            null = conditions.zero_null(name, value) if own is None else own.entry(name, value)
            return torch.where(per_sample(keep, value), value, null.to(value.device, value.dtype))

        return conditions.map_entries(kept, cond)

    def null_like(self, cond: Cond) -> Cond:
        """Return the null condition for as many samples as cond has."""
        first = next(iter(conditions.entries(cond).values()))
        return self.with_null(cond, torch.zeros(len(first), dtype=torch.bool, device=first.device))

    def save(self, path: str | Path, **record: object) -> None:
        """Write `path` (.safetensors) and, beside it, a JSON file with metadata and SHA-256.

        Args:
            record: more metadata for the JSON file, such as the command that trained the network.
        """
        checkpoint.save_denoiser(Path(path), self, record)

    @staticmethod
    @arguments
    def load(
        path: str | Path,
        network: Annotated[nn.Module, IS_NETWORK] | None = None,
        *,
        process: Annotated[Process, IS_PROCESS] | None = None,
        parameterization: Annotated[Parameterization, IS_MEANING] | None = None,
        noise_input: Annotated[NoiseInput, IS_NOISE_INPUT] | None = None,
    ) -> "Denoiser":
        """Read a file of `save`, in eval mode. Never runs code from the file.

        Memory and time are bounded by the size of the file, whatever the JSON file contains.

        Args:
            path: the .safetensors file; the JSON file is beside it.
            network: a network that receives the weights; required if its class is not in
                `sde_diffusion.networks`.
            process, parameterization, noise_input: required in the same way; must equal the saved
                ones.
        Raises:
            storage.BadFile: if anything is missing or damaged; it names the file and the reason. A
                given network is then unchanged.
        """
        given = process, parameterization, noise_input
        return checkpoint.load_denoiser(Denoiser, Path(path), network, given).eval()


def check_distinct(c: Tensor, dtype: torch.dtype) -> None:
    """Warn of different noise inputs that a cast makes equal; not on a GPU, which would stall."""
    if readable(c) and c.is_floating_point() and len(c.to(dtype).unique()) < len(c.unique()):
        validate.warn(ROUNDED.format(dtype))


class NullCond(nn.Module):
    """The null condition: parameters (learned) and buffers (fixed) by name.

    Args:
        null: one tensor, stored as "cond", or a mapping.
    """

    def __init__(self, null: Cond) -> None:
        super().__init__()
        for name, value in conditions.entries(null).items():
            if not name.isidentifier() or hasattr(self, name):
                raise ValueError(f"null must have other names for its entries; got {name!r}")
            label = f"null of {name}" if isinstance(null, Mapping) else "null"
            validate.kind(label, value, "a tensor", "dtype")
            setattr(self, name, value if isinstance(value, nn.Parameter) else nn.Buffer(value))

    def entry(self, name: str, cond: Tensor) -> Tensor:
        """Return the null of one entry of the condition, shaped like one sample of it."""
        kept = dict(self.named_parameters()) | dict(self.named_buffers())
        if name not in kept:
            raise ValueError(f"null must have an entry {name!r}; got {list(kept)}")
        value, wanted = kept[name], tuple(cond.shape[1:])
        if value.shape != wanted:
            got = tuple(value.shape)
            raise ValueError(f"null of {name} must have shape {wanted}, as one sample; got {got}")
        if value.is_floating_point() and not cond.is_floating_point():
            raise ValueError(f"null of {name} must be {cond.dtype}, as cond; got {value.dtype}")
        return value


def cond_for(name: str, cond: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a condition with one entry per sample of x, floats in the dtype of the network."""
    cond = validate.cond(name, cond, len(x))
    cond = ordinary(cond.to(x.device, dtype) if cond.is_floating_point() else cond.to(x.device))
    return cond if len(cond) == len(x) else cond.expand(len(x), *cond.shape[1:])


def pretrained(name: str) -> Denoiser:
    """Load a denoiser whose weights come with the package.

    Args:
        name: "mnist_vp": 28x28 digits in [-1, 1], VP process. "mnist_conditional": the same with
            the digit as condition, one-hot (B, 10); see guidance.ClassifierFree.
    """
    folder = Path(__file__).parents[1] / "weights"
    validate.choice("name", name, sorted(path.stem for path in folder.glob("*.safetensors")))
    return Denoiser.load(folder / f"{name}.safetensors")
