"""The processes, samplers and models that tests are parametrized over."""

import torch
from common.words import by_word

import sde_diffusion as sd

PROCESSES = by_word(sd.processes.CATALOGUE)
SAMPLERS = by_word(sd.samplers.CATALOGUE)
# Settings that run the code of another entry: certified, but left out of the products of tests.
TWINS = {"torch-sde-milstein", "torch-sde-srk", "adams-k-2", "adams-k-4", "adams-k-5"}
FIXED_STEP = {
    name: sampler
    for name, sampler in SAMPLERS.items()
    if sampler.claims.order is not None and name not in TWINS
}
OWN_STEPS = {name: SAMPLERS[name] for name in ("torch-ode", "scipy-ode", "adaptive-ode")}
PARAMETERIZATIONS = {
    "eps": sd.Eps(),
    "x0": sd.X0(),
    "v": sd.V(),
    "score": sd.Score(),
    "velocity": sd.Velocity(),
    "karras": sd.models.Preconditioned(0.8),
}

MEAN = 0.7


def gaussian(process, variance=0.25):
    return sd.exact.Gaussian(process, torch.tensor([MEAN], dtype=torch.float64), variance)


class Recorded:
    """A model that keeps the levels of its calls."""

    def __init__(self, model):
        self.model, self.process, self.levels = model, model.process, []

    def __call__(self, x, level):
        self.levels.append(level)
        return self.model(x, level)
