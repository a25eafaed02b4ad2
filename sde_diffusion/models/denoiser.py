"""The denoiser: a network with what is needed to read it, and its file."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from sde_diffusion import processes, validate
from sde_diffusion.files import describe, storage
from sde_diffusion.files.describe import public
from sde_diffusion.models import parameterizations, prediction
from sde_diffusion.models.checkpoint import (
    check_same,
    checked_parts,
    described,
    dtype_of,
    maker,
    sketched,
)
from sde_diffusion.models.noise_inputs import (
    CNoise,
    ContinuousTime,
    LogSNR,
    NoiseInput,
    TimestepIndex,
)
from sde_diffusion.models.parameterizations import Eps
from sde_diffusion.models.prediction import Parameterization, Prediction
from sde_diffusion.processes import Level, Process, Scalar

__all__ = ["Denoiser", "pretrained"]

NOISE_INPUTS: list[type] = [ContinuousTime, LogSNR, CNoise, TimestepIndex]


class Denoiser(nn.Module):
    """A network with what is needed to read it: process, parameterization, noise input.

    Args:
        network: called as network(x, c) or network(x, c, cond), x (B, ...), c (B,); it answers with
            a tensor shaped like x, or with twice the channels (see `prediction.read`).
        process: the process it is trained on.
        parameterization: the meaning of its output.
        noise_input: the number that tells it the noise level.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        parameterization: Parameterization | None = None,
        noise_input: NoiseInput | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.parameterization = parameterization or Eps()
        self.noise_input = noise_input or ContinuousTime()

    def forward(self, x: Tensor, level: Level, cond: Tensor | None = None) -> Prediction:
        """The prediction for x (B, ...) at `level`; cond (B, width) for conditional networks.

        The network runs in its own dtype; the prediction has that of x.
        """
        validate.batch("x", x)
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        c = self.noise_input(level)
        if isinstance(c, Tensor):
            c = c.reshape(-1).expand(len(x)).to(dtype)
        else:
            c = torch.full((len(x),), c, dtype=dtype, device=x.device)
        scale = self.parameterization.input_scale(level)
        seen = (x if is_one(scale) else x * scale).to(dtype)
        if cond is not None and len(cond) != len(x):
            raise ValueError(f"cond must hold one context per sample, {len(x)}; got {len(cond)}")
        inputs = (seen, c) if cond is None else (seen, c, cond.to(dtype))
        return prediction.from_network(x, self.network(*inputs), level, self.parameterization)

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
            "process": describe.to_record(self.process),
            "parameterization": describe.to_record(self.parameterization),
            "noise_input": describe.to_record(self.noise_input),
        }
        storage.write(path, self.network.state_dict(), {"denoiser": parts, **record})

    @staticmethod
    def load(
        path: str | Path,
        network: nn.Module | None = None,
        *,
        process: Process | None = None,
        parameterization: Parameterization | None = None,
        noise_input: NoiseInput | None = None,
    ) -> "Denoiser":
        """Read what `save` wrote, in eval mode. Never runs code from the file.

        Memory and time are bounded by the size of the file: whatever numbers its record holds, a
        network is only made once its outline has the tensors of the file.

        Args:
            path: the .safetensors file; its JSON stands beside it.
            network: the network to fill, needed if it is not one of this package's.
            process, parameterization, noise_input: likewise; they must be what was saved.
        Raises:
            storage.BadFile: naming the file and the reason, if anything is missing or damaged; a
                network that was given is then as it was.
        """
        if network is not None:
            validate.kind("network", network, "a torch module", "state_dict", "load_state_dict")
        if process is not None:
            validate.kind("process", process, "a process such as VP()", "log_alpha", "variance")
        if parameterization is not None:
            validate.kind("parameterization", parameterization, "one such as Eps()", "x0", "target")
        if noise_input is not None:
            validate.kind("noise_input", noise_input, "one such as ContinuousTime()", "__call__")
        path = Path(path)
        saved = storage.examine(path)
        with storage.blaming_record(path):
            parts = checked_parts(saved.record)
            made = Denoiser(
                nn.Identity(),
                describe.from_record("process", public(processes), parts["process"], process),
                describe.from_record(
                    "parameterization",
                    public(parameterizations),
                    parts["parameterization"],
                    parameterization,
                ),
                describe.from_record(
                    "noise_input", NOISE_INPUTS, parts["noise_input"], noise_input
                ),
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
            denoiser.noise_input(level),
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
    folder = Path(__file__).parents[1] / "weights"
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    if name not in names:
        raise ValueError(f"no packaged weights {name!r}; there are: {', '.join(names) or 'none'}")
    return Denoiser.load(folder / f"{name}.safetensors")
