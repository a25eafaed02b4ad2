"""Processes with parameters: torch modules of two formulas."""

import math

import torch
from torch import nn

from sde_diffusion.processes import Process


class Rate(nn.Module, Process):
    """dx = -b/2 x dt + sqrt(b) dW with a learned b."""

    def __init__(self, b=10.0):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def log_alpha(self, t):
        return -self.b * t / 2

    def variance(self, t):
        return -torch.expm1(-self.b * t)


class LogSNR(nn.Module, Process):
    """Variance-preserving, with  sigma^2 / alpha^2 = e^(-high) expm1(G(t)),  G from 0 to `fall`.

    So log_snr = high - G(t) away from t = 0, as in Kingma et al. 2021. From t = START on, G is
    linear plus softplus ramps of positive slopes, all learned: monotone, with fixed ends. Without
    ramps it is the linear log-SNR.

    Args:
        knots: number of ramps; 0 for the fixed linear log-SNR.
    """

    HIGH, FALL, START = 10.0, 20.0, 0.1

    def __init__(self, knots=0):
        super().__init__()
        self.slopes = nn.Parameter(torch.full((knots,), -3.0, dtype=torch.float64))
        places = torch.linspace(self.START, 1, knots, dtype=torch.float64)
        self.register_buffer("places", places)

    def fall(self, t):
        def ramps(t):
            each = nn.functional.softplus(12 * (t[..., None] - self.places)) / 12
            return t + (self.slopes.exp() * each).sum(-1)

        low, high = ramps(t.new_tensor([self.START, 1.0]))
        share = (ramps(t.clamp(min=self.START)) - low) / (high - low)
        return self.FALL * (t.clamp(max=self.START) + (1 - self.START) * share)

    def ratio(self, t):
        return math.exp(-self.HIGH) * torch.expm1(self.fall(t))

    def log_alpha(self, t):
        return -torch.log1p(self.ratio(t)) / 2

    def variance(self, t):
        ratio = self.ratio(t)
        return ratio / (1 + ratio)
