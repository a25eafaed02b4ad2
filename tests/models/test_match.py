"""Models moved between processes: the same answers at the same log-SNR, and nothing invented."""

import math

import numpy as np
import pytest
import torch
from cases import MEAN, PROCESSES, gaussian
from learned import Rate
from oracles import fitted_order, normal, reverse_sde_moments, w2
from torch.testing import assert_close

import sde_diffusion as sd

CHAIN = sd.Discrete.linear(10)
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def levels(process, *times):
    return process.levels(torch.tensor(times, dtype=torch.float64))


@EVERY
@pytest.mark.parametrize("home", ["vp", "edm", "cosine", "rectified-flow"])
def test_a_matched_exact_model_is_the_exact_model_of_the_other_process(home, process):
    """Every process noises N(m, S) to the same law at the same log-SNR, up to scale."""
    matched, exact = sd.match(gaussian(PROCESSES[home]), process), gaussian(process)
    x, begin = normal(6, 1), float(process.time(max(matched.trained.low, -1e9)))
    for level in levels(process, 0.05 * begin, 0.4 * begin, 0.9 * begin):
        for quantity in ("x0", "eps", "score", "v", "velocity"):
            ours, theirs = (getattr(model(x, level), quantity) for model in (matched, exact))
            assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_levels_of_a_batch_are_matched_sample_by_sample():
    matched = sd.match(gaussian(sd.VP()), sd.EDM())
    x, t = normal(4, 1), torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    together = matched(x, matched.process.level(t, x))
    for k, level in enumerate(levels(matched.process, *t.tolist())):
        assert_close(together.score[k], matched(x, level).score[k], rtol=1e-9, atol=1e-12)
    alone = matched(x, matched.process.level(t[1], x))
    assert_close(alone.x0[1], together.x0[1], rtol=1e-9, atol=1e-12)


def test_a_trained_network_draws_the_same_samples_on_another_process():
    """The flow in the straight frame is one and the same, so equal starts have equal ends."""
    torch.manual_seed(0)
    model = sd.Denoiser(sd.networks.MLP((2,), width=16).double(), sd.VP(), sd.V())
    matched = sd.match(model, sd.EDM())
    assert matched.process == sd.EDM()
    (own,), (other,) = (
        levels(sd.VP(), float(sd.VP().time(sd.EDM().log_snr(1.0)))),
        levels(sd.EDM(), 1.0),
    )
    y = normal(5, 2)
    solver = sd.samplers.ScipyODE(rtol=1e-9, atol=1e-9)
    ours = sd.sample(matched, solver, y * (other.alpha + other.sigma))
    theirs = sd.sample(model, solver, y * (own.alpha + own.sigma), times=[own.t, 0.0])
    assert_close(ours, theirs, rtol=0, atol=1e-7)


# ---- the ends --------------------------------------------------------------------------------


def test_sampling_starts_at_the_largest_common_noise():
    """EDM's model is trained up to sigma / alpha = 80, and VP goes to 152."""
    model = RecordingLevels(gaussian(sd.EDM()))
    matched = sd.match(model, sd.VP())
    assert matched.trained.low == pytest.approx(-2 * math.log(80), rel=1e-12)
    begin = float(sd.VP().time(matched.trained.low))
    (level,) = levels(sd.VP(), begin)
    x = sd.prior(matched, (3, 1), seeds=[0, 1, 2])
    assert_close(x, math.hypot(level.alpha, level.sigma) * sd.VP().prior((3, 1), seeds=[0, 1, 2]))
    for sampler in (sd.Adams(), sd.Heun(), sd.Ancestral(), sd.EulerMaruyama()):
        model.levels.clear()
        assert sd.sample(matched, sampler, x, steps=8, seeds=[0, 1, 2]).isfinite().all()
        assert model.levels[0].t == pytest.approx(1, abs=1e-12)
    even = torch.linspace(begin, 0, 9, dtype=torch.float64)  # VP's own grids are even
    path = [state.t for state in sd.trajectory(matched, sd.Ancestral(), x, steps=8)]
    assert path == pytest.approx(even[1:].tolist(), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("home", [sd.VP(), sd.OU(), sd.Discrete.linear(), sd.RectifiedFlow()],
                         ids=lambda p: type(p).__name__)  # fmt: skip
@pytest.mark.parametrize("process", [sd.VP(), sd.OU(), sd.Cosine(), sd.RectifiedFlow(), sd.EDM()],
                         ids=lambda p: type(p).__name__)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_levels_at_the_noisiest_time_is_matched_to_the_noisiest_of_its_own(
    home, process, dtype
):
    """Its log-SNR may lie beyond the last one of the model by rounding, or far beyond."""
    model = RecordingLevels(gaussian(home))
    x, t = normal(3, 1).to(dtype), torch.ones(3, dtype=dtype)
    found = sd.match(model, process)(x, process.level(t, x))
    least = torch.tensor(max(float(p.log_snr(1.0)) for p in (home, process)), dtype=dtype)
    assert found.x0.isfinite().all()
    assert_close(model.levels[0].log_snr.flatten(), least.expand(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("process", "ratio", "std"),
    [(sd.VE(), 0.7, math.sqrt(1.49)), (sd.RectifiedFlow(), 1.0, math.sqrt(0.5)), (sd.VP(), 2.0, 1)],
    ids=["ve", "rectified-flow", "vp"],
)
def test_a_shortened_path_starts_with_the_spread_of_unit_data(process, ratio, std):
    """sqrt(alpha^2 + sigma^2) where sigma / alpha = ratio: 1.22, .71 and 1."""
    short = gaussian(process).ranged(sd.models.LogSNRRange(low=-2 * math.log(ratio)))
    drawn, unit = (draw((5, 1), seeds=range(5)) for draw in (
        lambda *a, **k: sd.prior(short, *a, **k), sd.VP().prior))  # fmt: skip
    assert_close(drawn, std * unit, rtol=1e-6, atol=0)


class RecordingLevels:
    """A model that keeps the levels at which it was evaluated."""

    def __init__(self, model):
        self.model, self.process, self.levels = model, model.process, []

    def __call__(self, x, level):
        self.levels.append(level)
        return self.model(x, level)


def test_a_ddpm_of_a_matched_model_is_the_ddpm_of_the_chains_own():
    """A chain of 30 steps ends noisier than VP: VP's model knows those with abar >= alpha(1)^2."""
    chain = sd.processes.discretize(sd.VP(), 30)
    known = int((np.cumprod(1 - np.array(chain.betas)) >= math.exp(-10.05)).sum())
    matched, own = sd.DDPM(sd.match(gaussian(sd.VP()), chain)), sd.DDPM(gaussian(chain))
    assert 20 < known < 30
    x = normal(4, 1)
    for i in (1, 7, known):
        for ours, theirs in zip(
            matched.p_mean_variance(x, i), own.p_mean_variance(x, i), strict=True
        ):
            assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_model_whose_noise_ends_at_the_signal_is_matched_too():
    """log_snr(1) = 0: rounding there is no share of it."""
    matched = sd.match(gaussian(sd.EDM(1.0)), sd.VP())
    x = sd.prior(matched, (3, 1), seeds=[0, 1, 2], dtype=torch.float64)
    for sampler in (sd.Adams(), sd.Ancestral(), sd.EulerMaruyama()):
        assert sd.sample(matched, sampler, x, steps=4, seeds=[0, 1, 2]).isfinite().all()


# ---- networks from elsewhere ---------------------------------------------------------------------


class Foreign:
    """The exact eps of N(0.7, 1/4), by a table that counts steps 0 .. N - 1."""

    def __init__(self, chain):
        self.abar = torch.tensor(chain.betas, dtype=torch.float64).neg().log1p().cumsum(0).exp()
        self.asked = []

    def __call__(self, x, step):
        self.asked.append(step)
        abar = self.abar[step].reshape(-1, *[1] * (x.ndim - 1))  # a float would be no index
        centred = x - abar.sqrt() * MEAN
        return (1 - abar).sqrt() / (abar / 4 + 1 - abar) * centred


def test_an_adopted_network_is_asked_for_its_own_integer_steps():
    chain = sd.Discrete.linear()
    network = Foreign(chain)
    adopted, exact = sd.adopt(network, chain), gaussian(chain)
    x = normal(3, 1)
    for i in (1, 2, 500, 999, 1000):
        (level,) = levels(chain, i / 1000)
        assert_close(adopted(x, level).x0, exact(x, level).x0, rtol=1e-9, atol=1e-9)
        assert network.asked[-1].tolist() == [i - 1] * 3
        assert network.asked[-1].dtype == torch.long
    batch = chain.level(torch.tensor([1, 7, 1000]) / 1000, x.float())  # float32 times
    adopted(x.float(), batch)
    assert network.asked[-1].tolist() == [0, 6, 999]


def test_a_network_may_answer_with_a_tuple_and_not_with_nothing():
    level, x = levels(CHAIN, 0.5)[0], normal(2, 1)
    assert torch.equal(sd.adopt(lambda x, step: (x,), CHAIN)(x, level).eps, x)
    with pytest.raises(
        TypeError, match="the output of the network must be a tensor of floats; got None"
    ):
        sd.adopt(lambda x, step: None, CHAIN)(x, level)


def test_a_network_may_count_from_one():
    chain, asked = sd.Discrete.linear(10), []

    def network(x, step):
        asked.append(step)
        return x

    for level in levels(chain, 0.1, 1.0):
        sd.adopt(network, chain, counts_from=1)(normal(2, 1), level)
    assert [step.tolist() for step in asked] == [[1, 1], [10, 10]]
    with pytest.raises(ValueError, match=r"t must be at least 1/N = 0\.1"):
        sd.adopt(network, chain, counts_from=1)(normal(2, 1), levels(chain, 0.05)[0])


def test_between_its_times_an_adopted_network_is_fed_a_real_step_and_nothing_is_rounded():
    chain, asked = sd.Discrete.linear(10), []

    def network(x, step):
        asked.append(step)
        return x

    sd.adopt(network, chain)(normal(2, 1), levels(chain, 0.55)[0])
    assert_close(asked[0], torch.full((2,), 4.5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"t must be at least 1/N = 0\.1"):
        sd.adopt(network, chain)(normal(2, 1), levels(chain, 0.05)[0])


def test_an_adopted_network_sampled_on_its_chain_and_matched_to_vp_has_the_exact_laws():
    chain = sd.processes.discretize(sd.VP(), 200, "exact")
    adopted = sd.adopt(Foreign(chain), chain)
    law = sd.verify.law(sd.Ancestral("beta"), adopted, steps=200, shape=(1,))
    exact = sd.verify.law(sd.Ancestral("beta"), gaussian(chain), steps=200)
    assert_close(law.mean, exact.mean, rtol=1e-9, atol=0)
    assert_close(law.covariance, exact.covariance, rtol=1e-9, atol=0)
    matched = sd.match(adopted, sd.VP())
    times = sd.VP().time(chain.log_snr(torch.arange(200, -1, -1, dtype=torch.float64) / 200))
    moved = sd.verify.law(sd.Ancestral("beta"), matched, times=times, shape=(1,))
    assert_close(moved.mean, exact.mean, rtol=1e-8, atol=0)
    assert_close(moved.covariance, exact.covariance, rtol=1e-8, atol=0)


def test_an_adopted_network_may_speak_another_parameterization():
    chain = sd.Discrete.linear()
    exact = gaussian(chain)

    def network(x, step):
        return exact(x, levels(chain, (int(step[0]) + 1) / 1000)[0]).v

    x, (level,) = normal(3, 1), levels(chain, 0.3)
    adopted = sd.adopt(network, chain, sd.V())
    assert_close(adopted(x, level).eps, exact(x, level).eps, rtol=1e-10, atol=1e-10)


@pytest.mark.peers
def test_a_diffusers_unet_gives_the_x0_of_its_own_ddim_scheduler():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(1000)
    chain = sd.Discrete(scheduler.betas)
    adopted, x = sd.adopt(unet, chain), normal(2, 1, 8, 8).float()
    with torch.no_grad():
        for i in (1, 10, 500, 1000):
            theirs = scheduler.step(unet(x, i - 1).sample, i - 1, x).pred_original_sample
            ours = adopted(x, levels(chain, i / 1000)[0]).x0
            scale = float(theirs.abs().max())
            assert_close(ours, theirs, rtol=0, atol=5e-7 * max(1.0, scale))


def identity(x, step):
    return x


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sd.match(None, sd.VP()), "model must be a model"),
        (lambda: sd.match(torch.nn.Linear(1, 1), sd.VP()), "model must be a model"),
        (lambda: sd.match(gaussian(sd.VP()), None), "process must be a Process"),
        (lambda: sd.match(gaussian(sd.VP()), sd.VP), "process must be a Process"),
        (lambda: sd.adopt(None, CHAIN), "network must be a network"),
        (lambda: sd.adopt(identity, sd.VP()), "process must be a Discrete process"),
        (lambda: sd.adopt(identity, CHAIN, counts_from=2), "counts_from"),
        (lambda: sd.processes.interpolate(sd.VP()), "discrete must be a Discrete process"),
        (lambda: sd.processes.discretize(None, 10), "process must be a Process"),
        (lambda: sd.verify.agreement(None, CHAIN), "a must be a Process"),
        (lambda: sd.verify.agreement(sd.VP(), None), "b must be a Process or a function of N"),
        (lambda: sd.verify.agreement(sd.VP(), sd.OU(), sizes=()), "sizes must hold"),
        (lambda: sd.verify.agreement(sd.VP(), sd.OU(), sizes=(0, 4)), "sizes must hold"),
        (lambda: sd.verify.agreement(sd.VP(), sd.OU(), sizes=(2.5,)), "sizes must be an integer"),
        (lambda: sd.verify.agreement(sd.VP(), sd.OU(), variance=-1), "variance"),
        (lambda: sd.verify.agreement(sd.VP(), sd.OU(), mean=math.nan), "mean"),
    ],
)
def test_what_is_not_what_it_should_be_is_named(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


# ---- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "low", "high"), [("beta", 0.98, 1.02), ("posterior", 0.9, 1.02)])
def test_ancestral_sampling_of_a_matched_model_tends_to_the_reverse_sde(kind, low, high):
    """VP's model, on chains of N steps; the limit by DOP853 on the SDE's moments."""
    sizes, limit, model = (1024, 2048, 4096), reverse_sde_moments(MEAN, 0.25), gaussian(sd.VP())
    errors = []
    for n in sizes:
        matched = sd.match(model, sd.processes.discretize(sd.VP(), n))
        begin = float(matched.process.time(matched.trained.low))  # VP is never noisier
        times = torch.arange(int(begin * n), -1, -1, dtype=torch.float64) / n
        law = sd.verify.measured(sd.Ancestral(kind), matched, times=times, shape=(1,))
        errors.append(w2((float(law.mean), float(law.covariance)), limit))
    assert low <= fitted_order(sizes, errors) <= high


def test_times_of_a_learned_process_have_no_gradient():
    """By the sign: -.0074 came for .211."""
    model = sd.match(sd.exact.Gaussian(sd.VP(), 1.0, 0.5), Rate(2.0))
    with pytest.raises(ValueError, match="process of match must have no parameters to be trained"):
        model(torch.ones(2, 1), torch.full((2,), 0.3))
