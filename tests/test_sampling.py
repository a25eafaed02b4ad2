"""The loop: seeds, purity, grids, and what is refused."""

import copy
import dataclasses
import functools
import gc
import io
import itertools
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import FIXED_STEP, OWN_STEPS, PARAMETERIZATIONS, PROCESSES, Recorded
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


def test_the_caller_may_write_into_the_batch_that_it_gave():
    x, model = torch.ones(2, 3), network()
    expected = sd.sample(model, sd.Heun(), x, steps=3)
    for state in sd.trajectory(model, sd.Heun(), x, steps=3):
        x.copy_(state.x)
    assert torch.equal(x, expected)


def test_hooks_are_found_inside_any_object_and_in_circles():
    """The method in the field of a plain class is checked as the bare one is."""

    class Around:
        def __init__(self, model):
            self.model, self.process, self.parent = model, model.process, self

        def __call__(self, x, level):
            return self.model(x, level)

    measurement = sd.inverse.Measurement(lambda x0: x0**3, 0.1, torch.ones(1, 3))
    model = Around(sd.inverse.DiffPIR(network(), measurement))
    with pytest.raises(ValueError, match="operator must be linear for DiffPIR"):
        sd.sample(model, sd.Heun(), torch.ones(2, 3), steps=2)


def test_the_grad_mode_of_the_caller_is_left_alone():
    states = sd.trajectory(network(), sd.Adams(1), torch.ones(2, 3), steps=3)
    for state in states:
        assert torch.is_grad_enabled()
        assert not state.x.requires_grad


def test_sample_is_the_end_of_the_trajectory_with_or_without_a_bar(monkeypatch):
    """On a terminal; a log file has no bar of a short run, see test_progress.py."""
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    model, x = network(), torch.ones(2, 3)
    *_, last = sd.trajectory(model, sd.Heun(), x, steps=4)
    assert torch.equal(last.x, sd.sample(model, sd.Heun(), x, steps=4, progress=True))
    assert "4/4" in shown.getvalue()


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


# ---- modes of networks ---------------------------------------------------------------------------


class Moody(torch.nn.Module):
    """A network whose output depends on its mode: dropout, and statistics of the batch."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inside = sd.networks.MLP((3,), width=16, depth=1, dropout=0.5)
            self.norm = torch.nn.BatchNorm1d(3)
        self.norm.eval()  # modes may differ

    def forward(self, x, c, cond=None):
        return self.norm(self.inside(x, c)) if cond is None else self.norm(x) * cond

    def modes(self):
        return [module.training for module in self.modules()]


CLASSIFIER = Moody()  # a global variable of the function below


def by_global(x, level, y):
    return -(CLASSIFIER(x, torch.full((len(x),), level.t)) - y).square().sum(1)


def entries():
    """The ways to evaluate a model, each with the network that it must find."""
    net, x = Moody(), sd.VP().prior((4, 3), seeds=range(4))
    model, other, y = sd.Denoiser(net, sd.VP(), sd.V()), network(), torch.ones(1, 3)
    chain, seeds = sd.Denoiser(net, sd.Discrete.linear(5), sd.V()), range(4)

    def guided(log_prob):
        return lambda: sd.sample(
            sd.models.ClassifierGuided(other, log_prob, y, 0.1), sd.Heun(), x, steps=3
        )

    def score(x, level, y, classifier=None):
        at = torch.full((len(x),), level.t)
        return -((classifier or net)(x, at) - y).square().sum(1)

    (level,) = sd.VP().levels(torch.tensor([0.5]))
    cost = sd.inverse.LogLikelihood(lambda x0, y: score(x0, level, y), y)
    return {
        "sample": (net, lambda: sd.sample(model, sd.Heun(), x, steps=3)),
        "trajectory": (net, lambda: next(sd.trajectory(model, sd.Adams(), x, steps=3)).x),
        "encode": (net, lambda: sd.encode(model, sd.Heun(), x, steps=3)),
        "adaptive": (net, lambda: sd.sample(model, sd.AdaptiveODE(1e-2, 1e-2), x)),
        "gradient": (net, lambda: sd.sample(model, sd.Heun(), x, steps=3, grad=True).detach()),
        "ddpm": (net, lambda: sd.DDPM(chain).sample((4, 3), seeds=seeds)),
        "one step": (net, lambda: sd.DDPM(chain).p_sample(x, 1)),
        "bound": (net, lambda: sd.DDPM(chain).bound(x, seeds=seeds).total),
        "closure": (net, guided(score)),
        "global": (CLASSIFIER, guided(by_global)),
        "partial": (net, guided(functools.partial(score, classifier=net))),
        "matched": (net, lambda: sd.sample(sd.match(model, sd.EDM()), sd.Heun(), x, steps=3)),
        "cost": (net, lambda: sd.sample(other, sd.inverse.DPS(sd.Heun(), cost, 0.1), x, steps=3)),
        "pigdm": (net, lambda: sd.sample(sd.inverse.PiGDM(other, cost), sd.Heun(), x, steps=3)),
    }  # fmt: skip


@pytest.mark.parametrize("entry", entries())
def test_networks_run_in_eval_mode_and_are_left_as_they_were(entry):
    net, call = entries()[entry]
    modes, before = net.modes(), copy.deepcopy(net.state_dict())
    assert True in modes
    assert False in modes
    state = torch.get_rng_state()
    made = call()
    assert torch.equal(made, call())
    assert net.modes() == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    training = [module for module in net.modules() if module.training]
    net.eval()
    assert torch.equal(made, call())
    for module in training:
        module.training = True


def test_modes_come_back_when_a_step_fails_and_between_the_steps():
    net = Moody()
    model, modes, x = sd.Denoiser(net, sd.VP(), sd.V()), net.modes(), torch.ones(2, 3)
    for _ in sd.trajectory(model, sd.Heun(), x, steps=3):
        assert net.modes() == modes

    def fails(t, s, like):
        assert not any(net.modes())
        raise KeyError

    with pytest.raises(KeyError):
        sd.sample(model, sd.Ancestral(), x, steps=3, noise=fails)
    assert net.modes() == modes


# ---- derivatives ---------------------------------------------------------------------------------


F64 = torch.float64


def conditional():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = sd.networks.MLP((2,), width=16, depth=2, cond=3).double()
    return sd.Denoiser(net, sd.VP(), sd.V())


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def check_derivative(model, sampler, weights, grads, rounding=1e-8, **arguments):
    """The derivative in one direction of x, cond and weights, against central differences.

    Their error is h^4 f^(5) / 30 + 1e-16 / h: some 1e-11 at h = 1e-3 to 1e-2 for functions of
    size 1 that change over lengths of 1.
    """
    start = numbers(3, 2), numbers(3, 3, seed=1), weights.detach().clone()
    directions = [numbers(*part.shape, seed=k) for k, part in enumerate(start, 2)]
    pull, h = numbers(3, 2, seed=9), 1e-3

    def end(e, grad=False):
        x, cond, w = (part + e * way for part, way in zip(start, directions, strict=True))
        with torch.no_grad():
            weights.copy_(w)
        inputs = [part.requires_grad_(bool(grad)) for part in (x, cond)]
        made = sd.sample(model, sampler, x, cond=cond, grad=grad, **arguments)
        return made, (*inputs, weights)

    values = {e: float((end(e)[0] * pull).sum()) for e in (-2 * h, -h, h, 2 * h)}
    expected = (8 * (values[h] - values[-h]) - (values[2 * h] - values[-2 * h])) / (12 * h)
    plain, _ = end(0.0)
    first = None
    for grad in grads:
        made, inputs = end(0.0, grad)
        assert_close(made.detach(), plain, rtol=1e-13, atol=1e-13)
        slopes = torch.autograd.grad((made * pull).sum(), inputs)
        slope = sum(float((a * b).sum()) for a, b in zip(slopes, directions, strict=True))
        assert slope == pytest.approx(expected, rel=rounding)
        if first is not None:
            assert torch.equal(made, first[0])
            assert all(map(torch.equal, slopes, first[1]))
        first = made, slopes


@pytest.mark.parametrize("name", FIXED_STEP)
def test_grad_differentiates_by_x_cond_and_weights(name):
    """A step that is computed again in the backward pass has the same noise: equal to the bit."""
    model, sampler = conditional(), FIXED_STEP[name]
    seeds = {"seeds": range(3)} if sampler.claims.noise else {}
    weights = next(model.network.parameters())
    check_derivative(model, sampler, weights, (True, "checkpoint"), steps=3, **seeds)


def test_steps_computed_again_have_the_entropy_of_the_first_time():
    model, made = conditional(), []
    for grad in (True, "checkpoint"):
        x = numbers(3, 2).requires_grad_()
        source = torch.Generator().manual_seed(0)
        end = sd.sample(
            model, sd.samplers.TorchSDE("srk"), x, steps=3, cond=numbers(3, 3), generator=source,
            grad=grad,
        )  # fmt: skip
        made.append(torch.autograd.grad(end.sum(), x)[0])
    assert torch.equal(*made)


def test_adaptive_solvers_differentiate_the_steps_that_they_have_chosen():
    """The flow of Gaussian data is affine in x: dx_0/dx_1 = (C_0 / C_1)^(1/2) in closed form."""
    model, x = sd.exact.Gaussian(sd.VP(), 0.7, 0.25), numbers(4, 1).requires_grad_()
    (expected,) = torch.autograd.grad(model.flow(x, 1.0, 0.0).sum(), x)
    for solver in (sd.AdaptiveODE(1e-6, 1e-6), sd.TorchODE(rtol=1e-6, atol=1e-6)):
        (slope,) = torch.autograd.grad(sd.sample(model, solver, x, grad=True).sum(), x)
        assert_close(slope, expected, rtol=0, atol=1e-5)
    model = conditional()
    weights = next(model.network.parameters())
    check_derivative(model, sd.AdaptiveSDE(0.1, 0.1), weights, (True,), seeds=range(3))


def test_a_lost_derivative_warns_and_a_missing_one_is_refused():
    model, cond, x = conditional(), numbers(3, 3), numbers(3, 2)
    with pytest.warns(UserWarning, match=r"x requires a gradient.*use grad=True"):
        sd.sample(model, sd.Heun(), x.clone().requires_grad_(), steps=2, cond=cond)
    with pytest.warns(UserWarning, match=r"cond requires a gradient.*use grad=True"):
        next(sd.trajectory(model, sd.Heun(), x, steps=2, cond=cond.clone().requires_grad_()))
    with torch.no_grad():
        sd.sample(model, sd.Heun(), x.clone().requires_grad_(), steps=2, cond=cond)
    smc = sd.inverse.SMC(sd.inverse.Measurement(torch.nn.Identity(), 0.1, x), 3)
    for sampler, grad, named in (
        (sd.samplers.ScipyODE(), True, "ScipyODE, which has no derivative"),
        (smc, True, "SMC, which has no derivative"),
        (sd.AdaptiveODE(), "checkpoint", "AdaptiveODE, one step"),
        (sd.Heun(), "checkpoints", "grad must be one of"),
    ):
        steps = None if sampler.claims.adaptive else 2
        with pytest.raises(ValueError, match=named):
            sd.sample(model, sampler, x, steps=steps, cond=cond, grad=grad)
    with torch.inference_mode():
        made = sd.sample(model, sd.Heun(), x + 0, steps=2, cond=cond, grad=True)
    assert made.requires_grad


# ---- from data to noise --------------------------------------------------------------------------


DETERMINISTIC = {
    "heun": (sd.Heun(), 2), "ddim": (sd.Ancestral(eta=0.0), 1), "adams": (sd.Adams(3), 3),
    "adams in a frame": (sd.Adams(2, frame=sd.grids.frames.GaussianFrame.of(
        torch.zeros(1), torch.eye(1))), 2),
    "dpm-solver": (sd.DPMSolver(2), 2), "dpm-solver 3": (sd.DPMSolver(3), 2),
}  # fmt: skip


@pytest.mark.parametrize("process", [sd.VP(), sd.EDM(), sd.RectifiedFlow()], ids=str)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_encode_tends_to_the_flow_at_the_order_of_the_sampler(name, process):
    sampler, order = DETERMINISTIC[name]
    model = sd.exact.Gaussian(process, 0.7, 0.25)
    x0 = model.sample(50, torch.Generator().manual_seed(0))[:, None]
    exact, sizes = model.flow(x0, 0.0, 1.0), (32, 64, 128)
    noises = {n: sd.encode(model, sampler, x0, steps=n) for n in sizes}
    back = [sd.sample(model, sampler, noise, steps=n) for n, noise in noises.items()]
    for ends, goal in ((noises.values(), exact), (back, x0)):
        errors = [float((end - goal).norm()) for end in ends]
        assert np.polyfit(np.log(sizes), np.log(errors), 1)[0] < 0.2 - order


@pytest.mark.parametrize("solver", [sd.TorchODE(), sd.samplers.ScipyODE()], ids=str)
def test_solvers_with_steps_of_their_own_encode_within_their_tolerance(solver):
    model = sd.exact.Gaussian(sd.VP(), 0.7, 0.25)
    x0 = model.sample(50, torch.Generator().manual_seed(0))[:, None]
    exact = model.flow(x0, 0.0, 1.0)
    assert (sd.encode(model, solver, x0) - exact).abs().max() < 10 * solver.atol


def test_a_mixture_comes_back_from_its_noise():
    model = sd.exact.GaussianMixture(
        sd.VP(), [0.4, 0.6], torch.tensor([[1.0, -1.0], [-1.0, 0.5]], dtype=F64), [0.25, 0.25]
    )
    x0 = model.sample(100, torch.Generator().manual_seed(0))
    noise = sd.encode(model, sd.Heun(), x0, steps=50)
    back = sd.sample(model, sd.Heun(), noise, steps=50)
    assert (back - x0).square().mean().sqrt() < 1e-3
    times = sd.Heun().grid(sd.VP(), 50)
    assert torch.equal(noise, sd.encode(model, sd.Heun(), x0, times=times.flip(0), progress=True))


@pytest.mark.parametrize("solver", [sd.Heun(), sd.Adams(), sd.DPMSolver(), sd.TorchODE()], ids=str)
def test_encode_evaluates_a_model_where_it_was_trained_only(solver):
    """Below the trained range the path is alpha x0, so an error of order u_end^2 remains."""
    low, high = -8.0, 9.0
    model = Recorded(sd.exact.Gaussian(sd.VP(), 0.7, 0.25))
    model.trained = sd.models.LogSNRRange(low, high)
    x0 = model.model.sample(50, torch.Generator().manual_seed(0))[:, None]
    made = sd.encode(model, solver, x0, steps=None if solver.claims.adaptive else 64)
    log_snrs = [level.log_snr for level in model.levels]
    assert min(log_snrs) > low - 1e-6
    assert max(log_snrs) < high + 1e-6
    exact = model.model.flow(x0, 0.0, sd.VP().time(low).item())
    end = 1 / (1 + math.exp(high / 2))
    assert (made - exact).abs().max() < 20 * end**2 + 3e-3


STEPS_DOWN = (
    sd.Ancestral(), sd.EulerMaruyama(), sd.VelocityMultistep(eta=0.0), sd.AdaptiveODE(),
    sd.AdaptiveSDE(), sd.DPMSolver(eta=0.5), sd.samplers.Langevin(sd.Heun()),
    sd.samplers.Churn(sd.Heun()), sd.samplers.TorchSDE("srk"),
    sd.inverse.DPS(sd.Heun(), sd.inverse.Measurement(torch.nn.Identity(), 0.1, torch.ones(1, 3))),
    sd.inverse.Replacement(sd.Heun(), torch.ones(1, 3), torch.tensor([[1.0, 0, 0]])),
)  # fmt: skip


@pytest.mark.parametrize("sampler", STEPS_DOWN, ids=lambda s: type(s).__name__)
def test_samplers_that_only_step_down_refuse_to_step_up(sampler):
    steps = None if sampler.claims.adaptive else 3
    with pytest.raises(ValueError, match=f"times must decrease for {type(sampler).__name__}; got"):
        sd.encode(network(), sampler, torch.ones(2, 3), steps=steps)


def test_times_of_encode_increase_and_those_of_sample_decrease():
    model, x = network(), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"increase from data to noise.*reverse them$"):
        sd.encode(model, sd.Heun(), x, times=[1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"reverse them, or use encode$"):
        sd.sample(model, sd.Heun(), x, times=[0.0, 0.5, 1.0])


# ---- what is not finite, and noise of the caller -------------------------------------------------


@pytest.mark.parametrize("sampler", FIXED_STEP.values(), ids=str)
def test_samples_that_are_not_finite_warn_once(sampler):
    model, x = network(), torch.ones(4, 3)
    with torch.no_grad():
        model.network.layers[-1].bias[0] = math.inf
    for run in (sd.sample, lambda *a, **k: list(sd.trajectory(*a, **k))):
        with pytest.warns(RuntimeWarning) as caught:
            run(model, sampler, x, steps=2, seeds=range(4))
        (message,) = [str(each.message) for each in caught]
        name = type(sampler).__name__
        assert message.startswith("4 of 4 samples are not finite at the end, the first at row 0")
        assert message.endswith(f"{name} or the model diverged")
        assert caught[0].filename == __file__
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match="x must be finite"):
        sd.sample(network(), sampler, x, steps=2)


@pytest.mark.parametrize(
    ("noise", "named"),
    [
        (lambda like: torch.zeros(3), r"shape of like, \(2, 3\); got \(3,\)"),
        (lambda like: torch.zeros(2, 1), r"shape of like, \(2, 3\); got \(2, 1\)"),
        (lambda like: torch.zeros(1, 2, 3), r"shape of like, \(2, 3\); got \(1, 2, 3\)"),
        (lambda like: like.double(), r"dtype of like, torch.float32; got torch.float64"),
        (lambda like: like.to("meta"), r"device of like, cpu; got meta"),
        (lambda like: np.zeros(like.shape), r"noise must return a tensor"),
        (lambda like: None, r"noise must return a tensor; got None"),
    ],
)
def test_injected_noise_that_would_be_broadcast_is_refused(noise, named):
    chain, x = sd.DDPM(network(sd.Discrete.linear(5))), torch.ones(2, 3)
    for call in (
        lambda source: sd.sample(network(), sd.Ancestral(), x, steps=2, noise=source),
        lambda source: sd.sample(network(), sd.EulerMaruyama(), x, steps=2, noise=source),
        lambda source: chain.p_sample(x, 3, noise=source),
        lambda source: chain.q_chain(x, 3, noise=source),
        lambda source: chain.bound(x, noise=source),
    ):
        with pytest.raises((ValueError, TypeError), match=named):
            call(lambda t, s, like: noise(like))
