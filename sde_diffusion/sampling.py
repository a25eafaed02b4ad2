"""Sampling: process, model, sampler and grid put together; the loop, written once.

Convention: a sampler moves a batch from time t to an earlier time s < t. x is (B, ...) of any rank
from 1 and any floating dtype, which the samples keep.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.grids import Grid
from sde_diffusion.grids.grid import IS_GRID, within
from sde_diffusion.models.model import (
    IS_MODEL,
    Bound,
    HeldBelow,
    Model,
    takes_cond,
    trained_range,
)
from sde_diffusion.noise.brownian import Brownian
from sde_diffusion.noise.sources import Generated, Noise, Seeded, start
from sde_diffusion.processes import Level, double
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers.sampler import IS_SAMPLER, Memory, Sampler
from sde_diffusion.validate import Batch, Cond, Kind, shown

__all__ = ["Sample", "prior", "sample", "trajectory"]

IS_NOISE = Kind("a function noise(t, s, like)", "__call__")

SLACK = 1e-6  # relative: log-SNR of a time that was computed in another precision


class Sample(NamedTuple):
    """State of a trajectory after a step.

    Attributes:
        x: the batch.
        t: its time.
        memory: what the sampler carries on; an adaptive solver leaves its report here.
    """

    x: Tensor
    t: float
    memory: Memory


def prior(
    model: Model,
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A batch of noise (B, ...) from which `sample` starts.

    N(0, prior_std^2 I) of the process; where the model was trained from a lower level on,
    N(0, (alpha^2 + sigma^2) I) there, the law of data of unit variance.

    Args:
        model: the model to sample from.
        shape: (B, ...).
        generator: source of the draw; fresh entropy if neither it nor `seeds` is given.
        seeds: one per sample; independent of the path that the same seeds drive in `sample`.
        dtype, device: of the batch.
    """
    process, begin = IS_MODEL("model", model).process, start_time(model)
    std = process.prior_std
    if begin < 1:
        (level,) = process.levels(torch.tensor([begin], dtype=torch.float64))
        std = math.hypot(level.alpha, level.sigma)
    return std * start(shape, generator, seeds, dtype, device)


@validate.arguments
def trajectory(
    model: Annotated[Model, IS_MODEL],
    sampler: Annotated[Sampler, IS_SAMPLER],
    x: Annotated[Tensor, Batch()],
    *,
    steps: int | None = None,
    grid: Annotated[Grid, IS_GRID] | None = None,
    times: Tensor | Sequence[float] | None = None,
    cond: Cond | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    noise: Noise | None = None,
) -> Iterator[Sample]:
    """Iterate over the states of a batch on its way from noise to data, one per step.

    Args:
        model: the model to sample from.
        sampler: the rule for a step.
        x: the batch at the first time (B, ...), usually `prior(model, shape)`; unchanged.
        steps: number of steps; left out for an adaptive sampler, which chooses its own.
        grid: through which levels; the sampler's own grid by default.
        times: any decreasing times in [0, 1] instead of steps and grid, (n + 1,).
        cond: condition of a conditional model, a tensor or a mapping; first axis B or 1.
        generator: source of all noise.
        seeds: one per sample instead: each follows a Brownian path of its own (noise/brownian.py),
            a function of its seed alone, the same in any batch and on any number of steps.
        noise: an injected source noise(t, s, like) instead.
    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite; got nan or infinity")
    if cond is not None:
        check_conditions(model, cond, len(x))
    model, path = prepared(model, sampler, steps, grid, times, cond)
    process = model.process
    levels = (process.rated_levels if sampler.claims.rates else process.levels)(path)
    driven = partial(Brownian, clock=process.u, times=[level.t for level in levels])
    source = chosen_noise(x, generator, seeds, noise, driven)
    return walk(model, sampler, x, levels, source)


def walk(
    model: Model, sampler: Sampler, x: Tensor, levels: list[Level[float]], source: Noise
) -> Iterator[Sample]:
    """The loop of `trajectory`."""
    memory = None
    for t, s in pairwise(levels):
        with torch.no_grad():
            x, memory = sampler.step(model, x, t, s, source, memory)
        yield Sample(x, s.t, memory)


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
    """The end of a `trajectory`: a batch shaped like x at the last time, data at t = 0.

    Args:
        progress: show a bar; the other arguments are those of `trajectory`.
    Warns:
        RuntimeWarning: if a sample is not finite at the end.
    """
    states = trajectory(
        model, sampler, x, steps=steps, grid=grid, times=times, cond=cond, generator=generator,
        seeds=seeds, noise=noise,
    )  # fmt: skip
    if progress:
        from tqdm import tqdm

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
    """Refuse a condition that the model does not take, of another size, or with nan."""
    if not takes_cond(model):
        raise TypeError(f"cond must be left out for {shown(model)}, which takes none")
    entries: Any = cond.items() if isinstance(cond, Mapping) else [("cond", cond)]
    for name, value in entries:
        validate.cond(name, value, count)
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite; got nan or infinity")


# ---- through which levels ----------------------------------------------------------------------


def prepared(
    model: Model, sampler: Sampler, steps: int | None, grid: Grid | None,
    times: Tensor | Sequence[float] | None, cond: Cond | None = None,
) -> tuple[Model, Tensor]:  # fmt: skip
    """The model as the sampler sees it, and the times."""
    path = path_of(model, sampler, steps, grid, times)
    end = end_time(model)
    seen: Model = model if cond is None else Bound(model, cond)
    if sampler.claims.adaptive and end > 0:
        seen = HeldBelow(seen, end)
    return seen, path


def path_of(
    model: Model, sampler: Sampler, steps: int | None, grid: Grid | None,
    times: Tensor | Sequence[float] | None,
) -> Tensor:  # fmt: skip
    """The times of a run, float64 on the CPU: a grid within the trained range, or those given."""
    name = type(sampler).__name__
    if times is not None:
        if steps is not None or grid is not None:
            raise ValueError("times must be given alone, without steps or grid; got both")
        path, end = given_times(model, times), end_time(model)
        crosses = sampler.claims.adaptive and path[-1] < end < path[-2]
        return torch.cat([path[:-1], path.new_tensor([end]), path[-1:]]) if crosses else path
    if sampler.claims.adaptive:
        if steps is not None or grid is not None:
            raise ValueError(
                f"steps must be left out for {name}, which chooses its own; got {steps}"
            )
    elif steps is None:
        raise ValueError(f"steps must be given for {name}; got None; e.g. steps=20")
    begin, end = start_time(model), end_time(model)
    ratio = math.exp(-trained_range(model).high / 2) if end else 0.0
    found = (sampler.grid if grid is None else grid)(model.process, steps, begin, ratio)
    if not end:
        return found
    if sampler.claims.adaptive:
        return torch.cat([found[:1], found.new_tensor([end]), found[1:]])
    return within(found, end)


def start_time(model: Model) -> float:
    """1, or the time of the noisiest level at which the model was trained."""
    low, last = trained_range(model).low, model.process.log_snr(1.0).item()
    return 1.0 if low <= last + 1e-9 * (1 + abs(last)) else model.process.time(low).item()


def end_time(model: Model) -> float:
    """The time of the cleanest level at which the model was trained; 0 if that is the data."""
    high = trained_range(model).high
    return 0.0 if high == math.inf else model.process.time(high).item()


def given_times(model: Model, times: Tensor | Sequence[float]) -> Tensor:
    """Explicit times, checked to decrease; a warning where the model was not trained."""
    path = double(times, "times").cpu()
    if path.ndim != 1 or len(path) < 2:
        raise ValueError(f"times must hold at least two numbers; got shape {tuple(path.shape)}")
    if not bool(path.isfinite().all()):
        raise ValueError("times must be finite; got nan or infinity")
    wrong = (~(path[:-1] > path[1:])).nonzero().flatten().tolist()
    if wrong:
        k, hint = wrong[0], "; reverse them" if len(wrong) == len(path) - 1 else ""
        raise ValueError(
            f"times must decrease from noise to data; got times[{k}]={path[k]:g}, "
            f"times[{k + 1}]={path[k + 1]:g}{hint}"
        )
    low, high, only = trained_range(model)
    log_snr = model.process.log_snr(path[:-1])
    slack = SLACK * (1 + log_snr.abs())
    outside = (log_snr < low - slack) | (log_snr > high + slack)
    if bool(outside.any()):
        at = float(path[:-1][outside][0])
        text = (
            f"log_snr {float(log_snr[outside][0]):.4g} at t={at:.4g} is outside the range "
            f"[{low:.4g}, {high:.4g}] at which the model was trained; use times from "
            f"{start_time(model):.4g} to {end_time(model):.4g}, then 0"
        )
        if only:
            raise ValueError(f"times must lie where the model is defined: {text}")
        warnings.warn(text, stacklevel=6)
    return path


def chosen_noise(
    x: Tensor,
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    noise: Noise | None,
    path: Callable[[Sequence[int]], Noise] = Seeded,
) -> Noise:
    """The one source of noise given; `path` makes that of seeds."""
    if sum(given is not None for given in (generator, seeds, noise)) > 1:
        raise ValueError("generator, seeds and noise must not be given together; got several")
    if noise is not None:
        return IS_NOISE("noise", noise)
    if seeds is None:
        return Generated(generator)
    if isinstance(seeds, Tensor | str) or not hasattr(seeds, "__len__"):
        raise TypeError(
            f"seeds must be a sequence of integers, one per sample; got {shown(seeds)}"
            f"{'; use seeds.tolist()' if isinstance(seeds, Tensor) else ''}"
        )
    if len(seeds) != len(x):
        raise ValueError(f"seeds must hold one seed per sample, {len(x)}; got {len(seeds)}")
    return path(seeds)
