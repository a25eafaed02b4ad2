"""What promises to hold for anything: any chain, process, shape, type, layout, grid and seed.

Each test is named after the promise and bounds its error by a count of roundings, which its
docstring gives. EPS is float64's, u stands for the eps of the type at hand.
"""

import itertools
import math

import mpmath
import numpy as np
import pytest
import strategies as draws
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from oracles import EPS, ddim_moments, ddpm_moments
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.models.prediction import truth

TINY = np.finfo(np.float64).tiny

every_process = draws.for_every("processes", draws.PROCESSES)
every_sampler = draws.for_every("samplers", draws.SAMPLERS)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- tables ------------------------------------------------------------------------------------


def exact_chain(betas):
    """alpha and sigma^2 at i = 0 .. N with 40 digits: the kernels, multiplied out one by one.

    sigma_i^2 = (1 - beta_i) sigma_(i-1)^2 + beta_i has no difference in it that could cancel.
    """
    with mpmath.workdps(40):
        abar, variance = [mpmath.mpf(1)], [mpmath.mpf(0)]
        for beta in map(mpmath.mpf, betas):
            abar.append(abar[-1] * (1 - beta))
            variance.append(variance[-1] * (1 - beta) + beta)
        return [mpmath.sqrt(a) for a in abar], variance


@given(draws.betas())
def test_tables_are_the_products_of_their_kernels(betas):
    """rel 1e-9: a sum of N logarithms rounds by N eps / 2 of it, 2000 x 1.1e-16 x 708 = 1.6e-10 at
    the smallest float64. A float32 time i/N is off by 2^-24 of it, so by i 2^-24 of an interval,
    and log alpha by that share of its fall over the interval on either side. A rate is a difference
    of two such sums, times N."""
    chain, n = sd.Discrete(betas), len(betas)
    alpha, variance = (np.array(column, dtype=np.float64) for column in exact_chain(betas))
    t = torch.arange(n + 1, dtype=torch.float64) / n
    assert_close(chain.alpha(t).numpy(), alpha, rtol=1e-9, atol=TINY)
    assert_close(chain.variance(t).numpy(), variance, rtol=1e-9, atol=0)
    assert_close(chain.sigma(t).numpy(), np.sqrt(variance), rtol=1e-9, atol=0)
    fall = -np.log1p(-np.array(betas[: n - (betas[-1] == 1)]))
    near = np.zeros(n + 1)
    near[: len(fall)] = fall
    near[1 : len(fall) + 1] = np.maximum(near[1 : len(fall) + 1], fall)
    bound = (1e-6 + 2.0**-24 * np.arange(n + 1) * near) * alpha + np.finfo(np.float32).tiny
    assert (np.abs(chain.alpha(t.float()).double().numpy() - alpha) <= bound).all()
    within = t[1 : len(fall) + 1]  # at a node the rate is that of the interval below
    rounding = 4 * EPS * n * fall.sum()
    assert_close(chain.diffusion(within).numpy() ** 2, n * fall, rtol=1e-9, atol=rounding)


@given(draws.betas(high=1 - 1e-12))
def test_a_chain_is_the_exact_discretization_of_the_sde_through_it(betas):
    """beta_i is told by log alpha's difference over one step, in which rounding of the whole sum
    stays, and of i/N, up to N eps / 2 of an interval. A beta that drowns there may be refused."""
    fall = -np.log1p(-np.array([beta for beta in betas if beta < 1]))
    lost = 2 * EPS * (fall.sum() + len(betas) * fall.max(initial=0.0))
    between, reason = sd.processes.interpolate(sd.Discrete(betas)), ""
    try:
        chain = sd.processes.discretize(between, len(betas), rule="exact")
    except ValueError as error:
        chain, reason = sd.Discrete(betas), str(error)
    drowned = reason.startswith(("betas must lie in (0, 1)", "process must have a log_snr that"))
    assert reason == "" or (min(betas) <= lost and drowned)
    assert (np.abs(np.array(chain.betas) - np.array(betas)) <= 1e-10 * np.array(betas) + lost).all()


@given(draws.betas(low=1e-6, high=0.9, max_steps=300, terminal=False))
def test_zero_terminal_snr_is_the_line_through_the_ends_of_lin_et_al(betas):
    """sqrt(abar_i) -> (sqrt(abar_i) - sqrt(abar_N)) sqrt(abar_1) / (sqrt(abar_1) - sqrt(abar_N)):
    differences of numbers off by N eps. The result is kept as betas: 1 - beta_j, which is off by
    eps / 2, gives alpha_j, and all that follow, eps / (4 (1 - beta_j)) of theirs."""
    chain, n = sd.Discrete(betas), len(betas)
    if n == 1:
        draws.refused(chain.zero_terminal_snr, "1 step")
        return
    alpha = np.array(exact_chain(betas)[0][1:], dtype=np.float64)
    assume(alpha[-2] - alpha[-1] > 1e-9 * alpha[0])  # less has no digits left
    scale = alpha[0] / (alpha[0] - alpha[-1])
    line = (alpha - alpha[-1]) * scale
    made = chain.zero_terminal_snr()
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    kept = np.cumsum(np.append(1.0, (line[:-2] / line[1:-1]) ** 2))
    bound = 8 * n * EPS * (1 + scale) * alpha[0] + EPS * np.append(kept * line[:-1], 0.0)
    assert (np.abs(made.alpha(t).numpy() - line) <= bound).all()
    assert made.betas[-1] == 1
    assert float(made.alpha(1.0)) == 0


# ---- kernels -----------------------------------------------------------------------------------


def published_sde(process, t):
    """Drift and squared diffusion of dx = f x dt + g dW as printed, at any parameters."""
    match process:
        case sd.VP(beta_min=low, beta_max=high):  # Song et al. 2021, eq. 11, 32
            beta = low + t * (high - low)
            return -beta / 2, beta
        case sd.SubVP(beta_min=low, beta_max=high):  # eq. 12
            beta, integral = low + t * (high - low), low * t + (high - low) * t**2 / 2
            return -beta / 2, beta * -math.expm1(-2 * integral)
        case sd.OU(rate=rate):
            return -rate, 2 * rate
        case sd.Cosine(s=s):  # Nichol & Dhariwal 2021, eq. 17
            rate = math.tan(math.pi / 2 * (t + s) / (1 + s)) * math.pi / 2 / (1 + s)
            return -rate, 2 * rate
        case sd.RectifiedFlow():
            return -1 / (1 - t), 2 * t / (1 - t)
        case sd.VE(sigma_min=low, sigma_max=high):  # Song et al. 2021, eq. 9
            return 0.0, low**2 * (high / low) ** (2 * t) * 2 * math.log(high / low)
        case sd.EDM(sigma_max=high):  # Karras et al. 2022: g^2 = 2 sigma sigma'
            return 0.0, 2 * high**2 * t


PUBLISHED = {kind.__name__: strategy for kind, strategy in draws.PARAMETERS.items()}


@draws.for_every("processes", PUBLISHED)
def test_kernels_solve_the_published_sde_at_any_parameters(processes, data):
    """rel 1e-10. Of g^2 = (sigma^2)' - 2 f sigma^2 neither term is negative, so nothing cancels;
    near a pole at t = 1 a rate is told to eps / (1 - t), 2e-13 at t_max."""
    process = data.draw(processes)
    t = data.draw(draws.times(last=process.t_max))
    drift, diffusion2 = published_sde(process, t)
    assert float(process.drift(t)) == pytest.approx(drift, rel=1e-10)
    assert float(process.diffusion(t)) ** 2 == pytest.approx(diffusion2, rel=1e-10)


@every_process
def test_kernels_compose(processes, data):
    """Chapman-Kolmogorov:  a_st = a_rt a_sr,  b_st^2 = b_rt^2 + a_rt^2 b_sr^2,  rel 1e-10.

    From data, s = 0, the kernel is the marginal. A chain's log a and its
    kernel's variance are differences of log alpha and sigma^2, of which some eps are lost.
    """
    process = data.draw(processes)
    time = st.one_of(st.just(0.0), draws.times(last=1 - 1e-9))
    split = data.draw(st.sets(time, min_size=3, max_size=3))
    s, r, t = (torch.tensor(time, dtype=torch.float64) for time in sorted(split))
    log_alpha, variance = float(process.log_alpha(t)), float(process.variance(t))
    lost = 0 if type(process) in draws.PARAMETERS else 16 * EPS * (variance - log_alpha)
    (a1, b1), (a2, b2), (a, b) = (process.transition(*pair) for pair in ((s, r), (r, t), (s, t)))
    assert_close(a2 * a1, a, rtol=1e-10 + 16 * EPS * -log_alpha, atol=0)
    assert_close(b2**2 + a2**2 * b1**2, b**2, rtol=1e-10, atol=lost)
    assert 0 <= a <= 1
    assert b >= 0
    a, b = process.transition(0.0, t)
    assert_close(a, process.alpha(t), rtol=1e-12 + 16 * EPS * -log_alpha, atol=0)
    assert_close(b, process.sigma(t), rtol=1e-10, atol=lost)


@every_process
def test_levels_are_finite_and_the_log_snr_falls(processes, data):
    """On the whole path; drift and diffusion up to t_max, and nan beyond, where they are not."""
    process = data.draw(processes)
    grid = data.draw(draws.grids())
    levels = process.levels(double(*grid))
    rates = (rate.tolist() for rate in process.rates(double(*grid)))
    for level, f, g2 in zip(levels, *rates, strict=True):
        assert 0 <= level.alpha <= 1
        assert 0 <= level.sigma < math.inf
        assert not math.isnan(level.log_snr)
        defined = level.t <= process.t_max
        assert math.isfinite(f) == math.isfinite(g2) == defined
        if defined:
            assert f <= 0 <= g2
    for later, earlier in itertools.pairwise(levels):
        slack = 8 * EPS * (1 + abs(earlier.log_snr)) if math.isfinite(earlier.log_snr) else 0
        assert later.log_snr <= earlier.log_snr + slack


@every_process
def test_time_inverts_the_log_snr(processes, data):
    """In log-SNR, which a time of some eps too much changes by as many eps t of its slope; it is a
    difference of 2 log alpha and log sigma^2, and of the log alpha that they come from."""
    process = data.draw(processes)
    t = data.draw(draws.times(last=1 - 1e-5))
    before, at, after = (float(process.log_snr(t * (1 + h))) for h in (-1e-6, 0.0, 1e-6))
    again = float(process.log_snr(process.time(at)))
    log_alpha = -float(process.log_alpha(torch.tensor(t, dtype=torch.float64)))
    told = 1 + abs(at) + log_alpha + log_alpha / float(process.sigma(t)) ** 2
    assert abs(again - at) <= 64 * EPS * (told + (before - after) / 1e-6)


@every_sampler
def test_own_grids_decrease_from_noise_to_data(samplers, data):
    process, sampler = data.draw(draws.processes()), data.draw(samplers)
    steps = None
    if not sampler.claims.adaptive:
        steps = data.draw(st.integers(1, min(60, draws.most_steps(process, sampler))))
    times = sampler.grid(process, steps)
    assert times.dtype == torch.float64
    assert len(times) == (steps or 1) + 1
    assert times[-1] == 0
    assert bool((times.diff() < 0).all())
    if draws.steps_in_t(sampler):
        assert times[0] <= process.t_max
    else:
        assert times[0] == 1


# ---- conversions -------------------------------------------------------------------------------

# Where a type tells alpha, sigma and their squares, and 1 / alpha and 1 / sigma.
RANGES = {
    torch.float64: (1e-70, 1e70),
    torch.float32: (1e-9, 1e9),
    torch.bfloat16: (1e-9, 1e9),
    torch.float16: (0.1, 10),
}


def output(meaning, alpha, sigma):
    """(p, q) of the output p x0 + q eps: the table of docs/notation.md."""
    match meaning:
        case sd.Eps():
            return 0.0, 1.0
        case sd.X0():
            return 1.0, 0.0
        case sd.V():
            return -sigma, alpha
        case sd.Score():
            return 0.0, -1 / sigma
        case sd.Velocity():
            return -1.0, 1.0
        case sd.models.Preconditioned(sigma_data=r):
            root = r * math.sqrt(alpha**2 * r**2 + sigma**2)
            return sigma / root, -alpha * r**2 / root


@every_process
def test_conversions_round_trip(processes, data):
    """(x, out) = M (x0, eps), and back: M^-1 takes a few u of M's entries to, at most, as many u of
    |M^-1| |M| (|x0|, |eps|) (Skeel's condition number, which is large only near alpha = 0 or
    sigma = 0). 16 u for some 12 roundings: 4e-15 in float64, 2e-6 in float32."""
    process = data.draw(processes)
    x0 = data.draw(draws.batches())
    eps = data.draw(draws.batches(shape=x0.shape, dtypes=[x0.dtype]))
    t = data.draw(draws.times())
    (level,) = process.levels(double(t))
    alpha, sigma = level.alpha, level.sigma
    low, high = RANGES[x0.dtype]
    assume(low < alpha and low < sigma < high)
    if data.draw(st.booleans(), label="one level per sample"):
        level = process.level(double(t).expand(len(x0)), x0)
    x = process.perturb(x0, level, eps)
    quantities = {
        "x0": (1, 0), "eps": (0, 1), "score": (0, -1 / sigma), "v": (-sigma, alpha),
        "velocity": (-1, 1),
    }  # fmt: skip
    u, smallest = torch.finfo(x0.dtype).eps, torch.finfo(x0.dtype).tiny
    for meaning in data.draw(draws.PARAMETERIZATIONS):
        made = sd.models.Prediction(x, meaning.target(truth(x0, eps, level)), level, meaning)
        p, q = output(meaning, alpha, sigma)
        inverse = np.array([[q, -sigma], [-p, alpha]]) / (alpha * q - sigma * p)
        there_and_back = np.abs(inverse) @ np.abs([[alpha, sigma], [p, q]])
        for name, (a, b) in quantities.items():
            of_x0, of_eps = np.abs([a, b]) @ there_and_back
            right = a * x0.double() + b * eps.double()
            bound = 16 * u * (of_x0 * x0.double().abs() + of_eps * eps.double().abs())
            quantity = getattr(made, name)
            assert quantity.dtype == x0.dtype
            off = (quantity.double() - right).abs()
            assert bool((off <= bound + smallest).all()), (meaning, name)


@every_process
def test_what_has_no_value_at_an_end_is_refused_and_all_else_is_finite(processes, data):
    """The score at sigma = 0; x0, and what holds it, from eps or the score at alpha = 0."""
    process, t = data.draw(processes), data.draw(st.sampled_from([0.0, 1.0]))
    x = data.draw(draws.batches(dtypes=draws.FULL))
    (level,) = process.levels(double(t))
    silent = level.alpha == 0
    assume(silent or level.alpha > 1e-30)
    if data.draw(st.booleans(), label="one level per sample"):
        assume(len(x))  # of no samples none is at the end
        level = process.level(double(t).expand(len(x)), x)
    for meaning in data.draw(draws.PARAMETERIZATIONS):
        made = sd.models.Prediction(x, torch.ones_like(x), level, meaning)
        of_noise = type(meaning) in (sd.Eps, sd.Score)
        for name in ("x0", "eps", "score", "v", "velocity"):
            if name == "score" and t == 0:
                draws.refused(lambda made=made: made.score, "sigma = 0")
            elif silent and of_noise and name in ("x0", "v", "velocity"):
                draws.refused(lambda made=made, name=name: getattr(made, name), "alpha = 0")
            else:
                assert bool(getattr(made, name).isfinite().all())


# ---- q(x_(i-1) | x_i, x_0) ---------------------------------------------------------------------


@given(st.data())
def test_q_posterior_is_bayes_theorem(data):
    """N(sqrt(before) x_0, v) times N(x_i; sqrt(1 - beta) x_(i-1), beta): precisions add.

    rel 1e-10 of each term; sqrt(before), of N factors, is off by N eps of its logarithm.
    """
    betas = data.draw(draws.betas(low=1e-150).filter(draws.falling))
    x0 = data.draw(draws.batches())
    x = data.draw(draws.batches(shape=x0.shape, dtypes=[x0.dtype]))
    n = len(betas)
    per_sample = data.draw(st.booleans(), label="one index per sample")
    index = st.integers(1, n)
    i = data.draw(st.lists(index, min_size=len(x), max_size=len(x)) if per_sample else index)
    rows = []
    root, variance = exact_chain(betas)
    with mpmath.workdps(40):
        for j in i if per_sample else [i]:
            beta, v = mpmath.mpf(betas[j - 1]), variance[j - 1]
            total = beta + (1 - beta) * v
            row = (beta * root[j - 1], v * mpmath.sqrt(1 - beta), v * beta)
            log = float(mpmath.log(root[j - 1])) if root[j - 1] else 0.0
            rows.append([*(float(term / total) for term in row), 1e-10 - n * EPS * log])
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    shape = (-1, *[1] * (x.ndim - 1)) if per_sample else ()
    of_x0, of_x, var, rel = (column.reshape(shape) for column in table.T)
    model = sd.DDPM(sd.exact.Gaussian(sd.Discrete(betas)))
    index = torch.tensor(i, dtype=torch.long) if per_sample else i
    mean, spread = model.q_posterior(x0, x, index)
    u, smallest = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    terms = of_x0 * x0.double(), of_x * x.double()
    bound = (rel + 4 * u) * (terms[0].abs() + terms[1].abs()) + 4 * smallest
    assert mean.dtype == x.dtype
    assert mean.shape == x.shape
    assert bool(((mean.double() - terms[0] - terms[1]).abs() <= bound).all())
    assert bool(((spread.double() - var).abs() <= (rel + u) * var + smallest).all())


# ---- the ancestral chain -----------------------------------------------------------------------

DATA = st.tuples(st.floats(-2, 2), draws.powers(-3, 1))  # mean and variance


def one_dimensional(process, mean, variance):
    return sd.exact.Gaussian(process, double(mean), variance)


def same_moments(law, expected, mean):
    """rel 1e-8 in the variance; the mean is a sum of terms of order |mean|, of either sign, which
    underflow where that is 1e-300."""
    assert float(law.covariance) == pytest.approx(expected[1], rel=1e-8)
    assert float(law.mean) == pytest.approx(expected[0], rel=1e-8, abs=1e-8 * abs(mean) + 1e-300)


@given(draws.betas(max_steps=60, low=1e-4, high=0.999, terminal=False), DATA, st.booleans())
@example(tuple(np.linspace(1e-4, 0.06, 300).tolist()), (1.0, 0.25), True)
def test_ancestral_chain_has_the_moments_of_ho_et_al(betas, data, posterior):
    kind, (mean, variance) = "posterior" if posterior else "beta", data
    model = one_dimensional(sd.Discrete(betas), mean, variance)
    law = sd.verify.law(sd.Ancestral(kind), model, steps=len(betas))
    same_moments(law, ddpm_moments(betas, mean, variance, kind), mean)


# Where abar_N > 1e-8: the recursion's x0 is a difference over sqrt(abar), off by 1e-16 / 1e-4.
VISIBLE = st.one_of(
    draws.betas(max_steps=4, low=1e-4, high=0.99, terminal=False),
    draws.betas(max_steps=40, low=1e-4, high=0.35, terminal=False),
    draws.betas(max_steps=2000, low=1e-5, high=9e-3, terminal=False),
)


@given(VISIBLE, DATA, st.floats(0, 1), st.data())
def test_any_sub_grid_of_the_chain_has_the_moments_of_ddim(betas, gaussian, eta, data):
    """From any index down to any other. "beta" there is Ho et al.'s chain with fewer, larger betas,
    which ends at data."""
    indices = data.draw(draws.sub_chains(len(betas)))
    (mean, variance), chain = gaussian, sd.Discrete(betas)
    abar = np.concatenate([[1.0], np.cumprod(1 - np.array(betas))])[indices[::-1]]
    model = one_dimensional(chain, mean, variance)
    times = [i / len(betas) for i in indices]
    law = sd.verify.law(sd.Ancestral(eta=eta), model, times=times)
    same_moments(law, ddim_moments(abar, mean, variance, eta), mean)
    if indices[-1] == 0:
        law = sd.verify.law(sd.Ancestral("beta"), model, times=times)
        same_moments(law, ddpm_moments(1 - abar[1:] / abar[:-1], mean, variance, "beta"), mean)
