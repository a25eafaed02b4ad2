"""The processes, samplers and models that tests are parametrized over."""

import torch

import sde_diffusion as sd

PROCESSES = {
    "vp": sd.VP(),
    "sub-vp": sd.SubVP(),
    "ve": sd.VE(),
    "ou": sd.OU(),
    "cosine": sd.Cosine(),
    "edm": sd.EDM(),
    "rectified": sd.RectifiedFlow(),
    "discrete": sd.Discrete.linear(),
    "interpolated": sd.continuous(sd.Discrete.linear()),
}
FIXED_STEP = {
    "ancestral": sd.Ancestral(),
    "ancestral-beta": sd.Ancestral("beta"),
    "ddim": sd.Ancestral(eta=0.0),
    "euler-maruyama": sd.EulerMaruyama(),
    "torchsde": sd.TorchSDE(),
    "heun": sd.Heun(),
    "churn": sd.Churn(sd.Heun(), s_churn=10.0),
    "dpm2": sd.DPMSolver(2),
    "dpm3": sd.DPMSolver(3),
    "sde-dpm2": sd.SDEDPMSolver(),
    "multistep": sd.VelocityMultistep(),
    "langevin": sd.Langevin(sd.Heun()),
    "adams1": sd.Adams(1),
    "adams3": sd.Adams(3),
}
OWN_STEPS = {
    "torch-ode": sd.TorchODE(),
    "scipy-ode": sd.ScipyODE(),
    "adaptive-ode": sd.AdaptiveODE(),
}
PARAMETERIZATIONS = {
    "eps": sd.Eps(),
    "x0": sd.X0(),
    "v": sd.V(),
    "score": sd.Score(),
    "velocity": sd.Velocity(),
    "karras": sd.Karras(0.8),
}

MEAN = 0.7


def gaussian(process, variance=0.25):
    return sd.exact.Gaussian(process, torch.tensor([MEAN], dtype=torch.float64), variance)


class Recorded:
    """A model that remembers the levels it was asked about."""

    def __init__(self, model):
        self.model, self.process, self.levels = model, model.process, []

    def __call__(self, x, level):
        self.levels.append(level)
        return self.model(x, level)

    def rows(self, index):
        return self
