"""Continuous-time SDE and score-based diffusion, with the DDPM as its Euler discretization."""

from sde_diffusion import networks
from sde_diffusion.denoiser import Denoiser, LogSNR, Time, pretrained
from sde_diffusion.losses import DiscreteTimes, NormalLogSNR, UniformTimes, denoising_loss
from sde_diffusion.prediction import X0, Eps, Prediction, Score, V
from sde_diffusion.processes import VP, Discrete, Interpolated, Level, Process, RectifiedFlow
