"""Local orders: the order of single steps, also between steps of unequal size."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.processes import Process
from sde_diffusion.processes.level import log_snr_at
from sde_diffusion.samplers import Sampler
from sde_diffusion.verify import convergence, probe, report
from sde_diffusion.verify.laws import Law

__all__ = ["LocalOrder", "local_order"]


@dataclass(frozen=True, repr=False)
class LocalOrder(report.Report):
    """Errors over a short stretch of steps of fixed ratio, as it shrinks.

    A method of order p makes an error of order p + 1 in a step, whatever the ratio of its steps. A
    corrector that comes with the next call may correct a step afterwards: the whole stretch is then
    of a higher order than its last step. A wrong step ratio in a formula of second order has the
    same effect, and shows in single steps only.

    Attributes:
        sampler: its name.
        declared: p of the whole stretch, and of one step.
        spans: largest step of each stretch, in u.
        whole: ratio of neighbouring steps -> the error of each stretch.
        single: ratio -> the part of it that the last step adds; nan where no call shows it.
        rounding: distances below this are rounding.
    """

    sampler: str
    declared: tuple[float, float]
    spans: tuple[float, ...]
    whole: dict[float, tuple[float, ...]]
    single: dict[float, tuple[float, ...]]
    rounding: float

    @property
    def fitted(self) -> dict[float, float]:
        """p of the whole stretch at each ratio: the slope of log error against log span, less 1."""
        return {ratio: self._fit(v, self.rounding) for ratio, v in self.whole.items()}

    @property
    def of_one_step(self) -> dict[float, float]:
        """p of the last step alone at each ratio for which calls show it."""
        seen = {ratio: v for ratio, v in self.single.items() if not any(map(math.isnan, v))}
        rounding = self.rounding / 30  # of differences of two near states
        return {ratio: self._fit(v, rounding) for ratio, v in seen.items()}

    def _fit(self, values: Sequence[float], rounding: float) -> float:
        kept = [(h, v) for h, v in zip(self.spans, values, strict=True) if v > rounding][-3:]
        return convergence.slope(*zip(*kept, strict=True)) - 1 if len(kept) > 1 else math.inf

    @property
    def holds(self) -> bool:
        return not self._missed

    @property
    def _missed(self) -> str:
        if min(self.fitted.values()) < self.declared[0] - convergence.SLACK:
            return "LOWER THAN DECLARED"
        if min(self.of_one_step.values(), default=math.inf) < self.declared[1] - convergence.SLACK:
            return "SINGLE STEPS LOWER THAN DECLARED (a wrong step ratio, or a corrector?)"
        return ""

    @property
    def verdict(self) -> str:
        orders, (whole, single) = (self.fitted, self.of_one_step), self.declared
        found, one = (", ".join(f"{p:.2f}" for p in seen.values()) or "not seen" for seen in orders)
        text = f"local order {found} (declared {whole:g}), of one step {one} (declared {single:g})"
        return f"{text}: {self._missed}" if self._missed else text

    def page(self) -> report.Page:
        errors = {f"whole {ratio:g}": values for ratio, values in self.whole.items()}
        errors |= {f"last {ratio:g}": values for ratio, values in self.single.items()}
        rows = zip(self.spans, *errors.values(), strict=True)
        return report.Page(
            f"local order of {self.sampler}: whole stretch and last step, by ratio of the steps",
            "a property of the two ends of the path, or of the limit there",
            report.Table({"h": ".3e", **dict.fromkeys(errors, ".2e")}, rows),
        )


@validate.arguments
def local_order(
    sampler: Annotated[
        Sampler | Callable[[Tensor], Sampler],
        probe.OrMaker("a Sampler, or a function of times", "step", "grid"),
    ],
    data: probe.AModel,
    process: probe.AProcess | None = None,
    *,
    start: Annotated[float, validate.Number(0, 1, strict=True)] = 0.6,
    spans: Sequence[float] = (0.04, 0.02, 0.01, 0.005, 0.0025, 0.00125),
    ratios: Sequence[float] = (2.0, 1.0, 0.5),
    declared: validate.NonNegative | None = None,
    of_one_step: validate.NonNegative | None = None,
) -> LocalOrder:
    """Fit the order of single steps, also of a multistep formula between steps of unequal size.

    A stretch begins with tiny steps that double up to h, which gives a multistep formula a history
    that is exact to its order, and continues with a few steps of the given ratio; the last is tiny,
    since a corrector corrects a step at the next call. The error of the whole stretch is that of a
    few steps of size h; the error of the step before the tiny one is separated from it.

    Args:
        sampler: a Sampler; or a function that makes one from times, as for an adapter:
            `lambda times: verify.KDiffusion(sample_lms, verify.ratios(process, times))`.
        data, process, declared: as in `order`.
        start: u = sigma / (alpha + sigma) of the beginning, in (0, 1), inside the path.
        spans: the h, decreasing, in u.
        ratios: of each step to the one before it.
        of_one_step: the expected order of a single step; by default the sampler's own claim, lower
            than `declared` for a corrector that comes with the next call.
    """
    for name, values in (("spans", spans), ("ratios", ratios)):
        for value in values:
            validate.number(f"each of {name}", value, 0, strict=True)
    if not ratios:
        raise ValueError("ratios must hold one or more numbers; got none")
    if len(spans) < 2 or list(spans) != sorted(set(spans), reverse=True):
        raise ValueError(f"spans must hold two or more decreasing numbers; got {tuple(spans)}")
    whole: dict[float, tuple[float, ...]] = {}
    single: dict[float, tuple[float, ...]] = {}
    some: Any = sampler
    for ratio in ratios:
        grids = [uneven(process or data.process, start, h, ratio) for h in spans]
        some, laws = convergence.ladder(sampler, data, process, grids)
        whole[ratio] = tuple(law.departure for law in laws)
        last = zip(laws, grids, strict=True)
        single[ratio] = tuple(added(law, *grid[-3:-1].tolist()) for law, grid in last)
    claimed = some.claims.order if declared is None else declared
    one = next(p for p in (of_one_step, some.claims.step_order, claimed) if p is not None)
    name, rounding = convergence.of_family(some), convergence.rounding(data, some)
    return LocalOrder(name, (claimed, one), tuple(spans), whole, single, rounding)


def added(law: Law, t: float, s: float) -> float:
    """The error that the step from t to s adds; nan if there is no call at one of them."""
    at = [[each for each in law.steps if abs(each.t - time) < 1e-9] for time in (t, s)]
    return at[1][-1].added(at[0][-1]) if all(at) else math.nan  # a second stage may come before


def uneven(process: Process, start: float, h: float, ratio: float) -> Tensor:
    """Times from u = start on: steps of u that double up to h, then three of the given ratio."""
    growing = [h * 2.0**k for k in range(-24, 1)]
    after = [h * ratio**k for k in range(1, 4)] if ratio != 2 else []
    tiny = (after or growing)[-1] / 1024
    steps = torch.tensor([0.0, *growing, *after, tiny], dtype=torch.float64)
    u = start - steps.cumsum(0)
    if u[-1] <= 0:
        raise ValueError(f"steps of h={h} at ratio {ratio:g} do not fit between u={start} and 0")
    return process.time(log_snr_at(u))
