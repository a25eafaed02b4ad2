"""Samplers: exact laws, limits and orders on Gaussian data, where everything is known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases import FIXED_STEP, PROCESSES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    ddim_moments,
    ddpm_moments,
    euler_maruyama_moments,
    fitted_order,
    reverse_sde_moments,
    vp_beta,
    w2,
)
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.prediction import truth
from sde_diffusion.processes import Process
from sde_diffusion.samplers.adams import adams_weights

MEAN = 0.7


def gaussian(process, variance=0.25):
    return sd.exact.Gaussian(process, torch.tensor([MEAN], dtype=torch.float64), variance)


def moments(law):
    return float(law.mean), float(law.covariance)


class Recorded:
    """A model that remembers the levels it was asked about."""

    def __init__(self, model):
        self.model, self.process, self.levels = model, model.process, []

    def __call__(self, x, level):
        self.levels.append(level)
        return self.model(x, level)

    def rows(self, index):
        return self


# ---- ancestral: Ho et al.'s chain -------------------------------------------------------------


@pytest.mark.parametrize("i", [1, 2, 500, 1000])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_one_ancestral_step_is_the_published_posterior(i, variance):
    """Ho et al. 2020, eq. 7, in their letters."""
    process = sd.Discrete.linear()
    beta = torch.tensor(process.betas, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0)
    before = abar[i - 2] if i > 1 else torch.ones((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(i)
    x, x0, z = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    mean = before.sqrt() * beta[i - 1] / (1 - abar[i - 1]) * x0
    mean += (1 - beta[i - 1]).sqrt() * (1 - before) / (1 - abar[i - 1]) * x
    var = beta[i - 1] if variance == "beta" else (1 - before) / (1 - abar[i - 1]) * beta[i - 1]
    expected = mean + (var.sqrt() * z if i > 1 else 0)

    class Knows:
        def __init__(self):
            self.process = process

        def __call__(self, x, level):
            return truth(x0, (x - level.alpha * x0) / level.sigma, level)

    times = torch.tensor([i, i - 1], dtype=torch.float64) / 1000
    step = sd.sample(Knows(), sd.Ancestral(variance), x, times=times, noise=lambda t, s, like: z)
    assert_close(step, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", [0.25, 1e-3])
@pytest.mark.parametrize("kind", ["beta", "posterior"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_the_whole_chain_has_the_exact_moments_of_ho_et_al(steps, kind, variance):
    chain = sd.discretize(sd.VP(), steps, rule="exact")
    law = sd.verify.law(sd.Ancestral(kind), gaussian(chain, variance), steps=steps)
    assert moments(law) == pytest.approx(ddpm_moments(chain.betas, MEAN, variance, kind), rel=1e-8)


@pytest.mark.parametrize("steps", [7, 300, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_any_sub_chain_has_the_exact_moments_of_ddim(steps, eta):
    chain = sd.Discrete.linear()
    times = chain.times(steps)
    abar = np.concatenate([[1.0], np.cumprod(1 - np.asarray(chain.betas))])
    abar = abar[(times * 1000).round().long().flip(0).numpy()]
    law = sd.verify.law(sd.Ancestral(eta=eta), gaussian(chain), times=times)
    assert moments(law) == pytest.approx(ddim_moments(abar, MEAN, 0.25, eta), rel=1e-8)


def test_eta_goes_with_the_posterior_variance():
    with pytest.raises(ValueError, match="eta"):
        sd.Ancestral("beta", eta=0.5)


# ---- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "order"), [("beta", 0.9), ("posterior", 0.9)])
def test_ancestral_tends_to_the_reverse_sde_in_law(kind, order):
    sizes = (512, 1024, 2048)
    limit = reverse_sde_moments(MEAN, 0.25)
    errors = [
        w2(moments(sd.verify.law(sd.Ancestral(kind), gaussian(sd.VP()), steps=n)), limit)
        for n in sizes
    ]
    assert fitted_order(sizes, errors) >= order


def test_euler_maruyama_tends_to_the_reverse_sde_at_order_one():
    sizes = (128, 256, 512)
    limit = reverse_sde_moments(MEAN, 0.25)
    laws = [sd.verify.law(sd.EulerMaruyama(), gaussian(sd.VP()), steps=n) for n in sizes]
    order = fitted_order(sizes, [w2(moments(law), limit) for law in laws])
    assert order == pytest.approx(1, abs=0.1)


def test_ancestral_and_euler_maruyama_approach_each_other_at_order_one():
    sizes = (256, 512, 1024)
    gaps = []
    for n in sizes:
        laws = [
            moments(sd.verify.law(sampler, gaussian(sd.VP()), steps=n))
            for sampler in (sd.Ancestral("beta"), sd.EulerMaruyama())
        ]
        gaps.append(w2(*laws))
    assert fitted_order(sizes, gaps) > 0.9


@pytest.mark.parametrize("sampler", [sd.EulerMaruyama(), sd.TorchSDE()], ids=["own", "torchsde"])
@pytest.mark.parametrize("name", ["vp", "rectified"])
def test_reverse_sde_solvers_have_the_exact_moments_of_euler_maruyama(sampler, name):
    process = PROCESSES[name]
    published = {
        "vp": (lambda t: -vp_beta(t) / 2, vp_beta, lambda t: (
            math.exp(-0.05 * t - 19.9 * t**2 / 4), -math.expm1(-0.1 * t - 19.9 * t**2 / 2))),
        "rectified": (lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t), lambda t: (1 - t, t**2)),
    }  # fmt: skip
    times = sampler.grid(process, 60)
    law = sd.verify.law(sampler, gaussian(process), times=times)
    expected = euler_maruyama_moments(times.tolist(), *published[name], MEAN, 0.25)
    assert moments(law) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("method", ["euler", "milstein"])
def test_torchsde_on_our_brownian_path_is_euler_maruyama(process, method):
    """g does not depend on x, so Milstein's correction is zero."""
    x = process.prior((5, 2, 3), seeds=range(5), dtype=torch.float64)
    model = sd.exact.Gaussian(process, 0.3, 0.5)
    ours = sd.sample(model, sd.EulerMaruyama(), x, steps=40, seeds=range(5))
    theirs = sd.sample(model, sd.TorchSDE(method), x, steps=40, seeds=range(5))
    assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sampler", "arguments"),
    [(sd.TorchSDE("srk"), {"steps": 200}), (sd.AdaptiveTorchSDE(), {}),
     (sd.AdaptiveTorchSDE("euler"), {})],
    ids=["srk", "adaptive-srk", "adaptive-euler"],
)  # fmt: skip
def test_torchsdes_own_paths_give_the_data_and_repeat_with_the_generator(sampler, arguments):
    """4,000 samples: 4.5 standard errors, and as much again for the steps.

    Euler-Maruyama, the coarsest of them, has an exact error of 0.0035 in W2 at 200 steps.
    """
    n, model = 4000, gaussian(sd.VP())
    x = sd.VP().prior((n, 1), seeds=range(n), dtype=torch.float64)
    made = [
        sd.sample(model, sampler, x, generator=torch.Generator().manual_seed(1), **arguments)
        for _ in range(2)
    ]
    assert torch.equal(*made)
    assert abs(made[0].mean() - MEAN) < 4.5 * 0.5 / math.sqrt(n) + 0.005
    assert abs(made[0].var() - 0.25) < 4.5 * 0.25 * math.sqrt(2 / n) + 0.005


@pytest.mark.parametrize("sampler", [sd.TorchSDE("srk"), sd.AdaptiveTorchSDE()])
def test_torchsdes_own_paths_refuse_seeds_and_injected_noise_by_name(sampler):
    x, steps = torch.zeros(2, 1), None if isinstance(sampler, sd.AdaptiveTorchSDE) else 4
    for source in ({"seeds": [0, 1]}, {"noise": lambda t, s, like: torch.zeros_like(like)}):
        with pytest.raises(ValueError, match="generator="):
            sd.sample(gaussian(sd.VP()), sampler, x, steps=steps, **source)


def test_torchsde_makes_one_call_a_step():
    model = Recorded(gaussian(sd.VP()))
    sd.sample(model, sd.TorchSDE(), torch.zeros(2, 1), steps=9)
    assert len(model.levels) == 9


# ---- the probability flow ---------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("tolerance", [1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize(
    "make",
    [lambda tol: sd.TorchODE(rtol=tol, atol=tol), lambda tol: sd.TorchODE("dopri8", tol, tol),
     lambda tol: sd.ScipyODE(rtol=tol, atol=tol), lambda tol: sd.ScipyODE("RK45", tol, tol)],
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
    solver = sd.TorchODE if method.startswith("dopri") else sd.ScipyODE
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
    reference = sd.sample(model, sd.ScipyODE("DOP853", 1e-11, 1e-11), x)
    for tolerance in (1e-5, 1e-7):
        made = sd.sample(model, sd.TorchODE(rtol=tolerance, atol=tolerance), x)
        assert float((made - reference).pow(2).mean().sqrt()) <= 10 * tolerance


@pytest.mark.parametrize("name", ["vp", "rectified"])
@pytest.mark.parametrize(
    "sampler", [sd.Adams(1), sd.Adams(2), sd.Adams(3), sd.Adams(4), sd.Adams(5), sd.Heun(),
                sd.Ancestral(eta=0.0)], ids=str,
)  # fmt: skip
def test_deterministic_samplers_converge_at_their_declared_order(name, sampler):
    model, sizes = gaussian(PROCESSES[name]), (64, 128, 256)
    x = model.process.prior((16, 1), seeds=range(16), dtype=torch.float64)
    flow = model.flow(x, 1.0, 0.0)
    errors = [float((sd.sample(model, sampler, x, steps=n) - flow).norm()) for n in sizes]
    assert fitted_order(sizes, errors) >= sampler.order - 0.2


@pytest.mark.parametrize("name", ["vp", "rectified"])
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
    for solver in (sd.TorchODE(), sd.ScipyODE()):
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


@dataclasses.dataclass(frozen=True)
class Scaled(Process):
    """x_t = (1 - t) x_0 + k t eps: a user's two formulas, not variance-preserving."""

    k: float = 1.0

    def log_alpha(self, t):
        return torch.log1p(-t)

    def variance(self, t):
        return (self.k * t) ** 2


@settings(deadline=None)
@given(st.floats(0.1, 10))
def test_ancestral_takes_a_users_process_whatever_its_rounding(k):
    """From alpha = 0 the posterior is N(alpha_s x0, sigma_s^2): no root of a negative residue."""
    model = sd.exact.Gaussian(Scaled(k), torch.tensor([0.5], dtype=torch.float64), 0.25)
    x = torch.ones(3, 1, dtype=torch.float64)
    for sampler in (sd.Ancestral(), sd.Ancestral(eta=0.0)):
        made = sd.sample(model, sampler, x, times=[1, 0.37, 0.1, 0], seeds=range(3))
        assert made.isfinite().all()


class Broken:
    """A model whose output is not finite, or grows without bound."""

    process = sd.VP()

    def __init__(self, output):
        self.output = output

    def __call__(self, x, level):
        return truth(self.output(x), torch.zeros_like(x), level)

    def rows(self, index):
        return self


@pytest.mark.parametrize("solver", [sd.TorchODE(max_calls=500), sd.ScipyODE(max_calls=500)])
@pytest.mark.parametrize(
    "output", [lambda x: x * math.nan, lambda x: 1e3 * x**3, lambda x: 1e6 * torch.sin(1e6 * x)]
)
def test_adaptive_solvers_give_up_by_name_on_models_they_cannot_integrate(solver, output):
    with pytest.raises(sd.SolverError, match=r"t=.*calls"):
        sd.sample(Broken(output), solver, torch.ones(3, 2))


# ---- Adams' weights ---------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sd.Adams(0), "k must"),
        (lambda: sd.Adams(6), "k must"),
        (lambda: sd.Adams(2, p=0), "p must"),
        (lambda: sd.Ancestral("small"), "variance"),
        (lambda: sd.Ancestral(eta=1.5), "eta"),
        (lambda: sd.TorchODE("dopri6"), "method"),
        (lambda: sd.TorchODE(rtol=0), "rtol"),
        (lambda: sd.TorchODE(max_calls=0), "max_calls"),
        (lambda: sd.ScipyODE("rk45"), "method"),
        (lambda: sd.TorchSDE("heun"), "method"),
        (lambda: sd.AdaptiveTorchSDE(dt_min=0), "dt_min"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


def test_samplers_are_values():
    for sampler in FIXED_STEP.values():
        assert type(sampler)(**dataclasses.asdict(sampler)) == sampler
        assert hash(sampler) is not None
