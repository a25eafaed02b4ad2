"""`verify.Function`: a plain function as a sampler, and the noise that is put in its draws' place.

No other library is needed here; test_peers.py has those.
"""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import ddim_moments, ddpm_moments, normal
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.noise.sources import Seeded

N = 20
CHAIN = sd.processes.discretize(sd.VP(), N, rule="exact")
DATA = sd.exact.Gaussian(CHAIN, torch.tensor([0.7], dtype=torch.float64), 0.25)
BETAS = torch.tensor(CHAIN.betas, dtype=torch.float64)
ABAR = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - BETAS, 0)])


def ho(eps_fn, x):
    """Ho et al. 2020, Algorithm 2, sigma_t^2 = beta_t, as it is written in the field."""
    for i in range(N, 0, -1):
        beta, abar = BETAS[i - 1], ABAR[i]
        z = torch.randn_like(x) if i > 1 else torch.zeros_like(x)
        x = (x - beta / (1 - abar).sqrt() * eps_fn(x, i / N)) / (1 - beta).sqrt() + beta.sqrt() * z
    return x


def ddim(eps_fn, x):
    """Song et al. 2021 (DDIM), eq. 12 with sigma = 0."""
    for i in range(N, 0, -1):
        eps = eps_fn(x, i / N)
        x0 = (x - (1 - ABAR[i]).sqrt() * eps) / ABAR[i].sqrt()
        x = ABAR[i - 1].sqrt() * x0 + (1 - ABAR[i - 1]).sqrt() * eps
    return x


# ---- a function is a sampler ------------------------------------------------------------------


def test_algorithm_2_typed_out_has_the_law_of_ho_et_al_and_ddim_that_of_ddim():
    law = verify.law(verify.Function(ho), DATA)
    expected = ddpm_moments(CHAIN.betas, 0.7, 0.25, "beta")
    assert (float(law.mean), float(law.covariance)) == pytest.approx(expected, rel=1e-8)
    law = verify.law(verify.Function(ddim), DATA)
    expected = ddim_moments(ABAR.numpy(), 0.7, 0.25, 0.0)
    assert (float(law.mean), float(law.covariance)) == pytest.approx(expected, rel=1e-8)


def test_algorithm_2_and_ancestral_are_the_same_at_every_state():
    same = verify.identities(sd.Ancestral("beta"), verify.Function(ho), DATA, steps=N)
    assert same.holds, same
    assert same.calls == (N, N)
    assert same.times == pytest.approx([*(i / N for i in range(N, 0, -1)), 0])
    same = verify.identities(verify.Function(ddim), sd.Ancestral(eta=0.0), DATA, steps=N)
    assert same.holds, same
    different = verify.identities(sd.Ancestral("beta"), verify.Function(ddim), DATA, steps=N)
    assert different.differences[0] == 0
    assert "DIFFERENT from" in different.verdict
    assert "at t=0.95, there by" in different.verdict  # after the first draw


def test_a_fault_in_one_step_of_the_function_is_placed_there():
    def faulty(eps_fn, x):
        def off(x, t):
            return eps_fn(x, t) * (1.001 if round(t * N) == 8 else 1.0)

        return ho(off, x)

    same = verify.identities(sd.Ancestral("beta"), verify.Function(faulty), DATA, steps=N)
    # The state at t = 7 / 20, which the step from 8 / 20 leads to, is the first to differ.
    assert "DIFFERENT from" in same.verdict
    assert "at t=0.35, there by" in same.verdict


def test_noise_drawn_before_the_call_of_its_step_is_the_steps_all_the_same():
    """Algorithm 2 draws z first and uses it after the call: variance beta, a share of exactly 1."""
    law = verify.law(verify.Function(ho), DATA)
    assert [draw.share for draw in law.draws] == pytest.approx([1.0] * (N - 1), rel=1e-8)
    assert f"{N - 1} draws" in str(law)


def test_a_function_starts_and_ends_at_its_times():
    """One exact step of DDIM between two times; the law is that of Ancestral on these two times."""
    level = {t: CHAIN.levels(torch.tensor([t], dtype=torch.float64))[0] for t in (0.75, 0.25)}
    t, s = level.values()

    def step(eps_fn, x):
        eps = eps_fn(x, 0.75)
        return s.alpha * (x - t.sigma * eps) / t.alpha + s.sigma * eps

    sampler = verify.Function(step, start=0.75, end=0.25)
    ours = verify.law(sd.Ancestral(eta=0.0), DATA, times=[0.75, 0.25])
    theirs = verify.law(sampler, DATA)
    assert_close(theirs.start_gain, ours.start_gain, rtol=1e-10, atol=0)
    assert theirs.departure == pytest.approx(ours.departure, rel=1e-8)
    assert [at.t for at in theirs.steps] == pytest.approx([0.75, 0.25])


def test_times_may_be_numbers_or_tensors_one_for_all_samples():
    x = normal(3, 1)
    kinds = [0.5, torch.tensor(0.5), torch.full((3,), 0.5), torch.full((3, 1), 0.5)]
    made = [sd.sample(DATA, verify.Function(lambda eps, x, t=t: eps(x, t)), x) for t in kinds]
    assert all(torch.equal(made[0], other) for other in made)
    with pytest.raises(verify.NotAffine, match="t must be one number for the whole batch"):
        sd.sample(DATA, verify.Function(lambda eps, x: eps(x, torch.arange(3.0) / 3)), x)


def test_the_batch_of_the_caller_is_not_changed_by_a_function_that_writes_in_place():
    x = normal(3, 1)
    before = x.clone()
    sd.sample(DATA, verify.Function(lambda eps, x: x.zero_()), x)
    assert torch.equal(x, before)


# ---- injected noise ---------------------------------------------------------------------------

NOISE = normal(4, 3)
DRAWS = {
    "randn": lambda x: torch.randn(4, 3, dtype=x.dtype),
    "randn of a shape": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "randn of size=": lambda x: torch.randn(size=(4, 3), dtype=x.dtype),
    "randn without a generator": lambda x: torch.randn((4, 3), generator=None, dtype=x.dtype),
    "randn_like": torch.randn_like,
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "normal, of a size": lambda x: torch.normal(0.0, 1.0, (4, 3), dtype=x.dtype),
    "normal, all named": lambda x: torch.normal(mean=0.0, std=1.0, size=(4, 3), dtype=x.dtype),
    "normal, of tensors": lambda x: torch.normal(torch.zeros_like(x), torch.ones_like(x)),
    "normal, of a mean": lambda x: torch.normal(torch.zeros_like(x)),
    "normal, of a mean and a number": lambda x: torch.normal(torch.zeros_like(x), 1.0),
    "normal, of a deviation": lambda x: torch.normal(0.0, torch.ones_like(x)),
    "normal, named": lambda x: torch.normal(mean=torch.zeros_like(x), std=1.0),
    "nn.init": lambda x: torch.nn.init.normal_(torch.empty_like(x)),
}


def ended(function, **source):
    return sd.sample(DATA, verify.Function(function), torch.zeros(4, 3, dtype=torch.float64),
                     **(source or {"noise": lambda t, s, like: NOISE}))  # fmt: skip


# Torch hands its own `normal_` of nn.init to the mode as well, with the tensor named.
INIT = "nn.init"


@pytest.mark.parametrize("name", [*list(DRAWS)[:-1], INIT])
def test_each_of_torchs_normal_draws_gives_the_injected_noise_bit_for_bit(name):
    draw = DRAWS[name]
    data = sd.exact.Gaussian(CHAIN, 0.7, 0.25)

    def function(eps, x):
        return draw(x)

    x = torch.zeros(4, 3, dtype=torch.float64)
    made = sd.sample(data, verify.Function(function), x, noise=lambda t, s, like: NOISE)
    assert torch.equal(made, NOISE)


AFFINE = {
    "normal_": lambda x: torch.empty_like(x).normal_(2.0, 0.5),
    "normal_, named": lambda x: torch.empty_like(x).normal_(mean=2.0, std=0.5),
    "normal": lambda x: torch.normal(2.0, 0.5, x.shape, dtype=x.dtype),
    "normal, of tensors": lambda x: torch.normal(2 + 0 * x, 0.5 + 0 * x),
    "nn.init": lambda x: torch.nn.init.normal_(torch.empty_like(x), 2.0, 0.5),
}


@pytest.mark.parametrize("name", [*list(AFFINE)[:-1], INIT])
def test_mean_and_deviation_of_a_draw_are_kept(name):
    assert torch.equal(ended(lambda eps, x: AFFINE[name](x)), 2 + 0.5 * NOISE)


def test_a_draw_in_float32_is_the_injected_noise_rounded():
    made = ended(lambda eps, x: torch.randn_like(x, dtype=torch.float32))
    assert torch.equal(made, NOISE.float().double())


def test_each_draw_gets_the_time_of_the_last_call():
    intervals = []

    def noise(t, s, like):
        intervals.append((t, s))
        return torch.zeros_like(like)

    def function(eps, x):
        torch.randn_like(x)
        eps(x, 0.5)
        torch.randn_like(x)
        eps(x, 0.25)
        return x + torch.randn_like(x)

    sd.sample(DATA, verify.Function(function), normal(4, 1), noise=noise)
    assert [t for t, _ in intervals] == pytest.approx([1.0, 0.5, 0.25])


def test_the_global_generators_are_where_they_were_and_injection_ends_with_the_run():
    def all_states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    before = all_states()
    verify.law(verify.Function(ho), DATA)
    after = all_states()
    assert torch.equal(before[0], after[0])
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]
    generator = torch.Generator().manual_seed(3)
    assert not torch.equal(torch.randn(4, 3, generator=generator), NOISE)


def test_seeds_make_each_row_independent_of_its_batch():
    seeds = [5, 3, 11]
    x = CHAIN.prior((3, 1), seeds=seeds, dtype=torch.float64)
    whole = sd.sample(DATA, verify.Function(ho), x, seeds=seeds)
    for row, seed in enumerate(seeds):
        alone = sd.sample(DATA, verify.Function(ho), x[[row]], seeds=[seed])
        assert_close(alone[0], whole[row], rtol=1e-12, atol=1e-12)
    theirs = sd.sample(DATA, verify.Function(ho), x, noise=Seeded(seeds))
    ours = sd.sample(DATA, sd.Ancestral("beta"), x, steps=N, noise=Seeded(seeds))
    assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


OTHERS = {
    "rand": lambda x: torch.rand(x.shape),
    "rand_like": torch.rand_like,
    "randint": lambda x: torch.randint(0, 9, x.shape),
    "randperm": lambda x: torch.randperm(4),
    "bernoulli": lambda x: torch.bernoulli(0 * x),
    "multinomial": lambda x: torch.multinomial(1 + 0 * x.abs(), 1),
    "poisson": lambda x: torch.poisson(x.abs()),
    "uniform_": lambda x: x.uniform_(),
    "exponential_": lambda x: x.exponential_(),
    "cauchy_": lambda x: x.cauchy_(),
    "log_normal_": lambda x: x.log_normal_(),
    "random_": lambda x: x.random_(),
    "geometric_": lambda x: x.geometric_(0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_draw_that_is_not_normal_is_refused_by_its_name(name):
    def drawn(eps, x):
        OTHERS[name](x)
        return x

    with pytest.raises(verify.NotAffine, match=f"function drawn draws by torch.{name}: only"):
        ended(drawn)


def test_a_private_generator_is_refused_by_name():
    own = torch.Generator().manual_seed(0)
    draws = [
        lambda x: torch.randn(x.shape, generator=own),
        lambda x: torch.normal(0 * x, 1.0, generator=own),
        lambda x: x.normal_(generator=own),
    ]
    for draw in draws:
        with pytest.raises(verify.NotAffine, match=r"function .*a generator of its own"):
            ended(lambda eps, x, draw=draw: draw(x))


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (3,), (12,), (3, 4)])
def test_a_draw_of_another_shape_than_the_batch_is_refused(shape):
    with pytest.raises(verify.NotAffine, match=r"draws noise of shape .* for a batch of shape"):
        ended(lambda eps, x: x + torch.randn(shape).sum())


# ---- what the probe sees of a function ----------------------------------------------------------


def refused(function, match):
    with pytest.raises(verify.NotAffine, match=match):
        verify.law(verify.Function(function), DATA)


def test_a_function_that_clips_draws_elsewhere_or_remembers_is_refused():
    source = np.random.default_rng(0)
    calls = []

    def clipped(eps, x):
        return ddim(lambda x, t: eps(x, t).clamp(-1, 1), x)

    def by_numpy(eps, x):
        return ddim(eps, x) + torch.from_numpy(source.standard_normal(x.shape))

    def remembers(eps, x):
        calls.append(1)
        return ddim(eps, x) + 1e-3 * len(calls)

    refused(clipped, "function clipped is not affine on Gaussian, first in call 2")
    refused(by_numpy, "function by_numpy: two runs on the same start and noise differ")
    refused(remembers, "function remembers: two runs on the same start and noise differ")


def test_a_functions_declared_order_is_held_and_its_error_is_ours():
    """DDIM of the first order on ever more steps; declared 2 it is too slow."""

    def family(n):
        def ddim_of(eps, x):
            grid = torch.linspace(1, 0, n + 1, dtype=torch.float64)
            levels = sd.VP().levels(grid)
            for t, s in pairwise(levels):
                e = eps(x, t.t)
                x = s.alpha * (x - t.sigma * e) / t.alpha + s.sigma * e
            return x

        return verify.Function(ddim_of, declared=1)

    data = DATA.on(sd.VP())
    order = verify.order(family, data, sizes=(32, 64, 128))
    assert order.holds
    assert order.sampler == "function ddim_of"
    ours = verify.order(sd.Ancestral(eta=0.0), data, sizes=(32, 64, 128))
    assert order.distances == pytest.approx(ours.distances, rel=1e-6)
    assert "LOWER" in verify.order(family, data, sizes=(32, 64, 128), declared=2).verdict
