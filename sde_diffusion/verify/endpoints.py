"""Samples of a sampler against the exact flow from the same starts, or the exact reverse SDE.

For samplers that are not affine, or on data that are not Gaussian.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from sde_diffusion.models import Model, Prediction, exact
from sde_diffusion.processes import Level, Process
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers import Sampler, ScipyODE
from sde_diffusion.sampling import path_of, sample
from sde_diffusion.validate import FloatBatch, Integer, Kind, arguments
from sde_diffusion.verify import probe, report

__all__ = ["Bias", "Endpoint", "Tolerances", "bias", "endpoint", "flow", "tolerances"]

KEPT = 32  # flows in memory, the oldest goes first
ALLOWED = 10.0  # times the tolerance
STRICT = 1e-5  # for tolerances up to this
ERRORS = 4.5  # standard errors

AMixture = Annotated[exact.GaussianMixture, Kind("an exact.GaussianMixture", "log_prob", "given")]
Samples = Annotated[int, Integer(2)]
Seed = Annotated[int, Integer(0)]


@dataclass(frozen=True, repr=False)
class Endpoint(report.Report):
    """Errors of a sampler's samples against the exact flow, from the same starts.

    Attributes:
        sampler: its name.
        calls: network calls.
        errors: one per sample, the root mean square over its coordinates.
    """

    sampler: str
    calls: int
    errors: Tensor

    @property
    def rms(self) -> float:
        return float(self.errors.square().mean().sqrt())

    @property
    def median(self) -> float:
        return float(self.errors.median())

    @property
    def worst(self) -> float:
        return float(self.errors.max())

    @property
    def verdict(self) -> str:
        return f"RMS {self.rms:.2e}, median {self.median:.2e}, worst {self.worst:.2e}"

    def page(self) -> report.Page:
        return report.Page(
            f"end of {self.sampler}: {self.calls} calls, {len(self.errors)} samples",
            "anything of another number of steps or of other data; an RMS above the median is that "
            "of a few samples far off",
            facts=["against the flow by DOP853 at 1e-10"],
        )


@arguments
def endpoint(
    sampler: probe.ASampler,
    data: AMixture,
    process: probe.AProcess | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    samples: Samples = 256,
) -> Endpoint:
    """Measure the error of each sample of a deterministic sampler, with fixed steps or not.

    Args:
        sampler: any that draws no noise.
        data: a mixture, or a Gaussian.
        process, times, steps: as in `law`.
        samples: their number, from fixed starts.
    Raises:
        NotAffine: if the sampler draws noise, so that its end is no function of its start.
    """
    model, x, ends = begun(sampler, data, process, times, steps, samples)
    counting = CountingModel(model)
    made = sample(counting, sampler, x, steps=steps, times=times, noise=none)
    off = coordinates(made - flow(model, x, *ends))
    return Endpoint(probe.one_line(sampler), counting.calls, off.square().mean(1).sqrt())


def none(t: float, s: float, like: Tensor) -> Tensor:
    """Noise source of a sampler that must draw none."""
    raise probe.NotAffine("the solver draws noise, so its end is no function of its start")


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
        end = model.flow(x, t, s) if hasattr(model, "flow") else flow(model, x, t, s)
        made = sample(model, at, x, noise=none)
        errors.append(float((made - end).abs().max()))
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
    mean: Tensor
    variance: Tensor

    @property
    def scores(self) -> Tensor:
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
    data: Annotated[exact.Gaussian, Kind("an exact.Gaussian", "mean", "covariance", "reverse_sde")],
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
    model, made, t = drawn(sampler, data, process, None, steps, samples, seed)
    mean, covariance = model.reverse_sde(t)
    variance = covariance.diagonal()
    means = [made.mean(0), mean, (variance / samples).sqrt()]
    variances = [made.var(0), variance, variance * math.sqrt(2 / (samples - 1))]
    return Bias(probe.one_line(sampler), samples, torch.stack(means, 1), torch.stack(variances, 1))


# ---- the reference flow --------------------------------------------------------------------------


FLOWS: dict[Any, Tensor] = {}


@arguments
def flow(data: AMixture, x: FloatBatch, t: float = 1.0, s: float = 0.0) -> Tensor:
    """Compute the exact probability flow from time t to s, by DOP853 at 1e-10; cached (32)."""
    parts = (x, data.log_weights, data.means, data.variances, data.axes)
    # Levels distinguish two processes of one name, such as an edited class.
    levels = data.process.levels(torch.linspace(s, t, 5, dtype=torch.float64))
    shapes = repr((data.process, levels, t, s, x.dtype, x.shape))
    key = (shapes, *(None if part is None else part.numpy().tobytes() for part in parts))
    if key not in FLOWS:
        FLOWS[key] = sample(data, ScipyODE("DOP853", rtol=1e-10, atol=1e-10), x, times=[t, s])
    if len(FLOWS) > KEPT:
        del FLOWS[next(iter(FLOWS))]
    return FLOWS[key].clone()


# ---- runs ----------------------------------------------------------------------------------------


@dataclass
class CountingModel:
    """A model that counts its calls."""

    model: Model
    calls: int = 0

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        self.calls += 1
        return self.model(x, level)


def begun(
    sampler: Sampler, data: Any, process: Process | None,
    times: Tensor | Sequence[float] | None, steps: int | None, samples: int, seed: int = 0,
) -> tuple[Any, Tensor, tuple[float, float]]:  # fmt: skip
    """The model, starts from its prior, and the first and the last time of the sampler."""
    model = probe.on_process_of(data, sampler, process)
    grid = path_of(model, sampler, steps, None, times)
    return model, starts(model, samples, seed), (float(grid[0]), float(grid[-1]))


def starts(model: Model, samples: int, seed: int) -> Tensor:
    """Draws from the prior of a model, another set for each seed."""
    shape, first = (samples, *probe.sizes(model, None)), seed * samples
    return model.process.prior(shape, seeds=range(first, first + samples), dtype=torch.float64)


def drawn(
    sampler: Sampler, data: Any, process: Process | None,
    times: Tensor | Sequence[float] | None, steps: int | None, samples: int, seed: int,
) -> tuple[Any, Tensor, float]:  # fmt: skip
    """The model, samples of a seed (n, d), and the time at which they start."""
    model, x, (t, _) = begun(sampler, data, process, times, steps, samples, seed)
    source = torch.Generator().manual_seed(seed)
    made = sample(model, sampler, x, steps=steps, times=times, generator=source)
    return model, coordinates(made), t
