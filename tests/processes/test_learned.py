"""Processes with parameters: their gradients, their identity, and what a learned log-SNR is for."""

import copy

import pytest
import torch
from learned import LogSNR, Rate
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import losses

TIMES = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)


def data(n=3, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, d, generator=generator, dtype=torch.float64)


# ---- gradients ---------------------------------------------------------------------------------


def test_levels_and_rates_have_the_gradients_of_their_formulas():
    """log alpha = -b t / 2, sigma^2 = 1 - e^(-b t), f = -b / 2 and g^2 = b."""
    process, b = Rate(), 10.0

    def slope(value):
        return torch.autograd.grad(value.sum(), process.b, retain_graph=True)[0]

    for t in TIMES:
        decay = torch.exp(-b * t)
        level = process.level(t, torch.zeros(1, 1, dtype=torch.float64))
        assert_close(slope(level.alpha), -t / 2 * decay.sqrt())
        assert_close(slope(level.sigma**2), t * decay)
        assert_close(slope(level.log_snr), -t - t * decay / (1 - decay))
        f, g2 = process.rates(t)
        assert_close(slope(f), torch.tensor(-0.5, dtype=torch.float64))
        assert_close(slope(g2), torch.tensor(1.0, dtype=torch.float64))
        assert_close(slope(process.diffusion(t)), torch.tensor(0.5 / b**0.5, dtype=torch.float64))
    assert not any(rate.requires_grad for rate in sd.VP().rates(TIMES))
    with torch.no_grad():
        assert not any(rate.requires_grad for rate in process.rates(TIMES))


@pytest.mark.parametrize("weight", [losses.Likelihood, lambda process: losses.SNR()])
def test_a_weight_carries_the_gradient_of_the_process(weight):
    """By a central difference; the optimum of the network moves with b, too."""
    process, (x0, eps) = Rate(), data()
    denoiser = sd.Denoiser(sd.networks.MLP().double(), process)

    def loss():
        return sd.denoising_loss(denoiser, x0, TIMES, eps, weight=weight(process)).mean()

    (slope,) = torch.autograd.grad(loss(), process.b)
    with torch.no_grad():
        values = []
        for step in (1e-4, -2e-4):
            process.b += step
            values.append(loss())
    assert_close(slope, (values[0] - values[1]) / 2e-4, rtol=1e-5, atol=1e-8)


class Loss(nn.Module):
    """The loss as a module, for torch.func.functional_call."""

    def __init__(self, denoiser, weight):
        super().__init__()
        self.denoiser, self.weight = denoiser, weight

    def forward(self, x0, t, eps):
        return sd.denoising_loss(self.denoiser, x0, t, eps, weight=self.weight)


@pytest.mark.parametrize("process", [sd.VP(), Rate(), sd.Cosine(), sd.Discrete.linear(10)],
                         ids=lambda p: type(p).__name__)  # fmt: skip
@pytest.mark.parametrize("kind", ["none", "likelihood", "min-snr"])
def test_gradients_of_each_sample_by_vmap_and_jacrev_are_those_of_a_loop(process, kind):
    made = {"none": None, "likelihood": losses.Likelihood(process), "min-snr": losses.MinSNR()}
    module = Loss(sd.Denoiser(sd.networks.MLP(width=8).double(), process, sd.V()), made[kind])
    parameters, (x0, eps) = dict(module.named_parameters()), data()

    def of_one(parameters, x0, t, eps):
        return functional_call(module, parameters, (x0[None], t[None], eps[None]))[0]

    each = vmap(grad(of_one), (None, 0, 0, 0))(parameters, x0, TIMES, eps)
    every = jacrev(lambda p: functional_call(module, p, (x0, TIMES, eps)))(parameters)
    for k in range(3):
        loss = module(x0[k : k + 1], TIMES[k : k + 1], eps[k : k + 1])
        for name, slope in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            assert_close(each[name][k], slope, rtol=1e-9, atol=1e-12)
            assert_close(every[name][k], slope, rtol=1e-9, atol=1e-12)


# ---- identity ----------------------------------------------------------------------------------


class LearnedVP(nn.Module, sd.VP):
    """A module whose base is a dataclass with fields."""

    def __init__(self):
        super().__init__()
        self.warp = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("kind", [Rate, LearnedVP])
def test_processes_with_parameters_are_equal_by_identity(kind):
    one, other = kind(), kind()
    assert one == one
    assert one != other
    assert one != copy.deepcopy(one)
    assert len({one, other}) == 2
    assert sd.VP() == sd.VP()


def test_parameters_outside_a_torch_module_are_refused():
    """No optimizer, average or file would find them."""

    class Hidden(sd.processes.Process):
        b = torch.tensor(10.0, requires_grad=True)

        def log_alpha(self, t):
            return -self.b * t / 2

        def variance(self, t):
            return -torch.expm1(-self.b * t)

    with pytest.raises(TypeError, match="process must be a torch module to have parameters"):
        sd.Denoiser(sd.networks.MLP(), Hidden())


def test_a_learned_process_is_in_the_file_of_its_denoiser(tmp_path):
    saved = sd.Denoiser(sd.networks.MLP(), Rate(7.0))
    saved.save(tmp_path / "learned.safetensors")
    loaded = sd.Denoiser.load(tmp_path / "learned.safetensors", process=Rate())
    assert float(loaded.process.b.detach()) == 7.0
    assert loaded.process.b.requires_grad


# ---- a learned log-SNR -------------------------------------------------------------------------


class Optimal(nn.Module):
    """E[eps | x] for data N(0, I), from the log-SNR: sigma x on a variance-preserving process."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, c):
        return x * torch.sigmoid(-c[:, None]).sqrt()


def losses_of(process, weight, seed, n, d=64):
    x0, eps = data(n, d, seed)
    generator = torch.Generator().manual_seed(seed + 999)
    t = losses.UniformTimes(process.START)(torch.rand(n, generator=generator).double())
    denoiser = sd.Denoiser(Optimal(), process, sd.Eps(), sd.models.LogSNR())
    return sd.denoising_loss(denoiser, x0, t, eps, weight=weight)


@pytest.mark.parametrize("seed", range(5))
def test_a_learned_log_snr_lowers_the_variance_of_the_likelihood(seed):
    """Its mean does not depend on the schedule between two ends (Kingma et al. 2021, sec. 5.1)."""
    fixed, learned = LogSNR(), LogSNR(knots=12)
    weight = losses.Likelihood(learned)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.2)
    for step in range(40):
        optimizer.zero_grad()
        losses_of(learned, weight, 1000 * (seed + 1) + step, 256).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        before, after = (losses_of(p, losses.Likelihood(p), seed, 4096) for p in (fixed, learned))
    error = ((before.var() + after.var()) / 4096).sqrt()
    assert abs(before.mean() - after.mean()) < 4.5 * error
    assert after.var() < before.var() / 2
