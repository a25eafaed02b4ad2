"""Processes: theorems that single faults, made by `mutation.py`, were found to break unseen."""

import math
from dataclasses import dataclass
from itertools import pairwise

import mpmath
import pytest
import torch
from cases import PROCESSES
from oracles import EXACT_MARGINALS, SDES
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.processes import Process, double

EPS = torch.finfo(torch.float64).eps
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
META = torch.device("meta")  # has shapes and no values: a device that must not be asked for any
DENOISER = sd.Denoiser(sd.networks.MLP(), sd.VP())


# ---- processes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain(Process):
    """The two formulas of another process, and nothing that it knows beyond them."""

    of: Process

    def log_alpha(self, t: Tensor) -> Tensor:
        return self.of.log_alpha(t)

    def variance(self, t: Tensor) -> Tensor:
        return self.of.variance(t)


@dataclass(frozen=True)
class Shrinking(Process):
    """dx = -3 (1 + t^2) x dt + g dW, and g = 0 from t = 1/2 on."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return -3 * t - t**3

    def variance(self, t: Tensor) -> Tensor:
        return t.clamp(max=0.5) * torch.exp(-6 * t) * torch.exp(-2 * t**3)


@pytest.mark.parametrize("name", ["vp", "sub-vp", "ou", "rectified-flow", "edm"])
def test_two_formulas_alone_give_the_kernel_that_is_known_in_closed_form(name):
    """b^2 is then a difference of variances: each is rounded a few times, b^2 by as much."""
    process = PROCESSES[name]
    s, t = (torch.tensor(v, dtype=torch.float64) for v in ([0.1, 0.3, 0.0], [0.2, 0.9, 0.4]))
    (a, b), (a_known, b_known) = Plain(process).transition(s, t), process.transition(s, t)
    assert_close(a, a_known, rtol=32 * EPS, atol=0)
    assert_close(b**2, b_known**2, rtol=0, atol=32 * EPS * float(process.variance(t).max()))


CHAINS = sd.Discrete.linear(), sd.Discrete.linear().zero_terminal_snr()


@pytest.mark.parametrize("process", CHAINS, ids=["linear", "zero-snr"])
def test_the_kernel_of_a_chain_keeps_its_digits_over_short_times(process):
    """With t - s = 1e-9 t in an interval: log a = f (t - s), or log((1 - t) / (1 - s)) in the last
    one of a chain that ends without signal; b^2 = 1 - a^2. Only t - s itself is rounded away."""
    t = torch.tensor([0.1003, 0.35, 0.9002, 0.9995], dtype=torch.float64)
    s = t * (1 - 1e-9)
    log_a = process.drift(t) * (t - s) if process.t_max == 1 else torch.log1p(-(t - s) / (1 - s))
    if process.t_max < 1:
        log_a[:3] = process.drift(t[:3]) * (t - s)[:3]
    _, b = process.transition(s, t)
    assert_close(b**2, -torch.expm1(2 * log_a), rtol=1e-10, atol=0)


def test_a_process_may_stop_adding_noise():
    """g^2 = (sigma^2)' - 2 f sigma^2 is then a difference of equals, of either sign by rounding:
    a few roundings of 2 f sigma^2, at most 6 e^(-3) here."""
    g2 = Shrinking().diffusion(torch.linspace(0.51, 1, 1001, dtype=torch.float64)) ** 2
    assert float(g2.max()) <= 8 * EPS * 6 * math.exp(-3)


def test_a_kernel_in_which_no_noise_is_added_has_none():
    """b^2 is a difference of equals, too, and its root is a number though rounding leave it < 0."""
    s = torch.linspace(0.5, 0.9, 1001, dtype=torch.float64)
    a, b = Shrinking().transition(s, torch.ones_like(s))
    assert_close(a, torch.exp(-3 * (1 - s) - (1 - s**3)), rtol=16 * EPS, atol=0)
    assert float((b**2).max()) <= 8 * EPS * 0.5 * math.exp(-8)


@dataclass(frozen=True)
class Receding(Process):
    """Noise that falls faster than the data from t = 0.81 on: no SDE has it."""

    scale: float

    def log_alpha(self, t: Tensor) -> Tensor:
        return -2 * t

    def variance(self, t: Tensor) -> Tensor:
        return self.scale**2 * t * (1 - t)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_log_snr_that_rises_is_refused_at_any_scale_of_the_noise(scale):
    """g^2 / scale^2 = 1 - 2 t + 4 t (1 - t) is 0 at t = (1 + sqrt 5) / 4 = 0.81."""
    assert float(Receding(scale).diffusion(0.8)) > 0
    for t in (0.82, torch.tensor([0.5, 0.82], dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"must decrease in t; it rises at t=0\.82"):
            Receding(scale).diffusion(t)
    level = (1 + math.sqrt(5)) / 4  # g^2 is 0 there, give or take rounding, which is no rise
    with pytest.raises(ValueError, match=r"it rises at t=0\.9"):
        Receding(scale).diffusion(torch.tensor([level, 0.9], dtype=torch.float64))


@dataclass(frozen=True)
class Halting(Process):
    """Nothing moves up to t = 1/4; the noise grows up to t = 5/8 and then falls."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def variance(self, t: Tensor) -> Tensor:
        return (t - 0.25).clamp(min=0) * (1 - t)


def test_the_time_named_is_where_log_snr_rises_and_not_where_it_stands_still():
    with pytest.raises(ValueError, match=r"it rises at t=0\.9"):
        Halting().drift(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))


@dataclass(frozen=True)
class Shifted(Process):
    """VP whose noise begins with `first`, and which stops at both `ends` of the path."""

    first: float = 0.0
    ends: tuple[float, float] = (0.0, 1.0)
    shift: float = 0.0

    def clock(self, t: Tensor) -> Tensor:
        return t.clamp(*self.ends) - self.ends[0]

    def log_alpha(self, t: Tensor) -> Tensor:
        return sd.VP().log_alpha(self.clock(t)) + self.shift

    def variance(self, t: Tensor) -> Tensor:
        return self.first + sd.VP().variance(self.clock(t))


PARTS = {
    "denoiser": lambda process: sd.Denoiser(sd.networks.MLP(), process),
    "exact": sd.exact.Gaussian,
    "mixture": lambda process: sd.exact.GaussianMixture(process, [1.0], [0.0], [1.0]),
    "match": lambda process: sd.match(sd.exact.Gaussian(sd.VP()), process),
    "times": sd.losses.LikelihoodTimes,
    "weight": sd.losses.Likelihood,
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
def test_a_process_that_is_no_path_from_the_data_is_refused_where_it_is_used(part):
    start = "process must begin with the data, without noise; got"
    for process, message in [
        (Shifted(first=1e-4), rf"{start} log_alpha\(0\) = 0, variance\(0\) = 0.0001"),
        (Shifted(shift=-0.1), rf"{start} log_alpha\(0\) = -0.1"),
        (Shifted(ends=(0.05, 1.0)), r"process must have a log_snr that decreases in t; got inf at"),
        (Shifted(ends=(0.0, 0.99)), r"decreases in t; got -9.85\d* at t=0.999, -9.85\d* at t=1.0"),
        (Receding(1.0), r"decreases in t"),
    ]:
        with pytest.raises(ValueError, match=message):
            part(process)
    part(Shifted())


def test_a_level_carries_no_gradient_to_the_times_it_was_made_from():
    t = torch.tensor([0.2, 0.7], requires_grad=True)
    assert not any(field.requires_grad for field in sd.VP().level(t, torch.zeros(2, 3))[:4])


def test_one_nan_among_log_snrs_is_refused():
    with pytest.raises(ValueError, match="log_snr must be a number; got nan"):
        sd.VP().time(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("name", ["vp", "sub-vp", "ve", "ou", "edm"])
def test_the_published_rates_go_on_beyond_one_where_alpha_does(name):
    """As kernels do. No two terms of g^2 cancel: the bound is that of `SDES` within [0, 1]."""
    process, (drift, diffusion2) = PROCESSES[name], SDES[name]
    assert float(process.drift(1.25)) == pytest.approx(drift(1.25), rel=1e-10)
    assert float(process.diffusion(1.25)) ** 2 == pytest.approx(diffusion2(1.25), rel=1e-10)


@pytest.mark.parametrize(
    ("process", "first", "high", "low"),
    [
        (sd.EDM(80.0), [], 80.0, 0.002),
        (sd.EDM(100.0), [100.0], 80.0, 0.002),  # above their range: the start, then theirs
        (sd.EDM(81.0), [81.0], 80.0, 0.002),
        (sd.VE(0.01, 50.0), [], math.sqrt(50.0**2 - 0.01**2), 0.002),
        (sd.EDM(0.1), [], 0.1, 0.001),  # below it: two decades
        (sd.RectifiedFlow(), [math.inf], 80.0, 0.002),
    ],
    ids=str,
)
def test_own_grids_have_the_noise_levels_of_karras_et_al(process, first, high, low):
    """sigma / alpha by eq. 5 with rho = 7, from 80 to 0.002; log-SNR is rounded."""
    n = 9
    ramp = [i / (n - 1 - len(first)) for i in range(n - len(first))]
    levels = [(high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in ramp]
    expected = torch.tensor([*first, *levels, 0.0], dtype=torch.float64)
    made = torch.exp(-process.log_snr(sd.grids.Usual()(process, n)) / 2)
    assert_close(made, expected, rtol=1e-12, atol=0)


def test_a_grid_from_t_max_leaves_the_start_out_where_it_is_too_noisy():
    """RectifiedFlow's last rate is stiff: sigma / alpha is 999 at t_max, and 80 on the grid."""
    process = sd.RectifiedFlow()
    times = sd.grids.Usual()(process, 7, process.t_max)
    assert len(times) == 8
    assert float(times[0]) == pytest.approx(80 / 81, rel=1e-12)
    assert sd.grids.Usual()(process, 1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", EXACT_MARGINALS)
@pytest.mark.parametrize("t", [2.0**-60, 2.0**-20, 0.5, 1 - 2.0**-20, 1 - 2.0**-50])
def test_marginals_keep_their_digits_at_both_ends(name, t):
    """Against 40 digits at exact binary times: log alpha is at most 10, rounded a few times."""
    with mpmath.workdps(40):
        alpha, variance = (formula(mpmath.mpf(t)) for formula in EXACT_MARGINALS[name])
        sigma = float(mpmath.sqrt(variance))
    assert float(PROCESSES[name].alpha(t)) == pytest.approx(float(alpha), rel=64 * EPS, abs=0)
    assert float(PROCESSES[name].sigma(t)) == pytest.approx(sigma, rel=64 * EPS, abs=0)


def test_one_start_without_signal_among_others_is_refused():
    with pytest.raises(ValueError, match=r"alpha\(s\) > 0"):
        sd.RectifiedFlow().transition(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0]))


def test_whole_numbers_are_times():
    whole = torch.tensor([0, 1])
    for schedule in (sd.VP().alpha, sd.VP().sigma, sd.VP().drift):
        assert torch.equal(schedule(whole), schedule(whole.double()))


def test_the_layout_of_log_snrs_does_not_matter():
    process = sd.processes.interpolate(sd.Discrete.linear(10))
    rows = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(3, 4)
    assert torch.equal(process.time(rows.T), process.time(rows.T.contiguous()))


@pytest.mark.parametrize("betas", [(0.1, 1.0), (0.1, 0.2, 0.2, 0.3, 1.0)])
def test_time_inverts_log_snr_on_a_chain_of_any_length_that_ends_without_signal(betas):
    process = sd.processes.Interpolated(betas)
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    assert_close(process.time(process.log_snr(t)), t, rtol=1e-12, atol=1e-14)


def test_a_model_has_some_variance_in_its_last_step_and_the_posterior_has_none():
    """Ho et al. 2020, eq. 7, at i = 1: asking for the one does not change the other."""
    chain = sd.Discrete((0.1, 0.2))
    second = 0.2 * 0.1 / (1 - 0.9 * 0.8)
    assert chain.model_variances("posterior").tolist() == pytest.approx(
        [second] * 2, rel=8 * EPS, abs=0
    )
    assert chain.posterior_variances.tolist() == pytest.approx([0, second], rel=8 * EPS, abs=0)


@pytest.mark.parametrize("make", ["linear", "scaled_linear", "sigmoid", "cosine"])
def test_the_betas_of_the_published_chains_rise(make):
    betas = getattr(sd.Discrete, make)(20).betas
    assert all(first < second for first, second in pairwise(betas))


def test_a_sigmoid_of_wide_span_goes_from_one_end_to_the_other():
    """1 / (1 + e^40) is 4e-18, below the rounding of either end."""
    betas = sd.Discrete.sigmoid(2, 0.1, 0.3, span=40.0).betas
    assert betas == pytest.approx((0.1, 0.3), rel=4 * EPS, abs=0)


def test_betas_may_be_equal_and_of_any_float_type():
    assert sd.Discrete.linear(3, 0.25, 0.25).betas == (0.25, 0.25, 0.25)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert sd.Discrete(torch.tensor([0.25, 0.5], dtype=dtype)).betas == (0.25, 0.5)


def test_a_constant_chain_keeps_its_alpha_in_every_step():
    """TTIC 31230: z_i = alpha z_(i-1) + ..., so alpha is the square root of Ho et al.'s."""
    alpha = sd.Discrete.constant(4, alpha=0.9).alpha(torch.arange(5, dtype=torch.float64) / 4)
    assert alpha.tolist() == pytest.approx([1, 0.9, 0.81, 0.729, 0.6561], rel=16 * EPS, abs=0)


def test_what_is_left_out_is_what_the_papers_have():
    assert sd.VP() == sd.VP(0.1, 20.0)  # Song et al. 2021, App. C
    assert sd.SubVP() == sd.SubVP(0.1, 20.0)
    assert sd.VE() == sd.VE(0.01, 50.0)  # the same, for CIFAR-10
    assert sd.EDM() == sd.EDM(80.0)  # Karras et al. 2022, Table 1
    assert sd.models.Preconditioned() == sd.models.Preconditioned(0.5)
    assert sd.losses.EDMWeight() == sd.losses.EDMWeight(0.5)
    assert sd.Cosine() == sd.Cosine(0.008)  # Nichol & Dhariwal 2021, sec. 3.2
    assert sd.Discrete.cosine(10) == sd.Discrete.cosine(10, 0.008, 0.999)
    assert sd.Discrete.linear(10) == sd.Discrete.linear(10, 1e-4, 0.02)  # Ho et al. 2020, sec. 4
    assert sd.Discrete.sigmoid(10) == sd.Discrete.sigmoid(10, 1e-4, 0.02, 6.0)
    assert sd.Discrete.scaled_linear(10) == sd.Discrete.scaled_linear(10, 0.00085, 0.012)
    assert sd.losses.MinSNR() == sd.losses.MinSNR(5.0)  # Hang et al. 2023, sec. 3.4
    assert sd.Ancestral() == sd.Ancestral("posterior", 1.0)  # Ho et al. 2020, Alg. 2


@pytest.mark.parametrize("make", ["linear", "scaled_linear", "sigmoid", "cosine", "constant"])
def test_the_published_chains_have_a_thousand_steps(make):
    assert getattr(sd.Discrete, make)().num_steps == 1000


@EVERY
def test_a_device_is_never_asked_for_the_values_of_its_times(process):
    """An accelerator would stall on it; `meta` refuses to."""
    t, x = torch.empty(4, device=META), torch.empty(4, 2, device=META)
    assert double(t).device == META
    for schedule in (process.alpha, process.sigma, process.log_snr, process.drift):
        assert schedule(t).device == META
    level = process.level(t, x)
    assert all(field.device == META for field in level[:4])
    assert process.time(level.log_snr).device == META


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sd.VP().transition(torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4])), "s <= t"),
        (lambda: sd.samplers.TorchSDE("heun"), "method must be one of"),
        (lambda: sd.VP().levels(torch.rand(2, 2)), "times must be a grid"),
        (lambda: sd.VP().level(torch.rand(2, 1), torch.zeros(2, 3)), "t must have shape"),
        (lambda: sd.losses.EDMWeight(0.0), "sigma_data must lie"),
        (
            lambda: sd.denoising_loss(DENOISER, torch.ones(2, 2).long(), *torch.ones(2, 2)),
            "x0 must",
        ),
        (lambda: sd.denoising_loss(None, *torch.zeros(3, 2)), "denoiser must be a Denoiser"),
        (lambda: sd.VP().transition(torch.zeros(2), torch.ones(2, 1)), "must agree in shape"),
        (lambda: sd.Discrete.linear(10, 0.1, 1.0), "beta_max < 1"),
        (lambda: sd.Discrete.constant(10, alpha=0.0), "alpha must lie"),
        (lambda: sd.OU(0.0), "rate must lie"),
        (lambda: sd.losses.Huber(0.0), "delta must lie"),
        (lambda: sd.VP().prior((2,), dtype=torch.int64), "dtype must be a floating-point type"),
        (lambda: sd.TorchODE(atol=0), "atol must lie"),
        (lambda: sd.samplers.ScipyODE(rtol=0), "rtol must lie"),
        (lambda: sd.AdaptiveSDE(rtol=0), "rtol must lie"),
        (lambda: sd.AdaptiveSDE(atol=0), "atol must lie"),
        (lambda: sd.AdaptiveSDE(max_calls=0), "max_calls must be"),
        (lambda: sd.VP(0.1, math.inf), r"beta_max must lie in \(0, inf\); got inf"),
        (lambda: sd.VE(0.0, 50.0), "sigma_min must lie"),
        (lambda: sd.VE(0.5, 0.5), "sigma_min must be below sigma_max"),
        (lambda: sd.VE(True, 50.0), "sigma_min must be a number"),
        (lambda: sd.Discrete.cosine(10, max_beta=0), "max_beta"),
        (lambda: sd.Discrete.linear(10, 0.0, 0.02), "beta_min must lie"),
        (lambda: sd.Discrete.linear(10, "low"), "beta_min must be a number"),
        (lambda: sd.Discrete.linear(10, 1e-4, "high"), "beta_max must be a number"),
        (lambda: sd.Discrete.scaled_linear(10, "low"), "beta_min must be a number"),
        (lambda: sd.Discrete.scaled_linear(10, 0.04, 0.01), r"got 0\.04 and 0\.01"),
        (lambda: sd.Discrete.sigmoid(10, "low"), "beta_min must be a number"),
    ],
)
def test_each_argument_is_refused_by_its_own_name(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda small: sd.VP(small, small),
        lambda small: sd.VE(small, 2 * small),
        lambda small: sd.OU(small),
        lambda small: sd.EDM(small),
        lambda small: sd.Cosine(small),
        lambda small: sd.Discrete.linear(2, small, small),
        lambda small: sd.Discrete.sigmoid(2, span=small),
        lambda small: sd.Discrete.cosine(2, max_beta=small),
        lambda small: sd.Discrete.constant(2, alpha=small),
        lambda small: sd.models.Preconditioned(small),
        lambda small: sd.losses.EDMWeight(small),
        lambda small: sd.losses.MinSNR(small),
        lambda small: sd.losses.Huber(small),
        lambda small: sd.Ancestral(eta=small),
        lambda small: sd.Adams(1, p=small),
        lambda small: sd.TorchODE(rtol=small, atol=small, max_calls=1),
        lambda small: sd.samplers.ScipyODE(rtol=small, atol=small, max_calls=1),
        lambda small: sd.AdaptiveSDE(small, small, max_calls=1),
    ],
)
def test_every_positive_number_is_as_good_as_the_next(make):
    """Ranges are open at 0, and 2^-20 is not 0."""
    assert make(2.0**-20) != make(2.0**-10)
