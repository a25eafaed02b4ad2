"""Half-precision batches: coefficients and squares are those of float32, results are rounded."""

import pytest
import torch
from cases import SAMPLERS, gaussian
from torch import nn
from torch.testing import assert_close

import sde_diffusion as sd

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@HALF
def test_an_exact_model_knows_the_squares_of_large_numbers(dtype):
    """300^2 is above the largest number of float16."""
    model, x = gaussian(sd.EDM()), torch.tensor([[300.0], [-1000.0], [0.5]], dtype=dtype)
    half, full = model(x, 0.9), model(x.double(), 0.9)
    for name in ("x0", "eps"):
        assert getattr(half, name).dtype == dtype
        rounding = torch.finfo(dtype).eps
        assert_close(getattr(half, name).double(), getattr(full, name), rtol=rounding, atol=1e-6)
    density = model.log_prob(x, 0.9).double()
    assert_close(density, model.log_prob(x.double(), 0.9), rtol=1e-6, atol=0)
    flow = model.flow(x, 0.9, 0.1)
    assert_close(flow.double(), model.flow(x.double(), 0.9, 0.1), rtol=rounding, atol=0)


@HALF
def test_losses_square_in_float32(dtype):
    """EDM's errors reach 80^2 here, beyond the 256 whose square float16 holds."""
    denoiser = sd.Denoiser(sd.networks.MLP(width=8), sd.EDM(), sd.X0())
    x0 = torch.tensor([[400.0, 1.0], [-300.0, 0.0]], dtype=dtype)
    eps, t = torch.tensor([[1.0, -1.0], [2.0, 0.5]], dtype=dtype), torch.tensor([0.3, 1.0])
    loss = sd.denoising_loss(denoiser, x0, t, eps)
    assert loss.dtype == torch.float32
    assert_close(loss, sd.denoising_loss(denoiser, x0.float(), t, eps.float()))


@HALF
@pytest.mark.parametrize("name", [name for name in SAMPLERS if "torch-sde" not in name])
@pytest.mark.parametrize("process", [sd.EDM(), sd.VE()], ids=["edm", "ve"])
def test_a_half_precision_sample_is_the_rounded_one_of_float32(name, process, dtype):
    """On one path: the state is in float32, so many small steps are not lost."""
    sampler, x = SAMPLERS[name], process.prior((6, 1), seeds=range(6), dtype=dtype)
    options = {} if sampler.claims.adaptive else {"steps": 30}
    options |= {"seeds": range(6)} if sampler.claims.noise else {}
    half, full = (sd.sample(gaussian(process), sampler, v, **options) for v in (x, x.float()))
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


def test_a_prediction_is_combined_in_float32():
    """x0 = x / alpha - sigma / alpha eps, a difference of numbers of 150."""
    (level,) = sd.VP().levels(torch.ones(1))
    x0, eps = torch.tensor([[0.25], [-3.0]]), torch.tensor([[1.0], [-0.5]])
    x = (level.alpha * x0 + level.sigma * eps).half()
    found = sd.models.prediction.from_network(x, eps.half(), level, sd.Eps()).x0
    exact = (x.double() - level.sigma * eps.double()) / level.alpha
    assert_close(found.double(), exact, rtol=2.0**-11, atol=4 * 150 * 2.0**-24)


class Recording(nn.Module):
    """A half-precision network that keeps its noise input."""

    def __init__(self, wide):
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 2).bfloat16(), []
        self.float32_noise_input = wide

    def forward(self, x, c):
        self.seen.append(c)
        return self.layer(x)


def index(step):
    (level,) = sd.Discrete.linear().levels(torch.tensor([step / 1000], dtype=torch.float64))
    return level


def test_a_network_in_bfloat16_can_tell_step_998_from_1000():
    network = Recording(wide=True)
    denoiser = sd.Denoiser(
        network, sd.Discrete.linear(), noise_input=sd.models.TimestepIndex(1000, 1)
    )
    for level in (index(998), index(1000), denoiser.process.level(0.998, torch.ones(1, 2))):
        denoiser(torch.ones(1, 2), level)
    assert [float(c) for c in network.seen] == pytest.approx([998, 1000, 998], rel=1e-6)


@pytest.mark.parametrize("network", [sd.networks.MLP(fourier=16, width=16),
    sd.networks.UNet(1, (8, 8), embedding=8, attention=())], ids=["mlp", "unet"])  # fmt: skip
def test_the_networks_of_the_package_take_their_noise_input_in_float32(network):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    shape = (1, 2) if isinstance(network, sd.networks.MLP) else (1, 1, 8, 8)
    denoiser = sd.Denoiser(network.bfloat16(), sd.VP(), sd.V())
    x = torch.ones(shape, dtype=torch.bfloat16)
    ours = denoiser(x, 0.998).v
    assert not torch.equal(ours, denoiser(x, 1.0).v)
    exact = sd.Denoiser(network.float(), sd.VP(), sd.V())(x.float(), 0.998).v.detach()
    assert_close(ours.float(), exact, rtol=0, atol=0.1 * float(exact.abs().max()))


def test_noise_inputs_that_rounding_makes_equal_are_a_warning():
    """0.999 and 1 of two calls, or in a batch; 0.5 and 0.75 stay apart."""
    denoiser, x = sd.Denoiser(Recording(wide=False), sd.VP()), torch.ones(2, 2)
    for t in (0.5, 0.75, 0.999):
        denoiser(x, t)
    denoiser(x, torch.tensor([0.5, 0.999]))
    for t in (1.0, torch.tensor([1.0, 0.999])):
        with pytest.warns(UserWarning, match=r"coincide in torch\.bfloat16.*float32_noise_input"):
            denoiser(x, t)


def test_float32_times_reach_a_table_of_steps_as_its_indices():
    """i / 1000 in float32 is i / 1000 (1 + 2^-24) at most; other times are not rounded."""
    seen = []
    chain = sd.Discrete.linear()

    def network(x, step):
        seen.append(step)
        return x

    model = sd.models.adopt(network, chain)
    times = torch.arange(1000, -1, -1).float() / 1000
    sd.sample(model, sd.Ancestral(eta=0.0), torch.ones(1, 1), times=times)
    assert all(step.dtype == torch.int64 for step in seen)
    assert [int(step) for step in seen] == list(range(999, -1, -1))
    sd.sample(model, sd.Ancestral(eta=0.0), torch.ones(1, 1), times=torch.tensor([0.5003, 0]))
    assert float(seen[-1]) == pytest.approx(499.3)
