r"""Models from elsewhere: networks trained by other programs, and models on another process.

What a model knows at a noise-to-signal ratio sigma / alpha does not depend on the process that
led there: x / (alpha + sigma) has one law, and x0 and eps are the same. So a network trained on one
process serves any other, by a change of time (log-SNR) and a rescaling of x.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.model import (
    IS_MODEL,
    LogSNRRange,
    Model,
    evaluate,
    level_of,
    null_of,
    trained_range,
)
from sde_diffusion.models.noise_inputs import WholeTimestep
from sde_diffusion.models.prediction import Parameterization, Prediction, Row
from sde_diffusion.processes import Discrete, Level, Process
from sde_diffusion.processes.level import double, enter, leave
from sde_diffusion.processes.process import IS_PROCESS
from sde_diffusion.validate import Cond, Integer, Kind

__all__ = ["Matched", "adopt", "match"]

IS_CHAIN = Kind("a Discrete process", "betas")


def adopt(
    network: Callable[..., Any],
    process: Discrete,
    parameterization: Parameterization | None = None,
    counts_from: int = 0,
) -> Denoiser:
    """The model of a network that another program trained on a chain.

    It is trained at the chain's own levels, i = 1 .. N. A step is fed as int64 at the chain's
    times, as a real number between them.

    Args:
        network: called as network(x, step), step (B,): a torch module or any function. It returns
            a tensor, or a tuple or a record that has it first or as `sample`, as diffusers'
            `UNet2DModel` does.
        process: the chain it was trained on, such as `Discrete(scheduler.betas)`.
        parameterization: the meaning of its output, Eps() by default.
        counts_from: index of its first step: 0 for steps 0 .. N - 1, our index less 1, as most
            libraries count; 1 for 1 .. N.
    """
    Kind("a network: a torch module or a function network(x, step)", "__call__")("network", network)
    IS_CHAIN("process", process)
    Integer(0, 1)("counts_from", counts_from)
    low, high = process.log_snr(1.0).item(), process.log_snr(1 / process.num_steps).item()
    return Denoiser(
        network if isinstance(network, nn.Module) else FunctionNetwork(network),
        process,
        parameterization,
        WholeTimestep(process.num_steps, counts_from),
        trained=LogSNRRange(low, high, only=True),
    )


class FunctionNetwork(nn.Module):
    """A plain function as a torch module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def match(model: Model, process: Process) -> "Matched":
    r"""The same model on another process, by log-SNR time change and rescaling.

    At a level of `process` the model is evaluated at its own level of equal log-SNR, at

        x (alpha' + sigma') / (alpha + sigma),        the primed ones its own,

    and its x0 and eps are the result. Where `process` starts noisier than the model's own, sampling
    starts at the largest common noise (see `sampling.prior`).

    Args:
        model: a Denoiser, an adopted network, an exact model, ...
        process: the other process.
    """
    IS_MODEL("model", model)
    IS_PROCESS("process", process)
    return Matched(model, process)


@dataclass(frozen=True)
class Matched:
    """See `match`."""

    model: Model
    process: Process

    @property
    def trained(self) -> LogSNRRange:
        """The model's own range, cut at the end of its own path."""
        own = trained_range(self.model)
        end, ours = (float(p.log_snr(1.0)) for p in (self.model.process, self.process))
        return own & LogSNRRange(low=end) if ours < end - 1e-9 * (1 + abs(end)) else own

    def null_like(self, cond: Cond) -> Cond:
        """The null of the model."""
        return null_of(self.model, cond)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        level = level_of(self.process, level, x)
        own = self._own_level(x, level)
        prediction = evaluate(self.model, leave(enter(x, level), own), own, cond)
        meaning = Elsewhere(prediction.meaning, own)
        return Prediction(prediction.first, prediction.second, level, meaning, prediction.extra)

    def _own_level(self, x: Tensor, level: Level) -> Level:
        """The level of the model's process at the same log-SNR."""
        process, trained = self.model.process, trained_range(self.model)
        log_snr = double(level.log_snr)
        if trained.only:  # a rounding beyond the last level is that level
            slack = 1e-3 if isinstance(level.log_snr, Tensor) else 1e-9 * (1 + abs(trained.high))
            over = (log_snr > trained.high) & (log_snr < trained.high + slack)
            log_snr = log_snr.where(~over, trained.high)
        t = process.time(log_snr)
        if isinstance(level.log_snr, Tensor):
            return process.level(t.flatten() if t.numel() == len(x) else t.reshape(()), x)
        return process.levels(t.reshape(1))[0]


@dataclass(frozen=True)
class Elsewhere(Parameterization):
    """A meaning at the level at which its network was evaluated, not that of the prediction."""

    meaning: Parameterization
    level: Level

    def x0(self, level: Level) -> Row:
        return self.meaning.x0(self.level)

    def eps(self, level: Level) -> Row:
        return self.meaning.eps(self.level)

    def target(self, prediction: Prediction) -> Tensor:
        raise TypeError("a matched model must be trained on its own process; got another")
