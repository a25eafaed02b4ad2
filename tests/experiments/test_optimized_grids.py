"""The times of least W2 on a spectrum, and the table of what they are worth."""

import json
import math

import pytest
import torch
from benchmarks import optimized_grids
from benchmarks.problems import problems
from cases import FIXED_STEP, OWN_STEPS
from common.best_grids import blurred, optimized, starts

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.verify import spectra

VP = sd.VP()
EIGENVALUES = 4.0 / torch.arange(1, 25, dtype=torch.float64) ** 2


def w2(sampler, eigenvalues, times):
    """Of a run from the data's own law, by the full law of a diagonal Gaussian."""
    data = sd.exact.Gaussian(VP, torch.zeros(len(eigenvalues)), eigenvalues)
    return verify.law(sampler, data, times=times).departure


def way(sampler, eigenvalues, times):
    """What `optimized` makes least, typed once more: the W2 at the end and, as a mean, before."""
    data, weights = blurred(eigenvalues, VP)
    squares = spectra.along(sampler, data, times=times).way.square() @ weights
    return float(squares[-1] + squares[:-1].sum() / len(squares))


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("name", ["ancestral-eta-0", "heun", "adams", "ancestral"])
def test_the_optimized_grid_is_better_than_all_it_starts_from(name, steps):
    sampler = FIXED_STEP[name]
    found = way(sampler, EIGENVALUES, optimized(sampler, steps, EIGENVALUES, VP))
    begun = starts(sampler, steps, VP)
    assert len(begun) == 5
    assert all(found < way(sampler, EIGENVALUES, times) for times in begun)


def test_heun_gets_nearer_to_the_data_than_on_any_grid_in_use():
    sampler, steps = sd.Heun(), 6
    best = w2(sampler, EIGENVALUES, optimized(sampler, steps, EIGENVALUES, VP))
    used = [
        sd.grids.Uniform()(VP, steps),
        sd.grids.Karras()(VP, steps),
        *(sd.grids.Power(p)(VP, steps) for p in (1.0, 1.25, 1.5, 2.0)),
    ]
    assert all(best < w2(sampler, EIGENVALUES, times) for times in used)


def test_for_ddim_on_one_variance_it_is_nearly_the_best_grid_there_is():
    """The best is even in the angle: of angles of a given sum, equal ones have the largest cosines.

    That is for W2 at this variance. `optimized` weighs an octave about it, and the way, for which
    its own grid is better; but none of those that it starts from comes as near.
    """
    std, steps, sampler = 0.5, 6, sd.Ancestral(eta=0.0)
    variance = torch.tensor([std**2], dtype=torch.float64)
    (top,) = VP.levels(torch.ones(1, dtype=torch.float64))
    angle = math.atan(top.sigma / top.alpha / std)
    least = std * (1 - math.cos(angle / steps) ** steps)
    ratios = std * (angle * torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tan()
    even = VP.time(-2 * ratios.log())
    even[0], even[-1] = 1.0, 0.0
    assert w2(sampler, variance, even) == pytest.approx(least, rel=1e-9)
    found = optimized(sampler, steps, variance, VP)
    assert least <= w2(sampler, variance, found)
    assert all(w2(sampler, variance, found) < w2(sampler, variance, times)
               for times in starts(sampler, steps, VP))  # fmt: skip
    assert way(sampler, variance, found) <= way(sampler, variance, even)


@pytest.mark.parametrize("process", [sd.VP(), sd.EDM(), sd.RectifiedFlow(), sd.Cosine()], ids=str)
@pytest.mark.parametrize("sampler", [sd.Heun(), sd.EulerMaruyama()], ids=str)
def test_an_optimized_grid_is_one_of_the_samplers_and_the_same_each_time(process, sampler):
    state = torch.get_rng_state()
    times, again = (optimized(sampler, 3, EIGENVALUES, process) for _ in range(2))
    assert torch.equal(times, again)
    assert times.dtype == torch.float64
    assert times.shape == (4,)
    assert (times[:-1] > times[1:]).all()
    assert times[0] == sampler.grid(process, 3)[0]
    assert times[-1] == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_one_step_has_one_grid():
    assert optimized(sd.Heun(), 1, EIGENVALUES, VP).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("sampler", OWN_STEPS.values(), ids=str)
def test_what_has_no_law_is_refused_by_name(sampler):
    with pytest.raises(verify.NotAffine, match=type(sampler).__name__):
        optimized(sampler, 5, EIGENVALUES, VP)


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"steps": 0}, ValueError, "steps"),
    ({"covariance": torch.ones(2, 3)}, ValueError, "shape .2, 3."),
    ({"covariance": 1.0}, TypeError, "exact.Gaussian or a covariance"),
    ({"process": sd.Discrete.linear()}, ValueError, "equivalence.continuous"),
])  # fmt: skip
def test_optimized_refuses_what_makes_no_sense(change, error, match):
    asked = {"sampler": sd.Heun(), "steps": 4, "covariance": EIGENVALUES, "process": VP} | change
    with pytest.raises(error, match=match):
        optimized(**asked)


def test_a_covariance_alone_is_put_on_vp():
    alone = optimized(sd.Heun(), 3, EIGENVALUES)
    assert torch.equal(alone, optimized(sd.Heun(), 3, EIGENVALUES, VP))


def rms(problem, sampler, times):
    made = sd.sample(problem.data, sampler, problem.start, times=times)
    return float(problem.errors(made).square().mean().sqrt())


def test_a_grid_optimized_for_the_covariance_serves_the_mixture():
    """Heun in 5 steps, the geometric mean over the mixtures, against the best grid in use."""
    steps, sampler = 5, sd.Heun()
    total, known = 0.0, torch.zeros(len(starts(sampler, steps, VP)), dtype=torch.float64)
    for problem in problems(40, dimensions=(2,), samples=128):
        covariance = problem.moments[1]
        total += math.log(rms(problem, sampler, optimized(sampler, steps, covariance, VP)))
        known += torch.tensor(
            [math.log(rms(problem, sampler, times)) for times in starts(sampler, steps, VP)],
            dtype=torch.float64,
        )
    assert total < float(known.min())


def test_the_table_has_a_figure_for_each_grid_and_is_written(tmp_path):
    config = optimized_grids.Config(
        spectrum="power", steps=(2,), seeds=(40,), dimensions=(2,), num_samples=16, out=tmp_path
    )
    optimized_grids.main(config)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", *(f"optimized_grids.{kind}" for kind in ("md", "json", "png"))}
    found = json.loads((tmp_path / "optimized_grids.json").read_text())
    rows = {row["sampler"]: row["figures"] for row in found["gaussian"]}
    assert rows.keys() == {"Ancestral(eta=0)", "Heun", "Adams.auto", "Ancestral"}
    assert rows["Ancestral(eta=0)"]["own"] == rows["Ancestral(eta=0)"]["uniform"]  # on VP
    assert rows["Heun"]["own"] == rows["Heun"]["Karras"]
    data = sd.exact.Gaussian(VP, torch.zeros(784), optimized_grids.spectrum("power"))
    exact = spectra.along(sd.Heun(), data, 2).errors.square().mean().sqrt()
    assert rows["Heun"]["own"] == pytest.approx(float(exact), rel=1e-12)
    assert len(found["cases"]) == 3 * 3  # three kinds of mixture, three flows
