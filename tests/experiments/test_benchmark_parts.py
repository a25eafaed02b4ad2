"""The other parts of the benchmark: laws, overhead, the rules of dpm-solver, and peers."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from benchmarks import ends, laws, overhead, peers, problems, rules, solvers, written
from benchmarks.problems import Problem
from torch.testing import assert_close

import sde_diffusion as sd


@pytest.fixture(scope="module")
def small() -> Problem:
    return problems.named(("narrow-2",), seed=5, samples=16)[0]


@pytest.fixture(scope="module")
def smooth() -> Problem:
    """One Gaussian of standard deviation 1/2: every solver is at its order from few steps on."""
    source = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.7, -0.4], dtype=torch.float64)
    noise = torch.randn(64, 2, dtype=torch.float64, generator=source)
    return Problem("smooth-2", sd.exact.Gaussian(sd.VP(), mean, 0.25), noise)


# ---- the rules of dpm-solver ---------------------------------------------------------------------


def test_order_2_without_the_correction_is_dpm_solver_2m(small):
    """The package's own, typed after Lu et al. 2022b, on the same levels; rounding of 20 steps."""
    rule = rules.UniP(2, "log-SNR", 1e-3)
    times = rule.grid(sd.VP(), 20)
    made, other = (
        sd.sample(small.data, sampler, small.start, times=times)
        for sampler in (rule, sd.DPMSolver(2))
    )
    assert_close(made, other, rtol=0, atol=1e-11)


def test_three_levels_are_exact_where_x0_is_quadratic_in_the_log_ratio():
    """x_s = sigma_s / sigma_t x + sigma_s int e^l x0(l) dl, Lu et al. 2022b, eq. 8."""
    times = torch.tensor([0.7, 0.6, 0.45, 0.3], dtype=torch.float64)
    *levels, s = sd.VP().levels(times)
    t = levels[-1]
    ends = [level.log_snr / 2 for level in (t, s)]
    a, b, c = 0.3, -0.8, 0.5  # x0 = a + b l + c l^2

    def integral(at):
        return math.exp(at) * (a + b * (at - 1) + c * (at**2 - 2 * at + 2))

    def seen(level):
        at = level.log_snr / 2
        return at, torch.tensor([a + b * at + c * at**2], dtype=torch.float64)

    x = torch.ones(1, dtype=torch.float64)
    exact = s.sigma / t.sigma * x + s.sigma * (integral(ends[1]) - integral(ends[0]))
    predicted = rules.advanced(x, t, s, seen(t), [seen(levels[1]), seen(levels[0])])
    assert_close(predicted, exact, rtol=1e-12, atol=0)
    corrected = rules.advanced(x, t, s, seen(t), [seen(s), seen(levels[1])])
    assert_close(corrected, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spacing", ["time", "quadratic", "log-SNR"])
def test_the_levels_are_even_in_what_they_say(spacing):
    grid = rules.UniP(2, spacing, 1e-3).grid(sd.VP(), 5)
    assert (grid[0], grid[-1]) == (1, 0)
    assert_close(grid[-2], torch.tensor(1e-3, dtype=torch.float64), rtol=1e-9, atol=0)
    clock = {
        "time": lambda t: t, "quadratic": lambda t: t.sqrt(),
        "log-SNR": lambda t: torch.tensor([level.log_snr for level in sd.VP().levels(t)]),
    }[spacing](grid[:-1])  # fmt: skip
    assert_close(clock.diff(), clock.diff().mean().expand(4), rtol=1e-6, atol=0)


# ---- laws ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """Draws of the data, moved; one pretended call."""

    data: sd.exact.GaussianMixture
    shift: float

    claims, grid = sd.samplers.Claims(None), sd.grids.Uniform()

    def step(self, model, x, t, s, noise, memory):
        model(x, t)
        return self.data.sample(len(x), noise.generator) + self.shift, None


def test_exact_samples_are_at_the_floor_and_moved_ones_are_not(small):
    families = {f"{shift}": lambda n, shift=shift: Drawn(small.data, shift) for shift in (0, 0.5)}
    exact, moved = laws.distances(families, {}, [small], [], 2000, columns=(1,))
    for name, (mean, std) in exact.floors.items():
        spread = std * math.sqrt(1 + 1 / laws.FLOORS)
        assert abs(exact.distances[name] - mean) <= 6 * spread, name  # t of 7: 4.5 SE is 6.0 std
        assert moved.distances[name] > mean + 6 * spread, name
    assert moved.ratio > exact.ratio
    # A shift by delta in every coordinate moves each projection by delta (1, 1) . direction: the
    # mean square of that over the directions is about delta^2.
    assert 0.25 < moved.distances["sliced W2"] < 1.0


@pytest.mark.parametrize("name", ["narrow-2", "anisotropic-8", "low-rank-8"])
def test_the_characteristic_function_is_that_of_the_samples(name):
    """n mean |phi_n - phi|^2 is 1 - mean |phi|^2 for exact samples: mean of 64 batches, 4.5 SE."""
    data = problems.named((name,), samples=2)[0].data
    source = torch.Generator().manual_seed(2)
    wave = laws.Characteristic.of(data, source)
    found = torch.tensor([wave.mmd(data.sample(500, source)) ** 2 for _ in range(64)])
    expected = float((1 - wave.known.abs().square()).mean()) / 500
    assert abs(float(found.mean()) - expected) <= 4.5 * float(found.std()) / 8


def test_starts_have_the_law_of_the_first_level(smooth):
    """Mean alpha m and variance alpha^2 / 4 + sigma^2, 4.5 standard errors of 20,000 draws."""
    sampler = SimpleNamespace(grid=lambda process, steps: torch.tensor([0.3, 0.0]).double())
    model = ends.Counted(smooth.data)
    n = 20_000
    x = laws.start(model, sampler, 5, smooth, n, torch.Generator().manual_seed(0))
    level = sd.VP().levels(torch.tensor([0.3], dtype=torch.float64))[0]
    variance = level.alpha**2 / 4 + level.sigma**2
    off = (x.mean(0) - level.alpha * smooth.data.mean).abs() / math.sqrt(variance / n)
    assert float(off.max()) <= 4.5
    off = (x.var(0) - variance).abs() / (variance * math.sqrt(2 / n))
    assert float(off.max()) <= 4.5


def test_a_path_adds_up():
    """A step within a step gets one Brownian path: corr = sqrt((a - b) / (a - c)), 4.5 SE."""
    n = 40_000
    torch_state = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = peers.Path(torch.zeros(n, dtype=torch.float64))
        half, whole = path(3.0, 2.0), path(3.0, 1.0)
        after = path(1.0, 0.5)
    assert torch.equal(torch_state, torch.get_rng_state())
    for made in (half, whole, after):
        assert abs(float(made.var()) - 1) <= 4.5 * math.sqrt(2 / n)
    rho = math.sqrt(1 / 2)
    for one, other, expected in ((half, whole, rho), (whole, after, 0.0)):
        error = math.sqrt((1 + expected**2) / n)
        assert abs(float((one * other).mean()) - expected) <= 4.5 * error


def test_the_table_of_laws_is_in_units_of_the_floor():
    made = laws.Distance("ancestral", "p", 10, 10.0, {"W": 3.0}, {"W": (1.5, 0.1)})
    assert made.ratio == 2
    assert "| ancestral | 2.00 |" in written.table_of_laws([made], 100)


# ---- overhead ------------------------------------------------------------------------------------


def test_the_unit_is_one_call_and_one_update_and_has_ratio_1(monkeypatch):
    """On a clock that ticks once a call."""
    networks = []

    def families(network, shape):
        networks.append(network)
        bare = overhead.bare(network, shape)

        def twice():
            bare()
            bare()

        return {"same": bare, "twice": twice, **overhead.ours(network, shape)}

    clock = SimpleNamespace(process_time=lambda: networks[-1].ticks if networks else 0)
    monkeypatch.setattr(overhead, "time", clock)
    monkeypatch.setattr(overhead, "OneOperation", Ticking)
    made = {m.solver: m for m in overhead.overheads(families, ((4, 2),), rounds=2)}
    assert {m.ratio for m in made.values()} == {1.0}
    steps = overhead.STEPS
    assert (made["same"].calls, made["twice"].calls) == (steps, 2 * steps)
    assert made["adams 3"].calls == steps
    assert made["heun"].calls == 2 * steps - 1


class Ticking(overhead.OneOperation):
    ticks = 0

    def forward(self, x, c=None):
        self.ticks += 1
        return super().forward(x, c)


def test_a_run_of_the_real_network_is_timed_against_its_calls():
    samplers = {"heun": sd.Heun(), "adams 2": sd.Adams(2)}
    heun, adams = overhead.unet(samplers, images=1, steps=2, rounds=1)
    assert (heun.calls, adams.calls) == (3, 2)
    assert min(heun.ratio, adams.ratio, heun.seconds) > 0


# ---- peers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer_solvers():
    for library in ("diffusers", "k_diffusion", "azula"):
        pytest.importorskip(library)
    overhead.quiet()
    return peers.solvers()


def run_at_20_calls(peer_solvers, problem):
    families = {n: solvers.without_problem(family) for n, family in peer_solvers.items()}
    refusals = []
    made = list(ends.by_calls(families, [problem], refusals, (20,)))
    assert not refusals
    assert [end.solver for end in made] == list(families)
    assert max(end.calls for end in made) <= 20
    # None adds the noise that it is given, 1e6; sigma is up to 1000 times what is left of x0.
    assert max(end.rms for end in made) < 1000


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_peer_of_each_kind_runs_at_20_calls(peer_solvers, small):
    kinds = {name.split()[1].strip(","): name for name in peer_solvers}
    run_at_20_calls({name: peer_solvers[name] for name in kinds.values()}, small)


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_peer_runs_at_20_calls(peer_solvers, small):
    run_at_20_calls(peer_solvers, small)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_eulers_rule_is_eulers_rule(peer_solvers, small):
    """k-diffusion's, its grid in float64, and DDIM on these levels: rounding of 10 steps."""
    theirs = peer_solvers["k-diffusion euler, u"](10)
    made = ends.end("theirs", 10, small, theirs)
    model = small.data.on(theirs.process)
    times = model.process.time(-2 * theirs.levels.log())
    start = small.at(model.process.levels(times[:1])[0])
    ours = small.errors(sd.sample(model, sd.Ancestral(eta=0.0), start, times=times))
    assert_close(made.rms, float(ours.square().mean().sqrt()), rtol=1e-9, atol=0)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_adaptive_peers_run_and_follow_their_tolerance(peer_solvers, small):
    for name, family in peers.adaptive().items():
        loose, tight = ends.by_tolerance({name: family}, [small], (1e-1, 1e-4))
        assert tight.rms < loose.rms
        assert tight.calls > loose.calls


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_every_stochastic_peer_runs_and_draws(peer_solvers, small):
    for name, family in peers.stochastic().items():
        runs = [laws.drawn(small, family(12), 12, 8, seed) for seed in (0, 0, 1)]
        assert all(bool(made.isfinite().all()) for made, _ in runs), name
        assert torch.equal(runs[0][0], runs[1][0])
        assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_peers_loops_are_timed(peer_solvers):
    (shape,) = shapes = ((4, 1, 8, 8),)
    made = overhead.overheads(overhead.with_peers, shapes, rounds=1)
    libraries = {name.split()[0] for name in (m.solver for m in made)}
    assert {"diffusers", "k-diffusion", "azula"} <= libraries
    assert {m.shape for m in made} == {shape}
    assert all(m.calls >= overhead.STEPS for m in made)
