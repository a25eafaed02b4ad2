"""Sampling: the loop over the steps of a sampler, with a model, a grid and a source of noise.

Convention: a sampler moves a batch from time t to an earlier time s < t. x is (B, ...), of any rank
from 1 and any floating-point dtype; the samples have the same dtype.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sde_diffusion import validate
from sde_diffusion.grids import Grid
from sde_diffusion.grids.grid import IS_GRID, cut
from sde_diffusion.models import conditions
from sde_diffusion.models.derivatives import leaf, ordinary, recorded
from sde_diffusion.models.model import (
    IS_MODEL,
    Bound,
    HeldBelow,
    KnownBelow,
    Model,
    evaluating,
    finite,
    modules_of,
    parts,
    trained_range,
)
from sde_diffusion.noise.brownian import Brownian
from sde_diffusion.noise.sources import (
    Generated,
    Injected,
    Noise,
    Repeated,
    Seeded,
    sequence_of_seeds,
    start,
)
from sde_diffusion.processes.level import Level, coordinates, double, wide
from sde_diffusion.progress import bar
from sde_diffusion.samplers.sampler import IS_SAMPLER, Memory, Sampler
from sde_diffusion.validate import Choice, Cond, FloatBatch, Kind, shown

__all__ = ["Sample", "encode", "prior", "sample", "trajectory"]

IS_NOISE = Kind("a function noise(t, s, like)", "__call__")
Grad = Annotated[bool | str, Choice(False, True, "checkpoint")]

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
    validate.check_threads()
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
    grad: Grad = False,
) -> Iterator[Sample]:
    """Iterate over the states of a batch from noise to data, one per step.

    Networks run in eval mode in each step, also those of guidances; between the steps each module
    has the mode that it had before.

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
            sample, whatever the rest of the batch. Other numbers of steps use nearly the same path
            (noise/brownian.py).
        noise: a function noise(t, s, like), instead of a generator.
        grad: True to differentiate the states by x, cond and the weights of networks; times and
            levels are constants. "checkpoint" computes each step again in the backward pass, with
            the same noise: the memory is that of one step and of the states.
    Raises:
        ValueError, TypeError: naming the argument.
    Warns:
        UserWarning: if x or cond requires a gradient, without grad=True.
        RuntimeWarning: if a sample is not finite at the end.
    """
    path = path_of(model, sampler, steps, grid, times)
    return states(model, sampler, x, path, cond, grad, generator, seeds, noise)


def states(
    model: Model, sampler: Sampler, x: Tensor, path: Tensor, cond: Cond | None, grad: bool | str,
    generator: torch.Generator | None = None, seeds: Sequence[int] | None = None,
    noise: Noise | None = None,
) -> Iterator[Sample]:  # fmt: skip
    """Check the arguments; return the states after each step along `path`, down or up."""
    validate.check_threads()
    if cond is not None:
        check_conditions(model, cond, len(x))
    check_grad(sampler, x, cond, grad)
    process, end = model.process, end_time(model)
    modules, hooked = modules_of(model, sampler), parts(model, sampler)
    with evaluating(modules):
        call_each("before_run", hooked, wide(x))
    levels = (process.rated_levels if sampler.claims.rates else process.levels)(path)
    driven = partial(Brownian, clock=process.u, times=[level.t for level in levels])
    source = chosen_noise(x, generator, seeds, noise, driven)
    wrapped: Model = model if cond is None else Bound(model, cond)
    if levels[0].sigma == 0:
        wrapped = KnownBelow(wrapped, x, end)
    elif sampler.claims.adaptive and end > 0:
        wrapped = HeldBelow(wrapped, end)
    return walk(wrapped, sampler, x, levels, source, grad, modules, hooked)


def walk(
    model: Model, sampler: Sampler, x: Tensor, levels: Sequence[Level[float]], source: Noise,
    grad: bool | str, modules: Sequence[nn.Module], hooked: Sequence[object],
) -> Iterator[Sample]:  # fmt: skip
    """Run the loop of `trajectory`, whose arguments are checked before the first step.

    In half precision small steps would change nothing, so the state is kept in float32.
    """
    memory, dtype, x = None, x.dtype, ordinary(wide(x))
    if grad and not x.requires_grad:  # so that gradients of guidances have those by weights
        x = leaf(x)

    def step(x: Tensor, t: Level[float], s: Level[float], noise: Noise, memory: Memory) -> Any:
        with recorded() if grad else torch.no_grad(), evaluating(modules):
            return sampler.step(model, x, t, s, noise, memory)

    for t, s in pairwise(levels):
        given, version = x, None if x.is_inference() else x._version
        if grad == "checkpoint":
            draws: list[Any] = []  # in the backward pass the step repeats them
            again = partial(replayed, step, x, t, s, source, memory, draws)
            with recorded():
                x, memory = checkpoint(again, use_reentrant=False)
        else:
            x, memory = step(x, t, s, source, memory)
        if version is not None and given._version != version:
            advice = "look for inplace=True in a first layer"
            raise ValueError(f"x must not be changed by the model or {sampler}; got one; {advice}")
        if s is levels[-1]:
            warn_of_divergence(x.to(dtype), type(sampler).__name__)
        yield Sample(x.to(dtype), s.t, memory)
    if levels[-1].t == 0:
        with evaluating(modules):
            call_each("after_run", hooked, x.detach())


def replayed(
    step: Callable[..., Any], x: Tensor, t: Level[float], s: Level[float], source: Noise,
    memory: Memory, draws: list[Any],
) -> Any:  # fmt: skip
    """Make a step with the noise in `draws`, which the first call fills."""
    return step(x, t, s, Repeated(source, draws), memory)


def call_each(hook: str, parts: Sequence[object], x: Tensor) -> None:
    """Call the hook, if it exists, of each part of a run with the batch, inner parts first.

    `before_run` refuses arguments that need the batch to be checked; `after_run` warns of samples
    at t = 0 that do not fit a measurement.
    """
    for part in reversed(parts):
        getattr(part, hook, lambda _: None)(x)


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
    grad: Grad = False,
    progress: bool = False,
) -> Tensor:
    """Return the last batch of a `trajectory`, shaped like x: data if the last time is 0.

    Args:
        progress: show a progress bar, in a log file one line a minute; the other arguments are
            those of `trajectory`.
    """
    path = trajectory(
        model, sampler, x, steps=steps, grid=grid, times=times, cond=cond, generator=generator,
        seeds=seeds, noise=noise, grad=grad,
    )  # fmt: skip
    if not progress:
        return last(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `trajectory` has warned
        total = len(path_of(model, sampler, steps, grid, times)) - 1
    return last(watched(path, total, sampler))


@validate.arguments
def encode(
    model: Annotated[Model, IS_MODEL],
    sampler: Annotated[Sampler, IS_SAMPLER],
    x0: Annotated[FloatBatch, finite],
    *,
    steps: int | None = None,
    grid: Annotated[Grid, IS_GRID] | None = None,
    times: Tensor | Sequence[float] | None = None,
    cond: Cond | None = None,
    grad: Grad = False,
    progress: bool = False,
) -> Tensor:
    """Return the noise from which the probability flow leads to the data x0, shaped like x0.

    The inverse of `sample` with the same arguments, up to the error of the solver: the path of
    `sample`, upwards. At t = 0 the data are known and E[eps | x_0] = 0, so the model is not called
    there. If it was trained down to a level above the data, the path up to this level is
    x = alpha x0.

    Args:
        sampler: one that draws no noise: Heun, Ancestral(eta=0), Adams, DPMSolver, TorchODE or
            ScipyODE. Others refuse the step up.
        times: increasing times in [0, 1], (n + 1,); x0 is the batch at the first.
        steps, grid, cond, grad, progress: as in `sample`.
    """
    nodes = path_of(model, sampler, steps, grid, times, up=True)
    path = states(model, sampler, x0, nodes, cond, grad)
    return last(watched(path, len(nodes) - 1, sampler) if progress else path)


def last(path: Iterator[Sample]) -> Tensor:
    """Run a path to its end and return the last batch; no other state stays in memory."""
    return deque(path, maxlen=1).pop().x


def watched(path: Iterator[Sample], total: int, sampler: Sampler) -> Iterator[Sample]:
    """Show the progress along a path."""
    return iter(bar(path, total=total, desc=type(sampler).__name__))


def warn_of_divergence(x: Tensor, name: str) -> None:
    """Warn of samples that are not finite at the end of a run, as adaptive solvers refuse them."""
    rows = (~coordinates(x).isfinite().all(1)).nonzero().flatten().tolist()
    if rows:
        validate.warn(
            f"{len(rows)} of {len(x)} samples are not finite at the end, the first at row "
            f"{rows[0]}: {name} or the model diverged",
            RuntimeWarning,
        )


def check_grad(sampler: Sampler, x: Tensor, cond: Cond | None, grad: bool | str) -> None:
    """Refuse derivatives that a sampler does not have; warn if one is lost."""
    name = type(sampler).__name__
    if grad and not sampler.claims.differentiable:
        raise ValueError(f"grad must be False for {name}, which has no derivative; got {grad}")
    if grad == "checkpoint" and sampler.claims.adaptive:
        raise ValueError(f"grad must be True or False for {name}, one step; got 'checkpoint'")
    inputs = {"x": x} | ({} if cond is None else dict(conditions.entries(cond)))
    if not grad and torch.is_grad_enabled():
        lost = [name for name, value in inputs.items() if value.requires_grad]
        if lost:
            validate.warn(f"{lost[0]} requires a gradient, which the samples lack; use grad=True")


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
    times: Tensor | Sequence[float] | None, *, up: bool = False,
) -> Tensor:  # fmt: skip
    """Return the times of a run, float64 on the CPU: `times`, or a grid in the trained range.

    They decrease, or increase if `up`.
    """
    name, adaptive, end = type(sampler).__name__, sampler.claims.adaptive, end_time(model)
    if times is not None:
        if steps is not None or grid is not None:
            raise ValueError("times must be given alone, without steps or grid; got both")
        path = given_times(model, times, up)
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
    return path.flip(0) if up else path


def start_time(model: Model) -> float:
    """Return 1, or the time of the noisiest level at which the model was trained."""
    low, last = trained_range(model).low, model.process.log_snr(1.0).item()
    return 1.0 if low <= last + 1e-9 * (1 + abs(last)) else model.process.time(low).item()


def end_time(model: Model) -> float:
    """Return the time of the cleanest level at which the model was trained; 0 if it is the data."""
    high = trained_range(model).high
    return 0.0 if high == math.inf else model.process.time(high).item()


def given_times(model: Model, times: Tensor | Sequence[float], up: bool) -> Tensor:
    """Return explicit times from the last to the first; they must decrease, or increase if `up`.

    Warn of times at which the model is evaluated but was not trained.
    """
    path = finite("times", double(times, "times").cpu())
    if path.ndim != 1 or len(path) < 2:
        raise ValueError(f"times must hold at least two numbers; got shape {tuple(path.shape)}")
    ordered = path[:-1] < path[1:] if up else path[:-1] > path[1:]
    wrong = (~ordered).nonzero().flatten().tolist()
    if wrong:
        k, hint = wrong[0], "; reverse them" if len(wrong) == len(path) - 1 else ""
        got = f"times[{k}]={path[k]:g}, times[{k + 1}]={path[k + 1]:g}"
        rule = "increase from data to noise" if up else "decrease from noise to data"
        hint = f"{hint}, or use encode" if hint and not up else hint
        raise ValueError(f"times must {rule}; got {got}{hint}")
    path = path.flip(0) if up else path
    steps = getattr(model.process, "chain_steps", None)
    if steps and getattr(times, "dtype", None) == torch.float32:  # i/N, to the rounding of float32
        nodes = (path * steps).round() / steps
        path = torch.where((path - nodes).abs() <= 2.0**-24 * nodes, nodes, path)
    called = path[path > 0] if up else path[:-1]
    low, high, only = trained_range(model)
    log_snr = model.process.log_snr(called)
    slack = SLACK * (1 + log_snr.abs())
    outside = ((log_snr < low - slack) | (log_snr > high + slack)).nonzero().flatten().tolist()
    if outside:
        k, first, last = outside[0], start_time(model), end_time(model)
        text = (
            f"log_snr {log_snr[k]:.4g} at t={called[k]:.4g} is outside the range [{low:.4g}, "
            f"{high:.4g}] at which the model was trained; use times from {first:.4g} to "
            f"{last:.4g}, then 0"
        )
        if only:
            raise ValueError(f"times must lie where the model is defined: {text}")
        validate.warn(text)
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
        known = isinstance(noise, Generated | Seeded | Brownian)
        return noise if known else Injected(IS_NOISE("noise", noise))
    if seeds is None:
        return Generated(generator)
    if len(sequence_of_seeds(seeds)) != len(x):
        raise ValueError(f"seeds must hold one seed per sample, {len(x)}; got {len(seeds)}")
    return path(seeds)
