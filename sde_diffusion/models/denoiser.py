"""The denoiser: a network with what is needed to read it, and its file."""

from pathlib import Path

import torch
from torch import Tensor, nn

from sde_diffusion import validate
from sde_diffusion.models import checkpoint, prediction
from sde_diffusion.models.noise_inputs import ContinuousTime, NoiseInput
from sde_diffusion.models.parameterizations import Eps
from sde_diffusion.models.prediction import Parameterization, Prediction
from sde_diffusion.processes import Level, Process, Scalar

__all__ = ["Denoiser", "pretrained"]


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
