"""AdaptiveODE: each sample's error within its tolerance, alone or in any batch."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from cases import PROCESSES, Recorded, gaussian
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.grids import frames
from sde_diffusion.models.model import per_sample_field
from sde_diffusion.models.prediction import truth
from sde_diffusion.samplers.adaptive_ode import Quadrature, lagrange, newest, product

MEANS = torch.tensor([[-1.2, 0.8], [0.4, -1.2], [1.3, 0.6]], dtype=torch.float64)
MODES = sd.exact.GaussianMixture(sd.VP(), [0.4, 0.35, 0.25], MEANS, [0.05, 0.05, 0.05])
MEAN = torch.tensor([0.1, -0.1], dtype=torch.float64)
FRAMES = {
    "straight": frames.Straight(),
    "gaussian": frames.GaussianFrame.of(MEAN, torch.diag(torch.tensor([1.2, 0.8]).double())),
}


def start(process=None, n=32, dtype=torch.float64):
    return (process or sd.VP()).prior((n, 2), seeds=range(n), dtype=dtype)


def ran(model, solver, x, **where):
    *_, last = sd.trajectory(model, solver, x, **where)
    return last


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_exact_gaussian_map_within_ten_tolerances(name, tolerance):
    model = gaussian(PROCESSES[name])
    x = model.process.prior((16, 1), seeds=range(16), dtype=torch.float64)
    made = sd.sample(model, sd.AdaptiveODE(tolerance, tolerance), x)
    assert float((made - model.flow(x, 1.0, 0.0)).abs().max()) <= 10 * tolerance


def test_steps_do_not_depend_on_torchs_default_dtype():
    """1 / an integer tensor has the default dtype; the samples moved by 1e-6 with it."""
    x, before = start(dtype=torch.float32), torch.get_default_dtype()
    made = sd.sample(MODES, sd.AdaptiveODE(), x)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(sd.sample(MODES, sd.AdaptiveODE(), x), made)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_every_frame_has_the_flow_of_a_mixture_for_its_limit(frame):
    """The RMS, over samples of which a few grow an error on a border, within ten tolerances."""
    x = start()
    flow = verify.flow(MODES, x, 1.0, 0.0)
    for tolerance in (1e-4, 1e-6):
        made = sd.sample(MODES, sd.AdaptiveODE(tolerance, tolerance, frame), x)
        assert float((made - flow).square().mean().sqrt()) <= 10 * tolerance


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_a_sample_is_the_same_in_any_batch(frame):
    """Bit for bit where every operation is elementwise; 1e-5 is what is promised."""
    x, solver = start(n=24), sd.AdaptiveODE(1e-3, 1e-3, frame)
    whole = ran(MODES, solver, x)
    for parts in (torch.arange(24).split(1), torch.arange(24).split([5, 12, 7])):
        for rows in parts:
            part = ran(MODES, solver, x[rows])
            assert_close(part.x, whole.x[rows], rtol=0, atol=1e-10)
            assert torch.equal(part.memory.calls, whole.memory.calls[rows])


@dataclass(frozen=True, eq=False)
class Shifted:
    """A conditional model: each sample has a Gaussian of its own mean."""

    means: Tensor = per_sample_field()
    seen: list[int] = field(default_factory=list)
    process = sd.VP()

    def __call__(self, x, level):
        self.seen.append(len(x))
        alpha, sigma = level.alpha, level.sigma
        gain = 0.25 * alpha / (0.25 * alpha**2 + sigma**2)
        x0 = self.means + gain * (x - alpha * self.means)
        eps = sigma * (x - alpha * self.means) / (0.25 * alpha**2 + sigma**2)
        return truth(x0, eps, level)


def test_finished_samples_leave_the_batch_and_a_condition_follows():
    """Means far from 0 take more calls than means near it; each ends where its own flow does."""
    means = torch.linspace(0, 30, 12, dtype=torch.float64)[:, None]
    model, x = Shifted(means), torch.ones(12, 1, dtype=torch.float64)
    last = ran(model, sd.AdaptiveODE(1e-5, 1e-5), x)
    level = model.process.levels(torch.ones(1, dtype=torch.float64))[0]
    spread = math.sqrt(0.25 / (0.25 * level.alpha**2 + level.sigma**2))
    exact = means + spread * (x - level.alpha * means)
    assert_close(last.x, exact, rtol=1e-4, atol=1e-4)
    assert model.seen == sorted(model.seen, reverse=True)
    assert model.seen[-1] < 12
    assert int(last.memory.calls.sum()) == sum(model.seen)


def test_the_report_counts_the_calls_and_estimates_the_error():
    model, x = Recorded(MODES), start()
    last = ran(model, sd.AdaptiveODE(1e-4, 1e-4), x)
    report, flow = last.memory, verify.flow(MODES, x, 1.0, 0.0)
    assert int(report.calls.max()) == len(model.levels)
    assert bool(report.finished.all())
    assert bool((report.rejections < report.calls).all())
    assert bool((report.error > 0).all())
    # it is of the predictions, before they are corrected: most samples do better
    assert float((last.x - flow).square().mean(1).sqrt().median()) <= float(report.error.median())


def test_tighter_tolerances_take_more_calls_and_leave_less_error():
    x = start()
    flow, calls, errors = verify.flow(MODES, x, 1.0, 0.0), [], []
    for tolerance in (1e-2, 1e-4, 1e-6, 1e-8):
        last = ran(MODES, sd.AdaptiveODE(tolerance, tolerance), x)
        calls.append(float(last.memory.calls.double().mean()))
        errors.append(float((last.x - flow).square().mean(1).sqrt().median()))
    assert calls == sorted(calls)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-7


def test_the_steps_of_a_grid_may_be_taken_one_after_another():
    x = start()
    grid = torch.tensor([1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    parts = sd.sample(MODES, sd.AdaptiveODE(1e-7, 1e-7), x, times=grid)
    assert_close(parts, verify.flow(MODES, x, 1.0, 0.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 1, 4, 4), (0, 2)])
def test_any_shape(shape):
    model = sd.exact.Gaussian(sd.VP(), 0.5, 0.25)
    x = sd.VP().prior(shape, seeds=range(shape[0]))
    last = ran(model, sd.AdaptiveODE(1e-3, 1e-3), x)
    assert last.x.shape == shape
    assert last.x.dtype == torch.float32
    assert len(last.memory.calls) == shape[0]
    assert_close(last.x, model.flow(x, 1.0, 0.0), rtol=0, atol=1e-2)


def test_the_weights_are_those_of_adams_bashforth_and_moulton_on_an_even_grid():
    """Hairer, Norsett & Wanner 1993, III.1: the coefficients of three slopes, and 3/8 of F."""
    nodes = torch.tensor([[0.0, 1.0, -1.0, -2.0, -3.0]], dtype=torch.float64)
    known = torch.tensor([[True, False, True, True, True]])  # the second was of a rejected step
    start, end = nodes[:, 0], nodes[:, 1]
    for count, bashforth, moulton in (
        (1, [1], 1 / 2),
        (2, [3 / 2, -1 / 2], 5 / 12),
        (3, [23 / 12, -16 / 12, 5 / 12], 3 / 8),
        (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24], 251 / 720),
    ):
        used, rule = newest(known, count), Quadrature.of_degree(count, like=start)
        places = rule.places(start, end)
        weights = rule.integral(lagrange(nodes, used, places), start, end)
        assert_close(weights[used], torch.tensor(bashforth, dtype=torch.float64))
        assert weights[~used].abs().max() == 0
        omega = product(nodes, used, end[:, None])[:, 0]
        assert_close(
            rule.integral(product(nodes, used, places), start, end) / omega,
            torch.tensor([moulton], dtype=torch.float64),
        )


@pytest.mark.parametrize("tolerance", [1e-4, 1e-5])
def test_data_narrower_than_any_step_are_not_missed(tolerance):
    """From afar a mode of standard deviation s is a point: its paths bend by s^2 / 2u only.

    There is always an s so small that the bend is below the tolerance until the last steps.
    """
    worst = []
    for exponent in range(16, 33):  # at 32 the mode itself is about the smaller tolerance
        model = sd.exact.Gaussian(sd.VP(), torch.full((4,), 2.0).double(), 10 ** (-exponent / 4))
        x = sd.VP().prior((96, 4), seeds=range(96), dtype=torch.float64)
        made = sd.sample(model, sd.AdaptiveODE(tolerance, tolerance), x)
        worst.append(float((made - model.flow(x, 1.0, 0.0)).abs().max()))
    assert max(worst) <= 10 * tolerance


def test_after_a_rejected_step_comes_a_shorter_one_from_the_same_place():
    """Seen from the model: u rises again as often as the report says, and is never below 0."""
    data, solver = sd.exact.Gaussian(sd.VP(), 2.0, 1e-5), sd.AdaptiveODE(1e-5, 1e-5)
    rejected = []
    for x in start(n=8).split(1):
        model = Recorded(data)
        report = ran(model, solver, x).memory
        u = [float(level.u) for level in model.levels]
        assert sum(b > a for a, b in pairwise(u)) == int(report.rejections)
        assert len(u) == int(report.calls)
        assert min(u) > 0
        rejected.append(int(report.rejections))
    assert sum(rejected) > 0


def test_in_float32_the_tolerance_holds_down_to_rounding():
    """Each of some 50 steps rounds a state of size 4 at most."""
    model, x = gaussian(sd.VP()), start(dtype=torch.float32)[:, :1]
    flow = model.flow(x.double(), 1.0, 0.0)
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6):
        last = ran(model, sd.AdaptiveODE(tolerance, tolerance), x)
        bound = 10 * tolerance + int(last.memory.calls.max()) * 4 * 2**-24
        assert last.x.dtype == torch.float32
        assert float((last.x - flow).abs().max()) <= bound


def test_each_interval_starts_afresh():
    """Bit for bit what separate runs give, and each report is of its interval."""
    x, solver, times = start(n=8), sd.AdaptiveODE(), [1.0, 0.5, 0.1, 0.0]
    model = Recorded(MODES)
    states = list(sd.trajectory(model, solver, x, times=times))
    for (t, s), state in zip(pairwise(times), states, strict=True):
        x = sd.sample(MODES, solver, x, times=[t, s])
        assert torch.equal(state.x, x)
    assert sum(int(state.memory.calls.max()) for state in states) == len(model.levels)


def test_a_limit_parts_the_finished_from_the_others():
    """Who needs no more calls than the limit is not touched by it, bit for bit."""
    x = start()
    free = ran(MODES, sd.AdaptiveODE(), x)
    limit = int(free.memory.calls.median())
    held = ran(MODES, sd.AdaptiveODE(max_calls=limit, return_partial=True), x)
    finished = free.memory.calls <= limit
    assert 0 < int(finished.sum()) < len(x)
    assert torch.equal(held.memory.finished, finished)
    assert torch.equal(held.memory.calls, free.memory.calls.clamp(max=limit))
    assert torch.equal(held.x[finished], free.x[finished])
    with pytest.raises(sd.SolverError, match=f"{int((~finished).sum())} of 32 samples"):
        sd.sample(MODES, sd.AdaptiveODE(max_calls=limit), x)


def test_a_single_call_is_eulers_rule_for_all():
    model, x = gaussian(sd.RectifiedFlow()), torch.ones(3, 1, dtype=torch.float64)
    last = ran(model, sd.AdaptiveODE(max_calls=1, return_partial=True), x)
    level = model.process.levels(torch.ones(1, dtype=torch.float64))[0]
    assert_close(last.x, x - model(x, level).velocity)
    assert last.memory.calls.tolist() == [1, 1, 1]


def test_at_max_calls_it_gives_up_by_name_or_predicts_the_rest_and_says_so():
    x = start()
    with pytest.raises(sd.SolverError, match=r"reached max_calls at t=.*step"):
        sd.sample(MODES, sd.AdaptiveODE(1e-6, 1e-6, max_calls=30), x)
    solver = sd.AdaptiveODE(1e-6, 1e-6, max_calls=30, return_partial=True)
    last = ran(MODES, solver, x)
    assert int(last.memory.calls.max()) == 30
    assert not bool(last.memory.finished.any())
    assert bool(last.x.isfinite().all())
    # 30 calls have come most of the way
    flow = verify.flow(MODES, x, 1.0, 0.0)
    assert float((last.x - flow).square().mean(1).sqrt().median()) < 0.5


class Made:
    """A model that answers by a function of x."""

    def __init__(self, answer):
        self.process, self.answer = sd.VP(), answer

    def __call__(self, x, level):
        return truth(torch.zeros_like(x), self.answer(x, level), level)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, level: torch.full_like(x, math.nan), "not finite at t="),
        (lambda x, level: x * 1e30, "at t="),
        (lambda x, level: -20 * (1 + x**2), r"failed at t=.*step"),
        (lambda x, level: -1e250 * x, "the state overflows at t="),
        (lambda x, level: torch.sin(1e9 * x) * 1e3, "at t="),
    ],
    ids=["nan", "blowing up", "leaving in finite time", "too large", "rough"],
)
def test_nothing_hangs(answer, message):
    with pytest.raises(sd.SolverError, match=message):
        sd.sample(Made(answer), sd.AdaptiveODE(max_calls=2000), start(n=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.AdaptiveODE(rtol=0.0), "rtol must"),
        (lambda: sd.AdaptiveODE(atol=-1.0), "atol must"),
        (lambda: sd.AdaptiveODE(k=0), "k must"),
        (lambda: sd.AdaptiveODE(max_calls=0), "max_calls must"),
        (lambda: sd.AdaptiveODE(frame=frames.Straight), "frame must be a frame"),
        (lambda: sd.AdaptiveODE(return_partial=2), "return_partial must"),
        (lambda: sd.sample(MODES, sd.AdaptiveODE(), start(), steps=10), "steps must be left out"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
