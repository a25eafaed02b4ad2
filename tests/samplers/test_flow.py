"""Solvers of the probability flow: the exact map, the declared order, the end."""

import math

import numpy as np
import pytest
import torch
from cases import PROCESSES, Recorded, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import fitted_order
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.models.prediction import truth
from sde_diffusion.samplers.adams import adams_weights


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("tolerance", [1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize(
    "make",
    [lambda tol: sd.TorchODE(rtol=tol, atol=tol), lambda tol: sd.TorchODE("dopri8", tol, tol),
     lambda tol: sd.samplers.ScipyODE(rtol=tol, atol=tol),
     lambda tol: sd.samplers.ScipyODE("RK45", tol, tol)],
    ids=["dopri5", "dopri8", "DOP853", "RK45"],
)  # fmt: skip
def test_ode_solvers_give_the_exact_gaussian_map_down_to_sigma_zero(process, make, tolerance):
    model = sd.exact.Gaussian(
        process,
        torch.tensor([1.0, -0.5], dtype=torch.float64),
        torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64),
    )
    x = process.prior((8, 2), seeds=range(8), dtype=torch.float64)
    error = sd.sample(model, make(tolerance), x) - model.flow(x, 1.0, 0.0)
    assert float(error.abs().max()) <= 10 * tolerance


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "DOP853", "RK45"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_no_gaussian_slips_through_the_error_control(method, batch):
    """Few, large steps can hide an error from an embedded estimate: here, once, 157 tolerances."""
    solver = sd.TorchODE if method.startswith("dopri") else sd.samplers.ScipyODE
    problems = [(0.7, 0.25), (3, 0.25), (0, 4), (1, 0.1), (0.7, 0.01), (2, 1e-3), (0, 1), (5, 1)]
    for mean, variance in problems:
        model = sd.exact.Gaussian(sd.VP(), torch.tensor([mean], dtype=torch.float64), variance)
        x = sd.VP().prior((batch, 1), seeds=range(batch), dtype=torch.float64)
        for tolerance in (1e-5, 1e-6, 1e-7):
            made = sd.sample(model, solver(method, tolerance, tolerance), x)
            assert float((made - model.flow(x, 1.0, 0.0)).abs().max()) <= 10 * tolerance


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_ode_solvers_agree_on_a_mixture(process):
    model = sd.exact.GaussianMixture(
        process, [0.4, 0.6], torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), torch.tensor([0.1, 0.05])
    )
    x = process.prior((16, 2), seeds=range(16), dtype=torch.float64)
    reference = sd.sample(model, sd.samplers.ScipyODE("DOP853", 1e-11, 1e-11), x)
    for tolerance in (1e-5, 1e-7):
        made = sd.sample(model, sd.TorchODE(rtol=tolerance, atol=tolerance), x)
        assert float((made - reference).pow(2).mean().sqrt()) <= 10 * tolerance


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(
    "sampler", [sd.Adams(1), sd.Adams(2), sd.Adams(3), sd.Adams(4), sd.Adams(5), sd.Heun(),
                sd.Ancestral(eta=0.0)], ids=str,
)  # fmt: skip
def test_deterministic_samplers_converge_at_their_declared_order(name, sampler):
    model, sizes = gaussian(PROCESSES[name]), (64, 128, 256)
    if name == "ou" and sampler == sd.Ancestral(eta=0.0):
        sizes = (1024, 2048, 4096)  # sigma starts like sqrt(10 t): even times resolve it late
    x = model.process.prior((16, 1), seeds=range(16), dtype=torch.float64)
    flow = model.flow(x, 1.0, 0.0)
    errors = [float((sd.sample(model, sampler, x, steps=n) - flow).norm()) for n in sizes]
    assert fitted_order(sizes, errors) >= sampler.claims.order - 0.2


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(
    ("sampler", "calls"), [(sd.Adams(3), 12), (sd.Heun(), 23), (sd.Ancestral(eta=0.0), 12)], ids=str
)
def test_fixed_step_solvers_end_at_sigma_zero_without_a_call_there(name, sampler, calls):
    model = Recorded(gaussian(PROCESSES[name]))
    states = list(sd.trajectory(model, sampler, torch.ones(2, 1), steps=12))
    assert len(states) == 12
    assert states[-1].t == 0
    assert len(model.levels) == calls
    assert min(level.sigma for level in model.levels) > 0


def test_ode_solvers_report_their_calls():
    for solver in (sd.TorchODE(), sd.samplers.ScipyODE()):
        model = Recorded(gaussian(sd.VP()))
        *_, last = sd.trajectory(model, solver, torch.ones(2, 1))
        assert last.memory.calls == len(model.levels) > 0


def test_fixed_step_methods_of_torchdiffeq_take_one_step_per_interval():
    """Before the last interval euler is DDIM, and rk4 converges at its own order, 4."""
    x = torch.ones(2, 1, dtype=torch.float64)
    model = gaussian(sd.VP())
    times = sd.Adams(1).grid(sd.VP(), 32)[:-1]
    euler = sd.sample(model, sd.TorchODE("euler"), x, times=times)
    ddim = sd.sample(model, sd.Ancestral(eta=0.0), x, times=times)
    assert_close(euler, ddim, rtol=1e-12, atol=1e-12)
    errors, sizes = [], (16, 32, 64)
    for n in sizes:
        times = torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)
        made = sd.sample(model, sd.TorchODE("rk4"), x, times=times)
        errors.append(float((made - model.flow(x, 0.9, 0.1)).abs().max()))
    assert fitted_order(sizes, errors) > 3.8


def test_levels_that_rounding_makes_equal_cost_nothing_and_break_nothing():
    """VP(0.1, 200): alpha underflows near t = 1, where u rounds to 1 at several times."""
    model = gaussian(sd.VP(0.1, 200.0))
    x = torch.ones(2, 1, dtype=torch.float64)
    times = torch.linspace(1, 0, 101, dtype=torch.float64)
    for sampler in (sd.Adams(3), sd.TorchODE(), sd.Ancestral(), sd.Ancestral(eta=0.0), sd.Heun()):
        assert sd.sample(model, sampler, x, times=times, seeds=[0, 1]).isfinite().all()


class Broken:
    """A model whose output is not finite, or grows without bound."""

    process = sd.VP()

    def __init__(self, output):
        self.output = output

    def __call__(self, x, level):
        return truth(self.output(x), torch.zeros_like(x), level)


@pytest.mark.parametrize(
    "solver", [sd.TorchODE(max_calls=500), sd.samplers.ScipyODE(max_calls=500)]
)
@pytest.mark.parametrize(
    "output", [lambda x: x * math.nan, lambda x: 1e3 * x**3, lambda x: 1e6 * torch.sin(1e6 * x)]
)
def test_adaptive_solvers_give_up_by_name_on_models_they_cannot_integrate(solver, output):
    with pytest.raises(sd.SolverError, match=r"t=.*calls"):
        sd.sample(Broken(output), solver, torch.ones(3, 2))


def test_adams_weights_are_the_textbook_ones_on_an_even_grid():
    assert adams_weights((0.0, -1.0), 0.0, 1.0) == pytest.approx((3 / 2, -1 / 2))
    assert adams_weights((0.0, -1.0, -2.0), 0.0, 1.0) == pytest.approx((23 / 12, -16 / 12, 5 / 12))
    assert adams_weights((1.0, 0.0), 0.0, 1.0) == pytest.approx((1 / 2, 1 / 2))
    assert adams_weights((1.0, 0.0, -1.0), 0.0, 1.0) == pytest.approx((5 / 12, 8 / 12, -1 / 12))


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=6))
def test_adams_weights_integrate_every_polynomial_they_can(gaps):
    """Uneven nodes with step ratios up to 20, where the weights cancel by at most 20^5."""
    nodes = np.cumsum(np.asarray(gaps) / 20.0)[::-1]
    start, end = float(nodes[0]), float(nodes[0] + gaps[0] / 20)
    weights = np.asarray(adams_weights(tuple(nodes.tolist()), start, end))
    for power in range(len(nodes)):
        integral = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
        rounding = np.abs(weights * nodes**power).sum() * 1e-10
        assert abs((weights * nodes**power).sum() - integral) <= rounding
