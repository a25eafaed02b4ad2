"""Grids: their formulas, their ends, and what a trained range leaves of them."""

import math
from itertools import pairwise

import pytest
import torch
from cases import PROCESSES, gaussian
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.grids import Ends, FromTMax, Karras, Power, Uniform, Usual, frames
from sde_diffusion.grids.grid import cut

EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
GRIDS = [Usual(), Uniform(), Karras(), Karras(rho=3.0), Power(), Power(1.4), FromTMax(), Ends()]
PLANE = frames.GaussianFrame.of(torch.zeros(2).double(), torch.diag(torch.tensor([2.0, 0.5])))
EPS = torch.finfo(torch.float64).eps


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def ratios(process, times):
    """sigma / alpha at these times."""
    return [lv.sigma / lv.alpha if lv.alpha else math.inf for lv in process.levels(times)]


# ---- each rule -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_grid_is_a_value_that_gives_decreasing_times_from_the_start_to_0(grid, process, n):
    first = process.t_max if isinstance(grid, FromTMax) else 1.0
    times = grid(process, n)
    assert times.dtype == torch.float64
    assert len(times) == (2 if isinstance(grid, Ends) else n + 1)
    assert times[-1] == 0
    assert bool((times.diff() < 0).all())
    assert times[0] == first or (isinstance(grid, FromTMax) and times[0] < first < 1)
    assert grid == type(grid)(**vars(grid))
    assert hash(grid) is not None


@pytest.mark.parametrize("start", [1.0, 0.3])
def test_uniform_times_are_equally_spaced(start):
    expected = double(*(start * (1 - i / 7) for i in range(8)))
    assert_close(Uniform()(sd.EDM(), 7, start), expected, rtol=4 * EPS, atol=0)


@EVERY
@pytest.mark.parametrize(("low", "rho"), [(0.002, 7.0), (0.05, 3.0)])
def test_karras_has_the_ratios_of_equation_5(process, low, rho):
    """ratio_i = (a + i / (n - 1) (b - a))^rho with a, b the roots of the ends, then 0.

    The largest is the one of the process where that is below sigma_max; where it is above, t = 1
    comes first. A level is found to rounding of t, which dlog ratio / dlog t magnifies.
    """
    n, high = 12, 20.0
    made = ratios(process, Karras(high, low, rho)(process, n))
    in_front = made[0] > high * (1 + 1e-9)
    top = high if in_front else made[0]
    a, b, count = top ** (1 / rho), low ** (1 / rho), n - in_front
    expected = [(a + i / (count - 1) * (b - a)) ** rho for i in range(count)]
    assert made[in_front:] == pytest.approx([*expected, 0.0], rel=1e-8, abs=0)
    if in_front:
        assert Karras(high, low, rho)(process, n)[0] == 1


def test_the_ratios_of_karras_are_those_of_the_paper_themselves():
    """Karras et al. 2022, eq. 5 and Table 1: 18 levels from 80 to 0.002, rho = 7."""
    made = Karras().ratios(18)
    expected = [
        (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)
    ]
    assert made.tolist() == pytest.approx([*expected, 0.0], rel=1e-12, abs=0)


@EVERY
@pytest.mark.parametrize("frame", [frames.Straight(), PLANE], ids=["straight", "gaussian"])
@pytest.mark.parametrize("p", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("first", [1.0, 0.5])
def test_power_is_even_on_the_clock(process, frame, p, first):
    """Equal steps of clock^(1/p), the first `first` times as long as the others."""
    times = Power(p, frame, first)(process, 10)
    clock = double(*(frame.clock(level) for level in process.levels(times))) ** (1 / p)
    steps = -clock.diff()
    assert_close(steps[1:], steps[1:].mean().expand(9), rtol=1e-5, atol=0)
    assert_close(steps[0], first * steps[1:].mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("process", [sd.VP(), sd.EDM(), sd.RectifiedFlow()], ids=str)
def test_power_with_a_ratio_takes_one_step_more_down_to_it(process):
    times = Power(1.4, PLANE, 0.5, 6.0)(process, 5)
    made = ratios(process, times)
    assert len(times) == 7
    assert (float(times[0]), made[-1]) == (1.0, 0.0)
    assert made[1] == pytest.approx(6.0, rel=1e-9)
    assert_close(times[1:], Power(1.4, PLANE, 0.5)(process, 5, float(times[1])), rtol=1e-9, atol=0)


def test_power_has_no_step_more_where_the_path_begins_below_its_ratio():
    process = sd.OU(0.5)  # sigma / alpha = 1.3 at t = 1
    plain = Power(1.4, PLANE)(process, 5)
    assert torch.equal(Power(1.4, PLANE, ratio=6.0)(process, 5), plain)


@EVERY
def test_the_usual_grid_is_uniform_where_times_are_even_and_karras_elsewhere(process):
    even = isinstance(process, sd.SubVP | sd.processes.VariancePreserving)
    assert process.even_times == even
    kind = Uniform() if even else Karras()
    assert_close(Usual()(process, 10), kind(process, 10), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("n", [1, 3, 7, 29, 30])
def test_on_a_chain_the_usual_grid_is_the_nearest_sub_chain(n):
    """Index by index: none of the chain's times is nearer to i / n than the one taken."""
    chain = sd.Discrete.linear(30)
    times = Usual()(chain, n)
    own = torch.arange(31, dtype=torch.float64) / 30
    for time, even in zip(times, Uniform()(chain, n), strict=True):
        assert float((own - time).abs().min()) == 0
        assert abs(time - even) <= (own - even).abs().min() + 4 * EPS
    assert len(times.unique()) == n + 1


def test_a_chain_refuses_more_steps_than_it_has_and_a_grid_between_its_times_does_not():
    chain = sd.Discrete.linear(30)
    with pytest.raises(ValueError, match=r"steps must be at most 30 on a chain of 30 from t=1"):
        Usual()(chain, 31)
    with pytest.raises(ValueError, match=r"steps must be at most 15 on a chain of 30 from t=0\.5"):
        Usual()(chain, 16, 0.5)
    assert len(Uniform()(chain, 31)) == 32


@EVERY
def test_from_t_max_is_the_other_grid_from_there(process):
    end = process.t_max
    for other in (Uniform(), Power(1.3), Usual()):
        made = FromTMax(other)(process, 8)
        assert torch.equal(made, other(process, 8, end))
        assert made[0] <= end
    assert torch.equal(FromTMax(Uniform())(process, 8, 0.4), Uniform()(process, 8, 0.4))


@EVERY
@pytest.mark.parametrize("steps", [None, 1, 20])
def test_ends_are_the_ends(process, steps):
    assert Ends()(process, steps).tolist() == [1.0, 0.0]
    assert Ends()(process, steps, 0.6).tolist() == [0.6, 0.0]


# ---- a trained range -----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Uniform(), Karras(), Power(1.4)], ids=str)
@pytest.mark.parametrize("process", [sd.VP(), sd.EDM(), sd.RectifiedFlow()], ids=str)
def test_nodes_beyond_the_trained_range_become_one_node_at_its_end(grid, process):
    times = grid(process, 40)
    end = float(times[33] + times[34]) / 2
    made = cut(times, end)
    assert torch.equal(made[:34], times[:34])
    assert made[34:].tolist() == [end, 0.0]


def test_a_node_at_the_end_of_the_range_is_that_node():
    times = Uniform()(sd.VP(), 10)
    for end in (float(times[7]), float(times[7]) * (1 + 1e-12)):
        assert torch.equal(cut(times, end), torch.cat([times[:8], times[-1:]]))


@EVERY
@pytest.mark.parametrize("grid", [Usual(), Uniform(), Karras(), Power(1.25)], ids=str)
def test_where_no_node_lies_beyond_the_times_are_the_same_to_the_bit(grid, process):
    times = grid(process, 12)
    assert cut(times, float(times[-2])) is times
    assert cut(times, float(times[-2]) / 2) is times


def test_where_every_node_lies_beyond_there_is_one_at_the_end():
    assert cut(double(0.01, 0.005, 0.0), 0.02).tolist() == [0.02, 0.0]


@pytest.mark.parametrize("process", [sd.EDM(), sd.VE(), sd.RectifiedFlow(), sd.VP()], ids=str)
@pytest.mark.parametrize("least", [0.01, 0.3])
def test_karras_puts_its_smallest_ratio_where_training_begins_so_n_steps_stay_n(process, least):
    n = 11
    times = Karras()(process, n, least_ratio=least)
    assert len(times) == n + 1
    assert ratios(process, times)[-2] == pytest.approx(least, rel=1e-8)
    end = process.time(-2 * math.log(least)).item()
    kept = cut(times, end)
    assert len(kept) == n + 1
    assert_close(kept, times, rtol=1e-9, atol=0)
    assert torch.equal(Karras()(process, n, least_ratio=0.001), Karras()(process, n))


class Ranged:
    """A model trained at these log-SNRs."""

    def __init__(self, process, low, high):
        self.model, self.process = gaussian(process), process
        self.trained = sd.models.LogSNRRange(low, high)
        self.levels = []

    def __call__(self, x, level):
        self.levels.append(level)
        return self.model(x, level)


@pytest.mark.parametrize("sampler", [sd.Heun(), sd.Adams(3), sd.Ancestral(), sd.DPMSolver(2)])
@pytest.mark.parametrize("process", [sd.VP(), sd.EDM(), sd.RectifiedFlow()], ids=str)
def test_a_model_is_evaluated_within_its_trained_range_alone(sampler, process):
    model = Ranged(process, -6.0, 4.0)
    x = sd.prior(model, (3, 1), seeds=range(3), dtype=torch.float64)
    sd.sample(model, sampler, x, steps=25, seeds=range(3))
    seen = [level.log_snr for level in model.levels]
    assert min(seen) == pytest.approx(-6.0, abs=1e-6)
    assert max(seen) == pytest.approx(4.0, abs=1e-6)


@pytest.mark.parametrize(
    "solver", [sd.TorchODE(), sd.samplers.ScipyODE(), sd.AdaptiveODE(), sd.AdaptiveSDE()], ids=str
)
def test_a_solver_with_steps_of_its_own_keeps_within_the_range_too(solver):
    model = Ranged(sd.VP(), -6.0, 5.0)
    x = sd.prior(model, (3, 1), seeds=range(3), dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    times = [1.0, *(state.t for state in sd.trajectory(model, solver, x, generator=source))]
    end = sd.VP().time(5.0).item()
    assert times[1:] == pytest.approx([end, 0.0], rel=1e-12)
    seen = torch.cat([torch.as_tensor(level.log_snr).reshape(-1) for level in model.levels])
    assert float(seen.min()) > -6.0 - 1e-6
    assert float(seen.max()) < 5.0 + 1e-6


def test_the_prior_of_a_range_has_the_deviation_of_unit_data_there():
    """alpha^2 + sigma^2 at the noisiest trained level; the law of the process where that is 1."""
    model, n = Ranged(sd.EDM(), -6.0, math.inf), 20_000
    x = sd.prior(model, (n,), seeds=range(n), dtype=torch.float64)
    variance = 1 + math.exp(6.0)
    assert abs(float(x.var()) / variance - 1) < 4.5 * math.sqrt(2 / n)
    plain = sd.prior(gaussian(sd.EDM()), (5,), seeds=range(5), dtype=torch.float64)
    assert torch.equal(plain, sd.EDM().prior((5,), seeds=range(5), dtype=torch.float64))


def test_explicit_times_are_never_cut_and_warn_once_outside_the_range():
    model = Ranged(sd.VP(), -6.0, 5.0)
    times = [0.7, 0.4, 0.001, 0.0]
    with pytest.warns(UserWarning, match=r"at t=0\.001 is outside the range \[-6, 5\]") as told:
        states = list(sd.trajectory(model, sd.Heun(), torch.ones(2, 1).double(), times=times))
    assert [state.t for state in states] == times[1:]
    assert len(told) == 1
    model.trained = sd.models.LogSNRRange(-6.0, 5.0, only=True)
    with pytest.raises(ValueError, match="times must lie where the model is defined"):
        sd.sample(model, sd.Heun(), torch.ones(2, 1).double(), times=times)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: Karras(sigma_max=0.0), "sigma_max must lie in"),
        (lambda: Karras(1.0, 2.0), "sigma_min must be below sigma_max; got 2.0 and 1.0"),
        (lambda: Karras(rho=-1.0), "rho must lie in"),
        (lambda: Power(0.0), "p must lie in"),
        (lambda: Power(first=1.5), "first must lie in"),
        (lambda: Power(ratio=0.0), "ratio must lie in"),
        (lambda: Power(frame=3), "frame must be a frame"),
        (lambda: Power(frame=frames.Straight), "frame must be a frame"),
        (lambda: FromTMax(3), "grid must be a grid"),
        (lambda: Uniform()(sd.VP(), 0), "steps must be at least 1"),
        (lambda: Uniform()(sd.VP(), None), "steps must be an integer"),
    ],
)
def test_a_bad_argument_is_refused_by_name(attempt, words):
    with pytest.raises((ValueError, TypeError), match=words):
        attempt()


def test_no_two_grids_of_a_catalogue_sampler_need_another_count():
    """n steps are n intervals on every sampler's own grid, but for a start that makes no call."""
    for sampler in sd.samplers.CATALOGUE:
        times = sampler.grid(sd.VP(), 7)
        assert len(times) == (2 if sampler.claims.adaptive else 8)
        assert all(t > s for t, s in pairwise(times.tolist()))
