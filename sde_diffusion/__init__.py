"""Continuous-time SDE and score-based diffusion, with the DDPM as its Euler discretization."""

from sde_diffusion import exact, grids, networks, verify
from sde_diffusion.denoiser import Denoiser, LogSNR, Time, pretrained
from sde_diffusion.equivalence import continuous, discretize
from sde_diffusion.losses import DiscreteTimes, NormalLogSNR, UniformTimes, denoising_loss
from sde_diffusion.prediction import X0, Eps, Prediction, Score, V
from sde_diffusion.processes import VP, Discrete, Interpolated, Level, Process, RectifiedFlow
from sde_diffusion.samplers import (
    Adams,
    AdaptiveTorchSDE,
    Ancestral,
    EulerMaruyama,
    Heun,
    ScipyODE,
    TorchODE,
    TorchSDE,
)
from sde_diffusion.sampling import Sample, Sampler, SolverError, sample, trajectory

__version__ = "0.1.0"

__all__ = [
    "VP",
    "X0",
    "Adams",
    "AdaptiveTorchSDE",
    "Ancestral",
    "Denoiser",
    "Discrete",
    "DiscreteTimes",
    "Eps",
    "EulerMaruyama",
    "Heun",
    "Interpolated",
    "Level",
    "LogSNR",
    "NormalLogSNR",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Sample",
    "Sampler",
    "ScipyODE",
    "Score",
    "SolverError",
    "Time",
    "TorchODE",
    "TorchSDE",
    "UniformTimes",
    "V",
    "continuous",
    "denoising_loss",
    "discretize",
    "exact",
    "grids",
    "networks",
    "pretrained",
    "sample",
    "trajectory",
    "verify",
]
