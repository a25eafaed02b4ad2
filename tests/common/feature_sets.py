"""Features that the tests of metrics share."""

import pytest
import torch
from sklearn.datasets import load_digits

f64 = torch.float64


def normal(*shape, seed=0, dtype=f64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stretched(n, d, seed=0):
    """Features whose deviations fall from 10 to 0.1, correlated."""
    return normal(n, d, seed=seed) * torch.logspace(1, -1, d, dtype=f64) @ normal(d, d, seed=99)


def of_images(x):
    """Features (N, 64) of scikit-learn's 8x8 digits: their pixels."""
    return x.flatten(1)


@pytest.fixture(scope="module", name="digits")
def digits_fixture():
    """1,797 real digits, (N, 1, 8, 8) in [-1, 1]; a little noise, as some pixels are constant."""
    x = torch.tensor(load_digits().images / 8 - 1)[:, None]
    return x + 0.01 * normal(*x.shape)
