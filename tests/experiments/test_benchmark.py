"""The benchmark: what it must find where the answer is known, and what it refuses."""

import json
import math
import sys
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from benchmarks import ends, problems, solvers, written
from benchmarks.problems import Problem
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import verify

NAMES = [f"{k}-{d}" for k in problems.KINDS for d in problems.DIMENSIONS]


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


# ---- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 11])
def test_every_problem_has_mean_0_and_variance_1(seed):
    for problem in problems.problems(seed, samples=2):
        mean, covariance = problem.moments
        assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)
        assert_close(covariance.trace() / len(mean), torch.ones_like(mean[0]), rtol=1e-12, atol=0)


def test_moments_are_those_of_the_samples():
    """Within 4.5 standard errors of 40,000 draws, from their own fourth moments."""
    for problem in problems.named(("anisotropic-2", "low-rank-8"), samples=2):
        mean, covariance = problem.moments
        x = problem.data.sample(40_000, torch.Generator().manual_seed(1)) - mean
        products = x[:, :, None] * x[:, None]
        for values, truth in ((x, torch.zeros_like(mean)), (products, covariance)):
            error = values.std(0) / len(x) ** 0.5
            assert bool(((values.mean(0) - truth).abs() <= 4.5 * error + 1e-12).all())


def test_a_seed_is_a_problem_and_another_seed_another():
    def made(seed):
        return problems.problems(seed, ("low-rank",), (8,), 4)[0]

    assert torch.equal(made(3).data.means, made(3).data.means)
    assert torch.equal(made(3).noise, made(3).noise)
    assert not torch.equal(made(3).noise, made(4).noise)
    assert made(3).data.variances.tolist() != made(4).data.variances.tolist()


def test_the_names_are_kinds_and_dimensions_and_an_unknown_one_is_refused():
    assert [problem.name for problem in problems.named((), samples=2)] == NAMES
    assert [p.name for p in problems.named(("narrow-8", "Narrow-8"), samples=2)] == ["narrow-8"]
    with pytest.raises(ValueError, match="--problems must be a known name; got wide-2; known: na"):
        problems.named(("wide-2",))


@pytest.mark.parametrize(
    "process", [sd.VP(), sd.EDM(), sd.Discrete.linear()], ids=["vp", "edm", "ddpm"]
)
def test_every_process_begins_on_the_same_paths(smooth, process):
    """The closed-form flow of a Gaussian, from any process' first level, ends where `end` is.

    Of three flows at 1e-10 each promises 10 tolerances.
    """
    data = smooth.data.on(process)
    start = smooth.at(process.levels(torch.ones(1, dtype=torch.float64))[0])
    assert_close(data.flow(start, 1.0, 0.0), smooth.end, rtol=0, atol=3e-9)


# ---- ends ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exactly:
    """The exact flow in as many pretended calls as steps."""

    data: sd.exact.Gaussian

    claims, grid = sd.samplers.Claims(None), sd.grids.Uniform()

    def step(self, model, x, t, s, noise, memory):
        model(x, t)
        return self.data.flow(x, t.t, s.t), None


def test_an_exact_solver_has_error_0(smooth):
    """30 tolerances of the reference, see above, whatever the number of steps."""
    made = list(ends.by_calls({"exact": lambda n, p: Exactly(p.data)}, [smooth], [], (1, 7)))
    assert [m.calls for m in made] == [1, 7]
    assert [m.slowest for m in made] == [1, 7]
    assert max(m.worst for m in made) <= 3e-9


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2)])
def test_the_columns_of_a_known_method_fall_at_its_order(smooth, name, order):
    family = {name: ends.OURS[name]}
    made = list(ends.by_calls(family, [smooth], [], (64, 128, 256)))
    slopes = [math.log(a.rms / b.rms) / math.log(b.calls / a.calls) for a, b in pairwise(made)]
    assert max(abs(slope - order) for slope in slopes) <= 0.2


def test_calls_are_counted_and_a_column_is_filled_as_far_as_it_goes(small):
    made = list(ends.by_calls(ends.OURS, [small], [], (3, 10)))
    calls = {(m.solver, m.setting): m.calls for m in made}
    assert calls["ddim", 10] == calls["adams 3", 10] == 10
    assert calls["heun", 10] == 9  # 2 n - 1
    assert calls["heun", 3] == 3


@pytest.mark.parametrize(
    "count",
    [
        lambda n: n, lambda n: 2 * n - 1, lambda n: 3 * n, lambda n: n + 9, lambda n: n + 1,
        lambda n: n if n >= 4 else None, lambda n: 2 * n if n % 2 == 0 else None,
    ],
)  # fmt: skip
def test_the_steps_of_a_column_are_the_most_that_fit(count):
    for calls in (1, 3, 5, 10, 20, 50, 100):
        fit = [n for n in range(1, calls + 1) if count(n) is not None and count(n) <= calls]
        assert ends.steps_for(calls, count) == max(fit, default=None)


def test_noise_that_is_added_cannot_pass_for_a_small_error(small):
    made = ends.end("ancestral", 20, small, sd.Ancestral(), 20)
    assert made.rms > 100


def test_what_is_not_finite_is_no_end(small):
    @dataclass(frozen=True)
    class Lost(Exactly):
        def step(self, model, x, t, s, noise, memory):
            return x * math.nan, None

    with (
        pytest.warns(RuntimeWarning, match="Lost or the model diverged"),
        pytest.raises(ValueError, match="lost is not finite on narrow-2"),
    ):
        ends.end("lost", 3, small, Lost(small.data), 3)
    family, refusals = {"lost": lambda n, p: Lost(p.data)}, []
    with pytest.warns(RuntimeWarning):
        assert not list(ends.by_calls(family, [small], refusals, (3,)))
    (refusal,) = refusals
    assert (refusal.solver, refusal.setting) == ("lost", 3)
    assert refusal.reason == "1 steps: ValueError: lost is not finite on narrow-2"


def test_adaptive_solvers_keep_their_tolerance_and_pay_for_it(small):
    """10 tolerances at 1e-5 and below, the promise of OwnSteps."""
    family = {"dopri5": ends.OURS_ADAPTIVE["torch-ode dopri5"]}
    loose, tight = ends.by_tolerance(family, [small], (1e-3, 1e-6))
    assert tight.worst <= 1e-5
    assert tight.calls > loose.calls
    assert tight.calls == tight.slowest  # one step size for all


def test_a_solver_with_steps_for_each_sample_is_told_by_its_mean_and_its_slowest(small):
    """The report of the solver itself."""
    (made,) = ends.by_tolerance({"own": ends.OURS_ADAPTIVE["adaptive-ode"]}, [small], (1e-4,))
    (last,) = sd.trajectory(small.data, sd.AdaptiveODE(1e-4, 1e-4), small.start)
    assert made.calls == float(last.memory.calls.double().mean())
    assert made.slowest == int(last.memory.calls.max())
    assert made.calls < made.slowest


def test_the_mean_over_problems_is_geometric_and_needs_all_of_them():
    def end(solver, problem, rms):
        return ends.End(solver, problem, 10, 10.0, 10, rms, rms / 4, 1.0)

    made = [end("a", "p", 1e-2), end("a", "q", 1e-4), end("b", "p", 1e-9)]
    (mean,) = ends.means(made, 2)
    assert mean.solver == "a"
    assert_close(mean.rms, 1e-3)
    assert_close(mean.median, 2.5e-4)
    assert ends.geometric([0.0, 1.0]) == 0


def test_a_front_holds_what_nothing_beats():
    def mean(calls, rms):
        return ends.Mean("a", 0.1, calls, 9, rms, rms)

    points = [mean(30, 1e-3), mean(10, 1e-1), mean(20, 1e-3), mean(40, 1e-4), mean(15, 0.5)]
    assert [(p.calls, p.rms) for p in ends.front(points)] == [
        (10, 1e-1), (20, 1e-3), (40, 1e-4)
    ]  # fmt: skip


def test_the_data_of_the_benchmark_are_those_of_verify(small):
    """`verify.flow` from the start on VP ends where the problem does: three flows at 1e-10."""
    assert_close(verify.flow(small.data, small.start), small.end, rtol=0, atol=3e-8)


# ---- the script ----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """The script with these flags, in this process: its exit status and what it said."""

    def runs(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark_solvers.py", *map(str, arguments)])
        try:
            solvers.command.run(solvers.main, solvers.Config)
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return runs


def test_the_script_writes_its_tables_and_its_picture(tmp_path, run):
    status, said, complaint = run(
        "--parts", "ends", "adaptive", "laws", "--problems", "narrow-2", "--num-samples", 4,
        "--law-samples", 50, "--solvers", "adams auto", "torch-ode dopri5", "--out", tmp_path,
    )  # fmt: skip
    assert (status, complaint) == (0, "")
    text = (tmp_path / "benchmark.md").read_text()
    assert text in said
    for title in ("Problems: narrow-2.", "## Fixed steps", "## Adaptive", "## Laws"):
        assert title in text
    found = json.loads((tmp_path / "benchmark.json").read_text())
    columns = [end["setting"] for end in found["ends"]]
    assert columns == 2 * list(ends.COLUMNS) == [end["calls"] for end in found["ends"]]
    line = next(line for line in text.splitlines() if line.startswith("| adams auto |"))
    assert [f"{end['rms']:.2g} ({end['median']:.1e})" for end in found["ends"][:6]] == [
        told.strip() for told in line.split("|")[2:-1]
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        "benchmark.md", "benchmark.json", "benchmark.png", "config.json"
    }  # fmt: skip
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"problems": ("wide-2",)}, "--problems must be a known name; got wide-2"),
        ({"solvers": ("adamas",)}, "--solvers adamas: no name begins so; there are: adams auto"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"num_samples": 1}, "--num-samples must be at least 2; got 1"),
        ({"law_samples": 0}, "--law-samples must be at least 2; got 0"),
        ({"rounds": 0}, "--rounds must be at least 1; got 0"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, config, message):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        solvers.main(replace(solvers.Config(out=out), **config))
    assert not out.exists()


@pytest.mark.parametrize("flags", [("--seed", "x"), ("--parts", "speed"), ("--problems", "q")])
def test_a_refusal_is_one_line_and_exit_2(tmp_path, run, flags):
    status, said, complaint = run(*flags, "--out", tmp_path / "out")
    assert (status, said) == (2, "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert flags[0] in complaint
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused_and_kept(tmp_path, run):
    (tmp_path / "file").write_text("mine")
    status, _, complaint = run("--out", tmp_path / "file")
    assert (status, complaint) == (2, f"error: --out {tmp_path / 'file'}: not a folder\n")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_tables_tell_the_best_peer_and_how_far_ours_is_from_it():
    def end(solver, rms, median):
        return ends.End(solver, "p", 10, 10.0, 10, rms, median, 1.0)

    made = [end("adams 3", 1e-3, 2e-4), end("azula A", 2e-3, 1e-4), end("diffusers B", 4e-3, 5e-5)]
    text = written.table_of_ends(ends.means(made, 1))
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["10", "RMS", "azula A", "0.002 (1.0e-04)", "0.5"] in rows
    assert ["10", "median", "diffusers B", "0.004 (5.0e-05)", "4"] in rows
    assert "2 peers" in text
