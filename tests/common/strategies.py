"""What hypothesis draws: chains, processes, grids, batches of any shape, type and layout.

Long tables and batches are filled by numpy from a drawn seed: hypothesis shrinks the seed, the size
and the range, which is enough to read a failure, and draws a table of 2,000 betas in no time.
"""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sde_diffusion as sd

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FULL = (torch.float32, torch.float64)

SEEDS = st.integers(0, 2**32 - 1)


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    """10^e, e in [low, high]: every order of magnitude is as likely as any other."""
    return st.floats(low, high).map(lambda e: 10.0**e)


def evenly(*strategies: st.SearchStrategy) -> st.SearchStrategy:
    """One of them, each as likely; `one_of` leans on the first."""
    return st.sampled_from(strategies).flatmap(lambda strategy: strategy)


# ---- chains ----------------------------------------------------------------------------------


@st.composite
def betas(
    draw, max_steps: int = 2000, low: float = 1e-300, high: float = 1 - 2.0**-53, terminal=True
) -> tuple[float, ...]:
    """A table of N in 1 .. max_steps betas in [low, high]; the last may be 1 if `terminal`.

    Short ones are drawn entry by entry. Long ones are even in log beta or, near 1, in
    log(1 - beta), between drawn ends, rising or in no order.
    """
    entry = st.one_of(st.floats(low, high), powers(math.log10(low), math.log10(high)))
    entry = entry.map(lambda beta: min(max(beta, low), high))
    if draw(st.booleans()):
        table = draw(st.lists(entry, min_size=1, max_size=min(6, max_steps)))
    else:
        n = draw(st.one_of(st.integers(1, min(60, max_steps)), st.integers(1, max_steps)))
        ends = sorted(draw(st.tuples(entry, entry)))
        rng = np.random.default_rng(draw(SEEDS))
        if ends[0] > 0.5:
            drawn = 1 - np.exp(rng.uniform(*np.log1p(-np.array(ends[::-1])), n))
        else:
            drawn = np.exp(rng.uniform(*np.log(ends), n))
        if draw(st.booleans()):
            drawn = np.sort(drawn)
        table = np.clip(drawn, low, high).tolist()
    if terminal and draw(st.integers(0, 4)) == 0:
        table[-1] = 1.0
    return tuple(table)


# ---- processes -------------------------------------------------------------------------------

RATES = st.tuples(powers(-3, 1), st.one_of(st.just(0.0), powers(-2, 2)))  # beta_min and the rise
PARAMETERS = {
    sd.VP: RATES.map(lambda rates: sd.VP(rates[0], sum(rates))),
    sd.SubVP: RATES.map(lambda rates: sd.SubVP(rates[0], sum(rates))),
    sd.OU: powers(-2, 2).map(sd.OU),
    sd.Cosine: st.one_of(st.just(0.0), powers(-4, 1)).map(sd.Cosine),
    sd.RectifiedFlow: st.just(sd.RectifiedFlow()),
    sd.VE: st.tuples(powers(-3, 0), powers(0.5, 4)).map(lambda p: sd.VE(p[0], p[0] * p[1])),
    sd.EDM: powers(-1, 3).map(sd.EDM),
}


def falling(betas: tuple[float, ...]) -> bool:
    """True if every beta lowers the log-SNR in float64: a process that is flat is refused."""
    log_snr = sd.Discrete(betas).log_snr(torch.arange(len(betas) + 1).double() / len(betas))
    return bool((log_snr.diff()[1:] < 0).all())


def tables(**limits) -> st.SearchStrategy[tuple[float, ...]]:
    """Betas of chains that have an SDE: with beta_1 = 1 there is no time before t_max = 0."""
    return betas(**limits).filter(lambda table: table[0] < 1)


GENTLE = st.tuples(powers(-1, 0), powers(0, 1.3))
CALM = {
    sd.VP: GENTLE.map(lambda rates: sd.VP(rates[0], sum(rates))),
    sd.SubVP: GENTLE.map(lambda rates: sd.SubVP(rates[0], sum(rates))),
    sd.OU: powers(-0.5, 0.7).map(sd.OU),
    sd.VE: st.tuples(powers(-2, 0), powers(0.5, 1.3)).map(lambda p: sd.VE(p[0], p[0] * p[1])),
    sd.EDM: powers(0, 1.3).map(sd.EDM),
}


def kinds(
    closed: dict, tabled: st.SearchStrategy
) -> dict[str, st.SearchStrategy[sd.processes.Process]]:
    """By name, so that a test can be parametrized: hypothesis alone would hardly draw those with
    no parameters, which have but one example."""
    named = {kind.__name__: strategy for kind, strategy in closed.items()}
    chains = {
        "Discrete": tabled.map(sd.Discrete),
        "Interpolated": tabled.map(sd.processes.Interpolated),
    }
    return named | chains


PROCESSES = kinds(PARAMETERS, tables(max_steps=60, low=1e-6, high=0.9999))
CALM_PROCESSES = kinds(PARAMETERS | CALM, tables(max_steps=40, low=1e-4, high=0.99))


def processes() -> st.SearchStrategy[sd.processes.Process]:
    return evenly(*PROCESSES.values())


# ---- times -----------------------------------------------------------------------------------


def times(first: float = 1e-5, last: float = 1.0) -> st.SearchStrategy[float]:
    """Any time in [first, last], as likely near data as near noise. Promises hold from 1e-5 on."""
    near_data = powers(math.log10(first), math.log10(last)).map(lambda t: min(max(t, first), last))
    return st.one_of(st.floats(first, last), near_data)


@st.composite
def grids(draw, first: float = 1e-5, last: float = 1.0, max_steps: int = 8) -> list[float]:
    """Any grid in {0} and [first, last] that decreases, mostly from `last` down to 0."""
    inner = draw(st.lists(times(first, last), min_size=1, max_size=max_steps, unique=True))
    start = [last] if draw(st.booleans()) else []
    end = [] if len({*inner, *start}) > 1 and draw(st.integers(0, 3)) == 0 else [0.0]
    return sorted({*inner, *start, *end}, reverse=True)


@st.composite
def sub_chains(draw, num_steps: int) -> list[int]:
    """Any decreasing indices of a chain of N steps, at least two, from N or below to 0 or above."""
    indices = draw(st.sets(st.integers(0, num_steps), min_size=1, max_size=12))
    if draw(st.booleans()) or len(indices) == 1:
        indices |= {0} if max(indices) > 0 else {num_steps}
    return sorted(indices, reverse=True)


# ---- batches ---------------------------------------------------------------------------------


@st.composite
def shapes(draw, empty: bool = True) -> tuple[int, ...]:
    """(B, ...), 1-d to 5-d; about one in five has a size 0.

    What comes first in a `sampled_from` is what hypothesis prefers.
    """
    ndim = draw(st.sampled_from([2, 3, 4, 1, 5]))
    shape = [draw(st.sampled_from([2, 3, 1])) for _ in range(ndim)]
    if empty and draw(st.integers(0, 4)) == 1:
        shape[draw(st.integers(0, ndim - 1))] = 0
    return tuple(shape)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def strided(x: Tensor) -> Tensor:
    """Every second entry of a larger tensor, which starts inside its storage."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def expanded(x: Tensor) -> Tensor:
    """All samples are the first one, in one place of the memory."""
    return x[:1].expand(x.shape) if len(x) else x


def channels_last(x: Tensor) -> Tensor:
    """For images and volumes; others are transposed."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[x.ndim]) if x.ndim in formats else transposed(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": transposed,
    "strided": strided,
    "expanded": expanded,
    "channels-last": channels_last,
}


@st.composite
def batches(draw, shape=None, dtypes=FLOATS, layouts=tuple(LAYOUTS)) -> Tensor:
    """A batch of standard normal numbers of any shape, floating type and layout."""
    shape = draw(shapes()) if shape is None else shape
    values = np.random.default_rng(draw(SEEDS)).standard_normal(shape)
    x = torch.from_numpy(np.asarray(values)).to(draw(st.sampled_from(dtypes)))
    return LAYOUTS[draw(st.sampled_from(layouts))](x)


# ---- models and samplers ---------------------------------------------------------------------

PARAMETERIZATIONS = powers(-1, 1).map(
    lambda r: (sd.Eps(), sd.X0(), sd.V(), sd.Score(), sd.Velocity(), sd.models.Preconditioned(r))
)


class Squashing(torch.nn.Module):
    """A network without weights, whose answer is bounded: tanh(x + c), coordinate by coordinate.

    To half precision it answers in float32, as a network's last norm may.
    """

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        seen = x + c.reshape(-1, *[1] * (x.ndim - 1))
        return torch.tanh(seen if x.dtype in FULL else seen.float())


@st.composite
def models(draw, process: sd.processes.Process, meanings) -> object:
    """The exact model of Gaussian data, or a network read in one of these parameterizations."""
    if draw(st.booleans()):
        return sd.exact.Gaussian(process, draw(st.floats(-1, 1)), draw(powers(-2, 1)))
    return sd.Denoiser(Squashing(), process, draw(st.sampled_from(meanings)))


LOOSE = {"rtol": 1e-3, "atol": 1e-3}
EXPLICIT = [method for method in sd.TorchODE.FIXED if method != "implicit_adams"]
ROW_BY_ROW = {  # no error norm over the batch
    "ancestral-beta": st.just(sd.Ancestral("beta")),
    "ancestral": st.floats(0, 1).map(lambda eta: sd.Ancestral(eta=eta)),
    "euler-maruyama": st.just(sd.EulerMaruyama()),
    "torchsde": st.sampled_from([sd.samplers.TorchSDE(), sd.samplers.TorchSDE("milstein")]),
    "heun": st.just(sd.Heun()),
    "adams": st.builds(sd.Adams, st.integers(1, 5), st.floats(0.5, 3)),
    "torch-ode-explicit": st.sampled_from(EXPLICIT).map(sd.TorchODE),
}
SAMPLERS = ROW_BY_ROW | {
    "torch-ode": st.sampled_from(sd.TorchODE.METHODS).map(lambda m: sd.TorchODE(m, **LOOSE)),
    "scipy-ode": st.sampled_from(sd.samplers.ScipyODE.METHODS).map(
        lambda m: sd.samplers.ScipyODE(m, **LOOSE)
    ),
    "torchsde-srk": st.just(sd.samplers.TorchSDE("srk")),
    "adaptive-ode": st.just(sd.AdaptiveODE(**LOOSE)),
    "adaptive-sde": st.just(sd.AdaptiveSDE(rtol=0.1, atol=0.1)),
}


def steps_in_t(sampler: object) -> bool:
    """Whether it needs drift and diffusion, and so starts at t_max."""
    return sampler.claims.rates


def draws_its_own_path(sampler: object) -> bool:
    """Whether its noise is torchsde's, which takes a generator and neither seeds nor a source."""
    return sampler == sd.samplers.TorchSDE("srk")


def cancellation(sampler: object, process: sd.processes.Process, times: list[float]) -> float:
    """How many times larger than the slopes the terms of an Adams step are, at most.

    (step / gap)^(k-1), the gaps those of u between the k slopes that the step looks back to.
    """
    if not isinstance(sampler, sd.Adams):
        return 1.0
    u = [level.u for level in process.levels(torch.tensor(times, dtype=torch.float64))]
    gaps, most = [start - end for start, end in pairwise(u)], 1.0
    for n in range(1, len(gaps)):
        least = min(gaps[max(0, n + 1 - sampler.k) : n], default=math.inf)
        most = max(most, (gaps[n] / least) ** (sampler.k - 1) if least > 0 else math.inf)
    return most


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of `sample`, but for the batch and the source of noise."""

    model: object
    sampler: object
    grid: tuple[tuple[str, object], ...]  # steps or times, or neither
    magnified: float = 1.0  # what rounding comes to by cancellation

    def run(self, x: Tensor, **source) -> Tensor:
        return sd.sample(self.model, self.sampler, x, **dict(self.grid), **source)

    def largest(self, x: Tensor, **source) -> float:
        """The size of the largest state on the way."""
        path = sd.trajectory(self.model, self.sampler, x, **dict(self.grid), **source)
        return max(float(state.abs().max()) for state in (x, *(at.x for at in path)))


def most_steps(process: sd.processes.Process, sampler: object) -> float:
    """How many its own grid may have: on a chain, those between the start and data."""
    start = process.t_max if steps_in_t(sampler) else 1.0
    on_its_times = isinstance(process, sd.Discrete) and not isinstance(sampler, sd.Heun | sd.Adams)
    return round(start * process.num_steps) if on_its_times else math.inf


@st.composite
def jobs(draw, x: Tensor, samplers: st.SearchStrategy) -> Job:
    """Any model, one of the samplers, and its own grid or any other that it takes, for the batch x.

    Where alpha is nearly 0 eps and the score say next to nothing of x0, and in front of a large
    sigma a bounded score is no bounded network. float16 ends at 65504, beyond which are (x - x0) /
    sigma^2, the score by way of x0, at early times, and the states of an explicit SDE solver whose
    steps are too long for its drift.
    """
    half, sampler = x.dtype not in FULL, draw(samplers)
    slow_drift = powers(-1, 0).map(sd.OU)
    process = draw(slow_drift if half and steps_in_t(sampler) else evenly(*CALM_PROCESSES.values()))
    meanings = [sd.V(), sd.Velocity(), sd.models.Preconditioned()]
    if not half:
        meanings.append(sd.X0())
    if process.prior_std == 1 and float(process.alpha(1.0)) > 1e-3:
        meanings += [sd.Eps(), sd.Score()]
    model = draw(models(process, meanings))
    times = None
    if draw(st.booleans()):
        last = process.t_max if steps_in_t(sampler) else 1.0
        most = 2 if sampler.claims.adaptive else 8  # each interval costs them a start
        times = draw(grids(1e-2 if half else 1e-5, last, most))
    if times is not None and (magnified := cancellation(sampler, process, times)) <= 1e3:
        return Job(model, sampler, (("times", tuple(times)),), magnified)
    if sampler.claims.adaptive:
        return Job(model, sampler, ())
    return Job(
        model, sampler, (("steps", draw(st.integers(1, min(8, most_steps(process, sampler))))),)
    )


# ---- what the property tests share -------------------------------------------------------------


def for_every(name, strategies):
    """Parametrized, with a fifth of the profile's examples for each."""
    share = settings(max_examples=settings.default.max_examples // 5)
    mark = pytest.mark.parametrize(name, strategies.values(), ids=strategies.keys())
    return lambda test: mark(share(given(data=st.data())(test)))


def refused(attempt, words):
    """The attempt ends in one line that has the words, and in nothing from inside torch."""
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        attempt()
    assert "\n" not in str(caught.value)
