"""A device without float64: what is computed in float64 is cast before it moves there."""

import pytest
import torch
from cases import FIXED_STEP, OWN_STEPS, PROCESSES
from float32_device import DEVICE, Float32Device
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import losses, training
from sde_diffusion.processes import level

TIMES = torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=torch.float64)
CHAIN = sd.Discrete.linear(10)
# torchdiffeq and torchsde read values in ways that only a real device allows.
SAMPLERS = {**FIXED_STEP, **OWN_STEPS, "adaptive-sde": sd.AdaptiveSDE()}
SAMPLERS = {name: s for name, s in SAMPLERS.items() if not name.startswith("torch-")}


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(level, "WITHOUT_FLOAT64", (DEVICE.type,))
    with Float32Device():
        yield


def batch():
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def network(process):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sd.Denoiser(sd.networks.MLP((2,), width=8), process, sd.V())


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("times_there", [False, True])
def test_levels_there_are_those_of_the_cpu(process, times_there):
    times, x = TIMES.float(), batch()
    there = process.level(times.to(DEVICE) if times_there else times, x.to(DEVICE))
    for ours, theirs in zip(process.level(times, x), there, strict=True):
        assert theirs.device == DEVICE
        assert torch.equal(theirs.inner, ours)


WEIGHTS = [None, losses.SNR(), losses.MinSNR(), losses.EDMWeight(), losses.Likelihood(CHAIN),
           losses.VLB(CHAIN)]  # fmt: skip


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: type(w).__name__)
def test_losses_there_are_those_of_the_cpu(weight):
    model, x0, eps = network(CHAIN), batch(), batch().flip(0)
    ours = sd.denoising_loss(model, x0, TIMES, eps, weight=weight)
    theirs = sd.denoising_loss(
        model.to(DEVICE), x0.to(DEVICE), TIMES, eps.to(DEVICE), weight=weight
    )
    theirs.mean().backward()
    assert_close(theirs.detach().inner, ours, rtol=1e-5, atol=0)  # t is float32 in the weights


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("exact", [True, False])
def test_samples_there_are_those_of_the_cpu(sampler, exact):
    model = sd.exact.Gaussian(sd.VP(), torch.zeros(2), torch.eye(2)) if exact else network(sd.VP())
    options = {} if sampler.claims.adaptive else {"steps": 4}
    options |= {"seeds": range(4)} if sampler.claims.noise else {}
    ours = sd.sample(model, sampler, batch(), **options)
    model = model if exact else model.to(DEVICE)
    theirs = sd.sample(model, sampler, batch().to(DEVICE), **options)
    assert_close(theirs.inner, ours, rtol=1e-4, atol=1e-4)


def test_a_step_of_training_is_made_there(monkeypatch):
    # The device is played by meta tensors, which a TrainState refuses: they hold no values.
    monkeypatch.setattr(training.state, "check_tensors", lambda denoiser: None)
    model, data = network(sd.VP()), sd.data.Points(batch())
    recipe = training.Recipe(steps=2, batch_size=4, warmup=0)

    def train(denoiser):
        def sgd(parameters):
            return torch.optim.SGD(parameters, lr=0.1)

        state = training.TrainState(denoiser, recipe, optimizer=sgd)
        return [metrics.loss for metrics in training.train(state, data)]

    there = train(network(sd.VP()).to(DEVICE))
    assert there == pytest.approx(train(model), rel=1e-5)
