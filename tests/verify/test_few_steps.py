"""`verify.steps_for`: how many steps a tolerance takes, from the exact law alone.

Bounds called rounding: float64, some hundred operations on numbers of order 1, hence 1e-10.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from benchmarks.problems import problems
from cases import FIXED_STEP, OWN_STEPS, PROCESSES
from oracles import normal
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.grids import frames
from sde_diffusion.verify import spectra

VP = sd.VP()
ROOT = normal(12, 3, 3)[11]
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(3, dtype=torch.float64)
PLANE = sd.exact.Gaussian(VP, torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64), COVARIANCE)
EIGENVALUES = 4.0 / torch.arange(1, 25, dtype=torch.float64) ** 2
FLOWS = {"ddim": sd.Ancestral(eta=0.0), "heun": sd.Heun(), "adams3": sd.Adams(3)}


# ---- the exact law along eigenvectors ---------------------------------------------------------


@pytest.mark.parametrize("name", FIXED_STEP)
def test_every_w2_tried_is_that_of_the_full_law(name):
    sampler = FIXED_STEP[name]
    found = verify.steps_for(1e-3, PLANE, sampler, most=5)
    for n, distance in found.tried.items():
        law = verify.law(sampler, PLANE, steps=n)
        assert distance == pytest.approx(law.w2(), rel=1e-10, abs=1e-10)
    assert max(found.tried) == found.steps == 5
    assert found.departure == pytest.approx(law.departure, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_law_is_the_full_one_on_every_process(process):
    found = verify.steps_for(1e-3, PLANE, sd.Ancestral(), process, most=4)
    for n, distance in found.tried.items():
        law = verify.law(sd.Ancestral(), PLANE, process, steps=n)
        assert distance == pytest.approx(law.w2(), rel=1e-10, abs=1e-10)


def test_a_gaussian_its_covariance_and_its_eigenvalues_are_one():
    centred = sd.exact.Gaussian(VP, torch.zeros(3), COVARIANCE)
    forms = (centred, COVARIANCE, torch.linalg.eigvalsh(COVARIANCE))
    first, *others = (verify.steps_for(0.1, data, sd.Heun(), VP) for data in forms)
    for other in others:
        assert other.steps == first.steps
        for n, distance in other.tried.items():
            assert distance == pytest.approx(first.tried[n], rel=1e-10, abs=1e-10)


def test_ddim_on_a_grid_even_in_its_angle_has_the_closed_form():
    r"""With r = sigma / alpha = s tan(theta), DDIM keeps cos(step) of what the flow keeps.

    xbar_s = (s^2 + r_s r_t) / (s^2 + r_t^2) xbar_t  for N(0, s^2), the flow's is the same with
    (s^2 + r_s^2)^(1/2) (s^2 + r_t^2)^(1/2) above: their ratio is cos(theta_t - theta_s).
    """
    std, n = 0.3, 7
    (top,) = VP.levels(torch.ones(1, dtype=torch.float64))
    angle = math.atan(top.sigma / top.alpha / std)
    ratios = std * (angle * torch.linspace(1, 0, n + 1, dtype=torch.float64)).tan()
    times = VP.time(-2 * ratios.log())
    times[0], times[-1] = 1.0, 0.0
    found = spectra.along(
        sd.Ancestral(eta=0.0),
        spectra.centred(torch.tensor([std**2], dtype=torch.float64), VP),
        times=times,
    )
    kept = math.cos(angle / n) ** torch.arange(1, n + 1, dtype=torch.float64)
    assert_close(found.way[:, 0], std * (kept - 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ancestral-eta-0", "ancestral", "euler-maruyama"])
def test_after_each_step_the_rest_is_exact_on_the_way(name):
    r"""Of the law N(m, s^2) after a step: what the exact flow, or reverse SDE, makes of it.

    x0 given x_t is N(K x_t, v (1 - alpha K)), K = alpha v / (alpha^2 v + sigma^2): so the SDE ends
    with variance v (1 - alpha K) + K^2 s^2, and the flow with v s^2 / (alpha^2 v + sigma^2).
    """
    sampler, v = FIXED_STEP[name], 0.3
    data = sd.exact.Gaussian(VP, torch.zeros(1), v)
    times = sampler.grid(VP, 5)
    found = spectra.along(sampler, data, times=times)
    for k, level in enumerate(VP.levels(times[1:-1])):
        s2 = float(verify.law(sampler, data, times=times[: k + 2]).steps[-1].covariance)
        gain = level.alpha * v / (level.alpha**2 * v + level.sigma**2)
        if name == "ancestral-eta-0":
            variance = gain / level.alpha * s2
        else:
            variance = v * (1 - level.alpha * gain) + gain**2 * s2
        assert float(found.way[k]) == pytest.approx(math.sqrt(variance) - math.sqrt(v), abs=1e-10)


# ---- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_one_step_less_misses_and_every_larger_number_tried_meets(name):
    found = verify.steps_for(0.2, EIGENVALUES, FLOWS[name], VP)
    assert found.holds
    assert found.w2 <= 0.2 < found.tried[found.steps - 1]
    assert all(distance <= 0.2 for n, distance in found.tried.items() if n >= found.steps)
    # doubled to the second number that meets, and bisected below the first
    assert max(found.tried) < 4 * found.steps
    assert len(found.tried) <= 2 * math.log2(found.steps) + 4
    assert torch.equal(found.times, FLOWS[name].grid(VP, found.steps))
    assert found.times.dtype == torch.float64
    assert found.rms == pytest.approx(found.w2 / 24**0.5, rel=1e-12)


def test_a_smaller_tolerance_takes_more_steps():
    """Ancestral's W2 falls with every step tried, so the results are ordered as the tolerances."""
    found = [verify.steps_for(tol, EIGENVALUES, sd.Ancestral(), VP) for tol in (1, 0.5, 0.25)]
    assert found[0].steps < found[1].steps < found[2].steps
    for each in found:
        distances = list(each.tried.values())
        assert distances == sorted(distances, reverse=True)


@dataclass(frozen=True)
class OneStepFor(sd.grids.Grid):
    """Heun's grid of n steps, of one step where n is one of `bad`."""

    bad: tuple[int, ...]

    def times(self, process, steps, start, least_ratio):
        return sd.Heun().grid(process, 1 if steps in self.bad else steps)


@dataclass(frozen=True)
class Uneven:
    """Heun where n is none of `bad`, else one step: its W2 is not monotone in n."""

    bad: tuple[int, ...]
    claims = sd.Heun().claims

    @property
    def grid(self):
        return OneStepFor(self.bad)

    def step(self, *arguments):
        return sd.Heun().step(*arguments)


def test_a_number_that_meets_by_luck_is_not_taken():
    """Doubling meets at 8 and misses at 16: the result lies above 16."""
    good = verify.steps_for(1.0, EIGENVALUES, Uneven(()), VP)
    assert 4 < good.steps <= 8
    found = verify.steps_for(1.0, EIGENVALUES, Uneven((16,)), VP)
    assert found.steps == 17
    assert found.tried[8] <= 1.0 < found.tried[16]


def test_what_is_not_reached_is_reported_and_the_prior_named():
    found = verify.steps_for(1e-4, PLANE, sd.Adams(3), most=64)
    assert not found.holds
    assert found.steps == 64
    assert "NOT REACHED by 64 steps; the prior alone" in found.verdict
    # from the data's own law the flow ends within tol: what is left is the prior, carried by it
    exact = verify.flow(PLANE, torch.zeros(1, 3, dtype=torch.float64), 1.0, 0.0)[0] - PLANE.mean
    assert found.departure < 1e-4 < float(exact.norm()) < found.w2
    assert "NOT REACHED by 4 steps" in str(verify.steps_for(1e-4, PLANE, sd.Heun(), most=4))


def test_a_chain_is_tried_up_to_its_own_length():
    found = verify.steps_for(1e-9, EIGENVALUES, sd.Ancestral(), sd.Discrete.linear(20))
    assert found.steps == 20
    assert not found.holds


def test_a_family_of_samplers_gets_each_number():
    found = verify.steps_for(0.03, EIGENVALUES, sd.Adams.auto, VP)
    assert torch.equal(found.times, sd.Adams.auto(found.steps).grid(VP, found.steps))
    assert str(sd.Adams.auto(found.steps)) in str(found).replace("\n", " ")


def test_the_report_states_its_unit_and_what_it_does_not_prove():
    text = str(verify.steps_for(0.1, EIGENVALUES, sd.Heun(), VP))
    for phrase in ("for W2 0.1, d = 24", "per coordinate", "verdict: ", "does not prove: ", "<-"):
        assert phrase in text


@pytest.mark.parametrize("name", FLOWS)
def test_with_narrowest_the_w2_bounds_that_of_every_gaussian_between(name):
    """Between variances a factor 2^(1/4) apart the worst may be 1 % off: see `spectra.band`.

    The errors e are smooth in log2(variance), with e'' of order e: (1/4)^2 / 8 e'' < 0.01 e.
    """
    sampler, narrowest = FLOWS[name], 0.05
    found = verify.steps_for(1e-9, EIGENVALUES[:3], sampler, VP, narrowest=narrowest, most=8)
    high = math.log(float(EIGENVALUES[0]))
    low = 2 * math.log(narrowest)
    for draw in normal(12, 3):
        variances = (low + (high - low) * torch.special.ndtr(draw)).exp()
        law = verify.law(sampler, sd.exact.Gaussian(VP, torch.zeros(3), variances), steps=8)
        assert law.w2() <= 1.01 * found.w2
    assert found.w2 >= verify.steps_for(1e-9, EIGENVALUES[:3], sampler, VP, most=8).w2
    assert "no std below 0.05" in str(found)


# ---- what is refused --------------------------------------------------------------------------


@dataclass(frozen=True)
class Swapped:
    """Heun that swaps the coordinates: affine, but no map of each eigenvector for itself."""

    claims, grid = sd.Heun().claims, sd.Heun().grid

    def step(self, model, x, t, s, noise, memory):
        x, memory = sd.Heun().step(model, x, t, s, noise, memory)
        return x.flip(1), memory


@dataclass(frozen=True)
class Clipped(Swapped):
    """Heun that clips what it makes."""

    def step(self, model, x, t, s, noise, memory):
        x, memory = sd.Heun().step(model, x, t, s, noise, memory)
        return x.clamp(-1, 1), memory


@pytest.mark.parametrize("sampler", [Swapped(), Clipped(), *OWN_STEPS.values()], ids=str)
def test_what_has_no_law_along_eigenvectors_is_refused_by_name(sampler):
    with pytest.raises(verify.NotAffine, match=type(sampler).__name__):
        verify.steps_for(0.1, EIGENVALUES, sampler, VP)


def test_a_frame_with_other_axes_is_refused_and_one_of_the_data_leaves_the_prior_alone():
    other = frames.GaussianFrame.of(PLANE.mean, torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    with pytest.raises(verify.NotAffine, match="by itself"):
        verify.steps_for(0.1, PLANE, sd.Adams(3, frame=other))
    own = frames.GaussianFrame.of(PLANE.mean, COVARIANCE)
    found = verify.steps_for(0.1, PLANE, sd.Adams(3, frame=own))
    assert found.steps == 1
    assert found.departure < 1e-10
    assert found.w2 > 1e-4


@pytest.mark.parametrize(("change", "error", "match"), [
    ({"tol": 0.0}, ValueError, "tol"),
    ({"tol": "small"}, TypeError, "tol"),
    ({"most": 0}, ValueError, "most"),
    ({"sampler": "heun"}, TypeError, "sampler must be a Sampler"),
    ({"process": "vp"}, TypeError, "process must be a Process"),
    ({"data": torch.ones(2, 3)}, ValueError, "shape .2, 3."),
    ({"data": torch.tensor([1.0, 0.0])}, ValueError, "positive definite"),
    ({"data": torch.tensor([1.0, math.nan])}, ValueError, "finite"),
    ({"data": sd.exact.GaussianMixture(VP, [1.0], [[0.0]], [1.0])}, TypeError, "exact.Gaussian"),
    ({"data": sd.Denoiser(sd.networks.MLP(), VP)}, TypeError, "exact.Gaussian"),
    ({"narrowest": 0.0}, ValueError, "narrowest"),
    ({"narrowest": 2.5}, ValueError, "narrowest"),
])  # fmt: skip
def test_steps_for_refuses_what_makes_no_sense(change, error, match):
    arguments = {"tol": 0.1, "data": EIGENVALUES, "sampler": sd.Heun(), "process": VP} | change
    with pytest.raises(error, match=match):
        verify.steps_for(**arguments)


# ---- on mixtures, at a seed of which nothing was measured -------------------------------------


@pytest.fixture(scope="module")
def mixtures():
    return problems(40, dimensions=(2, 8), samples=128)


def rms(problem, sampler, times):
    made = sd.sample(problem.data, sampler, problem.start, times=times)
    return float(problem.errors(made).square().mean().sqrt())


@pytest.mark.parametrize("name", FLOWS)
def test_a_mixture_takes_no_more_than_six_times_the_steps_of_its_gaussian(mixtures, name):
    """As steps_for's docstring states it, with and without `narrowest`."""
    sampler = FLOWS[name]
    for problem in mixtures:
        covariance, narrowest = problem.moments[1], float(problem.data.variances.min()) ** 0.5
        for steps, least, factor in ((5, None, 6), (20, None, 6), (20, narrowest, 5)):
            error = rms(problem, sampler, sampler.grid(VP, steps))
            tol = error * len(covariance) ** 0.5
            found = verify.steps_for(tol, covariance, sampler, VP, narrowest=least, most=64)
            assert steps <= factor * found.steps, (problem, steps, found)


def test_a_covariance_alone_is_put_on_vp():
    assert verify.steps_for(0.1, EIGENVALUES, sd.Heun()).process == "VP"
