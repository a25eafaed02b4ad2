"""`verify.order`, `local_order`, `limit` and `identities`, held to schemes whose error is known.

Synthetic samplers: the exact flow of the data plus an error that is put in on purpose.
"""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from oracles import w2

import sde_diffusion as sd
from sde_diffusion import verify
from sde_diffusion.grids import frames
from sde_diffusion.samplers import Claims

MEAN, VARIANCE = 0.7, 0.25
DATA = sd.exact.Gaussian(sd.VP(), torch.tensor([MEAN], dtype=torch.float64), VARIANCE)
SIZES = (64, 128, 256)


@dataclass(frozen=True)
class Shifted:
    """Exact in law, but each step of size h in u moves the state by  constant h^(p + 1) + floor.

    On data of any process, in the straight frame: y -> y + that, brought to the end of the path by
    the flow, so the whole error is known.
    """

    p: float = 1.0
    constant: float = 1.0
    floor: float = 0.0  # added once, in the last step
    claimed: int | None = None
    grid = sd.grids.Power()

    @property
    def claims(self):
        return Claims(self.claimed or math.floor(self.p))

    def step(self, model, x, t, s, noise, memory):
        """y = z (alpha m, C) is kept as the standardized z: z -> z + error."""
        prediction = model(x, t)
        gain, offset = flow_gain(t, s)
        # An addition to the model's output is passed on, so that the map is affine in it too.
        x = gain * x + offset + (s.sigma / 10) * (prediction.eps - DATA.on(model.process)(x, t).eps)
        h = t.u - s.u
        error = self.constant * h ** (self.p + 1) + (self.floor if s.sigma == 0 else 0.0)
        return x + math.sqrt(total(s)) * error, memory


def total(level):
    """Variance of the data at a level."""
    return level.alpha**2 * VARIANCE + level.sigma**2


def flow_gain(t, s):
    """x_s = gain x_t + offset, the exact flow."""
    gain = math.sqrt(total(s) / total(t))
    return gain, (s.alpha - gain * t.alpha) * MEAN


# ---- order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 1.5])
def test_the_order_of_a_known_error_is_found_and_its_size(p):
    """n even steps of u_max / n, each of which shifts by C h^(p+1) standard deviations and is then
    carried exactly: a mean off by n C h^(p+1) std, of order p."""
    order = verify.order(Shifted(p), DATA, sizes=SIZES)
    u = sd.VP().levels(torch.ones(1, dtype=torch.float64))[0].u
    expected = [n * (u / n) ** (p + 1) * math.sqrt(VARIANCE) for n in SIZES]
    assert order.distances == pytest.approx(expected, rel=1e-6)
    assert order.fitted == pytest.approx(p, abs=1e-6)
    assert order.rates == pytest.approx([p, p], abs=1e-6)
    assert order.tends == pytest.approx(p, abs=1e-6)
    assert order.holds
    assert order.floor is None


@pytest.mark.parametrize(("p", "claims"), [(1.0, 2), (2.0, 3), (1.5, 2)])
def test_an_order_lower_than_declared_is_reported(p, claims):
    order = verify.order(Shifted(p, claimed=claims), DATA, sizes=SIZES)
    assert not order.holds
    assert f"declared {claims}" in order.verdict
    assert "LOWER THAN DECLARED" in order.verdict
    assert verify.order(Shifted(p, claimed=claims), DATA, sizes=SIZES, declared=p).holds


def test_a_planted_floor_is_found_at_its_value():
    """The floor adds to the mean, 0.01 std, and the rest falls as 1 / n: below it by 512 steps."""
    sizes = (64, 128, 256, 512)
    order = verify.order(Shifted(2.0, floor=0.01), DATA, sizes=sizes)
    floor = 0.01 * math.sqrt(VARIANCE)
    assert order.floor == pytest.approx(floor, rel=1 / 64**2 / 0.01)
    assert f"THE ERROR STOPS SHRINKING at {floor:.1e}" in order.verdict
    assert not order.holds


@pytest.mark.parametrize("c", [4.0, 16.0])
def test_rates_that_rise_to_the_order_are_foreseen_and_falling_ones_are_not(c):
    """An error (1 - c / n) / n has the rate 1 - (x / 2 + 3 x^2 / 8 + ..) / ln 2 from n on, x = c /
    n: a doubling halves what it lacks. The last rate and its gain leave 3 x^2 / 16 ln 2 and more
    terms of x^3: x^2 / 2 is above both for x <= 1/4."""
    sizes = (64, 128, 256)
    rising = verify.Order("known", 1, sizes, tuple((1 - c / n) / n for n in sizes), 1e-12)
    assert rising.tends == pytest.approx(1, abs=(c / 64) ** 2 / 2)
    assert abs(rising.rates[-1] - 1) > c / 128 / 2 / math.log(2)
    falling = verify.Order("known", 1, sizes, tuple((1 + c / n) / n for n in sizes), 1e-12)
    assert falling.tends == falling.rates[-1] > 1


def test_an_exact_sampler_is_exact_up_to_rounding():
    order = verify.order(Shifted(constant=0.0), DATA, sizes=SIZES)
    assert order.fitted == math.inf
    assert order.holds
    assert order.verdict == "exact up to rounding at every number of steps"


def test_a_function_of_the_number_of_steps_is_a_family():
    """Each size makes its own sampler: here one with its times inside."""

    def family(n):
        grid = sd.Heun().grid(sd.VP(), n)
        return Planned(sd.Heun(), tuple(grid.tolist()))

    ours = verify.order(sd.Heun(), DATA, sizes=(16, 32))
    theirs = verify.order(family, DATA, sizes=(16, 32))
    assert theirs.distances == ours.distances
    assert theirs.declared == 2


@dataclass(frozen=True)
class At(sd.grids.Grid):
    """Its own times, whatever the steps."""

    own: tuple[float, ...]

    def __call__(self, process, steps, start=1.0, least_ratio=0.0):
        assert steps is None
        return self.times(process, 1, start, least_ratio)

    def times(self, process, steps, start, least_ratio):
        return torch.tensor(self.own, dtype=torch.float64)


@dataclass(frozen=True)
class Planned:
    """A sampler with its times inside."""

    inner: sd.samplers.Sampler
    times: tuple[float, ...]

    @property
    def claims(self):
        return replace(self.inner.claims, adaptive=True)

    @property
    def grid(self):
        return At(self.times)

    def step(self, *arguments):
        return self.inner.step(*arguments)


# ---- local order ------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamsBashforth:
    """AB2 in the straight frame, or with the ratio of its steps upside down.

    y_(n+1) = y_n + h ((1 + r / 2) F_n - r / 2 F_(n-1)),    r = h_n / h_(n-1)
    """

    inverted: bool = False

    claims, grid = Claims(2), sd.grids.Power()

    def step(self, model, x, t, s, noise, memory):
        slope, h = model(x, t).velocity, s.u - t.u
        if memory is None:
            total = slope
        else:
            r = h / memory[1]
            r = 1 / r if self.inverted else r
            total = (1 + r / 2) * slope - r / 2 * memory[0]
        return frames.leave(frames.enter(x, t) + h * total, s), (slope, h)


@pytest.mark.parametrize("inverted", [False, True])
def test_the_global_order_on_even_steps_does_not_see_an_inverted_ratio(inverted):
    order = verify.order(AdamsBashforth(inverted), DATA, sizes=(64, 128, 256))
    assert order.holds
    assert order.fitted == pytest.approx(2, abs=0.2)


FEW = (0.01, 0.005, 0.0025)
# An error of a stretch is in units of x = (alpha + sigma) y at its end, up to 5 h below u = 0.6.
# There d log(alpha + sigma) / du is 1 / (1 - u) = 2.5 on VE, -0.4 on VP: less than 3 apart. So fits
# over FEW may differ by
END = 3 * 5 * (0.01 - 0.0025) / math.log(4)


def test_single_steps_see_an_inverted_ratio_and_whole_stretches_do_not():
    """h / r = the step before: what is inverted adds (h_(n-1) / 2) (F_n - F_(n-1)), the trapezoidal
    correction of the step before. A stretch is of order 2; a step, left uncorrected, of order 1."""
    two, one = dict.fromkeys((2.0, 1.0, 0.5), 2.0), {2.0: 1.0, 1.0: 2.0, 0.5: 1.0}
    right = verify.local_order(AdamsBashforth(), DATA)
    assert right.holds
    assert right.fitted == pytest.approx(two, abs=0.2)
    assert right.of_one_step == pytest.approx(two, abs=0.2)
    wrong = verify.local_order(AdamsBashforth(inverted=True), DATA)
    assert wrong.fitted == pytest.approx(two, abs=0.2)
    assert wrong.of_one_step == pytest.approx(one, abs=0.2)
    assert not wrong.holds
    assert "SINGLE STEPS LOWER THAN DECLARED" in wrong.verdict
    assert verify.local_order(AdamsBashforth(inverted=True), DATA, of_one_step=1).holds


@pytest.mark.parametrize("process", [sd.VE(), sd.RectifiedFlow()], ids=str)
def test_local_order_is_the_same_on_every_process(process):
    """The straight frame is one for all; see END for what differs."""
    ours, theirs = (
        verify.local_order(AdamsBashforth(), DATA, on, spans=FEW) for on in (None, process)
    )
    assert theirs.fitted == pytest.approx(ours.fitted, abs=END)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_the_local_order_of_a_known_error_is_found(p):
    """A stretch of steps in proportion to h shifts by a multiple of h^(p+1) standard deviations.
    The constant keeps a single step of order 3 above rounding."""
    local = verify.local_order(Shifted(p, constant=1000.0), DATA, spans=FEW)
    known = dict.fromkeys((2.0, 1.0, 0.5), p)
    assert local.fitted == pytest.approx(known, abs=END)
    assert local.of_one_step == pytest.approx(known, abs=END)
    assert local.holds
    assert "LOWER" in verify.local_order(Shifted(p, claimed=4), DATA, spans=FEW).verdict


# ---- limit ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tends:
    """One step to N(mean + a / N, (std + b / N)^2) exactly, on a grid of N."""

    mean: float = MEAN
    std: float = math.sqrt(VARIANCE)
    a: float = 1.0
    b: float = -2.0
    power: float = 1.0

    claims, grid = Claims(1), sd.grids.Power()

    def step(self, model, x, t, s, noise, memory):
        n = (memory or 0) + 1
        gain, offset = flow_gain(t, s)
        x = gain * x + offset + 0 * model(x, t).x0
        if s.sigma == 0:  # n is the number of steps
            size = (self.std + self.b / n**self.power) / math.sqrt(VARIANCE)
            x = (x - MEAN) * size + self.mean + self.a / n**self.power
        return x, n


@pytest.mark.parametrize("power", [1.0, 2.0, 1.5])
def test_richardson_is_exact_for_a_plus_b_by_n_to_a_power(power):
    """Mean and root of the covariance are a + b N^-p: no rest. Rounding: eps N^p, below 1e-9."""
    limit = verify.limit(Tends(power=power), DATA)
    assert limit.rate == pytest.approx(power, abs=1e-8)
    assert float(limit.mean) == pytest.approx(MEAN, abs=1e-10)
    assert float(limit.covariance) == pytest.approx(VARIANCE, abs=1e-10)
    assert limit.uncertainty < 1e-9
    errors = [math.hypot(1 / n**power, -2 / n**power) for n in limit.sizes]
    assert limit.distances == pytest.approx(errors, rel=1e-8)
    assert limit.holds
    assert limit.verdict.startswith("tends to the data")


@pytest.mark.parametrize("wrong", [{"mean": MEAN + 1e-3}, {"std": math.sqrt(VARIANCE) * 1.001}])
def test_a_wrong_limit_is_reported_with_its_distance(wrong):
    limit = verify.limit(Tends(**wrong), DATA)
    right = Tends()
    found = Tends(**wrong)
    expected = w2((found.mean, found.std**2), (right.mean, right.std**2))
    assert limit.distance == pytest.approx(expected, abs=1e-9)
    assert not limit.holds
    assert limit.verdict.startswith("TENDS TO ANOTHER LAW")


def test_heun_misses_the_data_by_eulers_step_from_karras_last_level():
    """s^2 / (2 std) with s = 0.002: `Law.left`, and no more than it is allowed for."""
    law = verify.law(sd.Heun(), DATA, steps=64)
    left = 0.002**2 / (2 * math.sqrt(VARIANCE))
    assert law.left == pytest.approx(left, rel=1e-4)  # its next term is 3 s^2 / (4 var)
    limit = verify.limit(sd.Heun(), DATA)
    assert limit.distance == pytest.approx(left, abs=3 * limit.uncertainty + 1e-8)
    assert limit.holds
    assert "as an Euler step from its last level leaves" in limit.verdict
    assert not replace(limit, left=0.0).holds
    assert not replace(limit, left=2 * left).holds


def test_laws_that_move_apart_show_no_limit():
    """However uncertain: a sampler that diverges must not pass for it."""
    apart = verify.limit(Tends(power=-1.0, a=0.05, b=0.0), DATA)
    assert not apart.shown
    assert not apart.holds
    slow = verify.limit(Tends(power=0.3, a=0.05, b=0.0), DATA)
    assert not slow.holds


def test_the_verdict_of_a_law_that_does_not_settle_is_no_limit():
    """a N^(-0.3) falls too slowly for a limit by doubling: no extrapolation is made."""
    limit = verify.limit(Tends(power=0.3, a=0.05, b=0.0), DATA)
    assert limit.rate == pytest.approx(0.3, abs=1e-6)
    assert limit.distance == pytest.approx(0.05 / 512**0.3, rel=1e-6)


# ---- identities -------------------------------------------------------------------------------


def test_torchsdes_euler_is_ours_at_every_state():
    for method in ("euler", "milstein"):
        same = verify.identities(sd.EulerMaruyama(), sd.samplers.TorchSDE(method), DATA, steps=12)
        assert same.holds
        assert same.calls == (12, 12)
        assert len(same.times) == len(same.differences) == 13
        assert same.verdict.startswith("equal to")


@dataclass(frozen=True)
class FromStep(sd.EulerMaruyama):
    """As another sampler from step `first` on."""

    first: int = 5
    other: sd.samplers.Sampler = field(default_factory=lambda: sd.Ancestral("beta"))

    def step(self, model, x, t, s, noise, memory):
        index = memory or 0
        chosen = self.other if index >= self.first else sd.EulerMaruyama()
        return chosen.step(model, x, t, s, noise, None)[0], index + 1


@pytest.mark.parametrize("first", [0, 5, 11])
def test_the_first_state_that_differs_is_named(first):
    same = verify.identities(sd.EulerMaruyama(), FromStep(first=first), DATA, steps=12)
    assert not same.holds
    assert max(same.differences[: first + 1]) == 0
    assert same.differences[first + 1] > 1e-6
    assert "DIFFERENT from" in same.verdict
    assert f"at t={same.times[first + 1]:.4g}, there by" in same.verdict


def test_schemes_of_different_numbers_of_calls_are_not_the_same():
    same = verify.identities(sd.Heun(), sd.Ancestral(eta=0.0), DATA, steps=6)
    assert same.calls == (11, 6)
    assert "NOT THE SAME SCHEME: 11 calls and 6" in same.verdict


def test_identities_need_no_exact_model():
    torch.manual_seed(0)
    network = sd.networks.MLP((3,), width=8)
    model = sd.Denoiser(network.double(), sd.VP())
    same = verify.identities(
        sd.EulerMaruyama(), sd.samplers.TorchSDE(), model, steps=6, shape=(3,), tolerance=1e-8
    )
    assert same.holds
