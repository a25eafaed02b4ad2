"""Solvers that choose their own steps: not affine, so held to the exact map or the exact law."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sde_diffusion import validate
from sde_diffusion.models.exact import Gaussian, GaussianMixture
from sde_diffusion.processes import Process
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.sampling import sample
from sde_diffusion.verify import probe
from sde_diffusion.verify.gaussians import ending
from sde_diffusion.verify.mixtures import begun, flow, none

__all__ = ["Bias", "Tolerances", "bias", "tolerances"]

ALLOWED = 10.0  # times the tolerance
STRICT = 1e-5  # from this tolerance on
ERRORS = 4.5  # standard errors


@dataclass(frozen=True, repr=False)
class Tolerances:
    """The largest error of an ODE solver at each tolerance, against the exact map; print it.

    Attributes:
        solver: its name.
        tolerances: rtol = atol.
        errors: largest |difference| over samples and coordinates.
    """

    solver: str
    tolerances: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [e / tol for e, tol in zip(self.errors, self.tolerances, strict=True)]

    @property
    def holds(self) -> bool:
        """Whether the error is at most 10 tolerances where these are at most 1e-5."""
        return all(r <= ALLOWED for r, tol in self._pairs if tol <= STRICT)

    @property
    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.ratios, self.tolerances, strict=True))

    @property
    def verdict(self) -> str:
        strict = [r for r, tol in self._pairs if tol <= STRICT] or self.ratios
        said = f"error up to {max(strict):.2g} tolerances"
        return said if self.holds else f"{said}: MORE THAN {ALLOWED:g}"

    def __str__(self) -> str:
        rows = [f"tolerances of {self.solver}", f"  {'tolerance':>10}{'error':>12}{'ratio':>8}"]
        for tol, error, ratio in zip(self.tolerances, self.errors, self.ratios, strict=True):
            rows.append(f"  {tol:10.0e}{error:12.2e}{ratio:8.2f}")
        return "\n".join(
            [*rows, *ending(self.verdict, "the same for stiffer data, nor in float32")]
        )

    __repr__ = __str__


def tolerances(
    solver: Any,
    data: GaussianMixture,
    process: Process | None = None,
    *,
    values: Sequence[float] = (1e-3, 1e-5, 1e-7),
    samples: int = 64,
) -> Tolerances:
    """The error of an ODE solver that takes rtol and atol, at several of them.

    Args:
        solver: a frozen dataclass with rtol and atol, such as TorchODE(); its own are replaced.
        data: a Gaussian, whose flow is a closed form; or a mixture, whose flow is computed.
        process: as in `law`.
        values: the tolerances.
        samples: how many, from fixed starts.
    """
    validate.kind("solver", solver, "a solver with rtol and atol", "rtol", "atol", "step")
    found: list[float] = []
    if not values:
        raise ValueError("values must hold one or more tolerances; got none")
    for value in values:
        at = replace(solver, rtol=value, atol=value)
        model, x, (t, s) = begun(at, data, process, None, None, samples)
        exact = model.flow(x, t, s) if hasattr(model, "flow") else flow(model, x, t, s)
        found.append(float((sample(model, at, x, noise=none) - exact).abs().max()))
    return Tolerances(probe.one_line(solver), tuple(values), tuple(found))


@dataclass(frozen=True, repr=False)
class Bias:
    """Mean and variance of samples against the exact law of the reverse SDE; print it.

    Attributes:
        sampler: its name.
        samples: how many were drawn.
        mean, variance: found, expected and standard error of each, (d, 3).
    """

    sampler: str
    samples: int
    mean: torch.Tensor
    variance: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """(found - expected) / standard error, of all means and then of all variances."""
        both = torch.cat([self.mean, self.variance])
        return (both[:, 0] - both[:, 1]) / both[:, 2]

    @property
    def holds(self) -> bool:
        return float(self.scores.abs().max()) <= ERRORS

    @property
    def verdict(self) -> str:
        worst = float(self.scores.abs().max())
        said = f"mean and variance within {worst:.1f} standard errors"
        return said if self.holds else f"{said}: BIASED (4.5 are allowed)"

    def __str__(self) -> str:
        rows = [f"bias of {self.sampler}: {self.samples} samples"]
        rows.append(f"  {'':>10}{'found':>12}{'exact':>12}{'std error':>12}")
        for name, values in (("mean", self.mean), ("variance", self.variance)):
            for found, exact, error in values.tolist():
                rows.append(f"  {name:>10}{found:12.6f}{exact:12.6f}{error:12.1e}")
        return "\n".join(
            [*rows, *ending(self.verdict, "that a bias below the standard error is 0")]
        )

    __repr__ = __str__


def bias(
    sampler: Sampler,
    data: Gaussian,
    process: Process | None = None,
    *,
    steps: int | None = None,
    samples: int = 4000,
    seed: int = 0,
) -> Bias:
    """The bias of an SDE solver whose noise cannot be injected, by Monte Carlo.

    Args:
        sampler: any; its noise comes from a generator.
        data: exact.Gaussian.
        process, steps: as in `law`.
        samples, seed: of the starts and the noise.
    """
    validate.kind("data", data, "an exact.Gaussian", "mean", "covariance", "reverse_sde")
    model, x, (t, _) = begun(sampler, data, process, None, steps, samples, seed)
    mean, covariance = model.reverse_sde(t)
    variance = covariance.diagonal()
    source = torch.Generator().manual_seed(seed)
    made = coordinates(sample(model, sampler, x, steps=steps, generator=source))
    means = [made.mean(0), mean, (variance / samples).sqrt()]
    variances = [made.var(0), variance, variance * math.sqrt(2 / (samples - 1))]
    return Bias(probe.one_line(sampler), samples, torch.stack(means, 1), torch.stack(variances, 1))
