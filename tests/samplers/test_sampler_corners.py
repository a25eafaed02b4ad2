"""Predictions, samplers, losses: theorems that single faults of `mutation.py` broke unseen."""

import math
from itertools import pairwise

import pytest
import torch
from cases import PROCESSES, Recorded, gaussian
from oracles import fitted_order
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.models.prediction import truth

EPS = torch.finfo(torch.float64).eps
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
META = torch.device("meta")  # has shapes and no values: a device that must not be asked for any
DENOISER = sd.Denoiser(sd.networks.MLP(), sd.VP())


# ---- predictions -------------------------------------------------------------------------------


def test_x0_without_noise_leaves_no_noise_even_where_it_contradicts_the_batch():
    """eps = (x - alpha x0) / sigma is 0 / 0 there; the limit 0 is the documented one."""
    process, x = sd.VP(), torch.ones(3, 2)
    levels = process.levels(torch.zeros(1))[0], process.level(torch.zeros(3), x)
    for level in levels:
        assert torch.equal(
            sd.models.prediction.from_network(x, 2 * x, level, sd.X0()).eps, torch.zeros(3, 2)
        )


def test_what_does_not_enter_a_quantity_cannot_spoil_it():
    (level,) = sd.VP().levels(torch.tensor([0.5]))
    good, bad = torch.ones(3, 2), torch.full((3, 2), math.nan)
    assert torch.equal(sd.models.prediction.from_network(bad, good, level, sd.X0()).x0, good)
    assert torch.equal(sd.models.prediction.from_network(bad, good, level, sd.Eps()).eps, good)
    assert torch.equal(truth(good, bad, level).x0, good)
    assert torch.equal(truth(bad, good, level).eps, good)


def test_the_truth_is_no_networks_output():
    x = torch.ones(3, 2)
    known = truth(x, x, sd.VP().level(0.5, x))
    with pytest.raises(TypeError, match="not the output of one network"):
        sd.denoising_loss(DENOISER, x, torch.full((3,), 0.5), x, space=known.meaning)


def test_a_model_of_eps_says_eps_where_it_cannot_say_x0():
    (noise,) = sd.RectifiedFlow().levels(torch.ones(1))
    x = torch.ones(3, 2)
    assert torch.equal(sd.models.prediction.from_network(x, 2 * x, noise, sd.Eps()).eps, 2 * x)


def test_a_model_of_x0_says_what_its_network_put_out_at_any_level():
    """At sigma = 1e-40 float32 has no 1 / sigma, and x0 does not need it."""
    x = torch.ones(3, 2)
    level = sd.VP().level(1e-79, x)
    assert 0 < float(level.sigma) < 1e-39
    assert torch.equal(sd.models.prediction.from_network(x, 2 * x, level, sd.X0()).x0, 2 * x)


# ---- samplers ----------------------------------------------------------------------------------


class Constant:
    """A flow of constant slope in the straight frame: the easiest there is."""

    process = sd.RectifiedFlow()

    def __call__(self, x: Tensor, level: sd.processes.Level) -> sd.models.Prediction:
        return truth(torch.zeros_like(x), torch.ones_like(x), level)


@pytest.mark.parametrize("solver", [sd.TorchODE("dopri5"), sd.samplers.ScipyODE("RK45")], ids=str)
def test_no_step_in_u_is_longer_than_an_eighth(solver):
    """However easy the flow; both methods evaluate at the ends of every step."""
    model = Recorded(Constant())
    sd.sample(model, solver, torch.ones(2, 1, dtype=torch.float64))
    u = sorted({level.u for level in model.levels})
    assert len(u) > 8
    assert max(b - a for a, b in pairwise(u)) <= 1 / 8


@pytest.mark.parametrize(
    "solver", [sd.TorchODE(), sd.samplers.ScipyODE(), sd.TorchODE("euler")], ids=str
)
@pytest.mark.parametrize("start", [1.0, 0.37, 1e-9])
def test_a_flow_is_asked_at_its_start_and_then_only_below(solver, start):
    """The first level is the one given, to the bit, and not that of its rounded u."""
    model = Recorded(gaussian(sd.VP()))
    x = torch.ones(2, 1, dtype=torch.float64)
    sd.sample(model, solver, x, times=[start, 0.0])
    assert model.levels[0] == sd.VP().levels(torch.tensor([start], dtype=torch.float64))[0]
    assert all(level.u <= model.levels[0].u for level in model.levels)


class Partly(Constant):
    """Finite for all samples but the last."""

    def __call__(self, x: Tensor, level: sd.processes.Level) -> sd.models.Prediction:
        bad = torch.zeros_like(x)
        bad[-1] = math.nan
        return truth(bad, 1 + bad, level)


@pytest.mark.parametrize("solver", [sd.TorchODE("euler"), sd.samplers.ScipyODE("RK45")], ids=str)
def test_one_sample_that_is_not_finite_stops_the_solver_by_name(solver):
    with pytest.raises(sd.SolverError, match="the model is not finite at t=1"):
        sd.sample(Partly(), solver, torch.ones(3, 2))


class Fleeing(Constant):
    """dy/du = -20 (1 + y^2): from any y it leaves for infinity within pi / 20, as a tangent."""

    def __call__(self, x: Tensor, level: sd.processes.Level) -> sd.models.Prediction:
        y = x / (level.alpha + level.sigma)
        return truth(torch.zeros_like(x), -20 * (1 + y**2), level)


@pytest.mark.parametrize("solver", [sd.TorchODE, sd.samplers.ScipyODE])
def test_a_flow_that_leaves_in_finite_time_is_given_up_by_name(solver):
    """From y = 0 at u = 1 the pole is at u = 1 - pi / 40 = 0.921, where the steps vanish."""
    with pytest.raises(sd.SolverError, match=r"failed at t=0\.92.*calls"):
        sd.sample(Fleeing(), solver(rtol=1e-3, atol=1e-3), torch.zeros(1, 1, dtype=torch.float64))


def test_a_reverse_sde_that_is_not_finite_is_given_up_by_name():
    with pytest.raises(sd.SolverError, match=r"after \d+ calls: the model is not finite"):
        sd.sample(Partly(), sd.AdaptiveSDE(), torch.ones(3, 2), generator=torch.Generator())


def test_between_levels_without_signal_an_ancestral_step_is_a_fresh_draw():
    """alpha = 0 at both in float64: the posterior is N(0, sigma_s^2), and x is forgotten."""
    process, z = sd.VP(0.1, 4000.0), torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    made = sd.sample(
        gaussian(process), sd.Ancestral(), 5 * z, times=[1.0, 0.95], noise=lambda t, s, like: z
    )
    assert float(process.alpha(0.95)) == 0
    assert_close(made, z, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("rtol", [1e-9, 1e-3])
def test_the_last_stretch_is_as_short_as_the_smaller_tolerance_asks(rtol):
    """Euler's rule from u errs by u^2 |y''| / 2: u = sqrt(tolerance) / 10 leaves it 1/200."""
    model = Recorded(gaussian(sd.VP()))
    solver = sd.samplers.ScipyODE(rtol=rtol, atol=1e-12 / rtol)
    sd.sample(model, solver, torch.ones(2, 1, dtype=torch.float64))
    assert model.levels[-1].u == pytest.approx(0.1 * math.sqrt(1e-9), rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("solver", "loose", "tight"),
    [
        (sd.TorchODE, 1e-4, 1e-8),
        (sd.samplers.ScipyODE, 1e-4, 1e-8),
        (sd.AdaptiveSDE, 1.0, 2e-2),
    ],
)
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_a_tighter_tolerance_costs_calls(solver, loose, tight, name):
    """Steps go as tolerance^(-1/p), p at most 8 (2 for the noise): here by 3 and more, where the
    longest step does not decide."""
    other = {"rtol": "atol", "atol": "rtol"}[name]
    calls = []
    for tolerance in (loose, tight):
        model = Recorded(gaussian(sd.OU(), 1e-3))
        sampler = solver(**{name: tolerance, other: tight / 1000})
        x, generator = torch.ones(4, 1, dtype=torch.float64), torch.Generator().manual_seed(0)
        sd.sample(model, sampler, x, generator=generator)
        calls.append(len(model.levels))
    assert calls[1] > calls[0]


@pytest.mark.parametrize(
    "sampler", [sd.Ancestral(), sd.EulerMaruyama(), sd.samplers.TorchSDE()], ids=str
)
def test_noise_is_asked_for_the_interval_from_t_down_to_s(sampler):
    """A Brownian source tells one from the other; independent draws do not."""
    asked, times = [], [0.9, 0.5, 0.2]

    def noise(t, s, like):
        asked.append((t, s))
        return torch.zeros_like(like)

    sd.sample(gaussian(sd.VP()), sampler, torch.ones(2, 1), times=times, noise=noise)
    assert asked == list(pairwise(times))


def test_each_stage_of_a_step_gets_the_level_that_it_stands_at():
    model = Recorded(gaussian(sd.OU()))
    x, generator = torch.ones(2, 1, dtype=torch.float64), torch.Generator().manual_seed(0)
    sd.sample(model, sd.samplers.TorchSDE("srk"), x, steps=5, generator=generator)
    times = torch.tensor([level.t for level in model.levels], dtype=torch.float64)
    assert len(times.unique()) > 5
    assert [level[:4] for level in model.levels] == [at[:4] for at in sd.OU().levels(times)]


@pytest.mark.parametrize("make", [sd.TorchODE, sd.samplers.ScipyODE, sd.AdaptiveSDE])
def test_a_solver_may_use_its_last_call_and_no_other(make):
    def calls(limit):
        model = Recorded(gaussian(sd.VP()))
        x, generator = torch.ones(2, 1, dtype=torch.float64), torch.Generator().manual_seed(0)
        sd.sample(model, make(max_calls=limit), x, generator=generator)
        return len(model.levels)

    enough = calls(100_000)
    assert calls(enough) == enough
    with pytest.raises(sd.SolverError, match="max_calls"):
        calls(enough - 1)


@pytest.mark.parametrize("solver", [sd.TorchODE(), sd.samplers.ScipyODE()], ids=str)
def test_an_empty_batch_costs_no_call_and_none_is_reported(solver):
    model = Recorded(gaussian(sd.VP()))
    (end,) = sd.trajectory(model, solver, torch.ones(0, 1), generator=torch.Generator())
    assert end.x.shape == (0, 1)
    assert getattr(end.memory, "calls", end.memory) == len(model.levels) == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_adams_is_of_the_order_it_declares_and_of_no_higher(k):
    model, sizes = gaussian(sd.RectifiedFlow()), (64, 128, 256)
    x = model.process.prior((16, 1), seeds=range(16), dtype=torch.float64)
    flow = model.flow(x, 1.0, 0.0)
    errors = [
        float((sd.sample(model, sd.Adams(k, p=1.0), x, steps=n) - flow).norm()) for n in sizes
    ]
    assert fitted_order(sizes, errors) == pytest.approx(sd.Adams(k).claims.order, abs=0.2)


def test_a_method_of_torchsde_is_of_the_order_of_euler_maruyama():
    """With additive noise it is Euler-Maruyama, or no better in law without more of the path."""
    assert (
        sd.samplers.TorchSDE().claims.order
        == sd.samplers.TorchSDE("srk").claims.order
        == sd.EulerMaruyama().claims.order
        == 1
    )


# ---- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.95, 1.05])
def test_a_bounds_weight_refuses_the_levels_of_a_cleaner_and_of_a_noisier_chain(share):
    """Same N, every beta 5 % off: sigma(1/N) = sqrt(beta_1) is then off by 2.5 %."""
    chain = sd.Discrete.linear(100)
    other = sd.Discrete(tuple(share * beta for beta in chain.betas))
    t, x = torch.tensor([0.01]), torch.zeros(1, 2)
    assert sd.losses.VLB(chain)(chain.level(t, x)).shape == (1, 1)
    with pytest.raises(ValueError, match="its own chain's levels"):
        sd.losses.VLB(chain)(other.level(t, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_bounds_weight_takes_its_own_chains_levels_in_any_precision(dtype):
    """Times are float32 and i/N is off by up to 2^-25; sigma has the digits of the batch."""
    chain = sd.Discrete.linear()
    level = chain.level(torch.arange(1, 1001) / 1000, torch.zeros(1000, 1, dtype=dtype))
    weight = sd.losses.VLB(chain)(level).double().flatten()
    betas = torch.tensor(chain.betas, dtype=torch.float64)
    expected = betas / (2 * (1 - betas) * level.sigma.double().flatten() ** 2)  # Ho et al., eq. 12
    assert_close(weight, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("i", [499.9, 500.1])
def test_a_bounds_weight_refuses_times_on_either_side_of_a_step(i):
    """sigma is there that of i = 500 within 0.1 %; the time is not."""
    process, weight = (
        sd.processes.interpolate(sd.Discrete.linear()),
        sd.losses.VLB(sd.Discrete.linear()),
    )
    for t in (torch.tensor([i / 1000]), torch.tensor([i / 1000, 0.5])):
        with pytest.raises(ValueError, match=f"got t={i / 1000:g}"):
            weight(process.level(t, torch.zeros(len(t), 2)))


@pytest.mark.parametrize(
    "weight",
    [
        sd.losses.Likelihood(sd.VP()),
        sd.losses.SNR(),
        sd.losses.MinSNR(),
        sd.losses.VLB(sd.Discrete.linear()),
    ],
)
def test_a_weight_never_asks_a_device_for_the_values_of_a_level(weight):
    level = sd.Discrete.linear().level(torch.empty(4, device=META), torch.empty(4, 2, device=META))
    assert weight(level).shape == (4, 1)
    assert weight(level).device == META


# ---- found by properties -----------------------------------------------------------------------


def test_a_step_too_short_for_its_slopes_to_differ_is_no_step():
    """Two slopes 1e-10 apart differ by their rounding, and an extrapolation magnifies that."""
    model, x = sd.exact.Gaussian(sd.VP()), torch.ones(1, 1)
    close = sd.sample(model, sd.Adams(3), x, times=[1.0, 1 - 1e-10, 0.25, 0.0])
    assert_close(close, sd.sample(model, sd.Adams(3), x, times=[1.0, 0.25, 0.0]))
    flow = sd.exact.Gaussian(sd.RectifiedFlow())
    double = sd.sample(flow, sd.Adams(3), x.double(), times=[1.0, 1 - 2**-53, 0.25, 0.0])
    once = sd.sample(flow, sd.Adams(3), x.double(), times=[1.0, 0.25, 0.0])
    assert_close(double, once, rtol=1e-12, atol=0)


def test_milstein_takes_an_empty_batch():
    empty = torch.ones(0, 3)
    made = sd.sample(
        sd.exact.Gaussian(sd.VP()), sd.samplers.TorchSDE("milstein"), empty, steps=2, seeds=[]
    )
    assert made.shape == empty.shape


def test_a_chain_says_how_many_steps_are_left_below_its_t_max():
    chain = sd.Discrete.linear().zero_terminal_snr()
    data = sd.exact.Gaussian(chain)
    with pytest.raises(ValueError, match=r"at most 999 on a chain of 1000 from t=0\.999"):
        sd.sample(data, sd.EulerMaruyama(), torch.ones(1, 1), steps=1000)
    assert sd.sample(data, sd.EulerMaruyama(), torch.ones(1, 1), steps=999).isfinite().all()


def test_where_sigma_has_underflowed_there_is_data():
    data, x = sd.exact.Gaussian(sd.EDM()), torch.ones(1, 1, dtype=torch.float64)
    for sampler in (sd.Ancestral(), sd.Ancestral("beta")):
        made = sd.sample(data, sampler, x, times=[1.0, 1e-170, 0.0], seeds=[0])
        assert made.isfinite().all()


@pytest.mark.parametrize(
    "ask",
    [
        lambda x, level: sd.exact.Gaussian(sd.VP())(x, level),
        lambda x, level: sd.exact.Gaussian(sd.VP()).flow(x, 1.0, 0.0),
        lambda x, level: sd.exact.Gaussian(sd.VP()).log_prob(x),
        lambda x, level: DENOISER(x, level),
    ],
    ids=["model", "flow", "log_prob", "denoiser"],
)
def test_a_batch_without_dimensions_is_refused_by_name(ask):
    level = sd.VP().levels(torch.tensor([0.5]))[0]
    with pytest.raises(ValueError, match=r"x must be a floating-point batch \(B, ...\)"):
        ask(torch.tensor(1.0), level)
    with pytest.raises(ValueError, match="shape must be that of a batch"):
        sd.VP().prior(())
