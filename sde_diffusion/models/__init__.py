"""*What is clean, what is noise.* Networks, exact models, guidance: all map (x, level) to both."""

from sde_diffusion.models import exact, guidance
from sde_diffusion.models.adapt import Matched, adopt, match
from sde_diffusion.models.denoiser import Denoiser, pretrained
from sde_diffusion.models.guidance import (
    ClassifierFree,
    ClassifierGuided,
    Clipped,
    get_context_mask,
)
from sde_diffusion.models.model import LogSNRRange, Model, per_sample_field
from sde_diffusion.models.noise_inputs import (
    CNoise,
    ContinuousTime,
    LogSNR,
    NoiseInput,
    TimestepIndex,
    WholeTimestep,
)
from sde_diffusion.models.parameterizations import X0, Eps, Preconditioned, Score, V, Velocity
from sde_diffusion.models.prediction import Parameterization, Prediction, truth

__all__ = [
    "X0",
    "CNoise",
    "ClassifierFree",
    "ClassifierGuided",
    "Clipped",
    "ContinuousTime",
    "Denoiser",
    "Eps",
    "LogSNR",
    "LogSNRRange",
    "Matched",
    "Model",
    "NoiseInput",
    "Parameterization",
    "Preconditioned",
    "Prediction",
    "Score",
    "TimestepIndex",
    "V",
    "Velocity",
    "WholeTimestep",
    "adopt",
    "exact",
    "get_context_mask",
    "guidance",
    "match",
    "per_sample_field",
    "pretrained",
    "truth",
]
