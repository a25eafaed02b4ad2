r"""The exact law of a sampler's output on Gaussian data, and what each step contributed to it.

For Gaussian data the exact model is affine, so a sampler's output is affine in its start and in
each of its noise draws. One run of its real code on a batch of basis inputs (nothing; a unit start;
a unit impulse in each draw) therefore gives its exact law, at the end and at every network call on
the way, with no Monte Carlo.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.model import Model
from sde_diffusion.processes import Level, Process
from sde_diffusion.samplers.sampler import Sampler
from sde_diffusion.sampling import path_of
from sde_diffusion.verify import probe
from sde_diffusion.verify.gaussians import ending, gaussian_kl, gaussian_w2, listed_numbers, thinned
from sde_diffusion.verify.outliers import odd_draws, odd_steps, unjudged
from sde_diffusion.verify.probe import Asked

__all__ = ["Draw", "Law", "Step", "law", "measured", "on_process_of"]

MOST = 10**8  # numbers that a law may take, 0.8 GB


class Step(NamedTuple):
    """The state at a network call, or at the end.

    Attributes:
        t: its time.
        mean, covariance: its law when the run starts from the data's exact law at the first time
            (from N(0, I) if the model does not say what that is).
        gain: (d, d), state per unit of start.
        exact: mean and covariance of the data's exact law at t, if the model knows it.
        log_snr: of the level.
    """

    t: float
    mean: Tensor
    covariance: Tensor
    gain: Tensor
    exact: tuple[Tensor, Tensor] | None
    log_snr: float

    @property
    def unit(self) -> float:
        """Standard deviation of a coordinate of the data at t."""
        return math.nan if self.exact is None else float(self.exact[1].diagonal().mean()) ** 0.5

    @property
    def departure(self) -> float:
        """W2 from the data's exact law at t, in its standard deviations; nan if that is unknown."""
        if self.exact is None:
            return math.nan
        return gaussian_w2((self.mean, self.covariance), self.exact) / self.unit

    @property
    def shift(self) -> list[float]:
        """The same with signs: of the mean (d), then of log det covariance / 2."""
        if self.exact is None:
            return []
        volume = float(torch.logdet(self.covariance) - torch.logdet(self.exact[1])) / 2
        return [*((self.mean - self.exact[0]) / self.unit).tolist(), max(volume, -100.0)]

    def added(self, before: "Step") -> float:
        """How far the way from an earlier state took the law from the data's, in its deviations.

        With M the map from that state to this one, what M makes of the earlier departure is taken
        off: for a scheme without memory this is the departure after one step from the exact law.
        """
        if self.exact is None or before.exact is None:
            return math.nan
        by = self.gain @ torch.linalg.pinv(before.gain)
        mean = self.mean - self.exact[0] - by @ (before.mean - before.exact[0])
        spread = self.covariance - self.exact[1]
        spread = spread - by @ (before.covariance - before.exact[1]) @ by.T
        unit = self.unit
        return math.hypot(float(mean.norm()) / unit, float(spread.norm()) / (2 * unit**2))


class Draw(NamedTuple):
    """A noise draw.

    Attributes:
        t, s: times of the call after the draw before it, where its step began, and of the call
            after it; s is the last time after the last call.
        added: standard deviation it adds to the state at s.
        gain: standard deviation it adds to the output.
        share: `added` by that of the forward kernel from s to t, which the reverse SDE adds for
            small steps; DDPM's small variance has sigma_s / sigma_t, a flow none; nan if t is not
            noisier than s.
    """

    t: float
    s: float
    added: float
    gain: float
    share: float


@dataclass(frozen=True, repr=False)
class Law:
    """The Gaussian law of a sampler's output, and what it is made of; print it.

    Attributes:
        sampler: its name.
        mean: (d,), started from the prior.
        covariance: (d, d), started from the prior.
        start_gain: (d, d), output per unit of start.
        noise_gains: (draws, d, d), output per unit of each noise draw, in order.
        steps: the state at each call and at the end.
        draws: each noise draw.
        data: mean and covariance of the data's exact law at the last time, if the model knows it.
        finish: sigma / alpha at the last call, if the end is at sigma = 0, else 0.
        remark: what an adapter noticed on the way.
    """

    sampler: str
    mean: Tensor
    covariance: Tensor
    start_gain: Tensor
    noise_gains: Tensor
    steps: tuple[Step, ...]
    draws: tuple[Draw, ...]
    data: tuple[Tensor, Tensor] | None
    finish: float = 0.0
    remark: str = ""

    def w2(self, mean: Tensor | None = None, covariance: Tensor | None = None) -> float:
        """Wasserstein-2 distance to N(mean, covariance), by default to the data."""
        return gaussian_w2((self.mean, self.covariance), self._other(mean, covariance))

    def kl(self, mean: Tensor | None = None, covariance: Tensor | None = None) -> float:
        """KL(output || N(mean, covariance)) in nats, by default to the data; it may be inf."""
        return gaussian_kl((self.mean, self.covariance), self._other(mean, covariance))

    @property
    def departure(self) -> float:
        """W2 to the data of the output when started from the data's exact law at the first time."""
        if self.data is None:
            raise TypeError("the model does not say what law its data have: no mean, covariance")
        end = self.steps[-1]
        return gaussian_w2((end.mean, end.covariance), self.data)

    @property
    def left(self) -> float:
        r"""The W2 that an Euler step of the flow from the last call to sigma = 0 leaves.

        Of a coordinate of variance v it makes v^(1/2) (1 + s^2 / v)^(-1/2), s = sigma / alpha: it
        lacks s^2 / (2 v^(1/2)) of its standard deviation, whatever the other steps are.
        """
        if self.data is None:
            return math.nan
        values = torch.linalg.eigvalsh(self.data[1])
        lacking = values.sqrt() * (1 - torch.rsqrt(1 + self.finish**2 / values))
        return float(lacking.norm())

    @property
    def faults(self) -> list[str]:
        """What stands out from its neighbours by more than a smooth scheme can."""
        remarks = [self.remark] if self.remark else []
        return [*remarks, *odd_draws(self.draws, self.steps), *odd_steps(self.steps)]

    @property
    def holds(self) -> bool:
        """Whether no step stands out."""
        return not self.faults

    @property
    def verdict(self) -> str:
        if self.faults:
            more = f"; and {len(self.faults) - 3} more" if len(self.faults) > 3 else ""
            return "; ".join(self.faults[:3]) + more
        told = unjudged(self.steps) or "no step stands out (the first and last three not judged)"
        return f"affine, each sample for itself; {told}"

    def __str__(self) -> str:
        calls, used = len(self.steps) - 1, [draw_of for draw_of in self.draws if draw_of.added > 0]
        rows = [f"law of {self.sampler}: {calls} calls, {len(used)} draws"]
        variances = self.covariance.diagonal()
        rows.append(f"  mean {listed_numbers(self.mean)}   variance {listed_numbers(variances)}")
        if self.data is not None:
            rows.append(f"  W2 to the data {self.w2():.3e}   KL {self.kl():.3e} nats")
            rows.append(f"  W2 if started from the data's own law {self.departure:.3e}")
        rows.append(f"  {'t':>10}{'departure':>12}{'draw adds':>12}{'share':>8}{'gain':>12}")
        by_call = {draw_of.t: draw_of for draw_of in used}
        for index in thinned(len(self.steps), 12):
            step = self.steps[index]
            row = f"  {step.t:10.4g}{step.departure:12.2e}"
            draw_of = by_call.get(step.t) if index < calls else None
            if draw_of is not None:
                row += f"{draw_of.added:12.3e}{draw_of.share:8.3f}{draw_of.gain:12.3e}"
            rows.append(row)
        if used and used[-1].t == self.steps[-2].t:
            rows.append(f"  the last step adds noise to the samples, std {used[-1].added:.3e}")
        return "\n".join([*rows, *ending(
            self.verdict,
            "that more steps would come nearer (order, limit), that each step is the published "
            "one (identities), nor anything of data that are not Gaussian",
        )])  # fmt: skip

    __repr__ = __str__

    def _other(self, mean: Tensor | None, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
        if mean is not None and covariance is not None:
            d = self.mean.numel()
            for name, value, shape in (("mean", mean, (d,)), ("covariance", covariance, (d, d))):
                if tuple(getattr(value, "shape", ("a number",))) != shape:
                    raise ValueError(f"{name} must be a tensor of shape {shape}; got {value!r:.80}")
            if not bool((torch.linalg.eigvalsh(covariance) >= 0).all()):
                raise ValueError("covariance must be positive semi-definite")
            return mean.double(), covariance.double()
        if mean is not None or covariance is not None:
            raise TypeError("give both mean and covariance, or neither for the data's")
        if self.data is None:
            raise TypeError("the model does not say what law its data have: give mean, covariance")
        return self.data


def law(
    sampler: Sampler,
    data: Model,
    process: Process | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    shape: Sequence[int] | None = None,
) -> Law:
    """The exact output law of a fixed-step sampler on Gaussian data.

    Args:
        sampler: one that takes its noise from `noise` and is affine for an affine model: any of
            ours with fixed steps, or a peer's in one of the adapters.
        data: the exact model of Gaussian data, or any other affine one.
        process: on which process; by default the sampler's own, as an adapter has, or the model's.
        times, steps: as in `sample`.
        shape: of one sample, of d coordinates; an exact model knows its own.
    Raises:
        NotAffine: naming the sampler and where it shows, see `probe.check`.
    """
    data = on_process_of(data, sampler, process)
    shape = probe.sizes(data, shape)
    probe.check_affine(sampler, data, shape, steps, times)
    return measured(sampler, data, shape, steps, times)


def measured(
    sampler: Sampler,
    data: Model,
    shape: tuple[int, ...],
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
) -> Law:
    """`law` without its check, for a sampler that has passed it at another number of steps."""
    d = prod(shape)
    trial = probe.run(sampler, data, probe.Trial((0,)), shape, steps, times)
    draws = len(trial.draws)
    needed = (1 + d + d * draws) * d * (len(trial.asked) + 1)
    if needed > MOST:
        raise ValueError(
            f"the law of {d} coordinates over {len(trial.asked)} calls and {draws} draws takes "
            f"{needed:.1e} numbers: take fewer coordinates (every one is treated alike) or steps"
        )
    made = probe.run(sampler, data, probe.Basis(d, draws), shape, steps, times)
    end = Parts.of(made.end, d)
    first, last = edges(sampler, data, steps, times)
    begin = marginal(data, first, d)
    walk = [*made.asked, Asked(last, made.end)]
    prior = torch.zeros(d).double(), data.process.prior_std**2 * torch.eye(d).double()
    mean, covariance = end.law(*prior)
    return Law(
        probe.one_line(sampler),
        mean,
        covariance,
        end.start,
        end.noises,
        tuple(step(asked, data, begin, d) for asked in walk),
        tuple(draw_of(walk, made.draws, index, d) for index in range(draws)),
        marginal(data, last, d),
        noise_ratio(made.asked[-1].level) if last.sigma == 0 else 0.0,
        made.remark,
    )


def noise_ratio(level: Level[float]) -> float:
    """sigma / alpha."""
    return level.sigma / level.alpha if level.alpha else math.inf


class Parts(NamedTuple):
    """An affine state: offset (d,), start gain (d, d), noise gains (draws, d, d)."""

    offset: Tensor
    start: Tensor
    noises: Tensor

    @staticmethod
    def of(state: Tensor, d: int) -> "Parts":
        gains = (state[1:] - state[0]).reshape(-1, d, d).transpose(1, 2)
        return Parts(state[0], gains[0], gains[1:])

    def law(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance for a start from N(mean, covariance)."""
        spread = self.start @ covariance @ self.start.T
        noise = torch.einsum("nij,nkj->ik", self.noises, self.noises)
        return self.offset + self.start @ mean, spread + noise


def on_process_of(data: Any, sampler: Any, process: Process | None) -> Model:
    """The data on the process asked for, or on the sampler's own if it has one, or on their own."""
    if process is not None:
        validate.kind("process", process, "a Process", "log_alpha", "variance")
    if process is not None and not hasattr(data, "on"):
        raise TypeError(
            f"{type(data).__name__} stays on its own process: leave out process, or give an "
            f"exact.Gaussian"
        )
    process = process or getattr(sampler, "process", None)
    return data.on(process) if process is not None and hasattr(data, "on") else data


def edges(
    sampler: Sampler, data: Model, steps: int | None, times: Tensor | Sequence[float] | None
) -> tuple[Level[float], Level[float]]:
    """The levels at which a run starts and ends."""
    grid = path_of(data, sampler, steps, None, times)
    first, last = data.process.levels(grid[[0, -1]])
    return first, last


def marginal(data: Any, level: Level[float], d: int) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance of the data's exact law at a level, if the model knows them."""
    if not (hasattr(data, "mean") and hasattr(data, "covariance")):
        return None
    mean, covariance = data.mean, data.covariance
    if len(mean) == 1:  # the law of each coordinate, independently
        mean, covariance = mean.expand(d), covariance * torch.eye(d, dtype=torch.float64)
    noise = level.sigma**2 * torch.eye(d, dtype=torch.float64)
    return level.alpha * mean, level.alpha**2 * covariance + noise


def step(asked: Asked, data: Model, begin: tuple[Tensor, Tensor] | None, d: int) -> Step:
    parts = Parts.of(asked.x, d)
    start = begin or (torch.zeros(d).double(), torch.eye(d).double())
    exact = marginal(data, asked.level, d) if begin is not None else None
    return Step(asked.level.t, *parts.law(*start), parts.start, exact, asked.level.log_snr)


def draw_of(walk: list[Asked], draws: list[int], index: int, d: int) -> Draw:
    before, began = draws[index], draws[index - 1] if index else 0
    gains = [
        float(Parts.of(walk[at].x, d).noises[index].square().sum() / d) ** 0.5
        for at in (before, min(before + 1, len(walk) - 1), -1)
    ]
    if not gains[0] and gains[1]:  # drawn first, and used after the call: Ho et al.'s Algorithm 2
        before, began = before + 1, began + 1
    added, gain = gains[0] or gains[1], gains[-1]
    t, s = walk[max(min(began, before - 1), 0)].level, walk[before].level
    kernel2 = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2 if s.alpha else t.sigma**2
    share = added / math.sqrt(kernel2) if kernel2 > 1e-9 * t.sigma**2 else math.nan
    return Draw(t.t, s.t, added, gain, share)
