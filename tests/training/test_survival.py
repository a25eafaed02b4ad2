"""A training program that is killed again and again ends with the bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import small_mnist

from sde_diffusion import training

SCRIPT = Path(__file__).parents[2] / "experiments" / "mnist_vp.py"

# The program with a slow disk: each flush takes a tenth of a second, so that a kill at a random
# moment often falls into a save. Nothing else is changed.
SLOW = """
import os, runpy, sys, time
flush = os.fsync
def slow(handle):
    time.sleep(0.1)
    flush(handle)
os.fsync = slow
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def program(out, mnist, *more, slow=False):
    """Its command line: 400 steps of a small network with dropout in a few seconds."""
    flags = ("--train", "--network", "mlp", "--train-steps", 400, "--batch-size", 16,
             "--checkpoint-every", 20, "--num-samples", 1, "--sampler", "adams", "--steps", 2,
             "--data-root", mnist, "--tracker", "none", "--out", out, *more)  # fmt: skip
    start = ("-c", SLOW) if slow else ()
    return [sys.executable, *start, *map(str, (SCRIPT, *flags))]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    return small_mnist(tmp_path_factory.mktemp("mnist"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, mnist):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(program(out, mnist), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def assert_same_run(out, whole):
    """Weights, average, optimizer, and every row of the table."""
    assert (out / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for name in ("training", "denoiser"):
        paths = [training.newest_checkpoint(f) / f"{name}.safetensors" for f in (out, whole)]
        ours, theirs = (path.read_bytes() for path in paths)
        assert ours == theirs, name
    weights, expected = (load_file(f / "mnist_vp.safetensors") for f in (out, whole))
    assert all((weights[name] == expected[name]).all() for name in expected)


def wait(process, until):
    """Wait for something to be true of the run, or for its end."""
    deadline = time.monotonic() + 240
    while process.poll() is None and not until():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def survive(kills, out, mnist, uninterrupted):
    """Kill the program `kills` times, each time after a random time, and let it end."""
    moments, during_save, seen = random.Random(kills), 0, set()
    table = out / "metrics.csv"
    for kill in range(kills):
        newest = training.newest_checkpoint(out)
        seen.add(newest)
        written = table.stat().st_mtime_ns if table.exists() else 0
        start = "--overwrite" if newest is None else "--resume"  # killed before its first save
        process = subprocess.Popen(
            program(out, mnist, start, slow=True),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kill % 3 == 0:  # anywhere, its start included
            time.sleep(moments.uniform(0, 6))
        else:  # in its steps, or from its second save on
            wait(process, lambda w=written: table.exists() and table.stat().st_mtime_ns != w)
        if kill % 3 == 1:
            time.sleep(moments.uniform(0, 5))
        if kill % 3 == 2:
            wait(process, lambda n=newest: training.newest_checkpoint(out) != n)
            wait(process, lambda: list(out.glob(".checkpoint-*.part")))
            time.sleep(moments.uniform(0, 0.9))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), errors
        during_save += bool(list(out.glob(".checkpoint-*.part")))
        if process.returncode == 0:
            break
    done = subprocess.run(
        program(out, mnist, "--resume"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "passed over" not in done.stderr  # no checkpoint was ever left damaged
    assert_same_run(out, uninterrupted)
    return during_save, seen


@pytest.mark.kill
def test_ten_kills_change_nothing(tmp_path, mnist, uninterrupted):
    during_save, seen = survive(10, tmp_path / "run", mnist, uninterrupted)
    assert during_save > 0  # some of them fell into a save
    assert len(seen) > 2  # and it had made progress in between


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path, mnist, uninterrupted):
    for round_ in range(5):
        survive(10 + round_, tmp_path / str(round_), mnist, uninterrupted)


@pytest.mark.kill
@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_and_the_run_goes_on(tmp_path, mnist, uninterrupted, which, code):
    out = tmp_path / "run"
    process = subprocess.Popen(
        program(out, mnist, "--checkpoint-every", 1000, slow=True),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not ((out / "metrics.csv").exists() and (out / "metrics.csv").stat().st_size > 100):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(which)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    saved = training.newest_checkpoint(out)
    steps = len(training.history(out))
    assert 0 < steps < 400
    assert saved.name == f"checkpoint-{steps:08d}"
    done = subprocess.run(
        program(out, mnist, "--resume"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(out, uninterrupted)
