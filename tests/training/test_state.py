"""The state of a run is one flat mapping: any optimizer, any parameter, resumed bit for bit."""

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learned import Rate
from torch import nn
from torch.testing import assert_close
from training_runs import POINTS, RECIPE, TIMES, Learned, assert_same_bits, content, fresh, mlp

from sde_diffusion.files import storage
from sde_diffusion.losses import denoising_loss
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.parameterizations import V
from sde_diffusion.processes import VP
from sde_diffusion.training import OtherSettings, Recipe, TrainState, draw, restore, save
from sde_diffusion.training.optimizers import flat

OPTIMIZERS = {
    "default": None,
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adafactor": torch.optim.Adafactor,
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05, t0=2),  # slots whose dtype is not the parameter's
    "nadam": torch.optim.NAdam,
    "rprop": torch.optim.Rprop,
    "groups": lambda ps: torch.optim.AdamW(
        [
            {"params": [p for p in ps if p.ndim > 1], "lr": 0.1},
            {"params": [p for p in ps if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
    ),
}


class Odd(nn.Module):
    """Two layers, and parameters of every strange kind."""

    def __init__(self, kinds):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        if "tied" in kinds:
            self.b.weight = self.a.weight
        if "frozen" in kinds:
            self.a.bias.requires_grad_(False)
        if "unused" in kinds:
            self.spare = nn.Parameter(torch.randn(3))
        if "empty" in kinds:
            self.empty = nn.Parameter(torch.zeros(0, 2))
        if "whole" in kinds:
            table = nn.Parameter(torch.randint(9, (3,)), requires_grad=False)
            self.tables = nn.ParameterList([table])

    def forward(self, x, c):
        if self.training:
            self.seen += 1
        return self.b(self.a(x).tanh()) + getattr(self, "empty", x[:0]).sum()


KINDS = ("tied", "frozen", "unused", "empty", "whole")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def advance(state, steps):
    for _ in range(steps):
        state.advance(draw(POINTS, state.recipe, TIMES, state.step))


@settings(max_examples=60)
@given(st.sets(st.sampled_from(KINDS)), st.sampled_from(sorted(OPTIMIZERS)),
       st.sampled_from(DTYPES), st.integers(0, 2))  # fmt: skip
def test_any_parameter_trains_saves_and_resumes_bit_for_bit(kinds, optimizer, dtype, cut):
    def start(seed):
        return fresh(lambda: Odd(kinds), seed=seed, dtype=dtype, optimizer=OPTIMIZERS[optimizer])

    whole, stopped, resumed = start(0), start(0), start(99)
    first = content(whole)
    advance(whole, 5)
    advance(stopped, cut)
    with tempfile.TemporaryDirectory() as folder:
        restore(resumed, save(stopped, folder))
    assert_same_bits(content(resumed), content(stopped))
    advance(resumed, 5 - cut)
    last = content(whole)
    assert_same_bits(content(resumed), last)
    same = {name for name in first if torch.equal(first[name], last[name])}
    frozen = {name for name, p in whole.denoiser.named_parameters() if not p.requires_grad}
    still = frozen | {n for n in first if n.endswith((".spare", ".empty"))}
    if dtype != torch.bfloat16:  # in which small steps are rounded away
        assert {n for n in same if n.startswith("network.")} <= still
    assert all(name in same for name in still)
    assert all(f"average.{name}" in same for name in still if f"average.{name}" in first)


def test_the_state_is_one_flat_mapping():
    state = fresh(lambda: Odd(()))
    advance(state, 2)
    slots = flat(state.optimizer)
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert set(state.tensors) == {
        *(f"network.{n}" for n in (*names, "seen")), *(f"average.network.{n}" for n in names)
    }  # fmt: skip
    assert set(slots) == {
        f"optimizer.{k}.{slot}" for k in range(4) for slot in ("step", "exp_avg", "exp_avg_sq")
    }


def test_a_process_and_a_null_with_parameters_are_trained_averaged_and_resumed(tmp_path):
    def start(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            null = nn.Parameter(torch.randn(3))
            denoiser = Denoiser(mlp(), Learned(), V(), null=null)
        return TrainState(denoiser, RECIPE)

    stopped, resumed, whole = start(0), start(9), start(0)
    advance(whole, 5)
    advance(stopped, 3)
    checkpoint = save(stopped, tmp_path)
    tensors, _ = storage.read(checkpoint / "training.safetensors")
    for name in ("process.gain", "average.process.gain", "null.cond", "average.null.cond"):
        assert torch.equal(tensors[name], stopped.tensors[name])
    restore(resumed, checkpoint)
    advance(resumed, 2)
    assert_same_bits(content(resumed), content(whole))
    gain = whole.denoiser.process.gain
    assert float(gain.detach()) != pytest.approx(0.1)
    assert torch.equal(whole.averaged.process.gain, whole.tensors["average.process.gain"])
    assert not torch.equal(whole.averaged.process.gain, gain)


def test_the_average_of_half_precision_weights_is_kept_in_float32():
    """Increments of (1 - decay) of the weights' own spacing would vanish in bfloat16."""
    state = fresh(lambda: Odd(()), dtype=torch.bfloat16)
    expected = {n: p.detach().float() for n, p in state.denoiser.named_parameters()}
    for step in range(6):
        advance(state, 1)
        for name, p in state.denoiser.named_parameters():
            expected[name].lerp_(p.detach().float(), 1 - RECIPE.ema.decay_at(step))
    averaged = dict(state.averaged.named_parameters())
    for name, value in expected.items():
        assert state.average[name].dtype == torch.float32
        assert_close(state.average[name], value, rtol=1e-6, atol=1e-7)
        assert torch.equal(averaged[name], state.average[name].bfloat16())


def test_the_schedule_multiplies_the_initial_rate_of_each_group():
    recipe = Recipe(steps=10, batch_size=16, warmup=3)
    state = fresh(recipe=recipe, optimizer=OPTIMIZERS["groups"])
    for step in range(5):
        metrics = state.advance(draw(POINTS, recipe, TIMES, step))
        rates = [group["lr"] for group in state.optimizer.param_groups]
        assert rates == [0.1 * recipe.factor(step), 0.01 * recipe.factor(step)]
        assert metrics.learning_rate == rates[0]


def test_a_custom_optimizer_moves_weights_as_torch_does():
    """The first step of SGD: rate times the clipped gradient, with nothing of the rehearsal."""
    recipe = Recipe(steps=10, batch_size=16, warmup=0, decay="constant")
    state = fresh(recipe=recipe, optimizer=OPTIMIZERS["momentum"])
    before = [p.detach().clone() for p in state.denoiser.parameters()]
    advance(state, 1)
    for old, p in zip(before, state.denoiser.parameters(), strict=True):
        assert_close(p.detach(), old - 0.05 * 1.9 * p.grad, rtol=1e-6, atol=1e-7)  # nesterov


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_rehearsal_leaves_no_trace(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = mlp().state_dict()
    state = fresh(optimizer=make)
    assert_same_bits(state.denoiser.network.state_dict(), expected)
    plain = (make or (lambda p: torch.optim.AdamW(p)))(list(state.denoiser.parameters()))
    assert_same_bits(flat(state.optimizer), flat(plain))
    assert all(p.grad is None for p in state.denoiser.parameters())


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (None, r"optimizer SGD.* -> AdamW"),
        (lambda p: torch.optim.SGD(p, 0.05, momentum=0.8), r"momentum=0.9.* -> .*momentum=0.8"),
        (lambda p: torch.optim.SGD(p, 0.06, momentum=0.9, nesterov=True), r"0.05.* -> .*0.06"),
        (lambda p: torch.optim.SGD(p[:2], 0.05, momentum=0.9, nesterov=True), "for 6 .* for 2"),
    ],
)
def test_another_optimizer_is_another_run(tmp_path, other, named):
    checkpoint = save(fresh(optimizer=OPTIMIZERS["momentum"]), tmp_path)
    with pytest.raises(OtherSettings, match=named):
        restore(fresh(optimizer=other), checkpoint)


class Listing(torch.optim.SGD):
    """It keeps a list of tensors."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [torch.zeros(2)]


def stranger(parameters):
    return torch.optim.SGD([*parameters, nn.Parameter(torch.zeros(2))], 0.1)


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (torch.optim.LBFGS, "must step on dense gradients without a closure; got LBFGS"),
        (torch.optim.SparseAdam, "must step on dense gradients without a closure; got SparseAdam"),
        (Listing, "must keep tensors and numbers; got list, optimizer.0.history"),
        (stranger, "must hold parameters of the denoiser"),
        (lambda p: None, "must be a function that returns a torch optimizer; got None"),
        (torch.optim.SGD([nn.Parameter(torch.zeros(2))]), "must be a function of parameters"),
        ("adam", "must be a function of parameters"),
    ],
)
def test_an_optimizer_that_cannot_train_or_be_saved_is_refused_at_once(optimizer, named):
    with pytest.raises((TypeError, ValueError), match=f"^optimizer {named}") as caught:
        fresh(optimizer=optimizer)
    assert "\n" not in str(caught.value)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: nn.Linear(2, 2).requires_grad_(False), "that requires a gradient"),
        (lambda: nn.LazyLinear(2), "initialized tensors of real numbers; got network.weight"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "network.weight of torch.complex64"),
        (lambda: Extra(2, 2), "network._extra_state of dict"),
    ],
)
def test_a_network_that_cannot_be_saved_is_refused_at_once(network, named):
    with pytest.raises(ValueError, match=f"^denoiser must .*{named}"):
        TrainState(Denoiser(network(), VP(), V()), RECIPE)


def test_more_tensors_than_a_file_may_have_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(storage, "TENSORS", 30)  # 6 weights, 6 averages, 18 slots of AdamW
    fresh()
    monkeypatch.setattr(storage, "TENSORS", 29)
    with pytest.raises(ValueError, match="at most 29 tensors in a checkpoint; got 30"):
        fresh()


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path):
    checkpoint = save(fresh(dtype=torch.float64), tmp_path)
    with pytest.raises(storage.BadFile, match="float"):
        restore(fresh(), checkpoint)


@pytest.mark.parametrize("edit", [{"optimizer.0.step": {}}, {"network.x": 1}, [], {"optimizer": 1}])
def test_numbers_that_make_no_sense_are_refused(tmp_path, edit):
    path = save(fresh(), tmp_path) / "training.safetensors"
    tensors, record = storage.read(path)
    record = {k: v for k, v in record.items() if k not in storage.OURS}
    storage.write(path, tensors, {**record, "numbers": edit})
    with pytest.raises(storage.BadFile, match="training"):
        restore(fresh(), path.parent)


def test_the_loss_has_a_gradient_for_a_parameter_of_the_process():
    """By a central difference of the loss."""
    process = Rate()
    denoiser = Denoiser(mlp().double(), process, V())
    x0, eps = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0)).double()

    def loss():
        return denoising_loss(denoiser, x0, torch.linspace(0.1, 0.9, 8), eps).mean()

    loss().backward()
    with torch.no_grad():
        process.b += 1e-4
        more = loss()
        process.b -= 2e-4
        slope = (more - loss()) / 2e-4
    assert_close(process.b.grad, slope, rtol=1e-5, atol=1e-8)


class Counted(torch.optim.SGD):
    """Counts its steps in a group, which a checkpoint does not hold."""

    def step(self, closure=None):
        self.param_groups[0]["count"] += 1
        return super().step(closure)


def test_an_optimizer_with_state_in_its_groups_is_refused():
    def make(parameters):
        return Counted([{"params": parameters, "count": 0}], lr=0.1)

    with pytest.raises(ValueError, match="a step changed 'count' of a group"):
        fresh(optimizer=make)
