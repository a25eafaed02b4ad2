r"""Models from elsewhere: networks trained on a chain, and models moved to another process.

What a model knows at a noise-to-signal ratio sigma / alpha does not depend on the process that
led there: x / (alpha + sigma) has one law, and x0 and eps are the same. So a network trained on one
process serves any other, by a change of time (log-SNR) and a rescaling of x.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.model import Model
from sde_diffusion.models.noise_inputs import TimestepIndex
from sde_diffusion.models.parameterizations import Eps
from sde_diffusion.models.prediction import Parameterization, Prediction, Row, from_network
from sde_diffusion.processes import Discrete, Level, Process, double
from sde_diffusion.processes.level import enter, leave

__all__ = ["Adopted", "Matched", "adopt", "match"]


def adopt(
    network: Callable[[Tensor, Tensor], Any],
    process: Discrete,
    parameterization: Parameterization | None = None,
    counts_from: int = 0,
) -> "Adopted":
    """The model of a network that was trained on a chain elsewhere.

    Args:
        network: called as network(x, step), step (B,). It answers with a tensor, or with a tuple
            or a record that has it first or as `sample`, as diffusers' `UNet2DModel` does.
        process: the chain it was trained on, such as `Discrete(scheduler.betas)`.
        parameterization: the meaning of its output, Eps() by default.
        counts_from: its name of the first step: 0 for steps 0 .. N - 1, our index less 1, as most
            libraries count; 1 for 1 .. N.
    """
    validate.kind("network", network, "a function network(x, step)", "__call__")
    validate.kind("process", process, "a Discrete process", "betas")
    validate.integer("counts_from", counts_from, 0, 1)
    return Adopted(network, process, parameterization or Eps(), counts_from)


@dataclass(frozen=True)
class Adopted:
    """See `adopt`. A step is fed as an integer at the chain's times, as a real number between."""

    network: Callable[[Tensor, Tensor], Any]
    process: Discrete
    parameterization: Parameterization
    counts_from: int

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        step = double(TimestepIndex(self.process.num_steps, self.counts_from)(level))
        near = 1e-6 if isinstance(level.t, float) else 1e-3  # float32 times have fewer digits
        if bool((step < self.counts_from - near).any()):
            raise ValueError(
                f"the network was trained from t = 1/N = {1 / self.process.num_steps:g} on; got "
                f"t={float(double(level.t).min()):g}: let the grid go from there to 0, as the "
                f"chain's own do"
            )
        whole = step.round().long()
        step = whole if bool(((step - whole).abs() <= near).all()) else step.to(torch.float32)
        out = self.network(x, step.reshape(-1).expand(len(x)).to(x.device))
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        return from_network(x, out, level, self.parameterization)

    def rows(self, index: Tensor) -> "Adopted":
        return self


def match(model: Model, process: Process) -> "Matched":
    r"""The same model on another process, by log-SNR time change and rescaling.

    At a level of `process` the model is asked at its own level of equal log-SNR about

        x (alpha' + sigma') / (alpha + sigma),        the primed ones its own,

    and its x0 and eps are the answer. Where `process` starts noisier than the model was trained,
    the result's process is `process.until(...)` there: sampling starts at the largest common noise.

    Args:
        model: a Denoiser, an `Adopted` network, an exact model, ...
        process: where it is to go.
    Raises:
        ValueError: from the result, at levels less noisy than the model was trained on, which a
            chain's model is from i = 1 on; `Matched.times` gives grids that keep to it.
    """
    validate.kind("model", model, "a model, such as a Denoiser", "process", "__call__")
    validate.kind("process", process, "a Process", "log_alpha", "variance")
    most = model.process.log_snr(1.0)
    if not bool(process.log_snr(1.0) < most - 1e-9 * (1 + most.abs())):
        return Matched(model, process)
    end = process.time(most)
    (own,), (to,) = model.process.levels(torch.ones(1)), process.levels(end.reshape(1))
    std = model.process.prior_std * (to.alpha + to.sigma) / (own.alpha + own.sigma)
    return Matched(model, process.until(end.item(), std))


@dataclass(frozen=True)
class Matched:
    """See `match`."""

    model: Model
    process: Process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        own = self._own_level(x, level)
        prediction = self.model(leave(enter(x, level), own), own)
        meaning = Elsewhere(prediction.meaning, own)
        return Prediction(prediction.first, prediction.second, level, meaning, prediction.extra)

    def rows(self, index: Tensor) -> "Matched":
        return Matched(self.model.rows(index), self.process)

    def times(self, steps: int, start: float = 1.0) -> Tensor:
        """The model's own grid of n steps, carried over, from `start` (1, or t_max) on.

        For a chain's model all times between the start and 0 are the chain's. There are fewer than
        n + 1 if this process starts less noisy than the model's.
        """
        log_snr = self.model.process.log_snr(self.model.process.times(steps))
        times = self.process.time(log_snr[log_snr > self.process.log_snr(start) + 1e-6])
        return torch.cat([torch.tensor([start], dtype=torch.float64), times])

    def _own_level(self, x: Tensor, level: Level) -> Level:
        """The level of the model's process at the same log-SNR, if the model was trained there."""
        own, slack = self.model.process, 1e-9
        log_snr = double(level.log_snr)
        if isinstance(level.log_snr, Tensor):
            slack = 8 * torch.finfo(level.log_snr.dtype).eps
        low, high = own.log_snr(1.0).item(), own.log_snr(own.first_time).item()
        outside = (log_snr < low - slack * (1 + abs(low))) | (
            log_snr > high + slack * (1 + abs(high))
        )
        if log_snr.device.type == "cpu" and bool(outside.any()):
            raise ValueError(
                f"the model was trained at log_snr from {low:.4g} to {high:.4g}, t = 1 to "
                f"{own.first_time:g} of its {type(own).__name__}; got "
                f"{log_snr[outside].flatten()[0]:.4g}: let a grid of steps keep between them and "
                f"then go to 0, as that of times(steps) does, and a solver with steps of its own "
                f"end at t = {self.process.time(high).item():.4g}"
            )
        t = own.time(log_snr).clamp(min=own.first_time)
        if isinstance(level.log_snr, Tensor):
            return own.level(t.flatten() if t.numel() == len(x) else t.reshape(()), x)
        return own.levels(t.reshape(1))[0]


@dataclass(frozen=True)
class Elsewhere(Parameterization):
    """A meaning at the level where its network was asked, which is not that of the prediction."""

    meaning: Parameterization
    level: Level

    def x0(self, level: Level) -> Row:
        return self.meaning.x0(self.level)

    def eps(self, level: Level) -> Row:
        return self.meaning.eps(self.level)

    def target(self, prediction: Prediction) -> Tensor:
        raise TypeError("a matched model is trained on its own process: train that")
