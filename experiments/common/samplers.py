"""The words of the scripts for samplers: the one place where a word becomes a sampler."""

from typing import Literal

import sde_diffusion as sd
from sde_diffusion.grids import frames

Word = Literal[
    "ancestral", "ddim", "sde", "torchsde", "langevin", "heun", "churn", "adams", "dpm2",
    "dpm3", "sde-dpm2", "multistep", "ode", "adaptive-ode", "adaptive-sde",
]  # fmt: skip
FrameWord = Literal["straight", "gaussian"]

# Steps that serve digits, and the tolerances of the solvers that choose their own steps.
STEPS = {
    "ancestral": 250, "ddim": 250, "sde": 250, "torchsde": 250, "langevin": 125, "heun": 18,
    "churn": 50, "adams": 20, "dpm2": 20, "dpm3": 20, "sde-dpm2": 50, "multistep": 50,
}  # fmt: skip
TOLERANCES = {"ode": (1e-3, 1e-3), "adaptive-ode": (1e-3, 1e-3), "adaptive-sde": (0.01, 0.01)}
FRAMED = ("adams", "adaptive-ode")  # which have a frame to integrate in


def sampler(
    word: Word,
    steps: int | None = None,
    frame: FrameWord | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> sd.samplers.Sampler:
    """The sampler of a word; what it has no use for has no effect.

    Args:
        steps: how many it will be asked for; adams has a setting for each.
        frame: in which adams and adaptive-ode integrate; gaussian is that of MNIST.
        rtol, atol: tolerances of a solver with steps of its own [TOLERANCES].
    """
    chosen = frames.GaussianFrame.pretrained("mnist") if frame == "gaussian" else frames.Straight()
    usual_rtol, usual_atol = TOLERANCES.get(word, (1.0, 1.0))
    rtol, atol = rtol or usual_rtol, atol or usual_atol
    made: dict[Word, sd.samplers.Sampler] = {
        "ancestral": sd.Ancestral(),
        "ddim": sd.Ancestral(eta=0.0),
        "sde": sd.EulerMaruyama(),
        "torchsde": sd.samplers.TorchSDE(),
        "langevin": sd.samplers.Langevin(sd.Ancestral()),
        "heun": sd.Heun(),
        "churn": sd.samplers.Churn(sd.Heun()),
        "adams": sd.Adams.auto(steps or STEPS["adams"], chosen),
        "dpm2": sd.DPMSolver(2),
        "dpm3": sd.DPMSolver(3),
        "sde-dpm2": sd.DPMSolver(2, eta=1.0),
        "multistep": sd.VelocityMultistep(),
        "ode": sd.TorchODE(rtol=rtol, atol=atol),
        "adaptive-ode": sd.AdaptiveODE(rtol, atol, chosen),
        "adaptive-sde": sd.AdaptiveSDE(rtol, atol),
    }
    return made[word]
