"""The loop: seeds, purity, grids, and what is refused."""

import dataclasses
import gc
import itertools
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import FIXED_STEP, OWN_STEPS, PARAMETERIZATIONS, PROCESSES
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.noise.sources import Seeded

STOCHASTIC = {name: FIXED_STEP[name] for name in ("ancestral", "euler-maruyama", "torch-sde")}


def network(process=PROCESSES["vp"], parameterization=PARAMETERIZATIONS["v"]):
    """An untrained network with weights large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sd.Denoiser(sd.networks.MLP((3,), width=32, fourier=8), process, parameterization)


@pytest.mark.parametrize("sampler", FIXED_STEP.values(), ids=FIXED_STEP.keys())
def test_a_sample_does_not_depend_on_its_batch_mates(sampler):
    """Matrix products of other sizes round otherwise: 1e-5 in float32, 1e-12 in float64."""
    model = network()
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = model.to(dtype)

        def drawn(seeds, model=model, dtype=dtype):
            x = sd.VP().prior((len(seeds), 3), seeds=seeds, dtype=dtype)
            return sd.sample(model, sampler, x, steps=12, seeds=seeds)

        whole = drawn(range(64))
        for size in (16, 1):
            parts = [drawn(range(k, k + size)) for k in range(0, 64, size)]
            assert_close(torch.cat(parts), whole, rtol=bound, atol=bound)


def test_the_noise_itself_is_bit_equal_at_any_batch_size():
    like = torch.empty(64, 3)
    whole, one = Seeded(range(64)), [Seeded([k]) for k in range(64)]
    for _ in range(3):
        rows = [source(0.5, 0.4, like[:1]) for source in one]
        assert torch.equal(whole(0.5, 0.4, like), torch.cat(rows))


@pytest.mark.parametrize("sampler", STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_one_seed_gives_one_result_and_two_seeds_give_two(sampler):
    model, x = network(), torch.ones(4, 3)
    for given in ("generator", "seeds"):
        drawn = []
        for seed in (1, 1, 2):
            source = torch.Generator().manual_seed(seed) if given == "generator" else [seed] * 4
            drawn.append(sd.sample(model, sampler, x, steps=5, **{given: source}))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def test_the_start_is_independent_of_the_path_that_the_same_seeds_drive():
    """A start equal to the first noise would correlate perfectly."""
    n = 4000
    start = sd.VP().prior((n,), seeds=range(n))
    first = Seeded(range(n))(1.0, 0.9, start)
    assert abs(float((start * first).mean())) < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("sampler", (FIXED_STEP | OWN_STEPS).values(), ids=str)
def test_sampling_is_pure(sampler):
    """Global generators, the input and its layout are untouched; layout does not matter."""
    model = network()
    base = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = base.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    steps = None if sampler in OWN_STEPS.values() else 6
    made = sd.sample(model, sampler, base.T, steps=steps, seeds=range(4))
    again = sd.sample(model, sampler, base.T.contiguous(), steps=steps, seeds=range(4))
    assert_close(made, again, rtol=1e-12, atol=1e-12)
    assert torch.equal(base, before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    expanded = torch.ones(1, 3).expand(4, 3)
    sd.sample(model, sampler, expanded, steps=steps, seeds=range(4))
    assert torch.equal(expanded, torch.ones(4, 3))


FACTORS = (FIXED_STEP | OWN_STEPS, PROCESSES, PARAMETERIZATIONS, (1, 2, 3, 7, 50))


def pairwise_cover(*factors):
    """One case for each pair of the first two factors; the others are chosen greedily, each case
    with as many pairs as possible that no case has had."""
    values = [list(factor) for factor in factors]
    both = itertools.combinations(enumerate(values), 2)
    missing = {(i, a, j, b) for (i, first), (j, second) in both for a in first for b in second}
    for case in itertools.product(*values[:2]):
        for k in range(2, len(values)):
            pairs = {c: [(i, a, k, c) for i, a in enumerate(case)] for c in values[k]}
            case = (*case, max(values[k], key=lambda c: len(missing.intersection(pairs[c]))))
        missing -= {(*a, *b) for a, b in itertools.combinations(enumerate(case), 2)}
        yield case
    assert not missing


def check_finite(process, sampler, parameterization, steps, dtype):
    model = network(PROCESSES[process], PARAMETERIZATIONS[parameterization])
    own = sampler in OWN_STEPS
    sampler = (FIXED_STEP | OWN_STEPS)[sampler]
    x = model.process.prior((2, 3), seeds=[0, 1], dtype=dtype)
    silent = model.process.alpha(1.0) == 0
    refused = silent and parameterization in ("eps", "score")
    refused = refused and not isinstance(sampler, sd.EulerMaruyama | sd.samplers.TorchSDE)
    if refused:  # at t = 1 alpha is 0, where these parameterizations say nothing of x0
        with pytest.raises(ValueError, match="alpha = 0"):
            sd.sample(model, sampler, x, steps=None if own else steps, seeds=[0, 1])
        return
    if own and parameterization == "score" and model.process.prior_std > 1:
        # eps is sigma times what an untrained network says: a flow too steep, or without bound
        sampler = dataclasses.replace(sampler, max_calls=500)
        try:
            sd.sample(model, sampler, x, seeds=[0, 1])
        except sd.SolverError as error:
            named = r"model is not finite at t=|reached max_calls|overflows at t="
            assert re.search(named, str(error))  # noqa: PT017 either this or a finite end
            return
    made = sd.sample(model, sampler, x, steps=None if own else steps, seeds=[0, 1])
    assert made.dtype == dtype
    assert made.shape == x.shape
    assert bool(made.isfinite().all())


@pytest.mark.parametrize(
    ("sampler", "process", "parameterization", "steps"), list(pairwise_cover(*FACTORS))
)
def test_samples_are_finite_or_refused_by_name(process, sampler, parameterization, steps):
    check_finite(process, sampler, parameterization, steps, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sampler", "process", "parameterization", "steps"), list(itertools.product(*FACTORS))
)
def test_samples_are_finite_in_the_full_product(process, sampler, parameterization, steps, dtype):
    check_finite(process, sampler, parameterization, steps, dtype)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3), (2, 1, 2, 3, 2), (0, 3)])
def test_batches_of_any_rank_and_size(shape):
    model = sd.exact.Gaussian(sd.VP(), 0.2, 0.5)
    x = sd.VP().prior(shape, seeds=range(shape[0]), dtype=torch.float64)
    for sampler in FIXED_STEP.values():
        assert sd.sample(model, sampler, x, steps=3, seeds=range(shape[0])).shape == shape
    for solver in (*OWN_STEPS.values(), sd.AdaptiveSDE()):
        made = sd.sample(model, solver, x, generator=torch.Generator().manual_seed(0))
        assert made.shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", (FIXED_STEP | OWN_STEPS).values(), ids=str)
def test_half_precision_batches_keep_their_type(sampler, dtype):
    """States of a Gaussian's path stay within 6; half precision holds 3 digits of them."""
    model = sd.exact.Gaussian(sd.VP(), 0.2, 0.5)
    x = sd.VP().prior((4, 2), seeds=range(4), dtype=dtype)
    made = sd.sample(
        model, sampler, x, steps=None if sampler in OWN_STEPS.values() else 8, seeds=range(4)
    )
    assert made.dtype == dtype
    assert made.abs().max() < 6


def test_a_network_told_the_log_snr_is_finite_at_the_ends_too():
    model = network(sd.RectifiedFlow())
    model.noise_input = sd.models.LogSNR()
    x = sd.RectifiedFlow().prior((2, 3), seeds=[0, 1])
    for sampler in (sd.Adams(3), sd.Heun(), sd.Ancestral(), sd.TorchODE()):
        steps = None if isinstance(sampler, sd.TorchODE) else 5
        assert sd.sample(model, sampler, x, steps=steps, seeds=[0, 1]).isfinite().all()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_drift_and_diffusion_are_computed_for_a_grid_at_once_or_not_at_all(process, monkeypatch):
    asked = []
    times, rates = sd.grids.Usual()(process, 50, process.t_max), type(process)._rates
    model, x = network(process), torch.ones(2, 3)
    monkeypatch.setattr(
        type(process), "_rates", lambda self, t: asked.append(len(t)) or rates(self, t)
    )
    for sampler in FIXED_STEP.values():
        asked.clear()
        sd.sample(model, sampler, x, times=times, seeds=[0, 1])
        assert asked == ([len(times)] if sampler.claims.rates else [])


def test_memory_does_not_grow_with_the_number_of_steps():
    def live(steps):
        model, x = network(), torch.ones(2, 3)
        peak = 0
        for k, _ in enumerate(sd.trajectory(model, sd.Adams(3), x, steps=steps)):
            if k % 10 == 9:
                gc.collect()
                peak = max(peak, sum(type(o) is torch.Tensor for o in gc.get_objects()))
        return peak

    assert live(100) <= live(20) + 2


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", (FIXED_STEP | OWN_STEPS).values(), ids=str)
def test_samples_on_a_gpu_are_those_of_the_cpu(sampler):
    """The noise is drawn on the CPU; what is left is the rounding of matrix products."""
    steps = None if sampler in OWN_STEPS.values() else 12
    x = sd.VP().prior((8, 3), seeds=range(8), dtype=torch.float64)
    model = network().double()
    here = sd.sample(model, sampler, x, steps=steps, seeds=range(8))
    there = sd.sample(model.cuda(), sampler, x.cuda(), steps=steps, seeds=range(8))
    assert there.is_cuda
    assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)


def test_the_grad_mode_of_the_caller_is_left_alone():
    states = sd.trajectory(network(), sd.Adams(1), torch.ones(2, 3), steps=3)
    for state in states:
        assert torch.is_grad_enabled()
        assert not state.x.requires_grad


def test_sample_is_the_end_of_the_trajectory_with_or_without_a_bar(capsys):
    model, x = network(), torch.ones(2, 3)
    *_, last = sd.trajectory(model, sd.Heun(), x, steps=4)
    assert torch.equal(last.x, sd.sample(model, sd.Heun(), x, steps=4, progress=True))
    assert "4/4" in capsys.readouterr().err


def test_an_injected_source_gets_every_interval():
    asked = []

    def noise(t, s, like):
        asked.append((t, s))
        return torch.zeros_like(like)

    times = [1.0, 0.5, 0.2, 0.0]
    sd.sample(network(), sd.EulerMaruyama(), torch.ones(2, 3), times=times, noise=noise)
    assert asked == [(1.0, 0.5), (0.5, 0.2), (0.2, 0.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": [0.0, 1.0]}, r"times\[0\]=0, times\[1\]=1; reverse them"),
        ({"times": [1.0, 0.5, 0.5]}, "must decrease"),
        ({"times": [1.0]}, "at least two"),
        ({"times": [2.0, 0.0]}, r"\[0, 1\]"),
        ({"times": [math.nan, 0.0]}, "times must be finite"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": 3, "grid": torch.linspace(1, 0, 4)}, "grid must be a grid"),
        ({"steps": 3, "grid": sd.grids.Karras}, "got the class Karras; make one"),
        ({"steps": True}, "steps"),
        ({}, "steps"),
        ({"steps": 3, "times": [1.0, 0.0]}, "times must be given alone"),
        ({"steps": 3, "seeds": [1]}, "seeds"),
        ({"steps": 3, "seeds": [1, -2]}, "seed"),
        ({"steps": 3, "seeds": [1.5, 2]}, "seed"),
        ({"steps": 3, "seeds": [2**128, 2]}, "seed"),
        ({"steps": 3, "seeds": [1, 2], "generator": torch.Generator()}, "together"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sd.sample(network(), sd.Ancestral(), torch.ones(2, 3), **arguments)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(2, 3, dtype=torch.int64)])
def test_batches_that_are_none_are_refused(x):
    with pytest.raises(ValueError, match="floating-point batch"):
        sd.sample(network(), sd.Ancestral(), x, steps=2)


@pytest.mark.parametrize("solver", [*OWN_STEPS.values(), sd.AdaptiveSDE()], ids=str)
def test_solvers_that_choose_their_steps_refuse_steps(solver):
    with pytest.raises(ValueError, match="steps must be left out"):
        sd.sample(network(), solver, torch.ones(2, 3), steps=5)


def test_solvers_in_t_refuse_to_start_where_the_drift_is_not_defined():
    model = sd.exact.Gaussian(sd.RectifiedFlow(), 0.0, 1.0)
    for sampler in (sd.EulerMaruyama(), sd.samplers.TorchSDE()):
        with pytest.raises(ValueError, match=r"RectifiedFlow are defined.*0\.999"):
            sd.sample(model, sampler, torch.ones(2, 3), times=[1.0, 0.5, 0.0])


FORKS = """
import os, warnings, torch, sde_diffusion as sd
exact, points = sd.exact.Gaussian(sd.VP()), sd.data.Points(torch.zeros(1, 2))
recipe = sd.training.Recipe(steps=1, batch_size=1)
state = sd.training.TrainState(sd.Denoiser(sd.networks.MLP(width=2), sd.VP()), recipe)
for threads in (2, 1):
    torch.set_num_threads(threads)
    if not os.fork():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sd.sample(exact, sd.Heun(), sd.prior(exact, (1, 2)), steps=1)
            next(sd.training.train(state, points))
        print(threads, sum("start it by spawn" in str(w.message) for w in caught), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_says_that_torchs_threads_are_not_in_it():
    """Large operations would wait for them forever; these are small. One thread needs no other.

    In a process of its own: torch refuses autograd in a fork of one that has differentiated.
    """
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["2 3", "1 0"], done.stderr
