"""torch.compile and mixed precision: one graph for all steps, no break in it; float32 states."""

import warnings
from itertools import pairwise

import pytest
import torch
from cases import FIXED_STEP

import sde_diffusion as sd

TORCHSDE = {"torch-sde"}  # its own Python loop, which is not ours to trace
SAMPLERS = {name: sampler for name, sampler in FIXED_STEP.items() if name not in TORCHSDE}
# Whole steps that torch 2.15 cannot compile once for all: these look up levels between those of
# the grid, on the CPU, and those need expm1 of a float that changes, on which dynamo specializes.
NOT_WHOLE = {
    "churn-heun-s-churn-10", "langevin-heun", "dpm-solver", "dpm-solver-k-3", "dpm-solver-eta-1",
    "velocity-multistep",
}  # fmt: skip


class Network(torch.nn.Module):
    """The package's own are checked at run time here, which dynamo cannot look through."""

    float32_noise_input = True

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 16), torch.nn.Linear(16, 2)

    def forward(self, x, c):
        return self.last(torch.tanh(self.first(torch.cat([x, c[:, None].to(x.dtype)], 1))))


def denoiser():
    torch.manual_seed(0)
    return sd.Denoiser(Network(), sd.VP(), sd.V())


class Counting:
    """A backend that runs the graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


def zero(t, s, like):
    return torch.zeros_like(like)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # The weights of Adams are cached; dynamo says that it looks through the cache.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_compiled_network_is_one_graph_for_all_levels(name):
    backend, model = Counting(), denoiser()
    network = torch.compile(model.network, backend=backend, fullgraph=True)
    compiled, x = sd.Denoiser(network, model.process, model.parameterization), torch.ones(4, 2)
    made = sd.sample(compiled, SAMPLERS[name], x, steps=6, noise=zero)
    assert torch.equal(made, sd.sample(model, SAMPLERS[name], x, steps=6, noise=zero))
    assert backend.graphs == 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith("adams") else [])
        for name in sorted(SAMPLERS.keys() - NOT_WHOLE)
    ],
)  # to trace the weights of Adams takes half a minute
def test_a_compiled_step_has_no_break_and_as_many_graphs_at_20_steps_as_at_12(name):
    """fullgraph=True raises at a break. The first steps, the inner ones and the last differ."""
    graphs, sampler, model = [], SAMPLERS[name], denoiser()
    for steps in (12, 20):
        torch._dynamo.reset()
        backend = Counting()
        step = torch.compile(sampler.step, backend=backend, fullgraph=True)
        x, memory = torch.ones(4, 2), None
        times = sampler.grid(model.process, steps)
        levels = model.process.rated_levels(times)
        with torch.no_grad():
            for t, s in pairwise(levels):
                x, memory = step(model, x, t, s, zero, memory)
        plain = sd.sample(model, sampler, torch.ones(4, 2), steps=steps, noise=zero)
        torch.testing.assert_close(x, plain, rtol=1e-5, atol=1e-5)
        graphs.append(backend.graphs)
    assert graphs[0] == graphs[1] <= 8


@pytest.mark.parametrize("name", FIXED_STEP)
def test_a_bf16_network_leaves_the_state_in_float32(name):
    """The network rounds its answers by 2^-9; nothing else does."""
    model, x = denoiser(), torch.ones(4, 2)
    whole = sd.sample(model, FIXED_STEP[name], x, steps=6, noise=zero)
    model.network.bfloat16()
    states = list(sd.trajectory(model, FIXED_STEP[name], x, steps=6, noise=zero))
    assert all(state.x.dtype == torch.float32 for state in states)
    made = states[-1].x
    assert not torch.equal(made, whole)
    # two layers and their input, each rounded by 2^-9, along a path some 6 units of x long
    assert float((made - whole).abs().max()) <= 18 * 2**-9 * max(1.0, float(whole.abs().max()))
    assert not torch.equal(made, made.bfloat16().float())


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_fixed_step_makes_the_host_wait_for_the_gpu(name):
    model, x = denoiser().cuda(), torch.ones(4, 2, device="cuda")
    source = torch.Generator("cuda").manual_seed(0)
    sd.sample(model, SAMPLERS[name], x, steps=6, generator=source)  # what is loaded once
    try:
        torch.cuda.set_sync_debug_mode("error")
        sd.sample(model, SAMPLERS[name], x, steps=6, generator=source)
        sd.sample(model, SAMPLERS[name], x, steps=6, seeds=range(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
