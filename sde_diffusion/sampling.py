"""Sampling: the loop, written once.

Convention: a sampler moves a batch from time t to an earlier time s < t. x is (B, ...) of any rank
from 1 and any floating dtype, which the samples keep.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.model import Model
from sde_diffusion.noise.brownian import Brownian
from sde_diffusion.noise.sources import Generated, Noise, Seeded
from sde_diffusion.processes import Process
from sde_diffusion.samplers.sampler import Memory, Sampler

__all__ = ["Sample", "sample", "trajectory"]


class Sample(NamedTuple):
    """Where a trajectory stands after a step.

    Attributes:
        x: the batch.
        t: its time.
        memory: what the sampler carries on; a solver with steps of its own leaves a report here.
    """

    x: Tensor
    t: float
    memory: Memory


def trajectory(
    model: Model,
    sampler: Sampler,
    x: Tensor,
    *,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    noise: Noise | None = None,
) -> Iterator[Sample]:
    """The states of a batch on its way from noise to data, one per step.

    Args:
        model: what is sampled from.
        sampler: how.
        x: the batch at the first time (B, ...), usually `model.process.prior(shape)`; unchanged.
        steps: number of steps on the sampler's own grid.
        times: any decreasing grid in [0, 1] instead, (n + 1,).
        generator: source of all noise.
        seeds: one per sample instead: each follows a Brownian path of its own (brownian.py), a
            function of its seed alone, the same in any batch and on any number of steps.
        noise: an injected source noise(t, s, like) instead.
    Raises:
        ValueError: naming the argument, if the grid or the batch makes no sense.
    """
    levels = model.process.levels(checked_times(model.process, sampler, steps, times))
    path = partial(Brownian, log_snr=model.process.log_snr, times=[level.t for level in levels])
    source = chosen_noise(x, generator, seeds, noise, path)
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
    times: Tensor | Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    noise: Noise | None = None,
    progress: bool = False,
) -> Tensor:
    """The end of a `trajectory`: a batch shaped like x at the last time, data at t = 0.

    Args:
        progress: show a bar; the other arguments are those of `trajectory`.
    """
    times = checked_times(model.process, sampler, steps, times)
    states = trajectory(
        model, sampler, x, times=times, generator=generator, seeds=seeds, noise=noise
    )
    if progress:
        from tqdm import tqdm

        states = tqdm(states, total=len(times) - 1, desc=type(sampler).__name__)
    for state in states:
        x = state.x
    return x


def checked_times(
    process: Process, sampler: Sampler, steps: int | None, times: Tensor | Sequence[float] | None
) -> Tensor:
    """The grid asked for, float64 on the CPU, or a ValueError that says what is wrong with it."""
    if steps is not None and times is not None:
        raise ValueError("give steps (the sampler's own grid) or times (yours), not both")
    if times is None:
        return sampler.grid(process, steps)
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must hold at least two numbers; got shape {tuple(times.shape)}")
    if not bool((times[:-1] > times[1:]).all()):
        first, last = times[0].item(), times[-1].item()
        ends = f"times[0]={first:.2f}, times[-1]={last:.2f}"
        hint = " (reverse it?)" if first < last else ""
        raise ValueError(f"times must decrease from noise to data; got {ends}{hint}")
    return times


def chosen_noise(
    x: Tensor,
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
    noise: Noise | None,
    path: Callable[[Sequence[int]], Noise] = Seeded,
) -> Noise:
    """The one source of noise asked for; `path` makes that of seeds."""
    validate.batch("x", x)
    if sum(given is not None for given in (generator, seeds, noise)) > 1:
        raise ValueError("give one of generator, seeds and noise")
    if noise is not None:
        return noise
    if seeds is None:
        return Generated(generator)
    if len(seeds) != len(x):
        raise ValueError(f"seeds must hold one seed per sample, {len(x)}; got {len(seeds)}")
    return path(seeds)
