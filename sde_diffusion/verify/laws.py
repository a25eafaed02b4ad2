r"""The exact law of a sampler's output on Gaussian data, and the contribution of each step.

For Gaussian data the exact model is affine, so a sampler's output is affine in its start and in
each of its noise draws. One run of its real code on a batch of basis inputs (zero; a unit start;
a unit impulse in each draw) therefore gives its exact law, at the end and at every network call,
without Monte Carlo.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion import sampling, validate
from sde_diffusion.models import Model
from sde_diffusion.processes import Level, forward_kernel
from sde_diffusion.samplers import Sampler
from sde_diffusion.verify import gaussians, outliers, probe, report

__all__ = ["Law", "law", "measured"]

MOST = 10**8  # numbers that a law may hold, 0.8 GB


class Step(NamedTuple):
    """The state at a network call, or at the end.

    Attributes:
        t: its time.
        mean, covariance: its law if the run starts from the data's exact law at the first time
            (from N(0, I) if the model has no such law).
        gain: (d, d), state per unit of start.
        exact: mean and covariance of the data's exact law at t, if the model has one.
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
        return gaussians.w2((self.mean, self.covariance), self.exact) / self.unit

    @property
    def shift(self) -> list[float]:
        """Signed departures: of the mean (d), then of log det covariance / 2."""
        if self.exact is None:
            return []
        volume = float(torch.logdet(self.covariance) - torch.logdet(self.exact[1])) / 2
        return [*((self.mean - self.exact[0]) / self.unit).tolist(), max(volume, -100.0)]

    def added(self, before: "Step") -> float:
        """Departure added since an earlier state, in standard deviations of the data.

        The earlier departure, carried by the map from that state to this one, is subtracted: for a
        scheme without memory this is the departure after one step from the exact law.
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
        t, s: times at which its step begins and ends: of the call after the previous draw, and of
            the call after this one; after the last call s is the last time.
        added: standard deviation that it adds to the state at s.
        gain: standard deviation that it adds to the output.
        share: `added` divided by the standard deviation of the forward kernel from s to t, which
            the reverse SDE adds for small steps; sigma_s / sigma_t for DDPM's small variance, 0
            for a flow; nan if t is not noisier than s.
    """

    t: float
    s: float
    added: float
    gain: float
    share: float


@dataclass(frozen=True, repr=False)
class Law(report.Report):
    """The Gaussian law of a sampler's output, and the parts that it consists of.

    Attributes:
        sampler: its name.
        mean: (d,), started from the prior.
        covariance: (d, d), started from the prior.
        start_gain: (d, d), output per unit of start.
        noise_gains: (draws, d, d), output per unit of each noise draw, in order.
        steps: the state at each call and at the end.
        draws: each noise draw.
        data: mean and covariance of the data's exact law at the last time, if the model has one.
        remark: a warning of an adapter.
    """

    sampler: str
    mean: Tensor
    covariance: Tensor
    start_gain: Tensor
    noise_gains: Tensor
    steps: tuple[Step, ...]
    draws: tuple[Draw, ...]
    data: tuple[Tensor, Tensor] | None
    remark: str = ""

    @property
    def finish(self) -> float:
        """sigma / alpha at the last call, if the end is at sigma = 0, else 0."""
        before, end = self.steps[-2:]
        return math.exp(-before.log_snr / 2) if end.log_snr == math.inf else 0.0

    def w2(self, mean: Tensor | None = None, covariance: Tensor | None = None) -> float:
        """Wasserstein-2 distance to N(mean, covariance), by default to the data."""
        return gaussians.w2((self.mean, self.covariance), self._other(mean, covariance))

    def kl(self, mean: Tensor | None = None, covariance: Tensor | None = None) -> float:
        """KL(output || N(mean, covariance)) in nats, by default to the data; it may be inf."""
        return gaussians.kl((self.mean, self.covariance), self._other(mean, covariance))

    @property
    def departure(self) -> float:
        """W2 to the data of the output when started from the data's exact law at the first time."""
        end = self.steps[-1]
        return gaussians.w2((end.mean, end.covariance), self._other())

    @property
    def left(self) -> float:
        r"""The W2 that an Euler step of the flow from the last call to sigma = 0 leaves.

        The standard deviation v^(1/2) of a coordinate becomes v^(1/2) (1 + s^2 / v)^(-1/2),
        s = sigma / alpha: s^2 / (2 v^(1/2)) is lost, whatever the other steps are.
        """
        if self.data is None:
            return math.nan
        values = torch.linalg.eigvalsh(self.data[1])
        return float((values.sqrt() * (1 - torch.rsqrt(1 + self.finish**2 / values))).norm())

    @property
    def faults(self) -> list[str]:
        """Draws and steps that differ from their neighbours by more than a smooth scheme can."""
        odd = [*outliers.odd_draws(self.draws, self.steps), *outliers.odd_steps(self.steps)]
        return [self.remark, *odd] if self.remark else odd

    @property
    def holds(self) -> bool:
        """True if no draw or step stands out."""
        return not self.faults

    @property
    def verdict(self) -> str:
        if self.faults:
            more = f"; and {len(self.faults) - 3} more" if len(self.faults) > 3 else ""
            return "; ".join(self.faults[:3]) + more
        found = "no step stands out (the first and last three not judged)"
        return f"affine, each sample by itself; {outliers.unjudged(self.steps) or found}"

    def page(self) -> report.Page:
        draws = [draw for draw in self.draws if draw.added > 0]
        facts = [report.moments(self.mean, self.covariance)]
        if self.data is not None:
            facts.append(f"W2 to the data {self.w2():.3e}   KL {self.kl():.3e} nats")
            facts.append(f"W2 if started from the data's own law {self.departure:.3e}")
        if draws and draws[-1].t == self.steps[-2].t:
            facts.append(f"the last step adds noise, std {draws[-1].added:.3e}")
        by_call = {draw.t: (draw.added, draw.share, draw.gain) for draw in draws}
        shown = [self.steps[index] for index in report.thinned(len(self.steps), 12)]
        rows = ((s.t, s.departure, *by_call.get(s.t, (None, None, None))) for s in shown)
        columns = {"t": ".4g", "departure": ".2e", "draw adds": ".3e", "share": ".3f"}
        return report.Page(
            f"law of {self.sampler}: {len(self.steps) - 1} calls, {len(draws)} draws",
            "that more steps come nearer (order, limit), that each step is the published one "
            "(identities), or a property on data that are not Gaussian",
            report.Table({**columns, "gain": ".3e"}, rows),
            facts,
        )

    def _other(
        self, mean: Tensor | None = None, covariance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The law to compare with: the one given, or the data's."""
        if mean is None and covariance is None:
            if self.data is None:
                raise TypeError("data must be an exact.Gaussian; the model has no mean, covariance")
            return self.data
        if mean is None or covariance is None:
            raise TypeError("mean and covariance must be given together, or neither for the data's")
        both = (("mean", mean, self.mean), ("covariance", covariance, self.covariance))
        for name, value, own in both:
            if getattr(value, "shape", None) != own.shape:
                shape = tuple(own.shape)
                raise ValueError(f"{name} must be a tensor of shape {shape}; got {value!r:.80}")
        if not bool((torch.linalg.eigvalsh(covariance) >= 0).all()):
            raise ValueError("covariance must be positive semi-definite")
        return mean.double(), covariance.double()


@validate.arguments
def law(
    sampler: probe.ASampler,
    data: probe.AModel,
    process: probe.AProcess | None = None,
    times: Tensor | Sequence[float] | None = None,
    *,
    steps: int | None = None,
    shape: Sequence[int] | None = None,
) -> Law:
    """Compute the exact output law of a fixed-step sampler on Gaussian data.

    Args:
        sampler: any with fixed steps, affine for an affine model, its noise drawn from `noise`; or
            a peer's in one of the adapters.
        data: the exact model of Gaussian data, or any other affine one.
        process: the process to use; by default the sampler's own, as an adapter has, or the
            model's.
        times, steps: as in `sample`.
        shape: of one sample, of d coordinates; by default that of an exact model.
    Raises:
        NotAffine: naming the sampler and the first state that shows it, see `probe.check_affine`.
    """
    data = probe.on_process_of(data, sampler, process)
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
    """`law` without its checks, for a sampler that passed them at another number of steps."""
    d = math.prod(shape)
    once = probe.run(sampler, data, probe.trial(0), shape, steps, times)
    calls, draws = len(once.calls), len(once.draws)
    numbers = (1 + d + d * draws) * d * (calls + 1)
    check_size(numbers, f"{d} coordinates, {calls} calls, {draws} draws")
    eye = torch.eye(d, dtype=torch.float64)
    made = probe.run(sampler, data, probe.basis(eye, draws), shape, steps, times)
    first, last = data.process.levels(sampling.path_of(data, sampler, steps, None, times)[[0, -1]])
    walk, begin = [*made.calls, probe.Call(last, made.end)], marginal(data, first, d)
    states = tuple(step(call, data, begin, d) for call in walk)
    drawn = tuple(draw_of(walk, made.draws, index, d) for index in range(draws))
    end = Parts.of(made.end, d)
    mean, covariance = end.law(0 * eye[0], data.process.prior_std**2 * eye)
    return Law(
        probe.one_line(sampler), mean, covariance, end.start, end.noises, states, drawn,
        marginal(data, last, d), made.remark,
    )  # fmt: skip


def check_size(numbers: int, parts: str) -> None:
    """Refuse a law that does not fit into memory."""
    if numbers > MOST:
        got = f"{numbers:.1e} ({parts}); use fewer coordinates or steps"
        raise ValueError(f"a law must have at most {MOST:.0e} numbers; got {got}")


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


def marginal(data: Any, level: Level[float], d: int) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance of the data's exact law at a level, if the model has one."""
    if not hasattr(data, "marginal"):
        return None
    law = data.marginal(level)
    each = 1 if len(law.mean) == d else torch.eye(d).double()  # one law for each coordinate
    return law.mean.expand(d), law.covariance * each


def step(call: probe.Call, data: Model, begin: tuple[Tensor, Tensor] | None, d: int) -> Step:
    """The state at a network call, or at the end."""
    parts, exact = Parts.of(call.x, d), marginal(data, call.level, d)
    start = begin or (torch.zeros(d).double(), torch.eye(d).double())
    return Step(call.level.t, *parts.law(*start), parts.start, exact, call.level.log_snr)


def draw_of(walk: list[probe.Call], draws: list[int], index: int, d: int) -> Draw:
    """Noise draw number `index`, made after draws[index] calls."""
    before, began = draws[index], draws[index - 1] if index else 0
    places = before, min(before + 1, len(walk) - 1), -1
    noises = [Parts.of(walk[at].x, d).noises[index] for at in places]
    here, after, gain = (float(noise.square().sum() / d) ** 0.5 for noise in noises)
    if not here and after:  # drawn first, and used after the call: Ho et al.'s Algorithm 2
        before, began = before + 1, began + 1
    t, s = walk[max(min(began, before - 1), 0)].level, walk[before].level
    _, std = forward_kernel(s, t)
    added = here or after
    share = added / std if std**2 > 1e-9 * t.sigma**2 else math.nan
    return Draw(t.t, s.t, added, gain, share)
