"""Released samplers of diffusers, k-diffusion and azula, by their own code through the adapters.

What is stated of them is what holds of the versions that are installed; a peer that mends a fault
breaks a test here.
"""

import copy
import importlib
from itertools import pairwise

import pytest
import torch
from oracles import normal

import sde_diffusion as sd
from sde_diffusion import verify

pytestmark = [
    pytest.mark.peers,
    # Of the peers and of what they import, at import and at use.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:UserWarning"),
]

# In two coordinates: an error of one may change its sign on the way, and look like none.
DATA = sd.exact.Gaussian(
    sd.VP(), torch.tensor([0.7, -0.4], dtype=torch.float64),
    torch.tensor([0.25, 1.5], dtype=torch.float64),
)  # fmt: skip
LINE = sd.exact.Gaussian(sd.VP(), torch.tensor([0.7], dtype=torch.float64), 0.25)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def k_diffusion():
    pytest.importorskip("k_diffusion")
    return importlib.import_module("k_diffusion.sampling")


@pytest.fixture(scope="module")
def azula():
    pytest.importorskip("azula")
    denoise, noise, sample = (
        importlib.import_module(f"azula.{name}") for name in ("denoise", "noise", "sample")
    )
    denoiser = denoise.SimpleDenoiser(torch.nn.Identity(), noise.VPSchedule())

    def family(name, declared=None):
        def made(steps):
            sampler = getattr(sample, f"{name}Sampler")(denoiser, steps=steps, silent=True)
            return verify.Azula(sampler, declared)

        return made

    return family


# ---- azula ------------------------------------------------------------------------------------


def test_azulas_reab_is_of_the_first_order_as_shipped(azula):
    order = verify.order(azula("REAB"), DATA, sizes=(64, 128, 256))
    assert order.declared == 2
    assert not order.holds
    assert "LOWER THAN DECLARED" in order.verdict
    assert order.tends == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("name", "declared", "order"), [("Heun", 2, 2), ("zAB", None, 2), ("DDIM", None, 1)]
)
def test_azulas_samplers_are_of_their_orders(azula, name, declared, order):
    found = verify.order(azula(name, declared), DATA, sizes=(32, 64, 128))
    assert found.declared == order
    assert found.holds, found
    assert found.fitted == pytest.approx(order, abs=0.2)


def test_azulas_sampler_is_not_changed_by_being_certified(azula):
    adapter = azula("zAB")(8)
    before = copy.deepcopy(adapter.sampler.__dict__)
    denoiser = adapter.sampler.denoiser
    verify.law(adapter, DATA)
    assert adapter.sampler.denoiser is denoiser
    assert adapter.sampler.__dict__.keys() == before.keys()
    assert (adapter.sampler.steps, adapter.sampler.order) == (before["steps"], before["order"])


# ---- diffusers --------------------------------------------------------------------------------


def chain_times(scheduler, steps):
    """The levels of a scheduler as times of its chain: the steps it asks at, then 0."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return [*((int(t) + 1) / 1000 for t in scheduler.timesteps), 0.0]


@pytest.mark.parametrize("steps", [10, 50])
def test_diffusers_ddim_is_ours_to_float32_on_the_levels_it_asks_at(diffusers, steps):
    """set_alpha_to_one: the last step ends at data, as ours. A stride off by one would show."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    theirs = verify.Diffusers(scheduler, steps)
    times = chain_times(scheduler, steps)
    same = verify.identities(sd.Ancestral(eta=0.0), theirs, DATA, times=times)
    assert same.holds, same
    assert same.calls == (steps, steps)
    off = [*(t + 0.001 for t in times[:-1]), 0.0]
    assert not verify.identities(sd.Ancestral(eta=0.0), theirs, DATA, times=off).holds


def test_diffusers_ddpm_without_clipping_is_ours_step_by_step(diffusers):
    """Its variance_type fixed_small is the posterior's, fixed_large beta; both clamp at 1e-20."""
    for kind, variance in (("fixed_small", "posterior"), ("fixed_large", "beta")):
        scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=kind)
        times = chain_times(scheduler, 50)
        same = verify.identities(
            sd.Ancestral(variance), verify.Diffusers(scheduler, 50), DATA, times=times
        )
        assert same.holds, same


def test_diffusers_ddpm_as_shipped_clips_and_has_no_gaussian_law(diffusers):
    scheduler = diffusers.DDPMScheduler()
    assert scheduler.config.clip_sample
    with pytest.raises(verify.NotAffine, match=r"DDPMScheduler.*not affine on Gaussian"):
        verify.law(verify.Diffusers(scheduler, 20), DATA)


def test_unipc_with_karras_spacing_has_a_floor_from_rounded_time_steps(diffusers):
    def family(steps):
        scheduler = diffusers.UniPCMultistepScheduler(use_karras_sigmas=True)
        return verify.Diffusers(scheduler, steps)

    order = verify.order(family, DATA, sizes=(64, 128, 256))
    assert order.floor is not None
    assert not order.holds
    assert "THE ERROR STOPS SHRINKING" in order.verdict
    assert "as if its time steps were rounded" in order.verdict
    even = verify.order(
        lambda n: verify.Diffusers(diffusers.UniPCMultistepScheduler(), n), DATA, sizes=(16, 32, 64)
    )
    assert even.floor is None
    assert "rounded" not in even.verdict


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_brownian_trees_are_refused_by_name(diffusers, k_diffusion):
    pytest.importorskip("torchsde")
    refused = {
        "diffusers DPMSolverSDEScheduler": verify.Diffusers(diffusers.DPMSolverSDEScheduler(), 10),
        "k-diffusion sample_dpmpp_sde": verify.KDiffusion(
            k_diffusion.sample_dpmpp_sde, sd.grids.Karras().ratios(10)
        ),
        "k-diffusion sample_dpmpp_2m_sde": verify.KDiffusion(
            k_diffusion.sample_dpmpp_2m_sde, sd.grids.Karras().ratios(10)
        ),
    }
    for name, sampler in refused.items():
        with pytest.raises(verify.NotAffine, match=f"{name}, 10 steps draws"):
            verify.law(sampler, DATA)


def test_a_scheduler_is_not_changed_by_being_certified(diffusers):
    scheduler = diffusers.UniPCMultistepScheduler()
    scheduler.set_timesteps(7)
    before = copy.deepcopy(scheduler.__dict__)
    verify.law(verify.Diffusers(scheduler, 12), DATA)
    assert scheduler.__dict__.keys() == before.keys()
    assert scheduler.num_inference_steps == 7
    assert torch.equal(scheduler.timesteps, before["timesteps"])
    assert torch.equal(scheduler.sigmas, before["sigmas"])
    assert scheduler.model_outputs == before["model_outputs"]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_what_the_network_puts_out_does_not_change_the_law(diffusers, kind):
    """The three give the same x; DDIM converts them back, in float32."""
    laws = [
        verify.law(
            verify.Diffusers(diffusers.DDIMScheduler(clip_sample=False, prediction_type=k), 20),
            DATA,
        )
        for k in ("epsilon", kind)
    ]
    assert laws[1].w2(laws[0].mean, laws[0].covariance) < 1e-4


def test_flow_matching_euler_is_the_euler_of_the_straight_frame(diffusers):
    """On RectifiedFlow's own t its step is  x + (s - t) velocity: first order in u."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

    def family(steps):
        return verify.Diffusers(scheduler, steps)

    order = verify.order(family, DATA, sizes=(16, 32, 64))
    assert order.fitted == pytest.approx(1, abs=0.2)
    assert isinstance(family(4).process, sd.RectifiedFlow)


# ---- k-diffusion ------------------------------------------------------------------------------


def family_of(function, declared=None):
    return lambda steps: verify.KDiffusion(
        function, sd.grids.Karras().ratios(steps), declared=declared
    )


@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("euler", 1), ("euler_ancestral", 1)])
def test_k_diffusions_samplers_are_of_the_published_orders_on_karras_grids(
    k_diffusion, name, order
):
    """Karras et al. 2022: Heun's rule is of the second order, Euler's of the first."""
    function = getattr(k_diffusion, f"sample_{name}")
    found = verify.order(family_of(function, order), DATA, sizes=(32, 64, 128))
    assert found.holds, found
    assert found.tends == pytest.approx(order, abs=0.2)


def test_k_diffusions_heun_is_algorithm_1_of_karras_et_al_at_every_state(k_diffusion):
    """Karras et al. 2022, Alg. 1, with sigma(t) = t: d_i = eps, and Euler's step alone to 0."""
    sigmas = sd.grids.Karras().ratios(12)

    def algorithm_1(eps, x):
        for t, s in pairwise(sigmas.tolist()):
            d = eps(x, t / 80)
            x_s = x + (s - t) * d
            if s > 0:
                x_s = x + (s - t) * (d + eps(x_s, s / 80)) / 2
            x = x_s
        return x

    theirs = verify.KDiffusion(k_diffusion.sample_heun, sigmas)
    same = verify.identities(verify.Function(algorithm_1), theirs, DATA, tolerance=1e-8)
    assert same.holds, same
    assert same.calls == (23, 23)


def test_the_local_order_of_dpmpp_2m_is_2_at_steps_of_any_ratio(k_diffusion):
    def made(times):
        return verify.KDiffusion(
            k_diffusion.sample_dpmpp_2m, verify.ratios(sd.VP(), times), declared=2
        )

    local = verify.local_order(made, DATA, spans=(0.02, 0.01, 0.005, 0.0025))
    assert local.holds, local
    assert local.fitted == pytest.approx({2.0: 2, 1.0: 2, 0.5: 2}, abs=0.2)


def test_a_function_with_tolerances_is_refused_by_name(k_diffusion):
    sampler = verify.KDiffusion(k_diffusion.sample_dpm_adaptive, sd.grids.Karras().ratios(10))
    with pytest.raises(verify.NotAffine, match=r"sample_dpm_adaptive.*chooses its own steps"):
        verify.law(sampler, DATA)


def test_the_sigmas_and_arguments_handed_in_are_not_changed(k_diffusion):
    sigmas, arguments = sd.grids.Karras().ratios(8), {"eta": 0.5}
    before = sigmas.clone()
    sampler = verify.KDiffusion(k_diffusion.sample_euler_ancestral, sigmas, arguments)
    x = 80 * normal(3, 1)
    sd.sample(LINE.on(sd.EDM()), sampler, x, seeds=range(3))
    assert torch.equal(sigmas, before)
    assert arguments == {"eta": 0.5}


def test_euler_ancestrals_noise_is_the_posteriors(k_diffusion):
    """Its sigma_up^2 = sigma_s^2 (sigma_t^2 - sigma_s^2) / sigma_t^2: a share of sigma_s / sigma_t,
    and none in the last step."""
    sigmas = sd.grids.Karras().ratios(12)
    law = verify.law(verify.KDiffusion(k_diffusion.sample_euler_ancestral, sigmas), LINE)
    shares = [draw.share for draw in law.draws]
    assert shares == pytest.approx((sigmas[1:-1] / sigmas[:-2]).tolist(), rel=1e-6)
    ours = verify.law(sd.Ancestral(), LINE.on(sd.EDM()), times=sigmas / 80)
    assert law.w2(ours.mean, ours.covariance) < 1e-9


# ---- the script -------------------------------------------------------------------------------


def test_certify_knows_the_peers_that_are_installed(diffusers, k_diffusion, azula):
    import certify as CERTIFY

    families = CERTIFY.peers()
    for library in ("diffusers", "k-diffusion", "azula"):
        assert sum(name.startswith(library) for name in families) >= 10
    refused = CERTIFY.theirs("k-diffusion dpm_adaptive", families["k-diffusion dpm_adaptive"])
    assert refused.by == "refused"
    assert not refused.holds
    assert "chooses its own steps" in refused.verdict
    with pytest.raises(
        ValueError, match=r"^--samplers must be a known name; got heun; near it: azula"
    ):
        list(CERTIFY.rows_of(CERTIFY.Config(samplers=("heun",), peers=True)))
