"""Distances of features are those of their papers; figures do not depend on the processes."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from feature_sets import digits_fixture as digits_fixture
from feature_sets import f64, normal, of_images, stretched
from torch import nn
from torch.testing import assert_close

from sde_diffusion import data, metrics
from sde_diffusion.metrics.quality import Statistics, frechet_distance

ROOT = Path(__file__).parents[2]


# ---- the Frechet distance ---------------------------------------------------------------------


def published(a, b):
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)), Heusel et al. 2017, with scipy's root."""
    S, T = a.covariance.numpy(), b.covariance.numpy()
    root = scipy.linalg.sqrtm(S @ T).real
    return float((a.mean - b.mean).square().sum()) + np.trace(S + T - 2 * root)


@pytest.mark.parametrize(("d", "n"), [(1, 10), (8, 100), (64, 65), (200, 400)])
def test_the_frechet_distance_is_the_published_formula(d, n):
    a, b = Statistics.of(stretched(n, d)), Statistics.of(1.3 * stretched(2 * n, d, seed=1) + 0.5)
    assert float(frechet_distance(a, b)) == pytest.approx(published(a, b), rel=1e-6)
    assert float(frechet_distance(a, b)) == pytest.approx(float(frechet_distance(b, a)), rel=1e-10)


def test_the_frechet_distance_of_gaussians_on_the_line_is_that_of_their_quantiles():
    """In one dimension it is (m - n)^2 + (s - t)^2."""
    a, b = (Statistics(torch.tensor([m], dtype=f64), torch.tensor([[s**2]], dtype=f64))
            for m, s in ((0.3, 2.0), (-1.0, 0.5)))  # fmt: skip
    assert float(frechet_distance(a, b)) == pytest.approx(1.3**2 + 1.5**2, rel=1e-12)


def test_a_set_is_at_no_distance_from_itself_and_none_is_negative(digits):
    """Rounding is eps times the trace and the width, 1e-11 here; also where S is singular."""
    real = metrics.statistics(digits, of_images)
    flat = stretched(100, 20)
    flat[:, 5:] = 0
    for stats in (real, Statistics.of(stretched(70, 64)), Statistics.of(flat)):
        assert 0 <= frechet_distance(stats, stats) <= 1e-8 * float(stats.covariance.trace())


def test_it_is_torchmetrics_with_our_features(digits):
    """FrechetInceptionDistance with our network in Inception's place, to its float64 rounding."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(nn.Module):
        num_features = 64

        def forward(self, x):
            return x.flatten(1)

    fid = FrechetInceptionDistance(feature=Pixels())
    fid.update(digits[:900], real=True)
    fid.update(digits[900:], real=False)
    ours = frechet_distance(
        *(metrics.statistics(x, Pixels()) for x in (digits[:900], digits[900:]))
    )
    assert float(ours) == pytest.approx(float(fid.compute()), rel=1e-6)
    assert ours.counts == (900, 897)


def test_the_bias_of_the_frechet_distance_falls_as_one_over_n():
    """Of N draws of N(0, I) against N(0, I) itself. Expanding the root of the sample covariance to
    second order, the mean is  d / N + d (d + 1) / (4 N) + O(1 / N^2),  d = 8."""
    d, truth = 8, Statistics(torch.zeros(8, dtype=f64), torch.eye(8, dtype=f64))
    for n in (400, 1600):
        found = torch.stack([
            torch.tensor(float(frechet_distance(truth, Statistics.of(normal(n, d, seed=k)))))
            for k in range(200)
        ])  # fmt: skip
        expected = (d + d * (d + 1) / 4) / n
        error = float(found.std()) / 200**0.5
        # The next order: third moments of a covariance of N draws are about (d / N)^2.
        assert abs(float(found.mean()) - expected) < 4.5 * error + (d / n) ** 2


def test_fewer_samples_than_features_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="63 samples are fewer than the 64 features"):
        Statistics.of(normal(63, 64))
    Statistics.of(normal(64, 64))


def test_statistics_are_mean_and_covariance(digits):
    found = metrics.statistics(digits, of_images, batch_size=100)
    x = digits.flatten(1).numpy()
    assert_close(found.mean.numpy(), x.mean(0))
    assert_close(found.covariance.numpy(), np.cov(x, rowvar=False))
    assert found.count == len(digits)


# ---- KID, precision, recall -------------------------------------------------------------------


def unbiased(x, y):
    """MMD^2 with (x . y / d + 1)^3, Binkowski et al. 2018, eq. 4 and Section 3, in a plain loop."""

    def k(a, b):
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_mean_over_disjoint_subsets_of_the_published_estimate():
    x, y = normal(40, 5), normal(33, 5, seed=1) + 0.5
    found = metrics.kid(x, y, subsets=3, seed=4)
    parts = [
        part[data.shuffled_indices(4 + k, len(part), 0, 33)].split(11)
        for k, part in enumerate((x, y))
    ]
    each = np.array([unbiased(a, b) for a, b in zip(*parts, strict=True)])
    assert float(found) == pytest.approx(each.mean(), rel=1e-10)
    assert found.standard_error == pytest.approx(each.std(ddof=1) / 3**0.5, rel=1e-8)
    assert found.counts == (40, 33)


def test_kid_is_unbiased_and_its_standard_error_is_right():
    """Between sets of one law its mean is 0 at any size, and the mean square of the errors it
    states is that of its own: disjoint subsets are independent."""
    found = [metrics.kid(normal(100, 4, seed=k), normal(100, 4, seed=1000 + k)) for k in range(300)]
    values = np.array([float(figure) for figure in found])
    stated = np.array([figure.standard_error for figure in found])
    for zero in (values, values**2 - stated**2):
        assert abs(zero.mean()) < 4.5 * zero.std() / 300**0.5
    assert metrics.kid(normal(100, 4), normal(100, 4, seed=1) + 1) > 0.5


def test_precision_and_recall_are_shares_inside_balls():
    """Kynkaanniemi et al. 2019, eq. 1, in a plain loop."""
    real, made = normal(60, 3), 0.6 * normal(50, 3, seed=1)

    def share(inside, balls, k=3):
        radii = [sorted(math.dist(b, c) for c in balls.tolist())[k] for b in balls.tolist()]
        within = [
            any(math.dist(p, b) <= r for b, r in zip(balls.tolist(), radii, strict=True))
            for p in inside.tolist()
        ]
        return sum(within) / len(within)

    found = metrics.precision_recall(real, made)
    assert float(found.precision) == pytest.approx(share(made, real), abs=1e-6)
    assert float(found.recall) == pytest.approx(share(real, made), abs=1e-6)
    assert found.recall.counts == (60, 50)
    assert found.precision > found.recall  # narrower than the real points


def test_precision_and_recall_at_their_ends():
    x = normal(50, 4)
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, x + 100) == (0, 0)
    one_mode = torch.cat([x, x + 100])
    found = metrics.precision_recall(one_mode, x)
    assert found == (1, 0.5)


# ---- few samples, halves ----------------------------------------------------------------------


def test_principal_components_are_those_of_the_covariance():
    x = stretched(200, 20)
    projected = metrics.principal(x, 4)(x)
    values, vectors = np.linalg.eigh(np.cov(x.numpy(), rowvar=False))
    found = torch.cov(projected.T)
    assert_close(found.diagonal().numpy(), values[::-1][:4].copy(), rtol=1e-9, atol=1e-9)
    assert_close(found - found.diag().diag(), torch.zeros_like(found), rtol=0, atol=1e-9)
    outside = vectors[:, :-4].T @ metrics.principal(x, 4).basis.numpy()
    assert np.abs(outside).max() < 1e-9
    with pytest.raises(ValueError, match="components must be at most 19; got 20"):
        metrics.principal(x[:20], 20)


def test_the_floor_is_the_metric_between_disjoint_halves(digits):
    x = digits.flatten(1)
    first, second = metrics.halves(x, seed=3)
    rows = {tuple(row) for row in torch.cat([first, second]).tolist()}
    assert len(rows) == len(x) == len(first) + len(second)
    assert len(first) - len(second) in (0, 1)

    def distance(a, b):
        return frechet_distance(Statistics.of(a), Statistics.of(b))

    assert metrics.floor(distance, x, seed=3) == distance(first, second)
    few = metrics.floor(distance, x, count=200, seed=3)
    assert few.counts == (len(first), 200)
    assert few > metrics.floor(distance, x, seed=3)  # its bias is about 1 / 200, not 1 / 898


# ---- bad arguments, global state --------------------------------------------------------------

X = normal(50, 3)
BAD = {
    "statistics of one": (lambda: Statistics.of(X[:1]), "N > 1"),
    "statistics of integers": (lambda: Statistics.of(X.long()), "floating"),
    "statistics of nan": (lambda: Statistics.of(X * torch.nan), "finite"),
    "float32 statistics": (lambda: Statistics(torch.zeros(2), torch.eye(2)), "float64"),
    "a wrong suffix": (lambda: Statistics.of(X).save("stats.npy"), "must end in .npz"),
    "widths": (
        lambda: frechet_distance(Statistics.of(X), Statistics.of(X[:, :2])),
        "same width; got 3 and 2",
    ),
    "kid widths": (lambda: metrics.kid(X, X[:, :2]), "same width"),
    "kid of few": (lambda: metrics.kid(X, X[:19]), "subsets must be at most 9; got 10"),
    "kid of one subset": (lambda: metrics.kid(X, X, subsets=1), "subsets"),
    "precision of few": (lambda: metrics.precision_recall(X, X[:3]), "k must be at most 2; got 3"),
    "no images": (lambda: metrics.extract(X[:0], of_images), "images must be .* N > 0"),
    "images of nan": (lambda: metrics.extract(X * torch.nan, of_images), "finite"),
    "features of another shape": (lambda: metrics.extract(X, lambda x: x[:, 0]), "network must"),
    "too large a floor": (lambda: metrics.floor(metrics.kid, X, count=26), "at most 25"),
    "points of integers": (lambda: metrics.wasserstein(X, X.long()), "made must be a floating"),
    "points without N": (lambda: metrics.wasserstein(X[0], X[0]), "real must be"),
    "points of nan": (lambda: metrics.mmd(X, X * torch.nan), "made must be finite"),
    "points of two widths": (lambda: metrics.energy_distance(X, X[:, :2]), "same width"),
    "no bandwidth": (lambda: metrics.mmd(X, X, bandwidth=0.0), "bandwidth"),
    "one point many times": (lambda: metrics.mmd(X * 0, X), "give a bandwidth"),
    "no directions": (lambda: metrics.sliced_wasserstein(X, X, projections=0), "projections"),
    "positions twice": (
        lambda: metrics.gathered(X[:2], torch.tensor([0, 0])), "positions must be 0"
    ),
    "too few positions": (lambda: metrics.gathered(X, torch.arange(3)), "positions must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name):
    attempt, reason = BAD[name]
    with pytest.raises(ValueError, match=reason):
        attempt()


def test_arguments_of_another_kind_are_refused_by_name():
    for attempt, reason in (
        (lambda: frechet_distance(X, Statistics.of(X)), "real must be Statistics"),
        (lambda: metrics.kid(Statistics.of(X), X), "real must be a tensor"),
        (lambda: Statistics([0.0], [[1.0]]), "mean must be a tensor"),
        (lambda: metrics.extract(X, "inception"), "network must be a module"),
        (lambda: metrics.chunks(2.5, 1), "count must be an integer"),
    ):
        with pytest.raises(TypeError, match=reason):
            attempt()


def test_nothing_is_changed_neither_inputs_nor_generators_nor_modes():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(9, 4))
    network[0].eval()
    images = normal(60, 1, 3, 3, dtype=torch.float32)
    kept, before = images.clone(), (torch.get_rng_state(), str(np.random.get_state()))  # noqa: NPY002
    x = metrics.extract(images, network)
    assert torch.equal(x, metrics.extract(images, network, batch_size=60))  # no dropout
    assert [part.training for part in network] == [False, True, True]
    assert not x.requires_grad
    metrics.kid(x, x + 1)
    metrics.precision_recall(x, x + 1)
    metrics.sliced_wasserstein(x, x + 1)
    metrics.wasserstein(x, x + 1)
    metrics.floor(metrics.energy_distance, x)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("torchmetrics", "metrics.kid(x, x)"),
        ("torch_fidelity", "metrics.precision_recall(x, x)"),
        ("ot", "metrics.wasserstein(x, x)"),
        ("ot", "metrics.sliced_wasserstein(x, x)"),
        ("torch_fidelity", "features.InceptionFeatures('/nowhere')"),
        ("efficientnet_lite_pytorch", "features.EfficientNetFeatures()"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_has_it(monkeypatch, module, use):
    from sde_diffusion.metrics import features

    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # how Python marks what cannot be imported
    names = {"metrics": metrics, "features": features, "x": X}
    what, _, argument = use.partition("(")
    call = getattr(names[what.partition(".")[0]], what.partition(".")[2])
    arguments = {"x, x)": (X, X), "'/nowhere')": ("/nowhere",), ")": ()}[argument]
    with pytest.raises(metrics.MissingExtra, match=r"pip install 'sde-diffusion\[metrics\]'"):
        call(*arguments)


# ---- processes --------------------------------------------------------------------------------

WORKER = """
import sys, torch
from accelerate import Accelerator
sys.path[:0] = ["tests/metrics", "tests/common"]
from test_metrics import spread
torch.set_num_threads(1)
world = Accelerator(cpu=True)
print(*spread(world.process_index, world.num_processes, world), flush=True)
world.end_training()
"""


def spread(process, processes, world=None):
    """Figures of 101 and of 5 images, each drawn and read by a network on one of the processes."""
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Tanh())
    for number, p in enumerate(network.parameters()):
        p.data = normal(*p.shape, seed=number, dtype=torch.float32)
    figures = []
    for count in (101, 5):
        mine = metrics.chunks(count, 8, process, processes)
        found = [torch.empty(0, 32)]  # the second process has none of the 5
        for part in mine:
            images = torch.stack([normal(1, 4, 4, seed=k, dtype=torch.float32) for k in part])
            found.append(metrics.extract(images, network, 8))
        positions = torch.tensor([k for part in mine for k in part], dtype=torch.int64)
        whole = metrics.gathered(torch.cat(found), positions, world)
        figures.append(float(whole.square().sum()).hex())
        figures.append(float(metrics.energy_distance(whole, whole[: count // 2] + 1)).hex())
    return figures


def test_two_processes_find_the_bits_of_one():
    """101 rows in chunks of 8: 7 chunks for one process and 6 for the other; 5 rows: 1 and none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    alone = spread(0, 1)
    for out, _ in ends:
        assert out.split() == alone


def test_chunks_are_dealt_whole_and_cover_every_position_once():
    for count, size, processes in ((101, 8, 2), (5, 8, 3), (16, 8, 2), (1, 1, 1)):
        dealt = [metrics.chunks(count, size, k, processes) for k in range(processes)]
        together = [position for part in dealt for chunk in part for position in chunk]
        assert sorted(together) == list(range(count))
        assert all(chunk.start % size == 0 for part in dealt for chunk in part)
