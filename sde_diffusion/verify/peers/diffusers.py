"""Schedulers of diffusers as samplers.

Nothing here imports diffusers; its objects are handed in, and run by their own code.
"""

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.models.parameterizations import Preconditioned
from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import EDM, Discrete, Process, RectifiedFlow
from sde_diffusion.verify.peers.foreign import SINGLE, Ask, Foreign

__all__ = ["Diffusers"]

ASIDE = 1e-3  # a share of sigma that is no rounding of float32


@dataclass(frozen=True)
class Diffusers(Foreign):
    """A scheduler of diffusers, run as its pipelines run it.

    It may be of the variance-preserving family (it has `alphas_cumprod`), a flow-matching one, or
    one of EDM's. The network is asked at the timestep that the scheduler feeds it: a whole one is a
    step of the chain, whatever the scheduler's own sigma is there; a fractional one can only mean
    that sigma, if the scheduler scales its input by it, and else log sigma is linear between steps.

    Args:
        scheduler: an instance; it is copied, never changed.
        steps: what `set_timesteps` is told.
        declared: its order; by default its `solver_order`, if it has one.
    """

    scheduler: Any
    steps: int
    declared: int | None = None
    rounding: float = SINGLE

    def __post_init__(self) -> None:
        validate.kind("scheduler", self.scheduler, "a diffusers scheduler", "set_timesteps", "step",
                    "config")  # fmt: skip
        validate.integer("steps", self.steps)
        if self._chain is None and not (self._is_edm or hasattr(self.scheduler, "scale_noise")):
            raise TypeError(
                f"{self}: neither of the variance-preserving family, nor flow matching, nor EDM"
            )
        if self.scheduler.config.get("use_flow_sigmas"):
            raise TypeError(f"{self}: use_flow_sigmas puts flow matching on a chain's timesteps")
        more = inspect.signature(self.scheduler.step).parameters.values()
        needed = [p.name for p in list(more)[3:] if p.default is p.empty and p.kind in (0, 1, 3)]
        if needed or "prev_timestep" in inspect.signature(self.scheduler.step).parameters:
            raise TypeError(f"{self}: its step wants more than the output, the timestep and x")
        times = self._started().timesteps
        if float(times[0]) < float(times[-1]):
            raise TypeError(f"{self} runs from data to noise")

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
        (_, sigma), _ = self.ends()
        return EDM(sigma) if self._is_edm else RectifiedFlow()

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        scheduler = self._started()
        t = scheduler.timesteps[0]
        scale = scale_of(scheduler, t)
        alpha, sigma = self._seen(t, scheduler)
        return (alpha / scale, sigma / scale), (1.0, 0.0)

    def loop(self, ask: Ask, x: Tensor) -> tuple[Tensor, str]:
        scheduler = self._started()
        sigmas = getattr(scheduler, "sigmas", ())
        aside = 0.0  # of log sigma, between where the network is asked and where the state is
        for index, t in enumerate(scheduler.timesteps):
            alpha, sigma = self._seen(t, scheduler)
            said = ask(scaled(scheduler, x, t), alpha, sigma)
            x = scheduler.step(self._out(said, alpha, sigma), t, x).prev_sample
            if self._chain is not None and len(sigmas) == len(scheduler.timesteps) + 1:
                aside = max(aside, abs(math.log(sigma / alpha / float(sigmas[index]))))
        if aside < ASIDE:
            return x, ""
        return x, (
            f"it asks the network up to {math.expm1(aside):.0%} of sigma away from where the state "
            f"is, as if its time steps were rounded"
        )

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
        if not 0 <= step <= len(self._chain) - 1:
            raise ValueError(f"{self} asks at step {step:g} of a chain 0 .. {len(self._chain) - 1}")
        scale = scale_of(scheduler, t)
        if step != round(step) and scale < 1:
            return unit(nearest_sigma(scheduler, math.sqrt(1 / scale**2 - 1)))
        with np.errstate(divide="ignore"):
            logs = np.log((1 - self._chain) / self._chain) / 2
        return unit(math.exp(min(np.interp(step, np.arange(len(logs)), logs), 700.0)))

    def _out(self, said: Prediction, alpha: float, sigma: float) -> Tensor:
        """What the network puts out."""
        if self._is_edm:
            out = Preconditioned(self.scheduler.config.sigma_data).target(said)
            turned = self.scheduler.config.prediction_type == "v_prediction"  # c_out < 0 there
            return -out if turned else out
        if self._chain is None:
            return said.velocity
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        of = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v_prediction": (-sigma, alpha)}
        return said.combine(*of[validate.choice("prediction_type", kind, of)])


def scale_of(scheduler: Any, t: Tensor) -> float:
    """What the network's input is multiplied by at a timestep."""
    return float(scaled(scheduler, torch.ones(1, dtype=torch.float64), t))


def nearest_sigma(scheduler: Any, sigma: float) -> float:
    """The one of a scheduler's sigmas that was meant; the scale has fewer digits."""
    known = [scheduler.sigmas, getattr(scheduler, "sigmas_interpol", scheduler.sigmas)]
    sigmas = torch.cat([torch.as_tensor(values).flatten().double() for values in known])
    sigmas = sigmas[sigmas.isfinite()]
    return float(sigmas[(sigmas - sigma).abs().argmin()])


def scaled(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """The network's input; flow-matching schedulers leave it as it is and have no word for it."""
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def unit(ratio: float) -> tuple[float, float]:
    """(alpha, sigma) of the variance-preserving coordinates with this sigma / alpha."""
    alpha = 1 / math.hypot(1, ratio)
    return alpha, ratio * alpha
