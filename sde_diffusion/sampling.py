"""Sampling: the loop over the steps of a sampler, with a model, a grid and a source of noise.

Convention: a sampler moves a batch from time t to an earlier time s < t. x is (B, ...), of any rank
from 1 and any floating-point dtype; the samples have the same dtype.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.grids import Grid
from sde_diffusion.grids.grid import IS_GRID, cut
from sde_diffusion.models import conditions
from sde_diffusion.models.model import IS_MODEL, Bound, HeldBelow, Model, finite, trained_range
from sde_diffusion.noise.brownian import Brownian
from sde_diffusion.noise.sources import Generated, Noise, Seeded, sequence_of_seeds, start
from sde_diffusion.processes.level import Level, coordinates, double, wide
from sde_diffusion.samplers.sampler import IS_SAMPLER, Memory, Sampler
from sde_diffusion.validate import Cond, FloatBatch, Kind, shown

__all__ = ["Sample", "prior", "sample", "trajectory"]

IS_NOISE = Kind("a function noise(t, s, like)", "__call__")

SLACK = 1e-6  # relative tolerance of log-SNRs: times may have been computed in float32


class Sample(NamedTuple):
    """State of a trajectory after a step.

    Attributes:
        x: the batch.
        t: its time.
        memory: the sampler's state for the next step; the report of an adaptive solver.
    """

    x: Tensor
    t: float
    memory: Memory


@validate.arguments
def prior(
    model: Annotated[Model, IS_MODEL],
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a batch of noise (B, ...) with which `sample` starts.

    It has the distribution N(0, prior_std^2 I) of the process. If the noisiest level at which the
    model was trained is below t = 1, it is N(0, (alpha^2 + sigma^2) I) of this level, as for data
    of unit variance.

    Args:
        model: the model to sample from.
        shape: (B, ...).
        generator: source of the draw; without it and `seeds` a new one with fresh entropy.
        seeds: one per sample. The draw is independent of the noise of the same seeds in `sample`.
        dtype, device: of the batch.
    """
    begin, std = start_time(model), model.process.prior_std
    if begin < 1:
        (level,) = model.process.levels(torch.tensor([begin], dtype=torch.float64))
        std = math.hypot(level.alpha, level.sigma)
    return std * start(shape, generator, seeds, dtype, device)


@validate.arguments
def trajectory(
    model: Annotated[Model, IS_MODEL],
    sampler: Annotated[Sampler, IS_SAMPLER],
    x: Annotated[FloatBatch, finite],
    *,
    steps: int | None = None,
    grid: Annotated[Grid, IS_GRID] | None = None,
    times: Tensor | Sequence[float] | None = None,
    cond: Cond | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    noise: Noise | None = None,
) -> Iterator[Sample]:
    """Iterate over the states of a batch from noise to data, one per step.

    Args:
        model: the model to sample from.
        sampler: the rule for a step.
        x: the batch at the first time (B, ...), usually `prior(model, shape)`; not modified.
        steps: number of steps; to be left out for adaptive samplers, which choose their own.
        grid: the rule for the times of the steps; the sampler's own grid by default.
        times: decreasing times in [0, 1], (n + 1,), instead of steps and grid.
        cond: condition of a conditional model, a tensor or a mapping; first axis B or 1.
        generator: source of all noise.
        seeds: one per sample, instead of a generator. Each seed determines the Brownian path of its
            sample (noise/brownian.py), whatever the rest of the batch and the number of steps.
        noise: a function noise(t, s, like), instead of a generator.
    Raises:
        ValueError, TypeError: naming the argument.
    """
    if cond is not None:
        check_conditions(model, cond, len(x))
    process, path, end = model.process, path_of(model, sampler, steps, grid, times), end_time(model)
    levels = (process.rated_levels if sampler.claims.rates else process.levels)(path)
    driven = partial(Brownian, clock=process.u, times=[level.t for level in levels])
    source = chosen_noise(x, generator, seeds, noise, driven)
    wrapped: Model = model if cond is None else Bound(model, cond)
    if sampler.claims.adaptive and end > 0:
        wrapped = HeldBelow(wrapped, end)
    return walk(wrapped, sampler, x, levels, source)


def walk(
    model: Model, sampler: Sampler, x: Tensor, levels: Sequence[Level[float]], source: Noise
) -> Iterator[Sample]:
    """Run the loop of `trajectory`, whose arguments are checked before the first step.

    In half precision small steps would change nothing, so the state is kept in float32.
    """
    memory, dtype, x = None, x.dtype, wide(x)
    for t, s in pairwise(levels):
        with torch.no_grad():
            x, memory = sampler.step(model, x, t, s, source, memory)
        yield Sample(x.to(dtype), s.t, memory)


def sample(
    model: Model,
    sampler: Sampler,
    x: Tensor,
    *,
    steps: int | None = None,
    grid: Grid | None = None,
    times: Tensor | Sequence[float] | None = None,
    cond: Cond | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    noise: Noise | None = None,
    progress: bool = False,
) -> Tensor:
    """Return the last batch of a `trajectory`, shaped like x: data if the last time is 0.

    Args:
        progress: show a progress bar; the other arguments are those of `trajectory`.
    Warns:
        RuntimeWarning: if a sample is not finite at the end.
    """
    states = trajectory(
        model, sampler, x, steps=steps, grid=grid, times=times, cond=cond, generator=generator,
        seeds=seeds, noise=noise,
    )  # fmt: skip
    if progress:
        from tqdm import tqdm

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `trajectory` has warned
            total = len(path_of(model, sampler, steps, grid, times)) - 1
        states = tqdm(states, total=total, desc=type(sampler).__name__)
    for state in states:
        x = state.x
    rows = (~coordinates(x).isfinite().all(1)).nonzero().flatten().tolist()
    if rows:
        warnings.warn(
            f"{len(rows)} of {len(x)} samples are not finite at the end, the first at row "
            f"{rows[0]}: {type(sampler).__name__} or the model diverged",
            RuntimeWarning,
            stacklevel=2,
        )
    return x


def check_conditions(model: Model, cond: Cond, count: int) -> None:
    """Refuse a condition of another size or with nan, or for a model that accepts none."""
    if not conditions.takes_cond(model):
        raise TypeError(f"cond must be left out for {shown(model)}, which takes none")
    if not conditions.entries(cond):
        raise ValueError("cond must have one or more entries; got none")
    for name, value in conditions.entries(cond).items():
        finite(name, validate.cond(name, value, count))


# ---- times of the steps ------------------------------------------------------------------------


def path_of(
    model: Model, sampler: Sampler, steps: int | None, grid: Grid | None,
    times: Tensor | Sequence[float] | None,
) -> Tensor:  # fmt: skip
    """Return the times of a run, float64 on the CPU: `times`, or a grid in the trained range."""
    name, adaptive, end = type(sampler).__name__, sampler.claims.adaptive, end_time(model)
    if times is not None:
        if steps is not None or grid is not None:
            raise ValueError("times must be given alone, without steps or grid; got both")
        path = given_times(model, times)
    elif adaptive and (steps is not None or grid is not None):
        word, got = ("grid", grid) if steps is None else ("steps", steps)
        raise ValueError(f"{word} must be left out for {name}, which chooses its own; got {got}")
    elif steps is None and not adaptive:
        raise ValueError(f"steps must be given for {name}; got None; e.g. steps=20")
    else:
        ratio = math.exp(-trained_range(model).high / 2)
        rule = sampler.grid if grid is None else grid
        path = cut(rule(model.process, steps, start_time(model), ratio), end)
    if adaptive and path[-1] < end < path[-2]:
        path = torch.cat([path[:-1], path.new_tensor([end]), path[-1:]])
    return path


def start_time(model: Model) -> float:
    """Return 1, or the time of the noisiest level at which the model was trained."""
    low, last = trained_range(model).low, model.process.log_snr(1.0).item()
    return 1.0 if low <= last + 1e-9 * (1 + abs(last)) else model.process.time(low).item()


def end_time(model: Model) -> float:
    """Return the time of the cleanest level at which the model was trained; 0 if it is the data."""
    high = trained_range(model).high
    return 0.0 if high == math.inf else model.process.time(high).item()


def given_times(model: Model, times: Tensor | Sequence[float]) -> Tensor:
    """Return explicit times if they decrease; warn of times where the model was not trained."""
    path = finite("times", double(times, "times").cpu())
    if path.ndim != 1 or len(path) < 2:
        raise ValueError(f"times must hold at least two numbers; got shape {tuple(path.shape)}")
    wrong = (~(path[:-1] > path[1:])).nonzero().flatten().tolist()
    if wrong:
        k, hint = wrong[0], "; reverse them" if len(wrong) == len(path) - 1 else ""
        got = f"times[{k}]={path[k]:g}, times[{k + 1}]={path[k + 1]:g}"
        raise ValueError(f"times must decrease from noise to data; got {got}{hint}")
    steps = getattr(model.process, "chain_steps", None)
    if steps and getattr(times, "dtype", None) == torch.float32:  # i/N, to the rounding of float32
        nodes = (path * steps).round() / steps
        path = torch.where((path - nodes).abs() <= 2.0**-24 * nodes, nodes, path)
    low, high, only = trained_range(model)
    log_snr = model.process.log_snr(path[:-1])
    slack = SLACK * (1 + log_snr.abs())
    outside = ((log_snr < low - slack) | (log_snr > high + slack)).nonzero().flatten().tolist()
    if outside:
        k, first, last = outside[0], start_time(model), end_time(model)
        text = (
            f"log_snr {log_snr[k]:.4g} at t={path[k]:.4g} is outside the range [{low:.4g}, "
            f"{high:.4g}] at which the model was trained; use times from {first:.4g} to "
            f"{last:.4g}, then 0"
        )
        if only:
            raise ValueError(f"times must lie where the model is defined: {text}")
        warnings.warn(text, stacklevel=5)
    return path


def chosen_noise(
    x: Tensor,
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    noise: Noise | None,
    path: Callable[[Sequence[int]], Noise] = Seeded,
) -> Noise:
    """Return the source of noise; `path` makes a source of seeds."""
    if sum(given is not None for given in (generator, seeds, noise)) > 1:
        raise ValueError("generator, seeds and noise must not be given together; got several")
    if noise is not None:
        return IS_NOISE("noise", noise)
    if seeds is None:
        return Generated(generator)
    if len(sequence_of_seeds(seeds)) != len(x):
        raise ValueError(f"seeds must hold one seed per sample, {len(x)}; got {len(seeds)}")
    return path(seeds)
