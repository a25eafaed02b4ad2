"""*What is minimized, and at which levels.* The denoising loss, its weights, the laws of t."""

from sde_diffusion.losses import score_matching, times
from sde_diffusion.losses.denoising import L1, L2, Huber, Penalty, denoising_loss
from sde_diffusion.losses.times import (
    DiscreteTimes,
    LikelihoodTimes,
    NormalLogSNR,
    TimeDistribution,
    UniformTimes,
    stratified,
)
from sde_diffusion.losses.weights import SNR, VLB, EDMWeight, Likelihood, MinSNR, Simple, Weight

__all__ = [
    "L1",
    "L2",
    "SNR",
    "VLB",
    "DiscreteTimes",
    "EDMWeight",
    "Huber",
    "Likelihood",
    "LikelihoodTimes",
    "MinSNR",
    "NormalLogSNR",
    "Penalty",
    "Simple",
    "TimeDistribution",
    "UniformTimes",
    "Weight",
    "denoising_loss",
    "score_matching",
    "stratified",
    "times",
]
