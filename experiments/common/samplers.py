"""Samplers of the command lines: the package's catalogue, and short names for the most used.

A sampler that is added to `sd.samplers.CATALOGUE` has a name here at once.
"""

from dataclasses import fields, replace
from typing import Any

from common.flags import UNSEEDED, FrameName
from common.words import by_word, match

import sde_diffusion as sd
from sde_diffusion.grids import frames

# Settings that serve digits. "adams" stands for Adams.auto of the steps that are given.
SHORT: dict[str, sd.samplers.Sampler] = {
    "ode": sd.TorchODE(rtol=1e-3, atol=1e-3),
    "adaptive-ode": sd.AdaptiveODE(1e-3, 1e-3),
    "adams": sd.Adams.auto(20),
    "dpm2": sd.DPMSolver(2),
    "dpm3": sd.DPMSolver(3),
    "ddim": sd.Ancestral(eta=0.0),
    "sde": sd.EulerMaruyama(),
    "torchsde": sd.samplers.TorchSDE(),
    "sde-dpm2": sd.DPMSolver(2, eta=1.0),
    "multistep": sd.VelocityMultistep(),
    "churn": sd.samplers.Churn(sd.Heun()),
    "langevin": sd.samplers.Langevin(sd.Ancestral()),
}
SAMPLERS: dict[str, sd.samplers.Sampler] = SHORT | {
    name: sampler
    for name, sampler in by_word(sd.samplers.CATALOGUE).items()
    if name not in SHORT and name not in UNSEEDED
}
# Steps other than those of the order: two calls a step, or noise in a method of order 2.
STEPS: dict[type, int] = {sd.Heun: 18, sd.samplers.Langevin: 125}


def settings(word: str) -> set[str]:
    """Return those of steps, frame, rtol and atol that have an effect on the sampler."""
    made: Any = SAMPLERS[word]
    own = {field.name for field in fields(made)} & {"frame", "rtol", "atol"}
    return own if made.claims.adaptive else own | {"steps"}


def check(word: str, flag: str = "--sampler", **given: Any) -> None:
    """Refuse an unknown name, and settings that are given and have no effect on the sampler."""
    match(flag, word, SAMPLERS)
    for name, value in given.items():
        if value is not None and name not in settings(word):
            raise ValueError(f"--{name} has no effect with {flag} {word}")


def usual_steps(word: str) -> int | None:
    """Return the number of steps that serves digits; None if the sampler chooses its own."""
    made = SAMPLERS[word]
    claims = made.claims
    if claims.adaptive:
        return None
    of_order = 250 if (claims.order or 1) <= 1 else 50 if claims.noise else 20
    return STEPS.get(type(made), of_order)


def sampler(
    word: str,
    steps: int | None = None,
    frame: FrameName | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> sd.samplers.Sampler:
    """Return the sampler of a name; settings that it does not have are ignored.

    Args:
        steps: number of steps it will make; adams has a setting for each.
        frame: coordinates in which it integrates; gaussian has the mean and covariance of MNIST.
        rtol, atol: tolerances of a solver that chooses its own steps.
    """
    chosen = frames.Straight() if frame == "straight" else None
    if frame == "gaussian":
        chosen = frames.GaussianFrame.pretrained("mnist")
    if word == "adams":
        return sd.Adams.auto(steps or 20, chosen or frames.Straight())
    made: Any = SAMPLERS[word]
    given = {"frame": chosen, "rtol": rtol, "atol": atol}
    own = settings(word)
    return replace(made, **{k: v for k, v in given.items() if v is not None and k in own})
