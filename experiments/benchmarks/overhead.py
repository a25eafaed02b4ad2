"""Benchmark of overhead: the cost of a step beside its network call, in one run on one machine.

The unit is a bare loop of the same network and one fused in-place update, x += h network(x, c).
All loops are repeated in turns, so that a slow machine slows all of them; reported are medians of
the processor's time, which leaves out other programs.
"""

import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sde_diffusion as sd

SHAPES = ((64, 1, 28, 28), (256, 2))
STEPS = 50

Loop = Callable[[], Any]  # one run over all steps

OURS: dict[str, sd.samplers.Sampler] = {
    "ddim": sd.Ancestral(eta=0.0),
    "ancestral": sd.Ancestral(),
    "heun": sd.Heun(),
    **{f"adams {k}": sd.Adams(k) for k in range(1, 6)},
    "dpmsolver 2": sd.DPMSolver(2),
    "dpmsolver 3": sd.DPMSolver(3),
    "sde-dpmsolver": sd.DPMSolver(2, eta=1.0),
    "velocity-multistep": sd.VelocityMultistep(),
}


@dataclass(frozen=True)
class Overhead:
    """Cost of one sampler.

    Attributes:
        solver: its name.
        shape: of the batch.
        calls: network calls of a run.
        ratio: time of a call with all that belongs to it, over that of a bare one: the median
            over the rounds, in each of which both were timed.
        seconds: of a bare call, the median.
    """

    solver: str
    shape: tuple[int, ...]
    calls: int
    ratio: float
    seconds: float


class OneOperation(nn.Module):
    """Network of one multiplication that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, c: Any = None) -> Tensor:
        self.calls += 1
        return x * -0.5


def overheads(
    families: Callable[[nn.Module, tuple[int, ...]], dict[str, Loop]],
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    rounds: int = 41,
) -> list[Overhead]:
    """Measure all of them at each shape.

    Args:
        families: (network, shape) -> name -> its run.
        rounds: how often everything is repeated.
    """
    made: list[Overhead] = []
    for shape in shapes:
        network = OneOperation()
        loops = {"bare": bare(network, shape)} | families(network, shape)
        calls: dict[str, int] = {}
        for name, loop in loops.items():
            loop()
            network.calls = 0
            loop()
            calls[name] = network.calls
        seconds = in_turns(loops, rounds)
        per_call = {name: [s / calls[name] for s in seconds[name]] for name in loops}
        unit = per_call.pop("bare")
        made += [
            Overhead(
                name, shape, calls[name],
                statistics.median(own / one for own, one in zip(times, unit, strict=True)),
                statistics.median(unit),
            )
            for name, times in per_call.items()
        ]  # fmt: skip
    return made


def in_turns(loops: dict[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each in every round; in a round they run one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            begun = time.process_time()
            loop()
            seconds[name].append(time.process_time() - begun)
    return seconds


def bare(network: nn.Module, shape: tuple[int, ...]) -> Loop:
    """Return the unit: only the network and x += h network(x, c)."""
    start, c = normal(shape), torch.ones(shape[0])

    @torch.no_grad()
    def run() -> Tensor:
        x = start.clone()
        for _ in range(STEPS):
            x.add_(network(x, c), alpha=-1 / STEPS)
        return x

    return run


def normal(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ours(network: nn.Module, shape: tuple[int, ...]) -> dict[str, Loop]:
    """Return our samplers on VP; the network's output is eps."""
    model, x = sd.Denoiser(network, sd.VP(), sd.Eps()), normal(shape)
    source = torch.Generator()

    def loop(sampler: sd.samplers.Sampler) -> Loop:
        return lambda: sd.sample(model, sampler, x, steps=STEPS, generator=source.manual_seed(0))

    return {name: loop(sampler) for name, sampler in OURS.items()}


def with_peers(network: nn.Module, shape: tuple[int, ...]) -> dict[str, Loop]:
    """Return ours and, by their own loops, those of the installed libraries."""
    loops, x = ours(network, shape), normal(shape)
    if importlib.util.find_spec("diffusers"):
        diffusers: Any = importlib.import_module("diffusers")
        for name in ("DDIM", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"):
            scheduler = getattr(diffusers, f"{name}Scheduler")()
            loops[f"diffusers {name}"] = diffusers_loop(scheduler, network, x)
    if importlib.util.find_spec("k_diffusion"):
        sampling: Any = importlib.import_module("k_diffusion.sampling")
        sigmas = sd.grids.Karras().ratios(STEPS).float()
        for name in ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde"):
            loops[f"k-diffusion {name}"] = k_diffusion_loop(
                getattr(sampling, f"sample_{name}"), network, x, sigmas
            )
    if importlib.util.find_spec("azula"):
        sample: Any = importlib.import_module("azula.sample")
        denoise: Any = importlib.import_module("azula.denoise")
        noise: Any = importlib.import_module("azula.noise")
        denoiser = denoise.SimpleDenoiser(network, noise.VPSchedule())
        for name in ("DDIM", "Heun", "vAB", "zEAB"):
            sampler = getattr(sample, f"{name}Sampler")(denoiser, steps=STEPS, silent=True)
            loops[f"azula {name}"] = azula_loop(sampler, x)
    return loops


def diffusers_loop(scheduler: Any, network: nn.Module, x: Tensor) -> Loop:
    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(STEPS)
        state = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(state, t), t)
            state = scheduler.step(out, t, state).prev_sample
        return state

    return run


def k_diffusion_loop(function: Any, network: nn.Module, x: Tensor, sigmas: Tensor) -> Loop:
    return torch.no_grad()(lambda: function(network, x * sigmas[0], sigmas, disable=True))


def azula_loop(sampler: Any, x: Tensor) -> Loop:
    return torch.no_grad()(lambda: sampler(x))


def unet(
    samplers: dict[str, sd.samplers.Sampler], images: int = 8, steps: int = 10, rounds: int = 5
) -> list[Overhead]:
    """Measure runs with the packaged network, 1.1 million parameters, over its calls alone."""
    model = sd.pretrained("mnist_vp")
    shape = (images, 1, 28, 28)
    x, c = normal(shape), torch.full((images,), 0.5)
    source = torch.Generator()
    forwards = Forwards(model.network, x, c, steps)
    counted = sd.Denoiser(forwards, model.process, model.parameterization, model.noise_input)

    def loop(sampler: sd.samplers.Sampler) -> Loop:
        return lambda: sd.sample(counted, sampler, x, steps=steps, generator=source.manual_seed(0))

    loops = {name: loop(sampler) for name, sampler in samplers.items()}
    calls: dict[str, int] = {}
    for name, run in loops.items():
        forwards.calls = 0
        run()
        calls[name] = forwards.calls
    seconds = in_turns({"forward": forwards.alone} | loops, rounds)
    unit = seconds.pop("forward")
    return [
        Overhead(
            name, shape, calls[name],
            statistics.median(
                own / calls[name] / (one / steps) for own, one in zip(times, unit, strict=True)
            ),
            statistics.median(unit) / steps,
        )
        for name, times in seconds.items()
    ]  # fmt: skip


class Forwards(nn.Module):
    """Network that counts its calls, and repeats them alone."""

    def __init__(self, network: nn.Module, x: Tensor, c: Tensor, steps: int) -> None:
        super().__init__()
        self.network, self.x, self.c, self.steps, self.calls = network, x, c, steps, 0

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x, c)

    @torch.no_grad()
    def alone(self) -> None:
        for _ in range(self.steps):
            self.network(self.x, self.c)


def quiet() -> None:
    """Silence warnings of other libraries about their dependencies."""
    warnings.filterwarnings("ignore", module="(clip|k_diffusion|diffusers|jsonschema).*")
