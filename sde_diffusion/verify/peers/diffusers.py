"""Schedulers of diffusers as samplers.

Nothing here imports diffusers: its objects are arguments, and their own code runs.
"""

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.models import Preconditioned, Prediction
from sde_diffusion.processes import Discrete, Process, RectifiedFlow
from sde_diffusion.validate import Count, Kind, choice
from sde_diffusion.verify.peers.foreign import SINGLE, Foreign, PeerModel

ASIDE = 1e-3  # relative to sigma: more than float32 rounds


@dataclass(frozen=True)
class Diffusers(Foreign):
    """A scheduler of diffusers, run as its pipelines run it.

    Schedulers may be variance-preserving (with `alphas_cumprod`), of flow matching, or of EDM. The
    network is called at the scheduler's timestep. A whole timestep is a step of the chain, whatever
    the scheduler's own sigma. A fractional one stands for that sigma if the scheduler scales its
    input by it; otherwise log sigma is linear between steps.

    Args:
        scheduler: an instance, never changed.
        steps: the argument of `set_timesteps`.
        declared: its order; by default its `solver_order`, if it has one.
    """

    scheduler: Annotated[Any, Kind("a diffusers scheduler", "set_timesteps", "step", "config")]
    steps: Count
    declared: int | None = None
    rounding: float = SINGLE

    def __post_init__(self) -> None:
        super().__post_init__()
        if missing := self._missing():
            raise TypeError(f"scheduler must be {missing}; got {self.name}")

    def _missing(self) -> str:
        """The requirement that the scheduler does not meet, if any."""
        if self._chain is None and not (self._is_edm or hasattr(self.scheduler, "scale_noise")):
            return "variance-preserving, of flow matching or of EDM"
        if self.scheduler.config.get("use_flow_sigmas"):
            return "without use_flow_sigmas, which puts flow matching on a chain's timesteps"
        more = inspect.signature(self.scheduler.step).parameters
        needed = [p for p in [*more.values()][3:] if p.default is p.empty and p.kind in (0, 1, 3)]
        if needed or "prev_timestep" in more:
            return "one whose step takes the output, the timestep and x"
        times = self._started().timesteps
        return "one from noise to data" if float(times[0]) < float(times[-1]) else ""

    @property
    def name(self) -> str:
        return f"diffusers {type(self.scheduler).__name__}"

    def __str__(self) -> str:
        return f"{self.name}, {self.steps} steps"

    @property
    def order(self) -> int:
        return self.declared or self.scheduler.config.get("solver_order") or 1

    @property
    def process(self) -> Process:
        if self._chain is not None:
            power = np.concatenate([[1.0], self._chain])
            if power[-1] >= power[-2]:  # zero-SNR: diffusers keeps 2^-24 of it, out of order
                power[-1] = 0.0
            return Discrete(tuple((1 - power[1:] / power[:-1]).tolist()))
        return super().process if self._is_edm else RectifiedFlow()

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        scheduler = self._started()
        t = scheduler.timesteps[0]
        scale, (alpha, sigma) = scale_of(scheduler, t), self._seen(t, scheduler)
        return (alpha / scale, sigma / scale), (1.0, 0.0)

    def _loop(self, model: PeerModel, x: Tensor) -> tuple[Tensor, str]:
        scheduler = self._started()
        sigmas = getattr(scheduler, "sigmas", ())
        aside = 0.0  # log sigma of the network's input against that of the state
        for index, t in enumerate(scheduler.timesteps):
            alpha, sigma = self._seen(t, scheduler)
            prediction = model(scaled(scheduler, x, t), alpha, sigma)
            x = scheduler.step(self._out(prediction, alpha, sigma), t, x).prev_sample
            if self._chain is not None and len(sigmas) == len(scheduler.timesteps) + 1:
                aside = max(aside, abs(math.log(sigma / alpha / float(sigmas[index]))))
        off = f"up to {math.expm1(aside):.0%} of sigma away from the state"
        remark = f"it calls the network {off}, as if its time steps were rounded"
        return x, remark if aside >= ASIDE else ""

    @property
    def _chain(self) -> Any:
        """The chain's alpha^2 at its steps, if it has one."""
        power = getattr(self.scheduler, "alphas_cumprod", None)
        return None if power is None else power.double().numpy()

    @property
    def _is_edm(self) -> bool:
        return hasattr(self.scheduler, "precondition_outputs")

    def _started(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        return scheduler

    def _seen(self, t: Tensor, scheduler: Any) -> tuple[float, float]:
        """alpha and sigma of the network's input at a timestep."""
        step = float(t)
        if self._is_edm:
            sigma = math.exp(4 * step)
            scale = 1 / math.hypot(self.scheduler.config.sigma_data, sigma)
            return scale, scale * sigma
        if self._chain is None:
            sigma = step / self.scheduler.config.num_train_timesteps
            return 1 - sigma, sigma
        last = len(self._chain) - 1
        if not 0 <= step <= last:
            raise ValueError(f"{self} calls at step {step:g} of a chain 0 .. {last}")
        scale = scale_of(scheduler, t)
        if step != round(step) and scale < 1:
            return unit(nearest_sigma(scheduler, math.sqrt(1 / scale**2 - 1)))
        with np.errstate(divide="ignore"):
            logs = np.log((1 - self._chain) / self._chain) / 2
        return unit(math.exp(min(np.interp(step, np.arange(last + 1), logs), 700.0)))

    def _out(self, prediction: Prediction, alpha: float, sigma: float) -> Tensor:
        """The network's output in the scheduler's parameterization."""
        if self._is_edm:
            out = Preconditioned(self.scheduler.config.sigma_data).target(prediction)
            turned = self.scheduler.config.prediction_type == "v_prediction"  # c_out < 0 there
            return -out if turned else out
        if self._chain is None:
            return prediction.velocity
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        of = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v_prediction": (-sigma, alpha)}
        return prediction.combine(*of[choice("prediction_type", kind, of)])


def scale_of(scheduler: Any, t: Tensor) -> float:
    """Factor of the network's input at a timestep."""
    return float(scaled(scheduler, torch.ones(1, dtype=torch.float64), t))


def nearest_sigma(scheduler: Any, sigma: float) -> float:
    """The scheduler's sigma nearest to one of fewer digits."""
    known = [scheduler.sigmas, getattr(scheduler, "sigmas_interpol", scheduler.sigmas)]
    sigmas = torch.cat([torch.as_tensor(values).flatten().double() for values in known])
    off = (sigmas - sigma).abs().nan_to_num(math.inf)
    return float(sigmas[off.argmin()])


def scaled(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """The network's input; flow-matching schedulers have no scaling."""
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def unit(ratio: float) -> tuple[float, float]:
    """(alpha, sigma) of the variance-preserving coordinates with this sigma / alpha."""
    alpha = 1 / math.hypot(1, ratio)
    return alpha, ratio * alpha
