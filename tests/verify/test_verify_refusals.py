"""What `verify` refuses: samplers without a Gaussian law, by name and place; bad arguments."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import sde_diffusion as sd
from sde_diffusion import verify

DATA = sd.exact.Gaussian(sd.VP(), torch.tensor([0.7], dtype=torch.float64), 0.25)
PLANE = sd.exact.Gaussian(sd.VP(), torch.tensor([0.7, -0.4], dtype=torch.float64), 0.25)
MIXTURE = sd.exact.GaussianMixture(sd.VP(), [0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
STEPS = 8


@dataclass(frozen=True)
class Planted(sd.Ancestral):
    """DDIM that puts its x0, or its state, through a function in one step."""

    at: int = 0
    x0: Callable | None = None
    state: Callable | None = None
    fresh_eps: bool = False

    def step(self, model, x, t, s, noise, memory):
        index = memory or 0
        prediction = model(x, t)
        x0, eps = prediction.x0, prediction.eps
        if index == self.at and self.x0 is not None:
            x0 = self.x0(x0)
            eps = (x - t.alpha * x0) / t.sigma if self.fresh_eps else eps
        x = s.alpha * x0 + s.sigma * eps
        if index == self.at and self.state is not None:
            x = self.state(x)
        return x, index + 1


def test_the_planted_sampler_is_ddim_where_nothing_is_planted():
    ours, ddim = (
        verify.law(sampler, DATA, steps=STEPS) for sampler in (Planted(), sd.Ancestral(eta=0.0))
    )
    assert float(ours.mean) == pytest.approx(float(ddim.mean), rel=1e-12)
    assert float(ours.covariance) == pytest.approx(float(ddim.covariance), rel=1e-12)


# ---- no Gaussian law --------------------------------------------------------------------------


@pytest.mark.parametrize("fresh_eps", [False, True], ids=["eps kept", "eps recomputed"])
@pytest.mark.parametrize("limit", [1, 10, 50])
@pytest.mark.parametrize("at", range(STEPS))
def test_an_x0_clipped_at_up_to_50_in_any_one_step_is_refused_at_the_next_state(
    limit, at, fresh_eps
):
    sampler = Planted(at=at, x0=lambda x0: x0.clamp(-limit, limit), fresh_eps=fresh_eps)
    place = f"in call {at + 2} of {STEPS}" if at < STEPS - 1 else "in the samples it ends with"
    with pytest.raises(verify.NotAffine, match=f"Planted.*not affine on Gaussian, first {place}"):
        verify.law(sampler, DATA, steps=STEPS)


def own_quantile(x0):
    """Saharia et al. 2022 (Imagen), sec. 2.3: each sample by its own percentile of |x0|."""
    size = x0.abs().quantile(0.995, dim=1, keepdim=True).clamp(min=1)
    return x0.clamp(-size, size) / size


def batch_quantile(x0):
    size = x0.abs().quantile(0.9).clamp(min=1)
    return x0.clamp(-size, size)


def batch_norm(x):
    return x - 0.01 * x.mean(0, keepdim=True)


def by_row(x):
    return x * (1 + 1e-6 * torch.arange(len(x), dtype=x.dtype)[:, None])


class Remembers:
    """A state that is kept between calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + 1e-6 * self.calls


def numpy_noise():
    source = np.random.default_rng(0)
    return lambda x: x + 0.1 * torch.from_numpy(source.standard_normal(x.shape))


def reseeded_noise(x):
    """As a tree of numpy seeds: the same in every run, but by the place in the batch."""
    return x + 0.1 * torch.from_numpy(np.random.default_rng(0).standard_normal(x.shape))


MATES = "depends on its batch mates"
TWICE = "two runs on the same start and noise differ"
PLANTS = {
    "threshold": ({"x0": own_quantile}, "not affine on Gaussian"),
    "batch quantile": ({"x0": batch_quantile}, MATES),
    "batch norm": ({"state": batch_norm}, MATES),
    "order of the batch": ({"state": by_row}, MATES),
    "numpy": ({"state": numpy_noise()}, TWICE),
    "numpy, seeded in the step": ({"state": reseeded_noise}, MATES),
    "hidden state": ({"state": Remembers()}, TWICE),
    "nan": ({"state": lambda x: x * math.nan}, "not finite"),
    "inf": ({"state": lambda x: x / 0}, "not finite"),
    "sign": ({"state": torch.abs}, "not affine on Gaussian"),
    "float16": ({"state": lambda x: x.half().double()}, "not affine on Gaussian"),
}


@pytest.mark.parametrize("at", [0, 4, STEPS - 1])
@pytest.mark.parametrize("name", PLANTS)
def test_what_couples_remembers_draws_or_bends_is_refused_by_name_and_place(name, at):
    plant, reason = PLANTS[name]
    place = f"in call {at + 2} of {STEPS}" if at < STEPS - 1 else "in the samples it ends with"
    with pytest.raises(verify.NotAffine, match=f"Planted.*{reason}.*first {place}"):
        verify.law(Planted(at=at, **plant), PLANE, steps=STEPS)


@pytest.mark.parametrize(
    "sampler",
    [sd.TorchODE(), sd.samplers.ScipyODE(), sd.AdaptiveSDE()],
    ids=lambda s: type(s).__name__,
)
def test_solvers_with_steps_of_their_own_are_refused_with_the_check_to_use(sampler):
    for check in (verify.law, verify.certificate, verify.order, verify.limit, verify.local_order):
        with pytest.raises(verify.NotAffine, match=f"{type(sampler).__name__}.*own steps.*bias"):
            check(sampler, DATA)


def test_a_path_of_torchsdes_own_is_refused_by_name():
    with pytest.raises(ValueError, match=r"must be left out for TorchSDE.*drawn by torchsde"):
        verify.law(sd.samplers.TorchSDE("srk"), DATA, steps=4)


@pytest.mark.parametrize("sampler", [sd.Adams(), sd.Ancestral(), sd.EulerMaruyama()])
def test_data_that_are_no_gaussian_are_refused_by_name(sampler):
    with pytest.raises(verify.NotAffine, match="not affine on GaussianMixture, first in call 2"):
        verify.law(sampler, MIXTURE, steps=20)


def test_a_mixture_of_one_component_is_a_gaussian():
    one = sd.exact.GaussianMixture(sd.VP(), [1.0], [[0.7]], [0.25])
    laws = [verify.law(sd.Heun(), data, steps=6) for data in (one, DATA)]
    assert torch.equal(laws[0].covariance, laws[1].covariance)
    with pytest.raises(TypeError, match="mean, covariance"):  # it has no mean and covariance
        laws[0].w2()


# ---- bad arguments ----------------------------------------------------------------------------

ARGUMENTS = {
    "sampler": lambda: verify.law(sd.Heun, DATA, steps=3),
    "data": lambda: verify.law(sd.Heun(), "x", steps=3),
    "steps": lambda: verify.law(sd.Heun(), DATA, steps=0),
    "times must be given alone": lambda: verify.law(sd.Heun(), DATA, times=[1.0, 0.0], steps=3),
    "x must have samples of shape (1,)": lambda: verify.law(sd.Heun(), DATA, steps=3, shape=(3,)),
    "leave out process": lambda: verify.law(
        sd.Heun(), sd.Denoiser(sd.networks.MLP((1,), width=8), sd.VP()), sd.VE(), steps=3
    ),
    "sizes must hold 2": lambda: verify.order(sd.Heun(), DATA, sizes=(3,)),
    "each entry of sizes": lambda: verify.order(sd.Heun(), DATA, sizes=["a"]),
    "growing": lambda: verify.order(sd.Heun(), DATA, sizes=(8, 4)),
    "declared": lambda: verify.order(sd.Heun(), DATA, sizes=(3, 4), declared=-1),
    "no mean, covariance": lambda: verify.order(sd.Heun(), one_component(), sizes=(3, 4)),
    "a function of the number of steps": lambda: verify.order(None, DATA),
    "what the function makes": lambda: verify.order(lambda n: n, DATA),
    "spans must": lambda: verify.local_order(sd.Heun(), DATA, spans=(0.1, 0.2)),
    "each of spans": lambda: verify.local_order(sd.Heun(), DATA, spans=(0.1, -0.1)),
    "each of ratios": lambda: verify.local_order(sd.Heun(), DATA, ratios=(0.0,)),
    "start": lambda: verify.local_order(sd.Heun(), DATA, start=1.5),
    "do not fit between": lambda: verify.local_order(sd.Heun(), DATA, start=0.1, spans=(0.2, 0.1)),
    "sizes must hold 4": lambda: verify.limit(sd.Heun(), DATA, sizes=(4, 8, 16)),
    "sizes must double": lambda: verify.limit(sd.Heun(), DATA, sizes=(4, 8, 16, 20)),
    "floor": lambda: verify.limit(sd.Heun(), DATA, sizes=(4, 8, 16, 32), floor=-1),
    "sampler, endpoint": lambda: verify.endpoint(None, DATA, steps=3),
    "data, endpoint": lambda: verify.endpoint(sd.Heun(), None, steps=3),
    "samples": lambda: verify.endpoint(sd.Heun(), DATA, steps=3, samples=1),
    "draws noise": lambda: verify.endpoint(sd.Ancestral(), DATA, steps=3),
    "samples, distribution": lambda: verify.distribution(sd.Heun(), DATA, steps=3, samples=1),
    "seed": lambda: verify.distribution(sd.Heun(), DATA, steps=3, samples=16, seed=-1),
    "solver": lambda: verify.tolerances(sd.Heun(), DATA),
    "rtol": lambda: verify.tolerances(sd.TorchODE(), DATA, values=(0,)),
    "data, bias": lambda: verify.bias(sd.Heun(), MIXTURE, steps=3),
    "samples, bias": lambda: verify.bias(sd.EulerMaruyama(), DATA, samples=1, steps=3),
    "times must decrease": lambda: verify.flow(DATA, torch.zeros(2, 1).double(), t=0.2, s=0.8),
    "times must lie": lambda: verify.flow(DATA, torch.zeros(2, 1).double(), t=2),
    "function": lambda: verify.Function(3),
    "start must lie": lambda: verify.Function(one_call, start=2.0),
    "steps must be left out": lambda: verify.law(verify.Function(one_call), DATA, steps=3),
    "must return a tensor": lambda: verify.law(verify.Function(lambda e, x: 3), DATA),
    "function, k-diffusion": lambda: verify.KDiffusion(3, [1, 0]),
    "sigmas": lambda: verify.KDiffusion(len, [0, 1]),
    "scheduler": lambda: verify.Diffusers(3, 4),
    "sampler, azula": lambda: verify.Azula(3),
}


def one_call(eps, x):
    return x - eps(x, 1.0)


def one_component():
    return sd.exact.GaussianMixture(sd.VP(), [1.0], [[0.7]], [0.25])


@pytest.mark.parametrize("named", ARGUMENTS)
def test_a_bad_argument_is_one_line_that_names_it(named):
    refused(ARGUMENTS[named], named.split(",")[0] if named[-1] != "e" else named)


def refused(call, word):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert word in str(error.value)
    assert "\n" not in str(error.value)


MORE = {
    "process": lambda: verify.law(sd.Heun(), DATA, "vp", steps=3),
    "shape": lambda: verify.law(sd.Heun(), DATA, steps=3, shape="3"),
    "sizes": lambda: verify.order(sd.Heun(), DATA, sizes=3),
    "sizes must": lambda: verify.certificate(sd.Heun(), DATA, sizes=(4, 8, 16)),
    "ratios": lambda: verify.local_order(sd.Heun(), DATA, ratios=()),
    "first": lambda: verify.identities(None, sd.Heun(), DATA, steps=3),
    "tolerance": lambda: verify.identities(sd.Heun(), sd.Heun(), DATA, steps=3, tolerance="x"),
    "values": lambda: verify.tolerances(sd.TorchODE(), DATA, values=()),
    "noise must be left out": lambda: verify.tolerances(
        sd.AdaptiveSDE(), DATA, values=(1e-1,), samples=2
    ),
    "data": lambda: verify.flow(None, torch.zeros(2, 1).double()),
    "x must": lambda: verify.flow(DATA, "x"),
    "start": lambda: verify.Function(one_call, start="a"),
    "end": lambda: verify.law(verify.Function(one_call, start=0.2, end=0.8), DATA),
    "function": lambda: verify.law(verify.Function(lambda eps, x: x), DATA),
    "mean must be a tensor": lambda: verify.law(sd.Heun(), DATA, steps=3).w2(0.7, 0.25),
    "positive definite": lambda: verify.law(sd.Heun(), DATA, steps=3).kl(
        DATA.mean, 0 * DATA.covariance
    ),
}


@pytest.mark.parametrize("word", MORE)
def test_a_bad_argument_of_any_check_is_one_line_that_names_it(word):
    refused(MORE[word], word)


def test_a_sampler_that_changes_its_input_is_refused():
    @dataclass(frozen=True)
    class InPlace(sd.Ancestral):
        def step(self, model, x, t, s, noise, memory):
            made, memory = super().step(model, x, t, s, noise, memory)
            return x.copy_(made), memory

    with pytest.raises(ValueError, match=r"x must not be changed by the model or .*InPlace"):
        verify.law(InPlace(eta=0.0), DATA, steps=3)
