"""Predictions: every conversion inverts, and what is undefined is refused by name."""

import pytest
import torch
from cases import PARAMETERIZATIONS, PROCESSES
from oracles import normal
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.models.prediction import Prediction, truth

QUANTITIES = ("x0", "eps", "score", "v", "velocity")


def made_from_truth(process, parameterization, t, dtype):
    """A true (x0, eps), and the prediction of a network that puts out the right thing."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator).to(dtype)
    level = process.levels(torch.tensor([t], dtype=torch.float64))[0]
    right = truth(x0, eps, level)
    x = process.perturb(x0, level, eps)
    return right, sd.models.Prediction(x, parameterization.target(right), level, parameterization)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_conversion_inverts(process, name, dtype, bound):
    """Where alpha and sigma are both over 0.1, so that no division magnifies rounding over 10 x."""
    for t in (0.2, 0.3, 0.4):
        right, made = made_from_truth(process, PARAMETERIZATIONS[name], t, dtype)
        for quantity in QUANTITIES:
            expected = getattr(right, quantity)
            scale = float(expected.abs().max())
            assert_close(getattr(made, quantity), expected, rtol=0, atol=bound * scale)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_target_of_a_prediction_is_the_networks_output(name):
    _, made = made_from_truth(sd.VP(), PARAMETERIZATIONS[name], 0.3, torch.float64)
    output = PARAMETERIZATIONS[name].target(made)
    assert_close(output, made.second, rtol=1e-14, atol=1e-14)


def test_quantities_are_the_published_combinations():
    right, _ = made_from_truth(sd.VP(), sd.Eps(), 0.3, torch.float64)
    alpha, sigma = right.level.alpha, right.level.sigma
    x0, eps = right.x0, right.eps
    assert_close(right.score, -eps / sigma)  # Song et al. 2021
    assert_close(right.v, alpha * eps - sigma * x0)  # Salimans & Ho 2022
    assert_close(right.velocity, eps - x0)


def test_velocity_is_the_slope_of_the_straight_frame():
    """y = x / (alpha + sigma) = (1 - u) x0 + u eps, so a difference quotient is exact."""
    process, (x0, eps) = sd.VP(), normal(2, 4)
    a, b = process.levels(torch.tensor([0.31, 0.3]))
    y = [process.perturb(x0, level, eps) / (level.alpha + level.sigma) for level in (a, b)]
    assert_close((y[0] - y[1]) / (a.u - b.u), truth(x0, eps, a).velocity, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_tensor_levels_agree_with_float_levels(name):
    parameterization = PARAMETERIZATIONS[name]
    right, made = made_from_truth(sd.VP(), parameterization, 0.3, torch.float64)
    level = sd.VP().level(torch.full((5,), 0.3, dtype=torch.float64), right.x0)
    batched = sd.models.Prediction(made.first, made.second, level, parameterization)
    for quantity in QUANTITIES:
        assert_close(getattr(batched, quantity), getattr(made, quantity), rtol=1e-12, atol=1e-12)


def ends(process, t, parameterization):
    level = process.levels(torch.tensor([t], dtype=torch.float64))[0]
    return sd.models.Prediction(torch.ones(1), torch.ones(1), level, parameterization)


def test_eps_and_score_refuse_to_say_x0_where_there_is_no_signal():
    for parameterization in (sd.Eps(), sd.Score()):
        with pytest.raises(ValueError, match="alpha = 0"):
            _ = ends(sd.RectifiedFlow(), 1.0, parameterization).x0
        batch = sd.RectifiedFlow().level(torch.tensor([0.5, 1.0]), torch.zeros(2, 1))
        made = sd.models.Prediction(torch.ones(2, 1), torch.ones(2, 1), batch, parameterization)
        with pytest.raises(ValueError, match="alpha = 0"):
            _ = made.x0
    for parameterization in (sd.V(), sd.X0(), sd.Velocity(), sd.models.Preconditioned()):
        assert ends(sd.RectifiedFlow(), 1.0, parameterization).x0.isfinite().all()
        assert ends(sd.RectifiedFlow(), 1.0, parameterization).eps.isfinite().all()


def test_the_score_is_refused_where_there_is_no_noise_and_nothing_else_is():
    for parameterization in PARAMETERIZATIONS.values():
        made = ends(sd.VP(), 0.0, parameterization)
        with pytest.raises(ValueError, match="sigma = 0"):
            _ = made.score
        for quantity in ("x0", "eps", "v", "velocity"):
            assert getattr(made, quantity).isfinite().all()


def test_no_quantity_changes_the_tensors_it_is_made_from():
    _, made = made_from_truth(sd.VP(), sd.V(), 0.3, torch.float64)
    x, out = made.first.clone(), made.second.clone()
    for quantity in QUANTITIES:
        getattr(made, quantity).add_(1)  # a sampler may work in place on what it gets
    assert torch.equal(made.first, x)
    assert torch.equal(made.second, out)


# ---- preconditioning -------------------------------------------------------------------------


def test_karras_preconditioning_is_table_1_of_the_paper():
    """c_skip, c_out and c_in of Karras et al. 2022, where alpha = 1."""
    data = 0.5
    for level in sd.EDM().levels(torch.tensor([0.0, 1e-4, 0.01, 0.3, 1.0], dtype=torch.float64)):
        sigma = level.sigma
        skip = data**2 / (sigma**2 + data**2)
        out = sigma * data / (sigma**2 + data**2) ** 0.5
        assert sd.models.Preconditioned(data).x0(level) == pytest.approx((skip, out), rel=1e-14)
        scale = sd.models.Preconditioned(data).input_scale(level)
        assert scale == pytest.approx((sigma**2 + data**2) ** -0.5, rel=1e-14)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_karras_input_and_target_have_unit_variance_at_every_level(process):
    """For data of standard deviation s: Var(c_in x), and Var(F) = E[(x0 - c_skip x)^2] / c_out^2,
    from the coefficients of (x0, eps), which are independent."""
    data = 0.7
    karras = sd.models.Preconditioned(data)
    for level in process.levels(torch.tensor([1e-4, 0.2, 0.7, 1.0], dtype=torch.float64)):
        scale = karras.input_scale(level)
        assert (scale * level.alpha * data) ** 2 + (scale * level.sigma) ** 2 == pytest.approx(1)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        of_x0 = float(karras.target(truth(one, zero, level)))
        of_eps = float(karras.target(truth(zero, one, level)))
        assert (of_x0 * data) ** 2 + of_eps**2 == pytest.approx(1, rel=1e-12)


def test_karras_of_unit_data_on_a_variance_preserving_process_is_minus_v():
    right, _ = made_from_truth(sd.VP(), sd.Eps(), 0.4, torch.float64)
    assert_close(sd.models.Preconditioned(1.0).target(right), -right.v, rtol=1e-12, atol=1e-14)


def test_a_network_sees_its_input_scaled():
    class Seen(torch.nn.Module):
        def forward(self, x, c):
            self.x, self.c = x, c
            return torch.zeros_like(x)

    network = Seen()
    model = sd.Denoiser(network, sd.EDM(), sd.models.Preconditioned(0.5), sd.models.CNoise())
    level = sd.EDM().levels(torch.tensor([0.1], dtype=torch.float64))[0]
    x = torch.full((3, 2), 9.0, dtype=torch.float64)
    made = model(x, level)
    assert_close(network.x, x / (8.0**2 + 0.5**2) ** 0.5)
    assert_close(network.c, torch.full((3,), 8.0, dtype=torch.float64).log() / 4)
    assert_close(made.x0, x * 0.25 / 64.25)  # c_skip x, since the network says 0
    batch = sd.EDM().level(torch.tensor([0.1], dtype=torch.float64).expand(3), x)
    assert_close(model(x, batch).x0, made.x0)


# ---- what a network may answer -----------------------------------------------------------------


class Answers(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x, c):
        return torch.arange(torch.Size(self.shape).numel(), dtype=x.dtype).reshape(self.shape)


def test_the_second_half_of_doubled_channels_is_extra():
    x, level = torch.ones(2, 3, 4), sd.VP().levels(torch.tensor([0.5]))[0]
    made = sd.Denoiser(Answers(2, 6, 4), sd.VP())(x, level)
    out = torch.arange(48.0).reshape(2, 6, 4)
    assert torch.equal(made.eps, out[:, :3])
    assert torch.equal(made.extra, out[:, 3:])
    assert sd.Denoiser(Answers(2, 3, 4), sd.VP())(x, level).extra is None


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 4), (1, 3, 4), (2, 3)])
def test_a_network_that_answers_with_another_shape_is_refused_by_name(shape):
    x, level = torch.ones(2, 3, 4), sd.VP().levels(torch.tensor([0.5]))[0]
    with pytest.raises(ValueError, match=r"must be shaped like x, \(2, 3, 4\)"):
        sd.Denoiser(Answers(*shape), sd.VP())(x, level)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sd.models.Preconditioned(0.0),
        lambda: sd.models.Preconditioned(-1),
        lambda: sd.models.Preconditioned(float("nan")),
    ],
)
def test_data_without_spread_are_refused(make):
    with pytest.raises(ValueError, match="sigma_data must lie in"):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_alpha_whose_inverse_overflows_is_named_as_alpha_0_is(dtype):
    """1 / 8e-40 is above the largest float32, in which float16 is computed, too."""
    process = sd.VP(beta_max=360.0)
    x = torch.ones(2, 3, dtype=dtype)
    (level,) = process.levels(torch.tensor([1.0]))
    for meaning in (sd.Eps(), sd.Score()):
        with pytest.raises(ValueError, match=r"overflows torch.float32 at alpha = 8e-40"):
            _ = Prediction(x, x, level, meaning).x0
        with pytest.raises(ValueError, match="not defined at alpha = 0"):
            _ = Prediction(x, x, process.level(1.0, x), meaning).x0
        wide = Prediction(x.double(), x.double(), level, meaning).x0
        assert bool(wide.isfinite().all())
    for meaning in (sd.V(), sd.X0(), sd.Velocity()):
        assert bool(Prediction(x, x, level, meaning).x0.isfinite().all())
