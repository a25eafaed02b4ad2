"""Distances between sets of points are those of their papers."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from feature_sets import digits_fixture as digits_fixture
from feature_sets import f64, normal

from sde_diffusion import metrics


def test_a_shift_has_its_length():
    """W_2 of x and x + c is |c|, and the sliced one |c| times the root mean square of a direction's
    component along c: over 2,000 directions 1 / d, to 4.5 standard errors of its chi-square."""
    x, c = normal(200, 5), torch.tensor([3.0, 0, -4, 0, 0], dtype=f64)
    assert float(metrics.wasserstein(x, x + c)) == pytest.approx(5, rel=1e-9)
    sliced = float(metrics.sliced_wasserstein(x, x + c, projections=2000)) ** 2
    # Var of a squared component on the sphere in d = 5: 3 / (d (d + 2)) - 1 / d^2.
    error = 25 * (3 / 35 - 1 / 25) ** 0.5 / 2000**0.5
    assert abs(sliced - 5) < 4.5 * error


def test_on_the_line_transport_pairs_the_sorted_points():
    x, y = normal(300, 1), normal(300, 1, seed=1).exp()
    expected = float((x.sort(0).values - y.sort(0).values).square().mean().sqrt())
    assert float(metrics.wasserstein(x, y)) == pytest.approx(expected, rel=1e-9)
    assert float(metrics.sliced_wasserstein(x, y)) == pytest.approx(expected, rel=1e-9)


def test_transport_is_the_best_assignment():
    x, y = normal(60, 3), normal(60, 3, seed=1)
    cost = torch.cdist(x, y).square().numpy()
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    found = metrics.wasserstein(x, y)
    assert float(found) == pytest.approx(cost[rows, columns].mean() ** 0.5, rel=1e-7)
    assert found.counts == (60, 60)


def test_the_energy_distance_on_the_line_is_scipys():
    """scipy's is the root of the biased one: with its zero pairs, N (N - 1) of N^2."""
    x, y = normal(80, 1), normal(70, 1, seed=1) + 0.5
    a, b = x[:, 0].numpy(), y[:, 0].numpy()

    def within(a):
        return np.abs(a[:, None] - a).sum() / (len(a) - 1) / len(a) / len(a)

    biased = scipy.stats.energy_distance(a, b) ** 2
    expected = biased - within(a) - within(b)
    assert float(metrics.energy_distance(x, y)) == pytest.approx(expected, rel=1e-9)


def test_mmd_between_gaussians_is_its_closed_form():
    """With X ~ N(0, 1), Y ~ N(m, 1) and this kernel, E k(X, Y) = h / sqrt(h^2 + 2)
    exp(-m^2 / (2 (h^2 + 2))), so MMD^2 = 2 h / sqrt(h^2 + 2) (1 - exp(...)); to 4.5 SE."""
    h, m = 1.5, 1.0
    expected = 2 * h / (h**2 + 2) ** 0.5 * (1 - math.exp(-(m**2) / (2 * (h**2 + 2))))
    found = torch.tensor([
        float(metrics.mmd(normal(100, 1, seed=k), normal(100, 1, seed=500 + k) + m, bandwidth=h))
        for k in range(200)
    ])  # fmt: skip
    assert abs(float(found.mean()) - expected) < 4.5 * float(found.std()) / 200**0.5


@pytest.mark.parametrize("distance", ["mmd", "energy_distance"])
def test_unbiased_distances_of_one_law_are_zero_on_average(distance):
    measure = getattr(metrics, distance)
    found = torch.tensor([
        float(measure(normal(50, 2, seed=k), normal(50, 2, seed=900 + k))) for k in range(300)
    ])  # fmt: skip
    if distance == "mmd":  # its bandwidth depends on the real points, hardly
        found = torch.tensor([
            float(metrics.mmd(normal(50, 2, seed=k), normal(50, 2, seed=900 + k), bandwidth=1.0))
            for k in range(300)
        ])  # fmt: skip
    assert abs(float(found.mean())) < 4.5 * float(found.std()) / 300**0.5
    assert bool((found < 0).any())
