"""The processes and samplers that tests are parametrized over."""

import sde_diffusion as sd

PROCESSES = {
    "vp": sd.VP(),
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
    "adams1": sd.Adams(1),
    "adams3": sd.Adams(3),
}
OWN_STEPS = {"torch-ode": sd.TorchODE(), "scipy-ode": sd.ScipyODE()}
PARAMETERIZATIONS = {"eps": sd.Eps(), "x0": sd.X0(), "v": sd.V(), "score": sd.Score()}
