"""Wrong arguments of the public calls: one line that names the argument, the rule and the value."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import grids, training, verify
from sde_diffusion.models.guidance import ClassifierFree

VP = sd.VP()
DATA = sd.exact.Gaussian(VP, torch.zeros(2), torch.ones(2))
NETWORK = sd.networks.MLP((2,))
DENOISER = sd.Denoiser(NETWORK, VP)
LABELLED = sd.Denoiser(sd.networks.MLP((2,), cond=3), VP)
X = torch.linspace(-1, 1, 8).reshape(4, 2)


def plain(x, t):
    return x


def run(model=DATA, sampler=sd.Heun(), x=X, **settings):  # noqa: B008 frozen
    settings = {"steps": 3, **settings} if "times" not in settings else settings
    return sd.sample(model, sampler, x, **settings)


SAMPLING = {
    "a word for a sampler": (
        lambda: run(sampler="heun"),
        "sampler must be a sampler such as Heun(); got 'heun'",
    ),
    "a class for a sampler": (
        lambda: run(sampler=sd.Heun),
        "sampler must be a sampler such as Heun(); got the class Heun; make one: Heun(...)",
    ),
    "model and sampler swapped": (
        lambda: run(sd.Heun(), DATA),
        "model must be a model such as Denoiser(network, process); got Heun()",
    ),
    "batch and sampler swapped": (
        lambda: run(DATA, X, sd.Heun()),
        "sampler must be a sampler such as Heun(); got a tensor of shape (4, 2), torch.float32",
    ),
    "a function for a model": (
        lambda: run(plain),
        "model must be a model such as Denoiser(network, process); got plain",
    ),
    "a network for a model": (
        lambda: run(NETWORK),
        "model must be a model such as Denoiser(network, process); got MLP(...)",
    ),
    "a process for a model": (
        lambda: sd.prior(VP, (4, 2)),
        "model must be a model such as Denoiser(network, process); "
        "got VP(beta_min=0.1, beta_max=20.0)",
    ),
    "no steps": (
        lambda: run(sampler=sd.DPMSolver(2), steps=None),
        "steps must be given for DPMSolver; got None; e.g. steps=20",
    ),
    "steps for a solver that chooses them": (
        lambda: run(sampler=sd.AdaptiveODE()),
        "steps must be left out for AdaptiveODE, which chooses its own; got 3",
    ),
    "no step": (lambda: run(steps=0), "steps must be at least 1; got 0"),
    "a part of a step": (lambda: run(steps=2.5), "steps must be an integer; got 2.5"),
    "a number for seeds": (
        lambda: run(seeds=0),
        "seeds must be a sequence of integers, one per sample; got 0",
    ),
    "a tensor of seeds": (
        lambda: run(seeds=torch.arange(4)),
        "seeds must be a sequence of integers, one per sample; "
        "got a tensor of shape (4,), torch.int64; use seeds.tolist()",
    ),
    "a number for the seeds of a prior": (
        lambda: sd.prior(DATA, (4, 2), seeds=0),
        "seeds must be a sequence of integers, one per sample; got 0",
    ),
    "a grid for a solver that chooses its levels": (
        lambda: run(sampler=sd.AdaptiveODE(), steps=None, grid=grids.Karras()),
        "grid must be left out for AdaptiveODE, which chooses its own; "
        "got Karras(sigma_max=80.0, sigma_min=0.002, rho=7.0)",
    ),
    "too few seeds": (
        lambda: run(seeds=[1, 2]),
        "seeds must hold one seed per sample, 4; got 2",
    ),
    "seeds that are no integers": (
        lambda: run(sampler=sd.Ancestral(), seeds=[0.5, 1, 2, 3]),
        "each seed must be an integer; got 0.5",
    ),
    "a number for a generator": (
        lambda: run(generator=0),
        "generator must be a torch.Generator; for a number use seeds=; got 0",
    ),
    "a number for a noise": (
        lambda: run(noise=0.5),
        "noise must be a function noise(t, s, like); got 0.5",
    ),
    "a time that occurs twice": (
        lambda: run(times=[1, 0.5, 0.5, 0]),
        "times must decrease from noise to data; got times[1]=0.5, times[2]=0.5",
    ),
    "times that increase": (
        lambda: run(times=[0, 0.5, 1]),
        "times must decrease from noise to data; got times[0]=0, times[1]=0.5; reverse them, "
        "or use encode",
    ),
    "a word for times": (
        lambda: run(times="karras"),
        "times must be a number or a tensor; got 'karras'",
    ),
    "a time that is no number": (
        lambda: run(times=[1, float("nan"), 0]),
        "times must be finite; got nan or infinity",
    ),
    "a time above 1": (lambda: run(times=[1.5, 0]), "times must lie in [0, 1]; got 1.5"),
    "times and steps": (
        lambda: run(times=[1, 0], steps=1),
        "times must be given alone, without steps or grid; got both",
    ),
    "a word for a grid": (
        lambda: run(grid="karras"),
        "grid must be a grid such as Karras(); got 'karras'",
    ),
    "a class for a grid": (
        lambda: run(grid=grids.Karras),
        "grid must be a grid such as Karras(); got the class Karras; make one: Karras(...)",
    ),
    "integers for a batch": (
        lambda: run(x=X.long()),
        "x must be a floating-point batch (B, ...); got shape (4, 2), torch.int64",
    ),
    "an array for a batch": (
        lambda: run(x=np.zeros((4, 2), np.float32)[:, :1]),
        "x must be a tensor (B, ...); got ndarray(...)",
    ),
    "nan in the batch": (lambda: run(x=X * torch.nan), "x must be finite; got nan or infinity"),
    "a condition for a model that takes none": (
        lambda: run(cond=torch.zeros(4)),
        "cond must be left out for Gaussian(...), which takes none",
    ),
    "a condition for a network that takes none": (
        lambda: run(DENOISER, cond=torch.zeros(4, 3)),
        "cond must be None: the network has no condition; got width 3",
    ),
    "a word for a condition": (
        lambda: run(LABELLED, cond="cat"),
        "cond must be a tensor of first axis 4 or 1; got str",
    ),
    "no condition for a guidance": (
        lambda: run(ClassifierFree(LABELLED)),
        "cond must be given for ClassifierFree; got None; sample(..., cond=)",
    ),
    "a guidance of a model without conditions": (
        lambda: ClassifierFree(DATA),
        "model must be called as model(x, level, cond); got Gaussian(...)",
    ),
    "a size for a shape": (
        lambda: sd.prior(DATA, 4),
        "shape must be a sequence of integers (B, ...); got 4",
    ),
}
DENOISERS = {
    "a word for a process": (
        lambda: sd.Denoiser(NETWORK, "vp"),
        "process must be a Process such as VP(); got 'vp'",
    ),
    "a class for a process": (
        lambda: sd.Denoiser(NETWORK, sd.VP),
        "process must be a Process such as VP(); got the class VP; make one: VP(...)",
    ),
    "a class for a network": (
        lambda: sd.Denoiser(sd.networks.MLP, VP),
        "network must be a torch module (adopt takes a plain function); "
        "got the class MLP; make one: MLP(...)",
    ),
    "network and process swapped": (
        lambda: sd.Denoiser(VP, NETWORK),
        "network must be a torch module (adopt takes a plain function); "
        "got VP(beta_min=0.1, beta_max=20.0)",
    ),
    "a function for a network": (
        lambda: sd.Denoiser(plain, VP),
        "network must be a torch module (adopt takes a plain function); got plain",
    ),
    "a word for a parameterization": (
        lambda: sd.Denoiser(NETWORK, VP, "eps"),
        "parameterization must be a parameterization such as Eps(); got 'eps'",
    ),
    "a class for a parameterization": (
        lambda: sd.Denoiser(NETWORK, VP, sd.Eps),
        "parameterization must be a parameterization such as Eps(); "
        "got the class Eps; make one: Eps(...)",
    ),
    "a word for a noise input": (
        lambda: sd.Denoiser(NETWORK, VP, sd.Eps(), "t"),
        "noise_input must be a noise input such as ContinuousTime(); got 't'",
    ),
    "a word for a null": (
        lambda: sd.Denoiser(NETWORK, VP, null="zero"),
        "null must be a tensor; got 'zero'",
    ),
    "a pair for a range": (
        lambda: sd.Denoiser(NETWORK, VP, trained=(0, 1)),
        "trained must be a LogSNRRange; got (0, 1)",
    ),
}
OTHERS = {
    "match swapped": (
        lambda: sd.match(VP, DENOISER),
        "model must be a model such as Denoiser(network, process); "
        "got VP(beta_min=0.1, beta_max=20.0)",
    ),
    "a level of a time that is no number": (
        lambda: DENOISER(X, "late"),
        "t must be a number or a tensor; got 'late'",
    ),
    "a time above 1": (lambda: DENOISER(X, 1.5), "times must lie in [0, 1]; got 1.5"),
    "a function in a loss": (
        lambda: sd.denoising_loss(plain, X, torch.rand(4), X),
        "denoiser must be a Denoiser; got plain",
    ),
    "no noise in a loss": (
        lambda: sd.denoising_loss(DENOISER, X, torch.rand(4), None),
        "eps must be a tensor (B, ...); got None",
    ),
    "a state and its recipe swapped": (
        lambda: training.TrainState(training.Recipe(steps=3), DENOISER),
        "denoiser must be a Denoiser; got Recipe(...)",
    ),
    "a law's model and sampler swapped": (
        lambda: verify.law(DATA, sd.Heun(), steps=3),
        "sampler must be a Sampler; got Gaussian(...)",
    ),
}
CASES = {f"{place}: {name}": case for place, cases in
         (("sampling", SAMPLING), ("denoiser", DENOISERS), ("others", OTHERS))
         for name, case in cases.items()}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_argument_is_refused_in_one_line(name):
    call, message = CASES[name]
    with pytest.raises((TypeError, ValueError)) as refusal:
        call()
    assert str(refusal.value) == message
    assert len(message.split()) <= 25


@pytest.mark.parametrize(
    "model",
    [
        DATA,
        DENOISER,
        sd.match(DENOISER, sd.RectifiedFlow()),
        sd.models.guidance.Clipped(DENOISER),
        sd.models.guidance.ClassifierGuided(DATA, lambda x, level, y: x.sum(1), torch.zeros(1)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_takes_a_time_for_a_level(model):
    """As a number, as a tensor, and as one time per sample."""
    (level,) = model.process.levels(torch.tensor([0.5]))
    expected = model(X, level)
    for time in (0.5, torch.tensor(0.5), torch.full((4,), 0.5)):
        found = model(X, time)
        assert_close(found.x0, expected.x0, rtol=1e-5, atol=1e-5)
        assert_close(found.eps, expected.eps, rtol=1e-5, atol=1e-5)


class Diverged:
    """Of two samples, the second has no number."""

    process = VP

    def __call__(self, x, level):
        wrong = torch.tensor([[1.0], [torch.nan]])
        return sd.models.prediction.truth(x * wrong, x, level)


def test_samples_that_are_not_finite_at_the_end_are_reported():
    with pytest.warns(RuntimeWarning, match=r"^1 of 2 samples are not .* row 1"):
        run(Diverged(), x=X[:2])


class Record:
    def __init__(self, sample):
        self.sample = sample


class FromElsewhere(nn.Module):
    """As diffusers' UNet2DModel: the output is a record."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, sample, timestep):
        return Record(self.scale * sample)


def test_a_network_that_returns_a_record_is_unwrapped_by_denoiser_and_adopt():
    chain = sd.Discrete.linear(10)
    made = sd.Denoiser(FromElsewhere(), VP)(X, 0.5)
    assert_close(made.eps, 0.5 * X)
    (level,) = chain.levels(torch.tensor([0.5]))
    assert_close(sd.adopt(FromElsewhere(), chain)(X, level).eps, 0.5 * X)


class Returning(nn.Module):
    """A network whose output is a function of x."""

    def __init__(self, made):
        super().__init__()
        self.made, self.weight = made, nn.Parameter(torch.ones(1))

    def forward(self, x, c):
        return self.made(x)


@pytest.mark.parametrize("made", [lambda x: x.long(), lambda x: x + 1j, lambda x: {"sample": x}])
def test_a_network_returns_floats(made):
    """Integers and complex numbers would be cast: their rest would be dropped without a word."""
    with pytest.raises(TypeError, match="output of the network must be a tensor of floats; got"):
        run(sd.Denoiser(Returning(made), VP))


@pytest.mark.parametrize("sampler", [sd.Heun(), sd.Ancestral(), sd.AdaptiveODE()])
def test_a_network_that_writes_into_its_input_is_refused(sampler):
    """As a ReLU(inplace=True) in front does: the user's batch and every state would be wrong."""
    model = sd.Denoiser(Returning(lambda x: x.mul_(0.9)), VP)
    steps = {} if sampler.claims.adaptive else {"steps": 3}
    with pytest.raises(ValueError, match="x must not be changed by the model or"):
        sd.sample(model, sampler, X.clone(), **steps)


def test_an_empty_batch_goes_through_every_network():
    for network, shape in (
        (sd.networks.UNet(channels=(32, 64), blocks=1), (0, 1, 8, 8)),
        (NETWORK, (0, 2)),
    ):
        model = sd.Denoiser(network, VP)
        assert sd.sample(model, sd.Heun(), torch.zeros(shape), steps=2).shape == shape


def test_every_module_is_there_at_once():
    assert 25 <= len(sd.__all__) <= 50
    for name in ("data", "files", "metrics", "plots", "training", "verify", "inverse", "grids"):
        assert getattr(sd, name).__name__ == f"sde_diffusion.{name}"
        assert name in sd.__all__
        assert name in dir(sd)
