"""Sampling functions of k-diffusion as samplers.

Nothing here imports k-diffusion: its functions are arguments, and their own code runs.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from sde_diffusion.validate import Kind, arguments
from sde_diffusion.verify.peers.foreign import Foreign, PeerModel, name_of, only
from sde_diffusion.verify.probe import AProcess


@dataclass(frozen=True)
class KDiffusion(Foreign):
    """A sampling function of k-diffusion, f(model, x, sigmas, ...).

    Functions of sigma_min, sigma_max and perhaps n instead get the last positive of the sigmas, the
    first, and their number.

    Args:
        function: such as `k_diffusion.sampling.sample_heun`.
        sigmas: decreasing, sigma / alpha, such as `grids.karras(20)`.
        arguments: further arguments of the function, by name.
        declared: its order, if it is known.
    """

    function: Annotated[Callable[..., Tensor], Kind("a function f(model, x, sigmas)", "__call__")]
    sigmas: Tensor | Sequence[float]
    arguments: dict[str, Any] = field(default_factory=dict)
    declared: int | None = None
    rounding: float = 1e-9

    def __post_init__(self) -> None:
        super().__post_init__()
        sigmas, got = self.levels, f"got {self.levels.tolist()!r:.60}"
        if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas[:-1] > sigmas[1:]).all()):
            raise ValueError(f"sigmas must decrease; {got}")
        if not bool((sigmas >= 0).all()) or (not self._takes("sigmas") and len(self._positive) < 2):
            raise ValueError(f"sigmas must be positive, the last may be 0; {got}")

    @property
    def levels(self) -> Tensor:
        """The sigmas in float64."""
        return torch.as_tensor(self.sigmas, dtype=torch.float64)

    @property
    def order(self) -> int | None:
        """The declared order, or 1; None for a function with tolerances of its own."""
        return None if self._takes("rtol") else super().order

    @property
    def name(self) -> str:
        return f"k-diffusion {name_of(self.function)}"

    def __str__(self) -> str:
        return f"{self.name}, {len(self.levels) - 1} steps"

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        last = self.levels if self._takes("sigmas") else self._positive
        return (1.0, float(self.levels[0])), (1.0, float(last[-1]))

    def _loop(self, model: PeerModel, x: Tensor) -> tuple[Tensor, str]:
        def denoised(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            return model(x, 1.0, only(sigma, "sigma")).x0

        usual = {"disable": True, "n": len(self.levels) - 1}  # no progress bar
        arguments = {k: v for k, v in usual.items() if self._takes(k)} | self.arguments
        if self._takes("sigmas"):
            return self.function(denoised, x, self.levels, **arguments), ""
        low, high = float(self._positive[-1]), float(self._positive[0])
        return self.function(denoised, x, low, high, **arguments), ""

    @property
    def _positive(self) -> Tensor:
        return self.levels[self.levels > 0]

    def _takes(self, name: str) -> bool:
        return name in inspect.signature(self.function).parameters


@arguments
def ratios(process: AProcess, times: Tensor) -> Tensor:
    """Return sigma / alpha at these times of a process, as the sigmas of a peer."""
    levels = process.levels(times)
    return torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
