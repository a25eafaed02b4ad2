"""Discrete and continuous as one: the chain of an SDE, and the SDE through a chain."""

from typing import Literal

import torch

from sde_diffusion import errors
from sde_diffusion.processes import Discrete, Interpolated, Process

__all__ = ["continuous", "discretize"]


def discretize(
    process: Process, num_steps: int, rule: Literal["euler", "exact"] = "euler"
) -> Discrete:
    r"""The DDPM chain of N steps whose limit is a variance-preserving process.

        euler:  beta_i = beta(i/N) / N,  beta = -2 f             (Song et al. 2021, App. B)
        exact:  beta_i = 1 - (alpha(i/N) / alpha((i-1)/N))^2     the process's own marginals at i/N

    Args:
        process: variance-preserving, alpha^2 + sigma^2 = 1.
        num_steps: N.
        rule: "euler" or "exact".
    Raises:
        ValueError: if the process is not variance-preserving, or a beta reaches 1.
    """
    errors.integer("num_steps", num_steps)
    errors.choice("rule", rule, ("euler", "exact"))
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    log_alpha = process.log_alpha(t)
    total = torch.exp(2 * log_alpha) + process.variance(t)
    if not torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12):
        raise ValueError(
            f"{type(process).__name__} is not variance-preserving, so no DDPM chain tends to it"
        )
    if rule == "euler":
        betas = -2 * process.drift(t[1:]) / num_steps
    else:
        betas = -torch.expm1(2 * log_alpha.diff())
    if bool((betas >= 1).any()):
        raise ValueError(
            f"rule {rule!r} gives beta = {betas.max():.3g} >= 1 with num_steps={num_steps}; "
            f"take more steps"
        )
    return Discrete(tuple(betas.tolist()))


def continuous(discrete: Discrete) -> Interpolated:
    """The SDE with piecewise constant beta(t) and the chain's marginals and transitions at i/N.

    It is the same path, but its own grids go anywhere between the chain's times.
    """
    return Interpolated(discrete.betas)
