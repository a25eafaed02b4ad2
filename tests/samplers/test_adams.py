"""Adams in its frames: exact for the frame's Gaussian, one limit, calls where they are needed."""

from itertools import pairwise

import pytest
import torch
from cases import PROCESSES, Recorded
from oracles import fitted_order
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.grids import frames
from sde_diffusion.samplers.adams import History, adams_weights

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.9, 0.3], [0.3, 0.4]], dtype=torch.float64)
OWN = frames.GaussianFrame.of(MEAN, COVARIANCE)
OTHER = frames.GaussianFrame.of(-MEAN, torch.diag(torch.tensor([0.3, 2.0], dtype=torch.float64)))
FRAMES = {"straight": frames.Straight(), "gaussian": OWN, "another gaussian": OTHER}
MODES = sd.exact.GaussianMixture(
    sd.VP(),
    [0.5, 0.5],
    torch.tensor([[-0.7, 0.6], [0.9, -0.2]], dtype=torch.float64),
    [0.2, 0.1],
)


def start_of(process, n=8):
    return process.prior((n, 2), seeds=range(n), dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("start", [None, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_data_of_the_frames_own_gaussian_are_exact_at_any_number_of_steps(name, start, steps):
    """The slope is 0: what is left is rounding, times the stretch of x at the noise."""
    process = PROCESSES[name]
    model, x = sd.exact.Gaussian(process, MEAN, COVARIANCE), start_of(process)
    made = sd.sample(model, sd.Adams(3, frame=OWN, start=start), x, steps=steps)
    assert_close(made, model.flow(x, 1.0, 0.0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
@pytest.mark.parametrize("k", [1, 2, 3])
def test_in_every_frame_it_tends_to_the_same_flow_at_the_declared_order(frame, k):
    x, sizes = start_of(sd.VP(), 32), (32, 64, 128)
    flow, sampler = verify.flow(MODES, x, 1.0, 0.0), sd.Adams(k, frame=frame)
    errors = [float((sd.sample(MODES, sampler, x, steps=n) - flow).norm()) for n in sizes]
    assert fitted_order(sizes, errors) >= sampler.claims.order - 0.2


@pytest.mark.parametrize("name", ["sub-vp", "edm", "rectified-flow"])
def test_its_certificate_holds_in_a_gaussian_frame_that_is_not_the_datas(name):
    own = torch.ones(1, 1, dtype=torch.float64)
    frame = frames.GaussianFrame(torch.zeros(1, dtype=torch.float64), own, 2 * own[0], 1.0)
    data = sd.exact.Gaussian(PROCESSES[name], torch.tensor([0.7], dtype=torch.float64), 0.25)
    made = verify.certificate(sd.Adams(3, frame=frame), data, sizes=(16, 32, 64, 128))
    assert made.holds, made.verdict


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
@pytest.mark.parametrize("p", [1.0, 1.4])
def test_the_first_step_is_half_as_long_as_the_others_on_the_clock(frame, p):
    levels = sd.VP().levels(sd.Adams(p=p, frame=frame).grid(sd.VP(), 8))
    root = torch.tensor([frame.clock(level) ** (1 / p) for level in levels], dtype=torch.float64)
    gaps = root[:-1] - root[1:]
    assert_close(gaps[1:], gaps[1:].mean().expand(7), rtol=1e-7, atol=0)
    assert float(gaps[0]) == pytest.approx(float(gaps[1]) / 2, rel=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_start_saves_the_calls_above_it_and_n_steps_make_n_calls(name):
    process = PROCESSES[name]
    model = Recorded(MODES.on(process))
    sampler = sd.Adams(2, frame=OWN, start=6.0)
    states = list(sd.trajectory(model, sampler, start_of(process), steps=5))
    assert len(states) == 6
    assert len(model.levels) == 5
    ratios = [level.sigma / level.alpha for level in model.levels]
    # the time of a level is found to 1e-16 of the path, which a chain's slope magnifies
    assert ratios[0] == pytest.approx(6.0, rel=1e-6)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] > 0


def test_a_path_that_begins_below_the_start_has_no_free_step():
    process = sd.OU(0.5)  # sigma / alpha = 1.3 at t = 1
    model = Recorded(MODES.on(process))
    sampler = sd.Adams(2, frame=OWN, start=6.0)
    assert len(sampler.grid(process, 5)) == 6
    sd.sample(model, sampler, start_of(process), steps=5)
    assert len(model.levels) == 5


def test_a_correction_takes_all_slopes_up_to_five_and_the_last_step_one_fewer():
    """Each step by hand, from the slopes that it was given."""
    model, sampler = Recorded(MODES), sd.Adams(3, p=1.0)
    x, memory, slopes, nodes = start_of(sd.VP()), None, [], []
    levels = sd.VP().levels(sampler.grid(sd.VP(), 9))
    for t, s in pairwise(levels):
        slopes.insert(0, MODES(x, t).velocity)
        nodes.insert(0, t.u)
        made, after = sampler.step(model, x, t, s, None, memory)
        if memory is None:
            y = frames.enter(x, t)
        else:
            weights = adams_weights(tuple(nodes[:5]), nodes[1], nodes[0])
            y = memory.z + sum(w * f for w, f in zip(weights, slopes, strict=False))
        assert isinstance(after, History)
        assert_close(after.z, y, rtol=1e-12, atol=1e-12)
        weights = adams_weights(tuple(nodes[: 2 if s.sigma == 0 else 3]), t.u, s.u)
        y = y + sum(w * f for w, f in zip(weights, slopes, strict=False))
        assert_close(made, frames.leave(y, s), rtol=1e-12, atol=1e-12)
        x, memory = made, after
    assert len(memory.slopes) == 4  # memory does not grow with the steps


# ---- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [frames.Straight(), OWN], ids=["straight", "gaussian"])
def test_auto_takes_the_row_that_has_room_for_the_calls(frame):
    for calls in (1, 2, 3, 5, 7, 10, 33, 100, 1000):
        sampler = sd.Adams.auto(calls, frame)
        assert sampler.frame is frame
        model = Recorded(MODES)
        sd.sample(model, sampler, start_of(sd.VP()), steps=calls)
        assert len(model.levels) == calls
    assert sd.Adams.auto(7, frame) == sd.Adams.auto(8, frame)
    assert sd.Adams.auto(101, frame) == sd.Adams.auto(1000, frame)
    assert sd.Adams.auto(100, frame).start is None


@pytest.fixture
def table(monkeypatch):
    from benchmarks import adams_table

    return adams_table


def test_the_table_is_what_its_script_finds(table):
    """At 4 calls, on other problems than it was made from: within a quarter of their own best.

    A quarter is about three standard errors of the mean log-ratio over so few problems.
    """
    made = table.problems(7, dimensions=(2, 8), samples=64)
    for name, over in (
        ("Straight", [(problem, frames.Straight()) for problem in made]),
        ("Gaussian", [(problem, table.frame_of(problem)) for problem in made]),
    ):
        of_table = sd.Adams.auto(4, over[0][1])
        trials = [
            table.tried(name, 4, setting, over)
            for setting in table.candidates(4, name == "Gaussian")
        ]
        chosen = table.tried(name, 4, (of_table.k, of_table.p, of_table.start), over)
        assert chosen.rms <= 1.25 * min(trial.rms for trial in trials)


def test_the_gaussian_frame_is_the_better_one_at_five_calls(table):
    """In the geometric mean over problems that the table has not seen."""
    rms = {True: [], False: []}
    for problem in table.problems(8, dimensions=(2, 8), samples=128):
        for gaussian in rms:
            frame = table.frame_of(problem) if gaussian else frames.Straight()
            sampler = sd.Adams.auto(5, frame)
            made = sd.sample(problem.data, sampler, problem.start, steps=5)
            rms[gaussian].append(float(problem.errors(made).square().mean().sqrt()))
    assert table.geometric(rms[True]) < 0.9 * table.geometric(rms[False])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.Adams(frame=frames.Straight), "frame must be a frame"),
        (lambda: sd.Adams(start=6.0), "start must be None in the straight frame"),
        (lambda: sd.Adams(frame=OWN, start=0.0), "start must lie"),
        (lambda: sd.Adams.auto(0), "calls must be at least 1"),
        (lambda: sd.Adams.auto(5.0), "calls must be an integer"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
