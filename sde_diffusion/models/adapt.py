r"""Adapters: networks trained by other programs, and models moved to another process.

At equal noise-to-signal ratio sigma / alpha the distribution of x / (alpha + sigma) is the same on
every process, and so are x0 and eps. So a network trained on one process can be used on any other,
by a change of time (log-SNR) and a rescaling of x.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sde_diffusion.models import conditions
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.model import IS_MODEL, LogSNRRange, Model, level_of, trained_range
from sde_diffusion.models.noise_inputs import WholeTimestep
from sde_diffusion.models.prediction import Parameterization, Prediction, Row
from sde_diffusion.processes.discrete import IS_CHAIN, Discrete
from sde_diffusion.processes.level import Level, double, enter, leave
from sde_diffusion.processes.process import IS_PROCESS, Process
from sde_diffusion.validate import Checked, Cond, Integer, Kind, arguments

__all__ = ["Matched", "adopt", "match"]

IS_FUNCTION = Kind("a network: a torch module or a function network(x, step)", "__call__")


@arguments
def adopt(
    network: Annotated[Callable[..., Any], IS_FUNCTION],
    process: Annotated[Discrete, IS_CHAIN],
    parameterization: Parameterization | None = None,
    counts_from: Annotated[int, Integer(0, 1)] = 0,
) -> Denoiser:
    """Make a model of a network that another program trained on a chain.

    Its trained range is the levels of the chain, i = 1 .. N. The timestep is an int64 at the times
    of the chain and a real number between them. A network with a table of steps needs times of the
    chain: `grid=grids.Usual()`, or `times=` of i/N; solvers that choose their steps do not suit it.

    Args:
        network: called as network(x, step), step (B,): a torch module or any function. It returns
            a tensor, a tuple that has the tensor first, or an object that has it as `sample`, as
            diffusers' `UNet2DModel` does.
        process: the chain of the training, such as `Discrete(scheduler.betas)`.
        parameterization: the meaning of the network's output, Eps() by default.
        counts_from: index of the network's first step: 0 for steps 0 .. N - 1, as in most
            libraries; 1 for 1 .. N.
    """
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
    r"""Move a model to another process, by a change of time (log-SNR) and a rescaling of x.

    With alpha, sigma of a level of `process`, and alpha', sigma' of the level of the model's own
    process at the same log-SNR, the model is evaluated there at

        x (alpha' + sigma') / (alpha + sigma),

    and its x0 and eps are the result. If `process` has higher noise at t = 1 than the model's own
    process, sampling starts at the highest noise of the latter (see `sampling.prior`).

    Args:
        model: a Denoiser, an adopted network, an exact model, ...
        process: the other process.
    """
    return Matched(model, process)


@dataclass(frozen=True)
class Matched(Checked):
    """A model on another process, made by `match`."""

    model: Annotated[Model, IS_MODEL]
    process: Annotated[Process, IS_PROCESS]

    @property
    def trained(self) -> LogSNRRange:
        """The model's own range, limited to the log-SNRs of its own process."""
        own = trained_range(self.model)
        end, ours = (p.log_snr(1.0).item() for p in (self.model.process, self.process))
        return own & LogSNRRange(low=end) if ours < end - 1e-9 * (1 + abs(end)) else own

    @property
    def takes_cond(self) -> bool:
        """True if the inner model takes a condition."""
        return conditions.takes_cond(self.model)

    def null_like(self, cond: Cond) -> Cond:
        """The null condition of the inner model."""
        return conditions.null_of(self.model, cond)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None) -> Prediction:
        level = level_of(self.process, level, x)
        own = self._own_level(x, level)
        prediction = conditions.evaluate(self.model, leave(enter(x, level), own), own, cond)
        meaning = Elsewhere(prediction.meaning, own)
        return Prediction(prediction.first, prediction.second, level, meaning, prediction.extra)

    def _own_level(self, x: Tensor, level: Level) -> Level:
        """The level of the model's process at the same log-SNR."""
        process, trained = self.model.process, trained_range(self.model)
        log_snr = double(level.log_snr)
        if log_snr.requires_grad and torch.is_grad_enabled():
            rule = "have no parameters to be trained: times of one log-SNR have no gradient"
            raise ValueError(f"process of match must {rule}; got {type(self.process).__name__}")
        if trained.only:  # a log-SNR above the last level by rounding is set to it
            slack = 1e-3 if isinstance(level.log_snr, Tensor) else 1e-9 * (1 + abs(trained.high))
            over = (log_snr > trained.high) & (log_snr < trained.high + slack)
            log_snr = log_snr.where(~over, trained.high)
        t = process.time(log_snr)
        if isinstance(level.log_snr, Tensor):
            return process.level(t.flatten() if t.numel() == len(x) else t.reshape(()), x)
        return process.levels(t.reshape(1))[0]


@dataclass(frozen=True)
class Elsewhere(Parameterization):
    """A parameterization at the level where the network ran, not the level of the prediction."""

    meaning: Parameterization
    level: Level

    def x0(self, level: Level) -> Row:
        return self.meaning.x0(self.level)

    def eps(self, level: Level) -> Row:
        return self.meaning.eps(self.level)

    def target(self, prediction: Prediction) -> Tensor:
        raise TypeError("model must be trained on its own process; got a matched model")
