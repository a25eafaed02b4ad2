"""Solvers that choose their own steps: not affine, compared with the exact map or law."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from sde_diffusion.models.exact import Gaussian
from sde_diffusion.processes.level import coordinates
from sde_diffusion.sampling import sample
from sde_diffusion.validate import Kind, arguments
from sde_diffusion.verify import probe, report
from sde_diffusion.verify.mixtures import AMixture, Samples, Seed, begun, flow, none

__all__ = ["Bias", "Tolerances", "bias", "tolerances"]

ALLOWED = 10.0  # times the tolerance
STRICT = 1e-5  # for tolerances up to this
ERRORS = 4.5  # standard errors


@dataclass(frozen=True, repr=False)
class Tolerances(report.Report):
    """Largest errors of an ODE solver at each tolerance, against the exact map.

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
        """True if the error is at most 10 tolerances where these are at most 1e-5."""
        return all(ratio <= ALLOWED for ratio in self._strict)

    @property
    def _strict(self) -> list[float]:
        """The ratios at tolerances of at most 1e-5."""
        pairs = zip(self.ratios, self.tolerances, strict=True)
        return [ratio for ratio, tol in pairs if tol <= STRICT]

    @property
    def verdict(self) -> str:
        text = f"error up to {max(self._strict or self.ratios):.2g} tolerances"
        return text if self.holds else f"{text}: MORE THAN {ALLOWED:g}"

    def page(self) -> report.Page:
        rows = zip(self.tolerances, self.errors, self.ratios, strict=True)
        table = report.Table({"tolerance": ".0e", "error": ".2e", "ratio": ".2f"}, rows)
        left = "the same for stiffer data, nor in float32"
        return report.Page(f"tolerances of {self.solver}", left, table)


@arguments
def tolerances(
    solver: Annotated[Any, Kind("a solver with rtol and atol", "rtol", "atol", "step", "grid")],
    data: AMixture,
    process: probe.AProcess | None = None,
    *,
    values: Sequence[float] = (1e-3, 1e-5, 1e-7),
    samples: Samples = 64,
) -> Tolerances:
    """Measure the error of an ODE solver at several values of rtol = atol.

    Args:
        solver: a frozen dataclass with rtol and atol, such as TorchODE(); its own are replaced.
        data: a Gaussian, with a flow in closed form; or a mixture, with a computed one.
        process: as in `law`.
        values: the tolerances.
        samples: their number, from fixed starts.
    """
    errors: list[float] = []
    if not values:
        raise ValueError("values must hold one or more tolerances; got none")
    for value in values:
        at = replace(solver, rtol=value, atol=value)
        model, x, (t, s) = begun(at, data, process, None, None, samples)
        exact = model.flow(x, t, s) if hasattr(model, "flow") else flow(model, x, t, s)
        errors.append(float((sample(model, at, x, noise=none) - exact).abs().max()))
    return Tolerances(probe.one_line(solver), tuple(values), tuple(errors))


@dataclass(frozen=True, repr=False)
class Bias(report.Report):
    """Mean and variance of samples against the exact law of the reverse SDE.

    Attributes:
        sampler: its name.
        samples: their number.
        mean, variance: measured, expected and standard error of each, (d, 3).
    """

    sampler: str
    samples: int
    mean: torch.Tensor
    variance: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """(measured - expected) / standard error, of all means and then of all variances."""
        both = torch.cat([self.mean, self.variance])
        return (both[:, 0] - both[:, 1]) / both[:, 2]

    @property
    def holds(self) -> bool:
        return float(self.scores.abs().max()) <= ERRORS

    @property
    def verdict(self) -> str:
        text = f"mean and variance within {float(self.scores.abs().max()):.1f} standard errors"
        return text if self.holds else f"{text}: BIASED ({ERRORS:g} are allowed)"

    def page(self) -> report.Page:
        rows = [("mean", *row) for row in self.mean.tolist()]
        rows += [("variance", *row) for row in self.variance.tolist()]
        table = report.Table({"": "", "measured": ".6f", "exact": ".6f", "std error": ".1e"}, rows)
        left = "that a bias below the standard error is 0"
        return report.Page(f"bias of {self.sampler}: {self.samples} samples", left, table)


@arguments
def bias(
    sampler: probe.ASampler,
    data: Annotated[Gaussian, Kind("an exact.Gaussian", "mean", "covariance", "reverse_sde")],
    process: probe.AProcess | None = None,
    *,
    steps: int | None = None,
    samples: Samples = 4000,
    seed: Seed = 0,
) -> Bias:
    """Measure the bias of an SDE solver whose noise cannot be injected, by Monte Carlo.

    Args:
        sampler: any; its noise comes from a generator.
        data: exact.Gaussian.
        process, steps: as in `law`.
        samples, seed: of the starts and the noise.
    """
    model, x, (t, _) = begun(sampler, data, process, None, steps, samples, seed)
    mean, covariance = model.reverse_sde(t)
    variance = covariance.diagonal()
    source = torch.Generator().manual_seed(seed)
    made = coordinates(sample(model, sampler, x, steps=steps, generator=source))
    means = [made.mean(0), mean, (variance / samples).sqrt()]
    variances = [made.var(0), variance, variance * math.sqrt(2 / (samples - 1))]
    return Bias(probe.one_line(sampler), samples, torch.stack(means, 1), torch.stack(variances, 1))
