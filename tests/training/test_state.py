"""The state of a run is one flat mapping: any optimizer, any parameter, resumed bit for bit."""

import tempfile
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learned import Rate
from torch import nn
from torch.testing import assert_close
from training_runs import POINTS, RECIPE, TIMES, Learned, assert_same_bits, content, fresh, mlp

from sde_diffusion.files import storage
from sde_diffusion.losses import NormalLogSNR, denoising_loss
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
        if "mask" in kinds:
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        if "transient" in kinds:
            self.register_buffer("calls", torch.zeros(()), persistent=False)
        if "sampling" in kinds:
            self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, c):
        h = self.a(x).tanh()
        if self.training:
            self.seen += 1
        if hasattr(self, "mask"):
            h = h @ (h.T @ h + self.mask).softmax(-1)
        if hasattr(self, "calls"):
            self.calls += self.training
            h = h * (1 + self.calls / 8)
        if hasattr(self, "temperature") and not self.training:
            h = h * self.temperature
        return self.b(h) + getattr(self, "empty", x[:0]).sum()


KINDS = ("tied", "frozen", "unused", "empty", "whole", "mask", "transient", "sampling")
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
    assert torch.equal(*(s.averaged(POINTS.x.to(dtype), 0.5).x0 for s in (whole, resumed)))
    same = {name for name in first if torch.equal(first[name], last[name])}
    frozen = {name for name, p in whole.denoiser.named_parameters() if not p.requires_grad}
    unused = (".spare", ".empty", ".mask", ".temperature")
    still = frozen | {n for n in first if n.endswith(unused)}
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
    """Of the process, too: in the optimizer, the average, the checkpoint and the file."""

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
    held = [p for group in stopped.optimizer.param_groups for p in group["params"]]
    assert [*map(id, held)] == [*map(id, stopped.denoiser.parameters())]
    path = checkpoint / "denoiser.safetensors"
    loaded = Denoiser.load(path, mlp(), process=Learned(), parameterization=V())
    for name, value in stopped.averaged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
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


@dataclass(frozen=True)
class Still:
    """An average of constant decay after its first weights."""

    decay: float = 0.9995

    def decay_at(self, updates):
        return self.decay if updates else 0.0


def test_an_average_of_bfloat16_weights_goes_on_as_in_closed_form():
    """The weights step from .9 to 1: after n updates the mean is 1 - .1 decay^n. In bfloat16 it
    would stay at its first value, .898: each update is below half the spacing of its numbers."""
    network = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    recipe = Recipe(steps=6000, batch_size=4, ema=Still())
    state = TrainState(Denoiser(network, VP(), V()), recipe)
    with torch.no_grad():
        network.weight.fill_(0.9)
        state._follow()
        start = float(network.weight)
        network.weight.fill_(1.0)
        for state.step in range(1, 5001):
            state._follow()
    expected = 1 - (1 - start) * 0.9995**5000
    assert expected > 0.991
    mean = state.averaged.network.weight
    assert mean.dtype == torch.bfloat16
    rounding = 5000 * 2.0**-25  # half a spacing of float32 below 1 for each update
    assert float(state.average["network.weight"]) == pytest.approx(expected, abs=rounding)
    assert float(mean) == pytest.approx(expected, abs=2.0**-9)


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


def beside(value, name="held", parameter=False):
    """A layer that holds a further tensor."""
    network = nn.Linear(2, 2)
    if parameter:
        network.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        network.register_buffer(name, value)
    return network


@torch.inference_mode()
def inferred():
    return torch.zeros(2)


def weight_normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return nn.utils.weight_norm(nn.Linear(2, 2))


class Hooked(nn.Linear):
    """A layer whose state_dict has one tensor more, or less, than its parameters."""

    def __init__(self, ins, outs, name):
        super().__init__(ins, outs)
        self.name = name

    def state_dict(self, *args, **kwargs):
        found = super().state_dict(*args, **kwargs)
        key = f"{kwargs['prefix']}{self.name}"
        if found.pop(key, None) is None:
            found[key] = torch.zeros(1)
        return found


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: nn.Linear(2, 2).requires_grad_(False), "that requires a gradient"),
        (lambda: nn.ParameterList([torch.zeros(0, 2)]), "that requires a gradient"),
        (lambda: nn.LazyLinear(2), "initialized tensors of real numbers, .*; got network.weight"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "network.weight of torch.complex64"),
        (lambda: nn.Linear(2, 2, device="meta"), "network.weight, without values"),
        (lambda: Extra(2, 2), "network._extra_state of dict"),
        (lambda: beside(torch.eye(2).to_sparse()), "network.held, torch.sparse_coo"),
        (lambda: beside(torch.zeros(1).expand(3)), "network.held, an expanded tensor"),
        (lambda: beside(torch.zeros(2, dtype=torch.uint16)), "network.held of torch.uint16"),
        (lambda: beside(inferred()), "network.held, of inference mode"),
        (lambda: beside(torch.tensor(torch.nan)), "finite, .*'network.held' has values"),
        (lambda: beside(torch.tensor(-torch.inf), parameter=True), "finite, .*'network.held'"),
        (lambda: beside(torch.zeros(2), name="long" * 50), "short, printable names"),
        (lambda: beside(torch.zeros(2), name="a\nb"), "short, printable names"),
        (lambda: Hooked(2, 2, "more"), "a state_dict of its parameters .*: network.more"),
        (lambda: Hooked(2, 2, "bias"), "a state_dict of its parameters .*: network.bias"),
        (lambda: nn.Embedding(3, 2, sparse=True), "dense gradients; got sparse=True in network"),
        (weight_normed, "allow copy.deepcopy; .*torch.nn.utils.parametrizations"),
    ],
)
def test_a_network_that_cannot_be_saved_is_refused_at_once(network, named):
    with pytest.raises(ValueError, match=f"^denoiser must .*{named}") as caught:
        TrainState(Denoiser(network(), VP(), V()), RECIPE)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Held:
    """A law, or a process, with a parameter that no denoiser has."""

    scale: nn.Parameter

    def __call__(self, *given):
        return self.scale

    def __getattr__(self, name):
        return getattr(VP(), name)


ONE = torch.ones(())


def closure(parameter):
    return lambda *given: parameter


@pytest.mark.parametrize("name", ["process", "weight", "penalty", "times"])
@pytest.mark.parametrize(
    "kind", [Held, lambda p: nn.ParameterList([p]), lambda p: Held(p).__call__, closure]
)
def test_parameters_that_nothing_would_train_are_refused_at_once(name, kind):
    """Learned weights of the loss, for example: the optimizer has those of the denoiser only."""
    part = kind(nn.Parameter(torch.ones(())))
    if name == "process":
        part = part if isinstance(part, Held) else Held(nn.ParameterList([nn.Parameter(ONE)]))
    process, laws = (part, {}) if name == "process" else (VP(), {name: part})
    with pytest.raises(ValueError, match=f"^{name} must .*so that its parameters are trained"):
        TrainState(Denoiser(mlp(), process, V()), RECIPE, **laws)


def test_a_law_may_use_parameters_of_the_denoiser():
    process = Rate()
    laws = {"times": NormalLogSNR(process), "weight": lambda level: level.alpha}
    state = TrainState(Denoiser(mlp(), process, V()), RECIPE, **laws)
    assert state.denoiser.trained is None  # its range would move with the process


def test_no_step_is_made_beyond_the_recipe():
    """A linear rate would be negative there, and a cosine would rise again."""
    state = fresh(recipe=Recipe(steps=2, batch_size=4, decay="linear"))
    advance(state, 2)
    before = content(state)
    with pytest.raises(ValueError, match="step must be below steps, 2; got 2; give a recipe"):
        advance(state, 1)
    assert_same_bits(content(state), before)


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
