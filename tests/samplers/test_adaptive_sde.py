"""AdaptiveSDE: its frame, its law, its path, and what it says of each sample.

Statistical bounds are 4.5 standard errors of the estimate named in the test.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import PARAMETERIZATIONS, PROCESSES, gaussian
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.models.model import per_sample_field
from sde_diffusion.noise import brownian
from sde_diffusion.noise.brownian import Brownian

MEANS = torch.tensor([[-1.2, 0.8], [0.4, -1.2], [1.3, 0.6]], dtype=torch.float64)


def mixture(process):
    return sd.exact.GaussianMixture(process, [0.4, 0.35, 0.25], MEANS, [0.05] * 3)


def run(model, solver, seeds, shape=(1,), dtype=torch.float64):
    """Samples and report."""
    x = model.process.prior((len(seeds), *shape), seeds=seeds, dtype=dtype)
    (end,) = sd.trajectory(model, solver, x, seeds=seeds)
    return end.x, end.memory


def network(process=PROCESSES["vp"], parameterization=PARAMETERIZATIONS["v"]):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sd.Denoiser(sd.networks.MLP((3,), width=32, fourier=8), process, parameterization)


# ---- the frame -----------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_the_reverse_sde_has_additive_noise_in_the_share_of_signal(process):
    """With c(t) = alpha / (alpha^2 + sigma^2), y = c x and time running down, Ito's rule gives

        dy = (-c' x - c f x + c g^2 score) dt + c g dW,

    which is (x0 + alpha score) dkappa + dW_kappa: c^2 g^2 = -kappa', both in float64.
    """
    t = torch.tensor([0.013, 0.21, 0.5043, 0.87, 0.96], dtype=torch.float64, requires_grad=True)
    alpha, variance = process.log_alpha(t).exp(), process.variance(t)
    power = alpha**2 + variance
    (c_slope,) = torch.autograd.grad((alpha / power).sum(), t, retain_graph=True)
    (kappa_slope,) = torch.autograd.grad((alpha**2 / power).sum(), t)
    t, alpha, variance, power = (v.detach() for v in (t, alpha, variance, power))
    c, f, g2 = alpha / power, process.drift(t), process.diffusion(t) ** 2
    assert_close(c**2 * g2, -kappa_slope, rtol=1e-9, atol=1e-12)
    x, x0 = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    score = (alpha * x0 - x) / variance
    drift = -c_slope * x - c * f * x + c * g2 * score
    assert_close(drift, -kappa_slope * (x0 + alpha * score), rtol=1e-8, atol=1e-10)


# ---- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [sd.VP(), sd.RectifiedFlow()], ids=["vp", "rectified"])
@pytest.mark.parametrize("d", [1, 2, 16])
def test_the_law_is_not_biased(process, d):
    """Mean and standard deviation of the reverse SDE from the prior, at the default tolerance.

    Steps are rejected on the way. With noise redrawn on rejection the standard deviation is wrong
    by tenths, which the solvers page of the docs measures.
    """
    n = 8000 // d
    mean = torch.full((d,), 0.7, dtype=torch.float64)
    model = sd.exact.Gaussian(process, mean, torch.full((d,), 0.25, dtype=torch.float64))
    made, report = run(model, sd.AdaptiveSDE(), range(10**6, 10**6 + n), (d,))
    exact, covariance = model.reverse_sde()
    variance = covariance.diagonal()
    assert ((made.mean(0) - exact).abs() < 4.5 * (variance / n).sqrt()).all()
    # Pooled over coordinates, which have the same law.
    spread = float(((made - exact) ** 2 / variance).mean())
    assert abs(spread - 1) < 4.5 * math.sqrt(2 / (n * d))
    assert report.rejections.sum() > 0
    assert report.finished.all()


def test_the_law_is_not_biased_by_rejection_where_many_steps_are():
    """At a large first step and in one coordinate, where the noise of a step decides most."""
    n = 20_000
    model = gaussian(sd.RectifiedFlow())
    made, report = run(model, sd.AdaptiveSDE(0.02, 0.02), range(n))
    mean, covariance = model.reverse_sde()
    assert report.rejections.double().mean() > 1
    variance = float(covariance)
    assert abs(made.mean() - float(mean)) < 4.5 * math.sqrt(variance / n)
    assert abs(made.var() / variance - 1) < 4.5 * math.sqrt(2 / n)


def test_a_generator_gives_the_law_too_and_the_same_sample_again():
    n = 4000
    model = gaussian(sd.VP())
    x = sd.VP().prior((n, 1), seeds=range(n), dtype=torch.float64)
    before = torch.get_rng_state()
    first, again, other = (
        sd.sample(model, sd.AdaptiveSDE(), x, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    mean, covariance = model.reverse_sde()
    for made in (first, other):
        assert abs(made.mean() - float(mean)) < 4.5 * math.sqrt(float(covariance) / n)
        assert abs(made.var() / float(covariance) - 1) < 4.5 * math.sqrt(2 / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_batch_mates(dtype):
    """In batches of 100, 10 and 1: matrix products of other sizes round otherwise."""
    model, bound = network().to(dtype), 1e-5 if dtype == torch.float32 else 1e-12
    whole, report = run(model, sd.AdaptiveSDE(), range(100), (3,), dtype)
    for size, count in ((10, 100), (1, 20)):
        for k in range(0, count, size):
            part, of_part = run(model, sd.AdaptiveSDE(), range(k, k + size), (3,), dtype)
            assert_close(part, whole[k : k + size], rtol=bound, atol=bound)
            assert torch.equal(of_part.calls, report.calls[k : k + size])


# ---- the path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_of_normal_data_the_sample_is_its_path_however_it_is_split(process):
    """D = 0 for data N(0, I): y ends at y_0 plus the whole increment, by few steps or by many."""
    model, n = sd.exact.Gaussian(process), 50
    ends = [run(model, sd.AdaptiveSDE(tol, tol), range(n)) for tol in (10.0, 1e-2, 1e-4)]
    for made, report in ends[1:]:
        assert_close(made, ends[0][0], rtol=1e-10, atol=1e-10)
        assert (report.rejections == 0).all()
    calls = [report.calls.double().mean() for _, report in ends]
    assert calls[0] < calls[1] < calls[2]


def test_the_path_is_that_of_the_other_samplers():
    """Where u(1) = 1 the whole increment is the one that a source gives for [0, 1]."""
    process, n = sd.RectifiedFlow(), 50
    made, _ = run(sd.exact.Gaussian(process), sd.AdaptiveSDE(), range(n))
    like = torch.empty(n, 1, dtype=torch.float64)
    assert_close(made, Brownian(range(n), process.u)(1.0, 0.0, like), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [sd.VP(), sd.EDM()], ids=["vp", "edm"])
def test_it_converges_to_what_a_fixed_step_solver_converges_to(process):
    """Euler-Maruyama's order is 1: 1,000 steps are a tenth as far as 100; a 20th of the spread is
    left to both."""
    model, n = gaussian(process), 200
    fine, _ = run(model, sd.AdaptiveSDE(1e-3, 1e-3), range(n))
    x = process.prior((n, 1), seeds=range(n), dtype=torch.float64)
    other = sd.sample(model, sd.EulerMaruyama(), x, steps=1000, seeds=range(n))
    assert (fine - other).square().mean().sqrt() < fine.std() / 20


def test_the_error_follows_the_tolerance():
    """Strongly, against 5e-4 on the same paths. A local error of order 3/2 in the length of a step
    adds up to one of order 1, so the error falls like tol^(2/3) or faster."""
    model, n = gaussian(sd.VP()), 300
    exact, _ = run(model, sd.AdaptiveSDE(5e-4, 5e-4), range(n))
    tolerances, gaps = (0.08, 0.04, 0.02, 0.01), []
    for tol in tolerances:
        made, report = run(model, sd.AdaptiveSDE(tol, tol), range(n))
        gaps.append(float((made - exact).square().mean().sqrt()))
        assert gaps[-1] < 2 * tol
        assert 1 / 3 < float(report.error.mean()) / gaps[-1] < 5
    assert np.polyfit(np.log(tolerances), np.log(gaps), 1)[0] > 2 / 3


def test_a_mixture_is_followed_too():
    """The median, as few samples fall into another mode: below the tolerance."""
    model, n = mixture(sd.VP()), 200
    exact, _ = run(model, sd.AdaptiveSDE(2e-3, 2e-3), range(n), (2,))
    made, _ = run(model, sd.AdaptiveSDE(), range(n), (2,))
    assert (made - exact).square().mean(1).sqrt().median() < 1e-2


@pytest.mark.parametrize(
    ("weights", "means", "stds"),
    [
        ([0.5, 0.5], [[-1.0], [1.0]], [0.02, 0.3]),
        ([0.3, 0.3, 0.4], [[-1.0, 0.5], [0.7, -0.7], [0.8, 0.9]], [0.02, 0.05, 0.3]),
        ([1.0], [[0.7]], [0.02]),
    ],
    ids=["line", "plane", "alone"],
)
def test_narrow_modes_have_their_spread_beside_wide_ones(weights, means, stds):
    """Within 1 % and the error of the estimate; the nearest mode is that of the sample."""
    n, means, stds = 3000, torch.tensor(means).double(), torch.tensor(stds).double()
    model = sd.exact.GaussianMixture(sd.VP(), weights, means, stds**2)
    made, report = run(model, sd.AdaptiveSDE(), range(n), means.shape[1:])
    assert report.calls.double().mean() < 130
    away = made[:, None] - means
    nearest = (away / stds.clamp(min=0.1)[:, None]).square().sum(2).argmin(1)
    for k, std in enumerate(stds):
        z = away[nearest == k, k] / std
        assert abs(float(z.square().mean().sqrt()) - 1) < 0.01 + 4.5 / math.sqrt(2 * z.numel())
        assert float(z.abs().max()) < 5.5


def test_a_network_whose_drift_is_singular_at_the_data_ends_in_few_calls():
    """eps that is not 0 at x = alpha x0 gives D = x0 - (alpha / sigma) eps without bound."""
    _, report = run(network(), sd.AdaptiveSDE(), range(8), (3,), torch.float32)
    assert report.calls.max() < 150


def test_the_parts_of_a_grid_have_paths_of_their_own_and_the_law_of_one():
    n = 10_000
    model = gaussian(sd.VP())
    x = sd.VP().prior((n, 1), seeds=range(n), dtype=torch.float64)
    made = sd.sample(model, sd.AdaptiveSDE(), x, times=[1.0, 0.5, 0.2, 0.0], seeds=range(n))
    mean, covariance = model.reverse_sde()
    assert abs(made.mean() - float(mean)) < 4.5 * math.sqrt(float(covariance) / n)
    assert abs(made.var() / float(covariance) - 1) < 4.5 * math.sqrt(2 / n)


@pytest.mark.parametrize(("high", "low"), [(1.0, 0.0), (0.99, 0.0), (0.6, 0.1), (0.3, 0.28)])
def test_the_intervals_that_cover_a_part_of_the_path_are_its_own(high, low):
    """They touch, end where they should, and are standard normal and independent."""
    n = 20_000
    keys, like = brownian.path_keys(range(n)), torch.empty(n, dtype=torch.float64)
    parts = sd.samplers.adaptive_sde.covering(high, low, keys, like)[::-1]
    assert [part.low for part in parts] == [part.high for part in parts[1:]] + [low]
    assert parts[0].high == high
    z = torch.stack([part.z for part in parts])
    assert ((z.var(1) - 1).abs() < 4.5 * math.sqrt(2 / n)).all()
    between = torch.atleast_2d(torch.corrcoef(z)) - torch.eye(len(z))
    assert between.abs().max() < 4.5 / math.sqrt(n)


# ---- what it says, and what it refuses -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Halting:
    """The exact model, which counts its calls by sample and refuses rows that have left."""

    model: object
    calls: Tensor
    index: Tensor = per_sample_field()

    @property
    def process(self):
        return self.model.process

    def __call__(self, x, level):
        assert len(self.index) == len(x)
        self.calls[self.index] += 1
        return self.model(x, level)


def test_finished_samples_leave_the_batch_and_calls_are_counted():
    n = 64
    calls = torch.zeros(n, dtype=torch.int64)
    model = Halting(gaussian(sd.VP()), calls, torch.arange(n))
    _, report = run(model, sd.AdaptiveSDE(), range(n))
    assert torch.equal(calls, report.calls)
    assert len(report.calls.unique()) > 3
    assert (report.rejections < report.calls).all()
    assert (report.error > 0).all()


@dataclass(frozen=True, eq=False)
class Conditional:
    """Data N(mean_k, 0.25) for sample k."""

    process: sd.processes.Process
    means: Tensor = per_sample_field()

    def __call__(self, x, level):
        p = sd.exact.Gaussian(self.process, 0.0, 0.25)(x - level.alpha * self.means, level)
        return sd.models.truth(p.x0 + self.means, p.eps, level)


def test_a_condition_follows_its_samples():
    """Shifting the data shifts the sample by as much, up to what the prior at t = 1 knows of them.

    alpha(1) = 6.6e-3, of which 1 part in 4 would show.
    """
    means = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    solver = sd.AdaptiveSDE(2e-3, 2e-3)
    shifted, _ = run(Conditional(sd.VP(), means), solver, range(40))
    plain, _ = run(Conditional(sd.VP(), 0 * means), solver, range(40))
    assert_close(shifted - plain, means, rtol=0, atol=2e-2)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("parameterization", ["x0", "v", "velocity", "karras"])
def test_networks_on_every_process(process, parameterization):
    model = network(process, PARAMETERIZATIONS[parameterization])
    made, report = run(model, sd.AdaptiveSDE(0.1, 0.1), range(2), (3,), torch.float32)
    assert made.isfinite().all()
    assert made.dtype == torch.float32
    assert report.finished.all()


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batches_of_any_rank_size_and_type(shape, dtype):
    model = sd.exact.Gaussian(sd.VP(), 0.2, 0.5)
    x = sd.VP().prior(shape, seeds=range(shape[0]), dtype=dtype)
    before = x.clone()
    (end,) = sd.trajectory(model, sd.AdaptiveSDE(), x, seeds=range(shape[0]))
    assert (end.x.shape, end.x.dtype) == (x.shape, dtype)
    assert torch.equal(x, before)
    assert [len(field) for field in end.memory] == [shape[0]] * 4


def test_max_calls_is_an_error_that_says_where():
    with pytest.raises(sd.SolverError, match=r"t=.* after 5 calls: max_calls reached by 8 of 8"):
        run(mixture(sd.VP()), sd.AdaptiveSDE(max_calls=5), range(8), (2,))


def test_a_part_of_the_way_is_predicted_along_the_path_if_asked_for():
    """With D = 0 the prediction is the end itself; the report says who was given up."""
    for process in (sd.VP(), sd.EDM()):
        model = sd.exact.Gaussian(process)
        exact, _ = run(model, sd.AdaptiveSDE(), range(20))
        short = sd.AdaptiveSDE(max_calls=4, return_partial=True)
        made, report = run(model, short, range(20))
        assert_close(made, exact, rtol=1e-10, atol=1e-10)
        assert not report.finished.any()
        assert (report.calls == 4).all()
    some = sd.AdaptiveSDE(max_calls=50, return_partial=True)
    made, report = run(mixture(sd.VP()), some, range(50), (2,))
    assert made.isfinite().all()
    assert 0 < report.finished.sum() < 50
    assert (report.calls[~report.finished] == 50).all()


def test_a_model_that_is_not_finite_is_named():
    class Broken(Conditional):
        def __call__(self, x, level):
            x0 = super().__call__(x, level).x0
            return sd.models.truth(
                torch.where(torch.arange(len(x))[:, None] == 3, torch.nan, x0), x0, level
            )

    with pytest.raises(sd.SolverError, match=r"AdaptiveSDE\(rtol=0.02, atol=0.02\) failed at t=1 "):
        run(Broken(sd.VP(), torch.zeros(5, 1, dtype=torch.float64)), sd.AdaptiveSDE(), range(5))


def test_injected_noise_and_steps_are_refused():
    model, x = gaussian(sd.VP()), torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"noise must be left out for AdaptiveSDE.*generator="):
        sd.sample(model, sd.AdaptiveSDE(), x, noise=lambda t, s, like: torch.zeros_like(like))
    with pytest.raises(ValueError, match="steps must be left out for AdaptiveSDE"):
        sd.sample(model, sd.AdaptiveSDE(), x, steps=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": 0}, "rtol must lie"),
        ({"atol": -1.0}, "atol must lie"),
        ({"max_calls": 0}, "max_calls must be"),
        ({"return_partial": "yes"}, "return_partial must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sd.AdaptiveSDE(**arguments)
