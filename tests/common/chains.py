"""Chains, models of them, and Bayes' theorem for their kernels, for the tests of DDPM."""

import numpy as np
import pytest
import torch

import sde_diffusion as sd

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
CHAINS = {
    "linear": sd.Discrete.linear(1000),
    "cosine": sd.Discrete.cosine(50),
    "zero-snr": sd.Discrete.linear().zero_terminal_snr(),
    "users": sd.Discrete((0.1, 0.05, 0.7)),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
both = pytest.mark.parametrize("kind", ["beta", "posterior"])


class Network(torch.nn.Module):
    """An MLP and, if given, as many channels again of `extra`."""

    def __init__(self, extra=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.mlp, self.extra = sd.networks.MLP((3,), width=16).double(), extra

    def forward(self, x, c):
        more = [] if self.extra is None else [self.extra.expand_as(x)]
        return torch.cat([self.mlp(x, c), *more], dim=1)


def ddpm(chain, parameterization=None, extra=None):
    """V by default, which is defined at alpha = 0, too."""
    return sd.DDPM(sd.Denoiser(Network(extra), chain, parameterization or sd.V()))


def at(chain, i, x):
    """beta_i, abar_i and abar_(i-1), by numpy's product, broadcast against x."""
    betas = np.asarray(chain.betas)
    abar = np.cumprod(1 - betas)
    table = torch.tensor(np.stack([betas, abar, np.append(1.0, abar[:-1])]))
    i = torch.as_tensor(i)
    return table[:, i - 1].reshape(3, *i.shape, *(1,) * (x.ndim - i.ndim))


def bayes(chain, i, x0, x):
    """q(x_(i-1) | x_0) = N(sqrt(before) x_0, v) times N(x_i; sqrt(1 - beta) x_(i-1), beta).

    Precisions add: 1 / variance = 1 / v + (1 - beta) / beta. All multiplied by v beta, as v = 0 at
    i = 1.
    """
    beta, _, before = at(chain, i, x)
    v = 1 - before
    total = beta + (1 - beta) * v
    mean = (beta * before.sqrt() * x0 + v * (1 - beta).sqrt() * x) / total
    return mean, v * beta / total


def output_of(model, i, x):
    """The network's output for x at index i, in whatever parameterization."""
    c = (torch.as_tensor(i).double() / model.num_steps).expand(len(x))
    return model.model.network.mlp(x, c)


def places(chain):
    return [1, 2, chain.num_steps // 2, chain.num_steps]


def reverse_variance(chain, i, x, kind):
    """sigma_i^2: beta_i, or the posterior's, for which at i = 1 that of i = 2 stands in."""
    i = torch.as_tensor(i)
    return at(chain, i, x)[0] if kind == "beta" else bayes(chain, i.clamp(min=2), x, x)[1]
