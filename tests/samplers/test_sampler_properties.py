"""What every sampler promises for any process, model, grid, shape, type, layout and seed."""

import itertools
import random

import numpy as np
import strategies as draws
import torch
from hypothesis import strategies as st
from strategies import refused
from torch.testing import assert_close

import sde_diffusion as sd

TINY = np.finfo(np.float64).tiny

every_sampler = draws.for_every("samplers", draws.SAMPLERS)


# ---- every sampler -----------------------------------------------------------------------------


def source(sampler, seeds, shared=False):
    """A seed per sample; or a generator, if it is shared or torchsde's own path needs one."""
    if shared or draws.draws_its_own_path(sampler):
        return {"generator": torch.Generator().manual_seed(sum(seeds) % 2**62)}
    return {"seeds": seeds}


def one_seed_each(x):
    return st.lists(draws.SEEDS, min_size=len(x), max_size=len(x))


def all_of(x):
    """The whole memory that a batch is a view of."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def global_states():
    numpys = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpys[1].tolist(), numpys[2:], random.getstate()


@every_sampler
def test_samples_are_finite_and_keep_shape_dtype_and_device(samplers, data):
    """Any shape, size 0 included, any type, layout, process, sampler and grid."""
    x = data.draw(draws.batches())
    job = data.draw(draws.jobs(x, samplers))
    made = job.run(x, **source(job.sampler, data.draw(one_seed_each(x))))
    assert (made.shape, made.dtype, made.device) == (x.shape, x.dtype, x.device)
    assert bool(made.isfinite().all())


@every_sampler
def test_inputs_and_global_generators_are_untouched_and_nothing_is_remembered(samplers, data):
    """Nor is the memory changed that the batch is a view of. After another run by the same sampler
    the first one comes out bit for bit again.

    beartype, which checks the package under pytest, takes from `random` to look at one seed in a
    list; a generator it lets pass.
    """
    x = data.draw(draws.batches(dtypes=draws.FULL))
    job = data.draw(draws.jobs(x, samplers))
    seed = data.draw(draws.SEEDS)

    def run(x, seed):
        return job.run(x, generator=torch.Generator().manual_seed(seed))

    before, states = all_of(x).clone(), global_states()
    made = run(x, seed)
    run(0.5 * x, seed + 1)
    assert torch.equal(run(x, seed), made)
    assert torch.equal(all_of(x), before)
    assert global_states() == states


def within(figure, job, x, seeds):
    """The figure's share of the largest state on the way: what rounding by other loops comes to."""
    if not x.numel():
        return 0.0
    return figure * job.magnified * max(job.largest(x, **source(job.sampler, seeds)), 1.0)


@draws.for_every("samplers", draws.ROW_BY_ROW)
def test_one_seed_gives_one_result_at_any_batch_size_and_split(samplers, data):
    """1e-12 in float64, 1e-5 in float32, as loops over other sizes round otherwise: a fused
    multiply-add here, two operations there. The prior has no loop and is equal in every bit."""
    rows = data.draw(st.integers(2, 5))
    shape = (rows, *data.draw(draws.shapes())[1:])
    x = data.draw(draws.batches(shape=shape, dtypes=draws.FULL))
    job = data.draw(draws.jobs(x, samplers))
    seeds = data.draw(one_seed_each(x))
    whole, prior = job.run(x, seeds=seeds), job.model.process.prior(shape, seeds=seeds)
    bound = within(1e-12 if x.dtype == torch.float64 else 1e-5, job, x, seeds)
    cuts = sorted({0, rows, *data.draw(st.sets(st.integers(1, rows - 1), min_size=1))})
    for start, end in itertools.pairwise(cuts):
        part = job.run(x[start:end], seeds=seeds[start:end])
        assert_close(part, whole[start:end], rtol=0, atol=bound)
        part = job.model.process.prior((end - start, *shape[1:]), seeds=seeds[start:end])
        assert torch.equal(part, prior[start:end])


@every_sampler
def test_layout_does_not_matter(samplers, data):
    """1e-12 in float64, 1e-5 in float32, for the same reason. Where the error norm of a solver
    rounds otherwise, its steps and with them its error, 1e-3, move by some 1e-13 of themselves."""
    layout = data.draw(st.sampled_from([name for name in draws.LAYOUTS if name != "contiguous"]))
    x = data.draw(draws.batches(dtypes=draws.FULL, layouts=[layout]))
    job = data.draw(draws.jobs(x, samplers))
    seeds, shared = data.draw(one_seed_each(x)), data.draw(st.booleans(), label="one generator")
    made = job.run(x, **source(job.sampler, seeds, shared))
    plain = job.run(x.contiguous(), **source(job.sampler, seeds, shared))
    bound = within(1e-12 if x.dtype == torch.float64 else 1e-5, job, x, seeds)
    assert_close(made, plain, rtol=0, atol=bound)


@every_sampler
def test_a_batch_without_dimensions_is_one_named_error(samplers, data):
    """By whatever sampler, chain or loss it is that gets it."""
    x = torch.tensor(data.draw(st.floats(-3, 3)), dtype=data.draw(st.sampled_from(draws.FLOATS)))
    job = data.draw(draws.jobs(x, samplers))
    refused(lambda: job.run(x), r"x must be a floating-point batch \(B, ...\); got shape \(\)")
    chain = data.draw(draws.betas(max_steps=40, low=1e-4, high=0.99))
    ddpm = sd.DDPM(sd.exact.Gaussian(sd.Discrete(chain)))
    i = data.draw(st.integers(1, len(chain)))
    for attempt in (
        lambda: job.model.process.level(0.5, x),
        lambda: ddpm.q_sample(x, i, x),
        lambda: ddpm.q_chain(x, i),
        lambda: ddpm.q_posterior(x, x, i),
        lambda: ddpm.p_sample(x, i),
        lambda: ddpm.p_loss(x, i, x),
        lambda: ddpm.negative_elbo(x),
        lambda: ddpm.bound(x),
    ):
        words = r"(x|x0|like|the batch) must be a floating-point batch \(B, ...\); got shape"
        refused(attempt, words)
