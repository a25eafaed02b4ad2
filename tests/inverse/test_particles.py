"""Particles: the posterior's own law, as closely as their number says."""

import math

import pytest
import torch
from cases import PROCESSES
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.inverse.measurements import LogLikelihood, Measurement
from sde_diffusion.inverse.operators import Matrix
from sde_diffusion.inverse.smc import SMC
from sde_diffusion.models.model import select

# Clouds of so few particles are degenerate; what is tested of them holds for any number.
pytestmark = pytest.mark.filterwarnings("ignore:.* clouds of [348] particles")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN, VARIANCE, NOISE = drawn(3, seed=4), 0.6, 0.5
MATRIX, Y = drawn(2, 3, seed=1), drawn(1, 2, seed=2)
MEASURED = Measurement(Matrix(MATRIX), NOISE, Y)


def clouds(evidence, particles, count, process=None, steps=8, seed=0, **settings):
    """Means of the clouds' particles, (count, 3), and the particles (count, P, 3)."""
    process = process or sd.VP()
    data = sd.exact.Gaussian(process, MEAN, VARIANCE)
    x = drawn(count * particles, 3, seed=seed) * process.prior_std
    source = torch.Generator().manual_seed(seed + 100)
    sampler = SMC(evidence, particles, kernel_variance=VARIANCE, **settings)
    made = sd.sample(data, sampler, x, steps=steps, generator=source)
    made = made.reshape(count, particles, 3)
    return made.mean(1), made


def posterior(process=None):
    return sd.exact.Gaussian(process or sd.VP(), MEAN, VARIANCE).given(MATRIX, Y[0], NOISE)


@pytest.mark.parametrize("variance", [0.2, VARIANCE, 3.0])
def test_the_error_falls_as_the_root_of_the_number_of_particles(variance):
    """With the kernels of N(m, v I) the chain's posterior is the data's, for any twist: the error
    of a cloud's mean falls as P^(-1/2), with no floor. The next term is 1/P of it with a factor of
    order 1: at P = 8 it turns the fitted slope by 0.01 times that."""
    numbers, exact = (8, 32, 128, 512), posterior().means[0]
    errors, standard, counts = [], [], [2048, 1024, 512, 256]
    for p, n in zip(numbers, counts, strict=True):
        means, _ = clouds(MEASURED, p, n, variance=variance)
        square = (means - exact).square().sum(1)
        errors.append(float(square.mean().log() / 2))
        standard.append(float(square.std() / square.mean()) / 2 / math.sqrt(n))
    bias = means.mean(0) - exact  # of 512 particles
    assert (bias.abs() < 4.5 * means.std(0) / math.sqrt(n) + 1 / p).all()
    off = torch.tensor(numbers).double().log()
    weight = (off - off.mean()) / (off - off.mean()).square().sum()
    slope = float(weight @ torch.tensor(errors).double())
    error = float((weight * torch.tensor(standard)).norm())
    assert abs(slope + 0.5) < 4.5 * error + 0.04


@pytest.mark.parametrize("process", PROCESSES)
def test_on_every_process_the_particles_have_the_posteriors_mean_and_covariance(process):
    means, made = clouds(MEASURED, 256, 64, PROCESSES[process], variance=VARIANCE)
    law = posterior()
    error, bias = means.std(0) / 8, 3 / 256  # of 256 particles: of order 1 / P
    assert ((means.mean(0) - law.means[0]).abs() < 4.5 * error + bias).all()
    covariance = (law.axes[0] * law.variances[0]) @ law.axes[0].T
    each = torch.stack([cloud.T.cov() for cloud in made])
    # A cloud's covariance is that around its own mean: less by the mean's own variance.
    each = each + means.T.cov()
    assert ((each.mean(0) - covariance).abs() < 4.5 * each.std(0) / 8 + bias).all()


def test_without_anything_measured_it_is_the_ancestral_chain():
    """A likelihood that says nothing: nothing is drawn again, and the samples are the chain's."""
    nothing = LogLikelihood(lambda x0, y: 0 * x0.sum(1), torch.zeros(1, 1).double())
    data, x = sd.exact.Gaussian(sd.VP(), MEAN, VARIANCE), drawn(6, 3)
    states = list(
        sd.trajectory(data, SMC(nothing, 3, kernel_variance=0.0), x, steps=5, seeds=range(6))
    )
    chain = sd.sample(data, sd.Ancestral(), x, steps=5, seeds=range(6))
    assert_close(states[-1].x, chain, rtol=0, atol=1e-12)
    assert_close(states[-1].memory.effective, torch.ones(2).double())


def test_clouds_know_nothing_of_each_other():
    each = Measurement(Matrix(MATRIX), NOISE, drawn(2, 2, seed=7).repeat_interleave(16, 0))
    data, x = sd.exact.Gaussian(sd.VP(), MEAN, VARIANCE), drawn(32, 3)
    both = sd.sample(data, SMC(each, 16), x, steps=5, seeds=range(32))
    for k in range(2):
        rows = torch.arange(16 * k, 16 * k + 16)
        alone = sd.sample(
            data, SMC(select(each, rows, 2), 16), x[rows], steps=5, seeds=rows.tolist()
        )
        assert_close(both[rows], alone, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*do not fit y")  # copies of a particle that does not
@pytest.mark.parametrize(("particles", "d", "noise_std"), [(16, 200, 0.1), (64, 4, 1e-3)])
def test_few_effective_particles_are_named(particles, d, noise_std):
    """One particle carries all weight at a step: the end is one row, or close to it."""
    data = sd.exact.Gaussian(sd.VP(), torch.zeros(d).double(), 1.0)
    given, x = Measurement(torch.nn.Identity(), noise_std, drawn(1, d)), drawn(2 * particles, d)
    sampler = SMC(given, particles)
    with pytest.warns(RuntimeWarning, match=f"2 of 2 clouds of {particles} particles") as found:
        states = list(sd.trajectory(data, sampler, x, steps=50, seeds=range(2 * particles)))
    few = [str(each.message) for each in found if "effective" in str(each.message)]
    least = float(states[-1].memory.least.min()) * particles
    assert len(few) == 1
    assert f"{least:.1f} were effective, fewer than 5" in few[0]
    assert least < 5
    shares = torch.stack([state.memory.effective for state in states])
    assert (states[-1].memory.least <= shares.min(0).values).all()


def test_enough_particles_pass_without_a_warning():
    clouds(MEASURED, 256, 4, variance=VARIANCE)


def test_one_call_a_step():
    class Counted:
        process, count = sd.VP(), 0
        model = sd.exact.Gaussian(sd.VP(), MEAN, VARIANCE)

        def __call__(self, x, level):
            self.count += 1
            return self.model(x, level)

    model = Counted()
    sd.sample(model, SMC(MEASURED, 4), drawn(8, 3), steps=7, seeds=range(8))
    assert model.count == 7


def test_systematic_draws_take_each_particle_as_often_as_its_weight_says():
    """floor(P w) or ceil(P w) times each, P w on the average."""
    sampler = SMC(MEASURED, 5)
    weight = torch.tensor([0.5, 0.02, 0.18, 0.1, 0.2], dtype=torch.float64)
    counts = []
    for seed in range(400):
        rows = sampler.drawn(weight.log(), drawn(5, 3, seed=seed))
        counts.append(torch.bincount(rows, minlength=5).double())
    counts = torch.stack(counts)
    assert ((counts >= (5 * weight).floor()) & (counts <= (5 * weight).ceil())).all()
    spread = counts.std(0) / math.sqrt(400)
    assert ((counts.mean(0) - 5 * weight).abs() <= 4.5 * spread + 1e-12).all()


@pytest.mark.parametrize(("call", "says"), [
    (lambda: SMC(Measurement(Matrix(MATRIX), 0.0, Y), 8), "noise_std must be above 0"),
    (lambda: SMC(MEASURED, 1), "particles"),
    (lambda: SMC(MEASURED, 8, threshold=1.5), "threshold"),
    (lambda: SMC(MEASURED, 8, variance=0.0), "variance"),
    (lambda: SMC(MEASURED, 8, kernel_variance=-1.0), "kernel_variance"),
    (lambda: clouds(MEASURED, 8, 1) and SMC(MEASURED, 5).step(
        sd.exact.Gaussian(sd.VP(), MEAN, 1.0), drawn(8, 3),
        *sd.VP().levels(torch.tensor([0.5, 0.4]).double()), lambda t, s, like: like, None),
     "clouds of 5 particles; got 8"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
