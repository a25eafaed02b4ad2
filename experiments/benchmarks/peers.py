"""Samplers of diffusers, k-diffusion and azula, each with every spacing that it has.

    solvers()      # name -> its family: number of steps -> sampler, all deterministic
    adaptive()     # those that choose their steps
    stochastic()   # those that draw noise

They run by their own code, in the adapters of `sde_diffusion.verify`; nothing is clipped.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks import rules
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import verify

Family = Callable[[int], sd.samplers.Sampler]

CHAIN = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # Ho et al. 2020
SIGMA_MAX = 80.0  # of k-diffusion's functions, as in Karras et al. 2022


def solvers() -> dict[str, Family]:
    """Return the deterministic samplers of the installed libraries, and dpm-solver's rules."""
    return installed(diffusers_solvers, k_diffusion_solvers, azula_solvers) | rules.solvers()


def adaptive() -> dict[str, Callable[[float, Any], sd.samplers.Sampler]]:
    """Return k-diffusion's dpm_adaptive of orders 2 and 3, from 80 to 0.002, by tolerance."""
    if importlib.util.find_spec("k_diffusion") is None:
        return {}
    function = importlib.import_module("k_diffusion.sampling").sample_dpm_adaptive

    def family(order: int, tolerance: float, problem: Any) -> sd.samplers.Sampler:
        settings = {"order": order, "rtol": tolerance, "atol": tolerance}
        return verify.KDiffusion(function, sd.grids.Karras().ratios(2)[:-1], settings)

    return {f"k-diffusion dpm_adaptive {order}": partial(family, order) for order in (2, 3)}


def stochastic() -> dict[str, Family]:
    """Return the stochastic samplers; not DPMSolverSDE of diffusers, which has a Brownian tree."""
    return installed(diffusers_stochastic, k_diffusion_stochastic, azula_stochastic)


def installed(*found: Callable[[], dict[str, Family]]) -> dict[str, Family]:
    """Return the samplers of the installed libraries."""
    families: dict[str, Family] = {}
    for find in found:
        library = find.__name__.rsplit("_", 1)[0]
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out")
        else:
            families |= find()
    if not families:
        raise ValueError("--peers: none is installed; python -m pip install -e '.[peers]'")
    return families


# ---- diffusers -----------------------------------------------------------------------------------

SPACINGS: dict[str, dict[str, Any]] = {
    **{name: {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}


def diffusers_solvers() -> dict[str, Family]:
    diffusers: Any = importlib.import_module("diffusers")
    diffusers.logging.set_verbosity_error()
    families: dict[str, Family] = {}

    def add(name: str, rule: str = "", spacings: tuple[str, ...] = (), **settings: Any) -> None:
        made = getattr(diffusers, f"{name}Scheduler")
        for spacing in spacings or ("",):
            title = ", ".join(part for part in (f"diffusers {name}", rule, spacing) if part)
            scheduler = made(**settings, **SPACINGS.get(spacing, {}))
            families[title] = partial(verify.Diffusers, scheduler)

    even = ("linspace", "leading", "trailing")
    sigmas = ("karras", "exponential", "beta")
    for order in (2, 3):
        more = {**CHAIN, "solver_order": order}
        for rule in ("dpmsolver++", "dpmsolver"):
            end = "zero" if rule == "dpmsolver++" else "sigma_min"
            settings = {"algorithm_type": rule, "final_sigmas_type": end, **more}
            add("DPMSolverMultistep", f"{rule} {order}", (*even, *sigmas, "lu"), **settings)
            add("DPMSolverSinglestep", f"{rule} {order}", ("", *sigmas), **settings,
                lower_order_final=True)  # fmt: skip
        add("DPMSolverMultistep", f"dpmsolver++ {order} sigma_min", (*even, *sigmas, "lu"),
            final_sigmas_type="sigma_min", **more)  # fmt: skip
        for kind in ("bh1", "bh2"):
            add("UniPCMultistep", f"{kind} {order} sigma_min", (*even, *sigmas), solver_type=kind,
                final_sigmas_type="sigma_min", **more)  # fmt: skip
        # To sigma = 0 only bh2: there bh1 is not finite.
        add("UniPCMultistep", f"bh2 {order}", (*even, *sigmas), **more)
        add("DEISMultistep", f"{order}", (*even, *sigmas), **more)
    add("DPMSolverMultistep", "dpmsolver++ 2 heun", (*even, *sigmas, "lu"), solver_type="heun",
        **CHAIN)  # fmt: skip
    for name in ("HeunDiscrete", "EulerDiscrete", "LMSDiscrete"):
        add(name, "", (*even, *sigmas), **CHAIN)
    add("KDPM2Discrete", "", (*even, *sigmas), **CHAIN)
    add("PNDM", "", even, **CHAIN)
    add("PNDM", "without Runge-Kutta", even, skip_prk_steps=True, **CHAIN)
    add("DDIM", "", even, clip_sample=False, **CHAIN)
    for spacing in ("karras", "exponential"):
        add("EDMEuler", spacing, sigma_schedule=spacing)
        for order in (2, 3):
            add("EDMDPMSolverMultistep", f"{order} {spacing}", sigma_schedule=spacing,
                solver_order=order)  # fmt: skip
    add("FlowMatchEulerDiscrete")
    for spacing in sigmas:
        add("FlowMatchEulerDiscrete", "", (spacing,))
    add("FlowMatchHeunDiscrete")
    return families


def diffusers_stochastic() -> dict[str, Family]:
    diffusers: Any = importlib.import_module("diffusers")
    diffusers.logging.set_verbosity_error()
    made: dict[str, Any] = {
        "DDPM": diffusers.DDPMScheduler(clip_sample=False, **CHAIN),
        "EulerAncestralDiscrete": diffusers.EulerAncestralDiscreteScheduler(**CHAIN),
        "SASolver": diffusers.SASolverScheduler(**CHAIN),
    }
    for spacing in ("trailing", "karras", "exponential", "lu"):
        made[f"DPMSolverMultistep, sde-dpmsolver++ 2, {spacing}"] = (
            diffusers.DPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver++", **CHAIN, **SPACINGS[spacing]
            )
        )
    return {f"diffusers {n}": partial(verify.Diffusers, scheduler) for n, scheduler in made.items()}


# ---- k-diffusion ---------------------------------------------------------------------------------


def u_uniform(steps: int) -> Tensor:
    """Return sigma / alpha at levels evenly spaced in u = sigma / (alpha + sigma)."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64) * SIGMA_MAX / (1 + SIGMA_MAX)
    return u / (1 - u)


def k_diffusion_spacings() -> dict[str, Callable[[int], Tensor]]:
    """Its own, from 80 to several last levels before 0, and levels even in u."""
    sampling: Any = importlib.import_module("k_diffusion.sampling")
    made: dict[str, Callable[[int], Tensor]] = {}

    def spaced(name: str, low: float, more: dict[str, float], steps: int) -> Tensor:
        if steps == 1:
            return torch.tensor([SIGMA_MAX, 0.0], dtype=torch.float64)
        return getattr(sampling, f"get_sigmas_{name}")(steps, low, SIGMA_MAX, **more).double()

    for low in (0.002, 0.02, 0.1):
        made[f"karras from {low}"] = partial(spaced, "karras", low, {})
        made[f"log-SNR from {low}"] = partial(spaced, "exponential", low, {})
        made[f"polyexponential 1.3 from {low}"] = partial(
            spaced, "polyexponential", low, {"rho": 1.3}
        )
    made["vp"] = lambda steps: sampling.get_sigmas_vp(steps).double()
    made["u"] = u_uniform
    return made


def k_diffusion_solvers() -> dict[str, Family]:
    sampling: Any = importlib.import_module("k_diffusion.sampling")

    def family(name: str, spacing: Callable[[int], Tensor], steps: int) -> sd.samplers.Sampler:
        return verify.KDiffusion(getattr(sampling, f"sample_{name}"), spacing(steps))

    families: dict[str, Family] = {}
    for name in ("euler", "heun", "dpm_2", "lms", "dpmpp_2m"):
        for spacing, levels in k_diffusion_spacings().items():
            families[f"k-diffusion {name}, {spacing}"] = partial(family, name, levels)

    def fast(low: float, steps: int) -> sd.samplers.Sampler:
        if steps < 2:
            raise ValueError("dpm_fast needs two levels")
        sigmas = sd.grids.Karras(SIGMA_MAX, low).ratios(steps)
        return verify.KDiffusion(sampling.sample_dpm_fast, sigmas[:-1], {"n": steps})

    for low in (0.002, 0.02, 0.1):  # it stops there
        families[f"k-diffusion dpm_fast to {low}"] = partial(fast, low)
    return families


def k_diffusion_stochastic() -> dict[str, Family]:
    sampling: Any = importlib.import_module("k_diffusion.sampling")
    spacings = k_diffusion_spacings()

    def family(name: str, spacing: Callable[[int], Tensor], steps: int) -> sd.samplers.Sampler:
        return verify.KDiffusion(
            partial(on_a_path, getattr(sampling, f"sample_{name}")), spacing(steps)
        )

    return {
        f"k-diffusion {name}, {spacing}": partial(family, name, spacings[spacing])
        for name in ("euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde",
                     "dpmpp_3m_sde")
        for spacing in ("karras from 0.02", "log-SNR from 0.02")
    }  # fmt: skip


def on_a_path(
    function: Callable[..., Tensor], model: Any, x: Tensor, sigmas: Tensor, disable: bool = True
) -> Tensor:
    """Return a function of k-diffusion with a Brownian path in sigma drawn by torch."""
    return function(model, x, sigmas, disable=disable, noise_sampler=Path(x))


class Path:
    """Increments of one Brownian path over intervals that begin where others did, or end there.

    k-diffusion's own, a Brownian tree, has a generator that no adapter can replace.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.known: tuple[float, float, Tensor] | None = None

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """The increment from sigma down to sigma_next, of variance 1."""
        start, stop = float(sigma), float(sigma_next)
        if self.known is None or self.known[0] != start:
            self.known = start, stop, (start - stop) ** 0.5 * torch.randn_like(self.x)
            return self.known[2] / (start - stop) ** 0.5
        _, middle, increment = self.known  # a step within a step: stop is beyond the middle
        increment = increment + (middle - stop) ** 0.5 * torch.randn_like(self.x)
        return increment / (start - stop) ** 0.5


# ---- azula ---------------------------------------------------------------------------------------


def azula_solvers() -> dict[str, Family]:
    denoise, noise, sample = (
        importlib.import_module(f"azula.{name}") for name in ("denoise", "noise", "sample")
    )
    schedules = {
        name: denoise.SimpleDenoiser(torch.nn.Identity(), getattr(noise, f"{name}Schedule")())
        for name in ("VP", "VE", "Cosine", "Rectified", "Decay")
    }

    def family(name: str, schedule: str, more: dict[str, int], steps: int) -> sd.samplers.Sampler:
        sampler = getattr(sample, f"{name}Sampler")(
            schedules[schedule], steps=steps, silent=True, dtype=torch.float64, **more
        )
        return verify.Azula(sampler)

    families: dict[str, Family] = {}
    for schedule in schedules:
        for name in ("Euler", "Heun"):
            families[f"azula {name}, {schedule}"] = partial(family, name, schedule, {})
        for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
            for order in (2, 3, 4):
                more = {"order": order}
                families[f"azula {name} {order}, {schedule}"] = partial(
                    family, name, schedule, more
                )
    return families


def azula_stochastic() -> dict[str, Family]:
    denoise, noise, sample = (
        importlib.import_module(f"azula.{name}") for name in ("denoise", "noise", "sample")
    )

    def family(name: str, schedule: str, steps: int) -> sd.samplers.Sampler:
        levels = getattr(noise, f"{schedule}Schedule")()
        denoiser = denoise.SimpleDenoiser(torch.nn.Identity(), levels)
        sampler = getattr(sample, f"{name}Sampler")
        return verify.Azula(sampler(denoiser, steps=steps, silent=True, dtype=torch.float64))

    return {
        f"azula {name}, {schedule}": partial(family, name, schedule)
        for name in ("DDPM", "Ito")
        for schedule in ("VP", "Rectified", "Decay")
    }
