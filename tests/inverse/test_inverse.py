"""Methods that use a measurement: exact where they promise it, one call a step."""

import math

import pytest
import torch
from cases import FIXED_STEP, PROCESSES
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.inverse import least_squares
from sde_diffusion.inverse.corrections import (
    BackpropCorrection,
    Differentiable,
    PosteriorMeanCorrection,
)
from sde_diffusion.inverse.measurements import LogLikelihood, Measurement
from sde_diffusion.inverse.methods import DPS, MMPS, DiffPIR, Kalman, PiGDM
from sde_diffusion.inverse.operators import Mask, Matrix
from sde_diffusion.models import derivatives
from sde_diffusion.models.model import select


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN, VARIANCE, NOISE = drawn(3, seed=4), 0.6, 0.3
MATRIX, Y = drawn(2, 3, seed=1), drawn(1, 2, seed=2)
MEASURED = Measurement(Matrix(MATRIX), NOISE, Y)


def data(process):
    return sd.exact.Gaussian(process, MEAN, VARIANCE)


def level_of(process, t):
    return process.levels(torch.tensor([t], dtype=torch.float64))[0]


class Calls:
    """A model that counts how often it is asked."""

    def __init__(self, model):
        self.model, self.process, self.count = model, model.process, 0

    def __call__(self, x, level):
        self.count += 1
        return self.model(x, level)


@pytest.mark.parametrize("process", PROCESSES)
def test_pigdm_is_the_model_of_the_posterior_on_gaussian_data(process):
    """For N(m, v I), any A: the posterior's own x0 and eps, at every level, per sample too."""
    process = PROCESSES[process]
    guided = PiGDM(data(process), MEASURED, variance=VARIANCE)
    exact = data(process).given(MATRIX, Y[0], NOISE)
    x = drawn(4, 3) * process.prior_std
    for t in (1.0, 0.95, 0.5, 0.1, 0.01):
        level = level_of(process, t)
        made, expected = guided(x, level), exact(x, level)
        assert_close(made.x0, expected.x0, rtol=1e-9, atol=1e-9)
        assert_close(made.eps, expected.eps, rtol=1e-9, atol=1e-9)
    level = process.level(torch.tensor([0.1, 1.0, 0.4, 0.2], dtype=torch.float64), x)
    assert_close(guided(x, level).x0, exact(x, level).x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FIXED_STEP)
def test_pigdm_with_any_sampler_has_the_samplers_own_law_on_the_posterior(name):
    """Bit for bit but for rounding what the sampler makes of the posterior's model."""
    sampler, x = FIXED_STEP[name], drawn(4, 3)
    guided = Calls(data(sd.VP()))
    made = sd.sample(
        PiGDM(guided, MEASURED, variance=VARIANCE), sampler, x, steps=6, seeds=range(4)
    )
    exact = Calls(data(sd.VP()).given(MATRIX, Y[0], NOISE))
    expected = sd.sample(exact, sampler, x, steps=6, seeds=range(4))
    assert_close(made, expected, rtol=0, atol=1e-8)
    assert guided.count == exact.count


@pytest.mark.parametrize("process", [sd.RectifiedFlow(), sd.Cosine(),
                                     sd.Discrete.linear(50).zero_terminal_snr()])  # fmt: skip
@pytest.mark.parametrize("sampler", [sd.Heun(), sd.Adams(), sd.AdaptiveODE()])
def test_pigdm_is_exact_from_where_there_is_no_signal_too(process, sampler):
    x, steps = drawn(4, 3), None if isinstance(sampler, sd.AdaptiveODE) else 6
    guided = PiGDM(data(process), MEASURED, variance=VARIANCE)
    exact = data(process).given(MATRIX, Y[0], NOISE)
    made, expected = (
        sd.sample(model, sampler, x, steps=steps, seeds=range(4)) for model in (guided, exact)
    )
    assert_close(made, expected, rtol=0, atol=1e-8)


ROOT = drawn(3, 3, seed=7) / 2
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(3).double()
FRAME = sd.grids.frames.GaussianFrame.of(MEAN, COVARIANCE)


def correlated(process):
    return sd.exact.Gaussian(process, MEAN, COVARIANCE)


OF_COVARIANCE = {
    "covariance": lambda model, given: Kalman(model, given, model),
    "frame": lambda model, given: Kalman(model, given, FRAME),
    "model": MMPS,
}


@pytest.mark.parametrize("method", OF_COVARIANCE)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_known_covariance_gives_the_model_of_the_posterior_of_any_gaussian(process, method):
    """For N(m, S), where PiGDM is wrong: the x0 and eps of the posterior, per sample too."""
    process = PROCESSES[process]
    guided = OF_COVARIANCE[method](correlated(process), MEASURED)
    exact = correlated(process).given(MATRIX, Y[0], NOISE)
    x = drawn(4, 3) * process.prior_std
    for t in (0.95, 0.5, 0.1, 0.01):
        level = level_of(process, t)
        made, expected = guided(x, level), exact(x, level)
        assert_close(made.x0, expected.x0, rtol=1e-9, atol=1e-9)
        assert_close(made.eps, expected.eps, rtol=1e-9, atol=1e-9)
    level = level_of(process, 0.5)
    off = PiGDM(correlated(process), MEASURED)(x, level).x0 - exact(x, level).x0
    assert off.abs().max() > 0.01
    level = process.level(torch.tensor([0.1, 0.9, 0.4, 0.2], dtype=torch.float64), x)
    assert_close(guided(x, level).x0, exact(x, level).x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", OF_COVARIANCE)
def test_a_known_covariance_is_exact_without_noise_too(method):
    """E[x0 | x, A x0 = y] = mean + C A^T (A C A^T)^-1 (y - A mean), C = Cov[x0 | x]."""
    given, x = Measurement(Matrix(MATRIX), 0.0, Y), drawn(4, 3)
    for t in (0.95, 0.5, 0.01):
        level, eye = level_of(sd.VP(), t), torch.eye(3).double()
        a, s = level.alpha, level.sigma
        cov = s**2 * COVARIANCE @ torch.linalg.inv(a**2 * COVARIANCE + s**2 * eye)
        mean = correlated(sd.VP())(x, level).x0
        gain = cov @ MATRIX.T @ torch.linalg.inv(MATRIX @ cov @ MATRIX.T)
        made = OF_COVARIANCE[method](correlated(sd.VP()), given)(x, level).x0
        assert_close(made, mean + (Y - mean @ MATRIX.T) @ gain.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", OF_COVARIANCE)
def test_contradictions_without_noise_are_met_in_the_mean(method):
    """Two equal rows of A with different y: the nearest A x0, the mean of both."""
    matrix, y = MATRIX[[0, 0, 1]], drawn(1, 3, seed=2)
    model = correlated(sd.VP())
    level, x = level_of(sd.VP(), 0.4), drawn(4, 3)
    made = OF_COVARIANCE[method](model, Measurement(Matrix(matrix), 0.0, y))(x, level).x0
    met = torch.stack([y[0, :2].mean(), y[0, 2]])[None]
    wanted = OF_COVARIANCE[method](model, Measurement(Matrix(MATRIX), 0.0, met))(x, level).x0
    assert_close(made, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("process", [sd.RectifiedFlow(), sd.Cosine()])
def test_the_ends_of_a_path_are_exact_with_a_known_covariance(process):
    """At alpha = 0 x0 is the posterior's mean; MMPS knows v I there. At sigma = 0 x0 is x."""
    exact, x = correlated(process).given(MATRIX, Y[0], NOISE), drawn(4, 3)
    for method in ("covariance", "frame"):
        guided = OF_COVARIANCE[method](correlated(process), MEASURED)
        made = guided(x, level_of(process, 1.0)).x0
        assert_close(made, exact(x, level_of(process, 1.0)).x0, rtol=1e-9, atol=1e-9)
    isotropic = sd.exact.Gaussian(process, MEAN, VARIANCE)
    made = MMPS(isotropic, MEASURED, variance=VARIANCE)(x, level_of(process, 1.0)).x0
    law = isotropic.given(MATRIX, Y[0], NOISE)
    assert_close(made, law(x, level_of(process, 1.0)).x0, rtol=1e-9, atol=1e-9)
    for method in OF_COVARIANCE.values():
        for noise_std in (0.0, NOISE):
            given = Measurement(Matrix(MATRIX), noise_std, Y)
            made = method(correlated(process), given)(x, level_of(process, 0.0))
            assert_close(made.x0, x, rtol=0, atol=1e-12)


def test_moment_matching_has_the_covariance_of_a_mixture():
    """E[x0 | x, y] for x0 given x ~ N(mean, C), with C of x0 given x by sums over the mixture."""
    mixture = sd.exact.GaussianMixture(sd.VP(), [0.4, 0.6], drawn(2, 3, seed=2), [0.1, 0.3])
    level, x = level_of(sd.VP(), 0.4), drawn(4, 3)
    a, s = level.alpha, level.sigma
    for k in range(4):
        law = mixture.given(a * torch.eye(3).double(), x[k], s)  # x0 given x
        weights = law.log_weights.exp()
        mean = weights @ law.means
        off = law.means - mean
        cov = torch.einsum("k,kij->ij", weights, law.covariances)
        cov = cov + torch.einsum("k,ki,kj->ij", weights, off, off)
        whole = MATRIX @ cov @ MATRIX.T + NOISE**2 * torch.eye(2).double()
        wanted = mean + cov @ MATRIX.T @ torch.linalg.solve(whole, Y[0] - MATRIX @ mean)
        assert_close(MMPS(mixture, MEASURED)(x, level).x0[k], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [PiGDM, DiffPIR, MMPS])
@pytest.mark.parametrize("sampler", [sd.AdaptiveODE(), sd.AdaptiveSDE()])
def test_a_mask_of_each_sample_goes_with_it(sampler, method):
    """Solvers that ask about a part of the batch: each row as it is alone."""
    mask = torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    model, x, seen = data(sd.VP()), drawn(4, 3), mask * drawn(4, 3, seed=8)

    def solved(rows):
        given = Measurement(Mask(mask[rows]), NOISE, seen[rows])
        return sd.sample(method(model, given), sampler, x[rows], seeds=rows)

    alone = torch.cat([solved([k]) for k in range(4)])
    assert_close(solved([0, 1, 2, 3]), alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", [PiGDM, DiffPIR, MMPS])
def test_noise_of_each_sample_goes_with_it(method):
    """Solvers that evaluate a part of the batch: each row as it is alone, with a number."""
    model, x, y, noise = data(sd.VP()), drawn(4, 3), drawn(4, 2), [0.05, 0.3, 1.0, 0.0]

    def solved(rows, noise_std):
        given = Measurement(Matrix(MATRIX), noise_std, y[rows])
        return sd.sample(method(model, given), sd.AdaptiveODE(), x[rows], seeds=rows)

    alone = torch.cat([solved([k], noise[k]) for k in range(4)])
    together = solved([0, 1, 2, 3], torch.tensor(noise, dtype=torch.float64))
    assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*(do not fit y|4 particles)")  # in four steps
@pytest.mark.parametrize("method", ["PiGDM", "DiffPIR", "DPS", "SMC", "to mean", "by classifier"])
def test_derivatives_are_found_in_inference_mode_too(method):
    model, chain, cost = data(sd.VP()), sd.Ancestral(), MEASURED.cost

    def log_prob(x, level, y):
        return -(x - y).square().sum(1)

    made_by = {
        "PiGDM": (PiGDM(model, MEASURED), chain),
        "DiffPIR": (DiffPIR(model, MEASURED), chain),
        "DPS": (model, DPS(chain, MEASURED, 0.1)),
        "SMC": (model, sd.inverse.SMC(MEASURED, 4)),
        "to mean": (model, PosteriorMeanCorrection(chain, cost, 0.1)),
        "by classifier": (sd.models.ClassifierGuided(model, log_prob, drawn(4, 3)), chain),
    }[method]

    def sampled():
        x = model.process.prior((4, 3), seeds=range(4), dtype=torch.float64)
        return sd.sample(*made_by, x, steps=4, seeds=range(4))

    with torch.inference_mode():
        within = sampled().clone()
    assert_close(within, sampled(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [sd.Heun(), sd.AdaptiveODE()])
@pytest.mark.parametrize("kind", ["mask", "matrix", "function", "classifier"])
def test_what_is_made_in_inference_mode_serves_too(kind, sampler):
    steps = None if isinstance(sampler, sd.AdaptiveODE) else 4
    model = data(sd.VP())

    def sampled():
        matrix, mask, y = MATRIX.clone(), torch.tensor([1.0, 0, 1]).double(), drawn(4, 3)
        guided = {
            "mask": lambda: PiGDM(model, Measurement(Mask(mask), 0.0, y)),
            "matrix": lambda: DiffPIR(model, Measurement(Matrix(matrix), 0.1, y[:, :2].clone())),
            "function": lambda: PiGDM(model, LogLikelihood(lambda x0, y: (x0 * y).sum(1), y)),
            "classifier": lambda: sd.models.ClassifierGuided(
                model, lambda x, _, y: (x * y).sum(1), y
            ),
        }[kind]()
        return sd.sample(guided, sampler, drawn(4, 3, seed=5), steps=steps, seeds=range(4))

    with torch.inference_mode():
        within = sampled().clone()
    assert_close(within, sampled(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_where_there_is_no_noise_left_nothing_is_moved(noise_std):
    """At sigma = 0 x0 is known: x itself, whatever was measured."""
    given = Measurement(Matrix(MATRIX), noise_std, Y)
    for process in (sd.VP(), sd.RectifiedFlow()):
        x = drawn(4, 3)
        made = PiGDM(data(process), given, variance=VARIANCE)(x, level_of(process, 0.0))
        assert_close(made.x0, x, rtol=0, atol=1e-12)
        assert made.eps.isfinite().all()


def test_a_likelihood_says_what_a_measurement_says():
    """PiGDM on log p(y | x0) given as a function is the score form of DPS."""
    model, x, level = data(sd.VP()), drawn(4, 3), level_of(sd.VP(), 0.5)
    function = LogLikelihood(lambda x0, y: -((y - x0 @ MATRIX.T) ** 2).sum(1) / (2 * NOISE**2), Y)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(MEASURED.log_likelihood(model(z, level).x0).sum(), z)
    made = PiGDM(model, function, scale=0.7)(x, level).score
    assert_close(made, model(x, level).score + 0.7 * gradient, rtol=1e-10, atol=1e-10)
    assert_close(function.cost(x), -MEASURED.log_likelihood(x))


def test_evidence_of_spread_data_is_that_of_gaussians():
    """log N(y; A x0, spread A A^T + noise^2 I), but for a constant, and its gradient."""
    x0 = drawn(5, 3)
    value, gradient = MEASURED.spread_likelihood(x0, 0.4)
    law = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), 0.4 * MATRIX @ MATRIX.T + NOISE**2 * torch.eye(2).double()
    )
    z = x0.clone().requires_grad_()
    expected = law.log_prob(Y - z @ MATRIX.T)
    assert_close(value - value[0], (expected - expected[0]).detach(), rtol=1e-10, atol=1e-10)
    assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0], rtol=1e-10, atol=1e-10)


def test_an_operator_that_is_not_linear_is_linearized_at_x0():
    def bent(x0):
        return torch.tanh(x0 @ MATRIX.T)

    x0 = drawn(2, 3)
    _, gradient = Measurement(bent, NOISE, Y).spread_likelihood(x0, 0.4)
    for k in range(2):
        slope = torch.autograd.functional.jacobian(lambda z: bent(z[None])[0], x0[k])
        whole = 0.4 * slope @ slope.T + NOISE**2 * torch.eye(2).double()
        expected = slope.T @ torch.linalg.solve(whole, Y[0] - bent(x0[k : k + 1])[0])
        assert_close(gradient[k], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise_std", [0.0, 0.2])
@pytest.mark.parametrize("process", PROCESSES)
def test_diffpir_solves_its_proximal_problem(process, noise_std):
    process = PROCESSES[process]
    model, x, lam = data(process), drawn(4, 3) * process.prior_std, 1.7
    guided = DiffPIR(model, Measurement(Matrix(MATRIX), noise_std, Y), lam)
    for t in (0.9, 0.5, 0.05):
        level = level_of(process, t)
        made, x0 = guided(x, level), model(x, level).x0
        assert_close(level.alpha * made.x0 + level.sigma * made.eps, x, rtol=1e-9, atol=1e-9)
        if not noise_std:
            assert_close(made.x0 @ MATRIX.T, Y.expand(4, 2), rtol=0, atol=1e-10)
            continue
        z = made.x0.clone().requires_grad_()
        weight = lam * level.alpha**2 / level.sigma**2
        objective = (Y - z @ MATRIX.T).square().sum() / noise_std**2
        objective = objective + weight * (z - x0).square().sum()
        (gradient,) = torch.autograd.grad(objective, z)
        size = 2 * float(((Y - x0 @ MATRIX.T) @ MATRIX).abs().max()) / noise_std**2
        assert gradient.abs().max() < 1e-9 * size


@pytest.mark.parametrize("name", FIXED_STEP)
def test_dps_corrects_each_step_by_the_gradient_through_the_model(name):
    """x_s - scale d|y - A x0_hat(x)| / dx at the x of the step's first call; no call is added."""
    sampler, model, x = FIXED_STEP[name], Calls(data(sd.VP())), drawn(4, 3)
    t, s = level_of(sd.VP(), 0.6), level_of(sd.VP(), 0.5)

    def noise(t, s, like):
        return drawn(*like.shape, seed=int(1000 * s))

    plain, _ = sampler.step(model, x, t, s, noise, None)
    calls, model.count = model.count, 0
    made, memory = DPS(sampler, MEASURED, 0.3).step(model, x, t, s, noise, None)
    assert model.count == calls
    assert memory is None
    if name.startswith("churn"):  # whose first call is higher up
        return
    z = x.clone().requires_grad_()
    cost = (Y - model(z, t).x0 @ MATRIX.T).norm(dim=1)
    (gradient,) = torch.autograd.grad(cost.sum(), z)
    assert_close(made, plain - 0.3 * gradient, rtol=0, atol=1e-12)


def test_corrections_leave_no_graph_behind():
    made = sd.sample(data(sd.VP()), DPS(sd.Ancestral(), MEASURED), drawn(4, 3), steps=30)
    assert not made.requires_grad
    assert not PiGDM(data(sd.VP()), MEASURED)(drawn(4, 3), level_of(sd.VP(), 0.5)).x0.requires_grad


def test_rows_take_their_measurements_with_them():
    model, level, x = data(sd.VP()), level_of(sd.VP(), 0.4), drawn(4, 3)
    each, index = Measurement(Matrix(MATRIX), NOISE, drawn(4, 2)), torch.tensor([3, 1])
    for guided in (PiGDM(model, each), DiffPIR(model, each)):
        part = select(guided, index, x.ndim)(x[index], level).x0
        assert_close(part, guided(x, level).x0[index], rtol=0, atol=1e-12)


def rounded(x0):
    return (4 * x0 @ MATRIX.T).round() / 4


WEIGHT = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))  # of an operator that is trained


@pytest.mark.parametrize("operator", [
    rounded, lambda x0: torch.sign(x0 @ MATRIX.T), lambda x0: (x0[:, :2] > 0).to(x0),
    lambda x0: (x0 @ MATRIX.T).detach(), lambda x0: WEIGHT * rounded(x0),
    lambda x0: rounded(WEIGHT.sum() * x0),
])  # fmt: skip
@pytest.mark.parametrize("method", ["PiGDM", "DiffPIR", "DPS", "SMC", "MMPS", "likelihood"])
def test_an_operator_without_a_derivative_is_refused_by_every_method(method, operator):
    """Its J^T v is 0 whatever v is; DPS would return the unguided sample."""
    model, chain, given = data(sd.VP()), sd.Ancestral(), Measurement(operator, NOISE, Y)
    function = LogLikelihood(lambda x0, y: -(operator(x0) - y).square().sum(1), Y)
    args = {
        "PiGDM": lambda: (PiGDM(model, given), chain),
        "DiffPIR": lambda: (DiffPIR(model, given), chain),
        "DPS": lambda: (model, DPS(chain, given)),
        "SMC": lambda: (model, sd.inverse.SMC(given, 4)),
        "MMPS": lambda: (MMPS(model, given), chain),
        "likelihood": lambda: (model, DPS(chain, function)),
    }[method]()
    with pytest.raises(ValueError, match="must be differentiable; got one without derivatives"):
        sd.sample(*args, drawn(4, 3), steps=4)


def test_a_cost_without_a_derivative_is_refused():
    for route in (BackpropCorrection, PosteriorMeanCorrection):
        rule = route(sd.Heun(), lambda x0: (rounded(x0) - Y).norm(dim=1))
        with pytest.raises(ValueError, match="cost must be differentiable"):
            sd.sample(data(sd.VP()), rule, drawn(4, 3), steps=4)


def test_a_classifier_without_a_derivative_is_refused():
    guided = sd.models.ClassifierGuided(
        data(sd.VP()), lambda x, level, y: -(rounded(x) - y).square().sum(1), Y
    )
    with pytest.raises(ValueError, match="log_prob must be differentiable"):
        sd.sample(guided, sd.Heun(), drawn(4, 3), steps=4)


class Once(torch.autograd.Function):
    """x^2, with a derivative that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, v):
        return 2 * ctx.saved_tensors[0] * v


@pytest.mark.filterwarnings("ignore:.*do not fit y")
def test_an_operator_that_is_differentiable_once_serves_dps():
    given = Measurement(Once.apply, NOISE, drawn(1, 3))
    made = sd.sample(data(sd.VP()), DPS(sd.Ancestral(), given), drawn(4, 3), steps=4)
    assert made.isfinite().all()
    likely = LogLikelihood(lambda x0, y: -Once.apply(x0 - y).sum(1), drawn(1, 3))
    assert sd.sample(PiGDM(data(sd.VP()), likely), sd.Heun(), drawn(4, 3), steps=4).isfinite().all()


def magnitudes(x0):
    """|FFT| of a signal: phase retrieval."""
    return torch.fft.fft(x0, n=2 * x0.shape[1]).abs()


def test_samples_that_do_not_fit_y_are_named_with_residual_and_noise():
    """The root mean square of y - A x0 is above 2 noise_std + 1 % of y."""
    model = sd.exact.Gaussian(sd.VP(), torch.zeros(32).double(), 1.0)
    y = magnitudes(drawn(1, 32, seed=6))
    given = Measurement(magnitudes, 0.05, y)
    with pytest.warns(RuntimeWarning, match=r"of 3 samples do not fit y") as found:
        made = sd.sample(PiGDM(model, given), sd.Ancestral(), drawn(3, 32), steps=10)
    residual = (y - magnitudes(made)).square().mean(1).sqrt()
    assert residual.max() > 0.1 + 0.01 * y.square().mean().sqrt()
    assert len(found) == 1
    text = str(found[0].message)
    assert f"{float(residual.max()):.3g} (root mean square) at row {int(residual.argmax())}" in text
    assert "for noise_std 0.05" in text
    assert found[0].filename == __file__


def test_samples_of_the_posterior_fit_y():
    """|r| / noise_std is below max(2 sqrt(m), sqrt(m) + 4.5) for m standard normals, all 20,000."""
    for d in (1, 2, 8, 64):
        x = drawn(20_000, d)
        y = x + 0.3 * drawn(20_000, d, seed=1)
        Measurement(torch.nn.Identity(), 0.3, y).after_run(x)
        with pytest.warns(RuntimeWarning, match="do not fit"):  # noise_std is 6.5 times too small
            Measurement(torch.nn.Identity(), 0.3 / 6.5, y).after_run(x)


def test_half_precision_is_compared_in_single():
    """100,000 squares of order 1 overflow float16."""
    x = drawn(2, 100_000)
    y = x + 0.3 * drawn(2, 100_000, seed=1)
    Measurement(torch.nn.Identity(), 0.3, y.half()).after_run(x.half())
    with pytest.warns(RuntimeWarning, match="do not fit"):
        Measurement(torch.nn.Identity(), 0.1, y.half()).after_run(x.half())
    Measurement(torch.nn.Identity(), 0.1, y.half()).check_linear(x.half(), "DiffPIR")


RATE = 20.0


def poisson(x0, y):
    rate = RATE * torch.nn.functional.softplus(x0)
    return (y * rate.log() - rate).sum(1)


def test_samples_that_do_not_fit_a_likelihood_are_named():
    """On average over y the square of the slope is the curvature (Bartlett's second identity): of
    400 counts within 4.5 of its standard deviations, for samples of the law of the data."""
    x = drawn(50, 400) / 2
    counts = torch.poisson(
        RATE * torch.nn.functional.softplus(x), generator=torch.Generator().manual_seed(3)
    )
    given = LogLikelihood(poisson, counts)
    given.after_run(x)
    with pytest.warns(
        RuntimeWarning, match=r"50 of 50 samples do not fit y: the slope of log_prob"
    ):
        given.after_run(x + 0.5 * drawn(50, 400, seed=5))
    model = sd.exact.Gaussian(sd.VP(), torch.zeros(400).double(), 0.25)
    given = LogLikelihood(lambda x0, y: 20 * poisson(x0, y), counts[:1])
    with pytest.warns(RuntimeWarning, match="do not fit y"):
        sd.sample(PiGDM(model, given), sd.Heun(), drawn(2, 400), steps=8)


@pytest.mark.parametrize("operator", [
    magnitudes, torch.tanh, torch.abs, lambda x0: x0.clamp(-1, 1), lambda x0: x0 + 0.1 * x0**2,
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_method_for_linear_operators_refuses_others_and_takes_affine_ones(operator, dtype):
    model, x = sd.exact.Gaussian(sd.VP(), torch.zeros(8), 1.0), drawn(2, 8).to(dtype)
    given = Measurement(operator, 0.1, operator(x))
    with pytest.raises(ValueError, match="operator must be linear for DiffPIR"):
        sd.sample(DiffPIR(model, given), sd.Heun(), x, steps=4)
    affine = Measurement(lambda x0: 3 - x0.flip(1), 0.1, x)
    assert sd.sample(DiffPIR(model, affine), sd.Heun(), x, steps=20).isfinite().all()


@pytest.mark.parametrize(("call", "says"), [
    (lambda: Measurement(Matrix(MATRIX), -0.1, Y), "noise_std"),
    (lambda: Measurement(Matrix(MATRIX), math.nan, Y), "noise_std"),
    (lambda: Measurement(Matrix(MATRIX), 0.1, Y * math.nan), "y must be finite"),
    (lambda: Measurement(3, 0.1, Y), "operator"),
    (lambda: Measurement(Matrix(MATRIX), 0.1, drawn(1, 3)).cost(drawn(4, 3)), "y must be shaped"),
    (lambda: Measurement(Matrix(MATRIX), 0.1, drawn(2, 2)).cost(drawn(4, 3)), "y must be shaped"),
    (lambda: Measurement(Mask(torch.tensor([1.0, 0, 0])), 0.0, drawn(4, 3))
     .log_likelihood(drawn(4, 3)), "above 0"),
    (lambda: LogLikelihood(lambda x0, y: x0, Y).log_likelihood(drawn(4, 3)), "shape"),
    (lambda: PiGDM(data(sd.VP()), MEASURED, math.nan), "scale"),
    (lambda: PiGDM(data(sd.VP()), MEASURED, variance=0.0), "variance"),
    (lambda: DiffPIR(data(sd.VP()), MEASURED, 0.0), "lam"),
    (lambda: MMPS(data(sd.VP()), MEASURED, 0), "rounds"),
    (lambda: MMPS(data(sd.VP()), LogLikelihood(lambda x0, y: x0.sum(1), Y)), "a Measurement"),
    (lambda: Kalman(data(sd.VP()), MEASURED, COVARIANCE), "an exact.Gaussian or GaussianFrame"),
    (lambda: sd.sample(
        Kalman(data(sd.VP()), MEASURED, sd.exact.Gaussian(sd.VP(), torch.zeros(5), 1.0)),
        sd.Heun(), drawn(4, 3), steps=2), r"samples of shape \(5,\)"),
    (lambda: DPS(sd.Ancestral(), MEASURED, math.inf), "scale"),
    (lambda: BackpropCorrection(sd.Ancestral, MEASURED.cost), "sampler"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_a_model_without_derivatives_is_refused():
    class Stone(Calls):
        @torch.no_grad()
        def __call__(self, x, level):
            return super().__call__(x, level)

    with pytest.raises(ValueError, match="no derivative"):
        PiGDM(Stone(data(sd.VP())), MEASURED)(drawn(4, 3), level_of(sd.VP(), 0.5))


# ---- derivatives ---------------------------------------------------------------------------------


def network_of_three():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sd.networks.MLP((3,), width=16, depth=2).double()


def log_prob(x, level, y):
    """A smooth classifier, bounded so that its guidance does not diverge."""
    off = (x @ MATRIX.T - y).square().sum(1)
    return -0.3 * off.log1p() * (1 + x.tanh().square().sum(1))


NET = sd.Denoiser(network_of_three(), sd.VP(), sd.V())
GUIDED = {
    "classifier": sd.models.ClassifierGuided(NET, log_prob, Y),
    "pigdm": PiGDM(NET, MEASURED),
    "pigdm without noise": PiGDM(NET, Measurement(Matrix(MATRIX), 0.0, Y)),
    "pigdm of a likelihood": PiGDM(NET, LogLikelihood(lambda x0, y: log_prob(x0, None, y), Y)),
    "diffpir": DiffPIR(NET, MEASURED),
    "kalman": Kalman(NET, MEASURED, sd.exact.Gaussian(sd.VP(), torch.zeros(3), 0.1 + torch.eye(3))),
    "diffpir of a classifier": DiffPIR(sd.models.ClassifierGuided(NET, log_prob, Y), MEASURED),
    "classifier of pigdm": sd.models.ClassifierGuided(PiGDM(NET, MEASURED), log_prob, Y),
    "on another process": sd.match(sd.models.ClassifierGuided(NET, log_prob, Y), sd.EDM()),
}
CORRECTED = {
    "dps": DPS(sd.Heun(), MEASURED, 0.3),
    "posterior mean": PosteriorMeanCorrection(sd.Heun(), MEASURED.cost, 0.3),
}


@pytest.mark.filterwarnings("ignore:.*do not fit y")  # in 3 steps
@pytest.mark.parametrize("small", [4096, 0])
@pytest.mark.parametrize("name", GUIDED | CORRECTED)
def test_derivatives_go_through_guidance(name, small, monkeypatch):
    """By x and by the weights, against central differences; `small` selects the linear solver."""
    monkeypatch.setattr(least_squares, "SMALL", small)
    model, sampler = GUIDED.get(name, NET), CORRECTED.get(name, sd.Heun())
    x, w = drawn(4, 3, seed=5), next(NET.network.parameters())
    ways, pull, h = (drawn(4, 3, seed=6), drawn(*w.shape, seed=7)), drawn(4, 3, seed=8), 1e-5

    def value(e):
        before = w.detach().clone()
        with torch.no_grad():
            w.add_(ways[1], alpha=e)
            made = sd.sample(model, sampler, x + e * ways[0], steps=3)
            w.copy_(before)
        return float((made * pull).sum())

    expected = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    slopes = []
    for grad in (True, "checkpoint"):
        x.requires_grad_()
        made = sd.sample(model, sampler, x, steps=3, grad=grad)
        parts = torch.autograd.grad((made * pull).sum(), (x, w))
        slopes.append(sum(float((a * b).sum()) for a, b in zip(parts, ways, strict=True)))
        x.requires_grad_(False)
    assert slopes[0] == pytest.approx(expected, rel=1e-6)
    assert slopes[1] == slopes[0]


KNOWN = sd.exact.Gaussian(sd.VP(), torch.zeros(3), 0.1 + torch.eye(3))


@pytest.mark.parametrize("inner", [PiGDM(NET, MEASURED), Kalman(NET, MEASURED, KNOWN),
                                   MMPS(NET, MEASURED)])  # fmt: skip
@pytest.mark.parametrize(
    "method", [lambda m: PiGDM(m, MEASURED), lambda m: Kalman(m, MEASURED, KNOWN)]
)
def test_a_variance_of_one_measurement_is_not_used_for_two(inner, method):
    """Kalman in Kalman gave the mean (1.66, -1.34) for (1.83, -1.32) of two measurements."""
    with pytest.raises(ValueError, match="model must not be conditioned on other evidence"):
        method(inner)


@pytest.mark.parametrize("of_noise", [True, False])
@pytest.mark.parametrize("method", [
    lambda m: PiGDM(NET, m), lambda m: DiffPIR(NET, m), lambda m: Kalman(NET, m, KNOWN),
])  # fmt: skip
def test_no_gradient_by_an_operator_or_its_noise_is_dropped(method, of_noise):
    """The solution of least squares is differentiated by y and x0 only: -.59 came for -.86."""
    weight = torch.tensor(1.0, requires_grad=not of_noise)
    noise = torch.full((4,), 0.5).requires_grad_(of_noise)
    model = method(Measurement(lambda x0: weight * x0, noise, torch.ones(1, 3)))
    with pytest.raises(ValueError, match=r"(operator|noise_std) must not require a gradient"):
        sd.sample(model, sd.Heun(), drawn(4, 3), steps=2, grad=True)


def test_moment_matching_has_no_derivative():
    with pytest.raises(ValueError, match="grad must be False for MMPS, which has no derivative"):
        sd.sample(MMPS(NET, MEASURED), sd.Heun(), drawn(4, 3), steps=2, grad=True)


@pytest.mark.filterwarnings("ignore:.*do not fit y")  # in 2 steps
def test_the_solution_of_a_nonlinear_operator_is_not_differentiated():
    model = PiGDM(NET, Measurement(lambda x0: x0.square(), 0.3, drawn(1, 3)))
    made = sd.sample(model, sd.Heun(), drawn(4, 3), steps=2, grad=True)
    with pytest.raises(ValueError, match="operator must be linear"):
        made.sum().backward()


def test_a_correction_sees_the_derivative_of_a_guided_model():
    """DPS through a classifier: its gradient holds the second derivative of log p(y | x)."""
    base, level = data(sd.VP()), level_of(sd.VP(), 0.5)
    guided, x = sd.models.ClassifierGuided(base, log_prob, Y), drawn(4, 3).requires_grad_()
    (expected,) = torch.autograd.grad(MEASURED.cost(guided(x, level).x0).sum(), x)
    with torch.no_grad():
        at = Differentiable.of(guided, x, level)
        _, pull = derivatives.gradient("cost", MEASURED.cost, at.x0)
        assert_close(at.back(pull), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["classifier", "pigdm", "diffpir", "on another process"])
def test_pigdm_refuses_a_model_with_other_evidence(name):
    """Two measurements of correlated coordinates: no single variance is right."""
    with pytest.raises(ValueError, match="model must not be conditioned on other evidence"):
        PiGDM(GUIDED[name], MEASURED)


def test_two_measurements_in_one_operator_have_the_exact_posterior():
    """x_1 = 2 and x_1 + x_2 = .5, noise .1, of N((1, -1), .25 I): by Bayes' rule in closed form."""
    matrix = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    y, mean = torch.tensor([[2.0, 0.5]], dtype=torch.float64), torch.tensor([1.0, -1.0]).double()
    both = Measurement(Matrix(matrix), 0.1, y)
    model = PiGDM(sd.exact.Gaussian(sd.VP(), mean, 0.25), both, variance=0.25)
    precision = 4 * torch.eye(2).double() + 100 * matrix.T @ matrix
    exact = torch.linalg.solve(precision, 4 * mean + 100 * matrix.T @ y[0])
    x = sd.prior(model, (4000, 2), seeds=range(4000), dtype=torch.float64)
    made = sd.sample(model, sd.Adams(), x, steps=40)
    std = precision.inverse().diagonal().sqrt()
    bias = float(sd.VP().alpha(1.0)) * exact.abs() * std  # the prior has mean 0, not alpha m
    assert ((made.mean(0) - exact).abs() < 4.5 * std / 4000**0.5 + bias + 1e-4).all()
    assert ((made.std(0) / std - 1).abs() < 4.5 / 8000**0.5 + 1e-3).all()
