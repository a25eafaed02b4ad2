"""From real data to samples, with no network and no files: scikit-learn's 8x8 digits."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits

import sde_diffusion as sd
from sde_diffusion import data, training

N = 200


@pytest.fixture(scope="module")
def digits():
    """1,597 digits to train on and 200 held out, (N, 1, 8, 8) in [-1, 1]."""
    pixels = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[N:]], pixels[order[:N]]


@pytest.fixture(scope="module")
def trained(digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = sd.networks.UNet(channels=(16, 32), blocks=1, patch=1, embedding=64, heads=2)
    denoiser = sd.Denoiser(network, sd.VP(), sd.V())
    recipe = training.Recipe(
        steps=300, batch_size=64, learning_rate=4e-3, warmup=50, ema=training.EMA(0.99)
    )
    state = training.TrainState(denoiser, recipe, sd.losses.NormalLogSNR(sd.VP()))
    losses = [m.loss for m in training.train(state, data.Points(digits[0]))]
    assert np.mean(losses[-50:]) < np.mean(losses[:50])
    return state.averaged


def w2(squared, a, b):
    """Wasserstein-2 between equal numbers of points: the best assignment of one to the other."""
    costs = squared[np.ix_(a, b)]
    return float(np.sqrt(costs[linear_sum_assignment(costs)].mean()))


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [(sd.TorchODE(rtol=1e-3, atol=1e-3), None), (sd.Adams(3), 20), (sd.Ancestral(), 100)],
    ids=["ode", "adams", "ancestral"],
)
def test_samples_are_closer_to_held_out_digits_than_a_fitted_gaussian(
    digits, trained, sampler, steps
):
    """Permutation test of the gap in exact W2: model and Gaussian samples exchanged."""
    train, held = digits
    x = sd.VP().prior((N, 1, 8, 8), seeds=range(N))
    made = sd.sample(trained, sampler, x, steps=steps, seeds=range(N))
    flat = train.flatten(1).double().numpy()
    fitted = np.random.default_rng(0).multivariate_normal(flat.mean(0), np.cov(flat.T), N)
    points = [made.flatten(1).double(), torch.from_numpy(fitted), held.flatten(1).double()]
    squared = torch.cdist(torch.cat(points), torch.cat(points)).square().numpy()
    model, gaussian, real = np.arange(3 * N).reshape(3, N)

    def gap(a, b):
        return w2(squared, b, real) - w2(squared, a, real)

    shuffles = np.random.default_rng(1)
    exchanged = [gap(*shuffles.permutation(2 * N).reshape(2, N)) for _ in range(999)]
    observed = gap(model, gaussian)
    assert observed > 0
    assert (1 + sum(value >= observed for value in exchanged)) / 1000 <= 0.001
