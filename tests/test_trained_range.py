"""The range at which a model was trained: samplers keep to it, and lose what theory allows."""

import math
import warnings

import pytest
import torch
from cases import FIXED_STEP, MEAN, OWN_STEPS, Recorded, gaussian
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.models import LogSNRRange
from sde_diffusion.models.model import HeldBelow

N, V = 1000, 0.25
CHAIN = sd.Discrete.linear(N)
FIRST = float((-CHAIN.log_snr(1 / N) / 2).exp())  # sigma / alpha at i = 1


def network(x, step):
    """The exact eps of N(0.7, 1/4) by steps 0 .. N - 1, real between them; none below 0."""
    assert bool((step >= 0).all())
    level = CHAIN.level((step.double() + 1) / N, x)
    return sd.exact.Gaussian(CHAIN, MEAN, V)(x, level).eps


def adopted(process=CHAIN):
    model = sd.adopt(network, CHAIN)
    return model if process is CHAIN else sd.match(model, process)


PROCESSES = {
    "discrete": CHAIN, "interpolated": sd.processes.interpolate(CHAIN), "vp": sd.VP(),
    "edm": sd.EDM(), "rectified-flow": sd.RectifiedFlow(),
}  # fmt: skip


def run(model, sampler, x, steps=None, **settings):
    return sd.sample(model, sampler, x, steps=steps, seeds=range(len(x)), **settings)


@pytest.mark.parametrize("name", FIXED_STEP)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [5, 40])
def test_a_network_of_a_chain_serves_every_sampler_on_its_own_grid(name, process, steps):
    """It equals the exact model of the same range, and ends where the uncut one does.

    Below s = sigma / alpha at i = 1 nothing is evaluated: of data of variance v that leaves
    s^2 / (2 sqrt(v)) of a standard deviation, 1.0e-4 here, times the 4 standard deviations that
    the starts span.
    """
    sampler, process = FIXED_STEP[name], PROCESSES[process]
    model, exact = adopted(process), gaussian(process, V)
    x = sd.prior(model, (6, 1), seeds=range(6), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = run(model, sampler, x, steps)
    cut = exact.ranged(sd.match(adopted(), process).trained)
    assert_close(
        made, run(cut, sampler, x, steps), rtol=0, atol=1e-12 if process is CHAIN else 1e-9
    )


@pytest.mark.parametrize("name", OWN_STEPS)
@pytest.mark.parametrize("process", PROCESSES)
def test_solvers_with_steps_of_their_own_come_near_the_exact_flow(name, process):
    """x0 is held below the range: the same s^2 / (2 sqrt(v)), at 2 standard deviations."""
    process = PROCESSES[process]
    model, exact = adopted(process), gaussian(process, V)
    x = sd.prior(model, (6, 1), seeds=range(6), dtype=torch.float64)
    begin = float(process.time(max(model.trained.low, float(process.log_snr(1.0)))))
    made = sd.sample(model, OWN_STEPS[name], x)
    assert_close(made, exact.flow(x, begin, 0.0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", FIXED_STEP)
def test_the_cut_costs_no_more_than_an_euler_step_from_the_last_level(name):
    """Against the same sampler on the uncut grid, on the path through the chain.

    A sampler that draws noise in its last step adds it from another level: its law is compared.
    """
    process, sampler = sd.processes.interpolate(CHAIN), FIXED_STEP[name]
    exact = gaussian(process, V)
    cut = exact.ranged(adopted().trained)
    allowed = FIRST**2 / (2 * math.sqrt(V))
    ours, uncut = (sd.verify.measured(sampler, m, (1,), 200) for m in (cut, exact))
    assert abs(float(ours.mean - uncut.mean)) < 2 * allowed * (1 + MEAN)
    assert abs(float(ours.covariance.sqrt() - uncut.covariance.sqrt())) < 2 * allowed


def test_nothing_changes_where_no_node_lies_beyond():
    x = CHAIN.prior((4, 1), seeds=range(4), dtype=torch.float64)
    for name in ("ancestral", "ancestral-eta-0", "euler-maruyama"):
        path = [
            s.t for s in sd.trajectory(adopted(), FIXED_STEP[name], x, steps=20, seeds=range(4))
        ]
        free = sd.trajectory(gaussian(CHAIN), FIXED_STEP[name], x, steps=20, seeds=range(4))
        assert path == [s.t for s in free]


def test_karras_keeps_its_number_of_steps():
    model = adopted(sd.EDM())
    x = sd.prior(model, (2, 1), seeds=[0, 1], dtype=torch.float64)
    states = list(sd.trajectory(model, sd.Heun(), x, steps=12))
    assert len(states) == 12
    last = float(sd.EDM().sigma(states[-2].t))
    assert last == pytest.approx(FIRST, rel=1e-9)


def test_known_pixels_stay_bit_equal_and_particles_keep_their_last_weighting():
    model = adopted()
    y, mask = torch.tensor([[0.3, -0.2]]).double(), torch.tensor([[1.0, 0.0]])
    x = sd.prior(model, (8, 2), seeds=range(8), dtype=torch.float64)
    made = run(model, sd.inverse.Replacement(sd.Heun(), y, mask), x, 20)
    assert torch.equal(made[:, 0], y.expand(8, 2)[:, 0])
    operator = sd.inverse.operators.Matrix(torch.ones(1, 2, dtype=torch.float64))
    smc = sd.inverse.SMC(sd.inverse.Measurement(operator, 0.1, torch.ones(1, 1).double()), 64)
    x = sd.prior(model, (64, 2), seeds=range(64), dtype=torch.float64)
    last = list(sd.trajectory(model, smc, x, steps=20, seeds=range(64)))[-1]
    assert last.t == 0
    assert torch.equal(last.memory.log_weight, torch.zeros(64, dtype=torch.float64))


# ---- explicit times ----------------------------------------------------------------------------


def test_explicit_times_outside_the_range_warn_once_and_run():
    ranged = gaussian(sd.VP()).ranged(LogSNRRange(high=float(sd.VP().log_snr(0.1))))
    x = sd.VP().prior((2, 1), seeds=[0, 1], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"log_snr .* at t=0.05 is outside the range") as caught:
        made = sd.sample(ranged, sd.Heun(), x, times=[1.0, 0.5, 0.05, 0.0])
    assert len(caught) == 1
    assert torch.equal(
        made, sd.sample(gaussian(sd.VP()), sd.Heun(), x, times=[1.0, 0.5, 0.05, 0.0])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.sample(ranged, sd.Heun(), x, times=[1.0, 0.5, 0.1, 0.0])  # the final 0 is not counted


def test_explicit_times_without_a_network_input_are_refused_before_the_first_call():
    calls = []
    model = sd.adopt(lambda x, step: calls.append(step) or x, CHAIN)
    x = CHAIN.prior((2, 1), seeds=[0, 1], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"times must lie where the model is defined: log_snr"):
        sd.sample(model, sd.Heun(), x, times=[1.0, 0.5, 0.0005, 0.0])
    assert not calls


def test_ranges_intersect_and_wrappers_pass_them_on():
    a, b = LogSNRRange(-3.0, 5.0), LogSNRRange(-9.0, 2.0, only=True)
    assert a & b == LogSNRRange(-3.0, 2.0, True)
    model = gaussian(sd.VP()).ranged(a)
    measured = sd.inverse.Measurement(torch.nn.Identity(), 0.1, torch.zeros(1, 1))
    conditional = sd.Denoiser(sd.networks.MLP((1,), cond=2), sd.VP(), trained=a)
    for wrapped in (
        sd.models.Clipped(model), sd.ClassifierFree(conditional), sd.match(model, sd.VP()),
        sd.inverse.PiGDM(model, measured), sd.inverse.DiffPIR(model, measured),
    ):  # fmt: skip
        assert wrapped.trained == a


def test_a_prior_below_t_1_has_the_law_of_unit_data():
    """On the largest common noise: N(0, alpha^2 + sigma^2)."""
    model = sd.match(gaussian(sd.VP()), sd.RectifiedFlow())
    t = float(sd.RectifiedFlow().time(model.trained.low))
    expected = math.hypot(1 - t, t)
    noise = sd.RectifiedFlow().prior((3, 2), seeds=range(3))
    assert_close(sd.prior(model, (3, 2), seeds=range(3)), expected * noise)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchdiffeq_keeps_to_the_range_in_every_dtype(method, dtype):
    """torchdiffeq rounds the clock to the dtype of the state."""
    end = sd.VP().time(5.0).item()
    model = Recorded(gaussian(sd.VP()))
    model.trained = LogSNRRange(-10.0, 5.0)
    x = torch.randn(3, 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
    sd.sample(model, sd.TorchODE(method), x)
    assert min(level.t for level in model.levels) == pytest.approx(end, rel=1e-9)


def test_above_its_end_a_held_model_is_the_model_at_any_order_of_calls():
    model = gaussian(sd.VP())
    held, x = HeldBelow(model, 0.1), torch.ones(2, 1, dtype=torch.float64)
    at_end = held(x, *levels(0.1)).x0
    assert torch.equal(held(x, *levels(0.4)).x0, model(x, *levels(0.4)).x0)
    assert torch.equal(held(x, *levels(0.05)).x0, at_end)


def levels(t):
    return sd.VP().levels(torch.tensor([t], dtype=torch.float64))


def test_a_range_that_is_empty_is_refused():
    apart = gaussian(sd.VP()).ranged(LogSNRRange(-3.0, 0.0) & LogSNRRange(1.0, 4.0))
    with pytest.raises(ValueError, match="trained must have low < high; got 1, 0"):
        sd.sample(apart, sd.Heun(), torch.ones(2, 1), steps=3)
