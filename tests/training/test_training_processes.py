"""Two processes compute what one computes, and none waits for one that is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from training_runs import POINTS, RECIPE, TIMES, Learned, fresh, small_mnist
from two_processes import CASES, DTYPES, content

from sde_diffusion import training

HERE = Path(__file__).parents[1] / "common"


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(*command, processes=2):
    """One program as that many processes, as torchrun starts them."""
    port = str(free_port())
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "PATH": "",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}",
              "LOCAL_WORLD_SIZE": str(processes)}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run = start(HERE / "two_processes.py", folder)
    told = [process.communicate(timeout=240)[1] for process in run]
    assert all(process.returncode == 0 for process in run), "\n".join(told)
    return folder


def alone(network, data, dtype, steps=3, parts=1, **others):
    state = fresh(network, dtype=dtype, **others)
    made = training.train(state, data, parts)
    losses = [metrics.loss for metrics, _ in zip(made, range(steps), strict=False)]
    return content(state), losses


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradient_of_one(found, case, dtype, parts):
    """At the third step, with dropout, to rounding. AdamW divides a gradient by its own size, so
    weights are compared where none is rounding alone: the biases in front of the U-Net's norms, of
    one channel a group, have no effect and a gradient of 0."""
    bound = {"float32": 1e-6, "float64": 1e-12}[dtype]
    expected, losses = alone(*CASES[case], DTYPES[dtype])
    theirs = load_file(found / "found.safetensors")
    moved = 0.0
    for name, value in expected.items():
        if case == "unet" and not name.startswith("grad"):
            continue
        other = theirs[f"{case}.{dtype}.{parts}.{name}"]
        size = max(1.0, float(value.abs().max()))
        assert_close(other, value, rtol=0, atol=bound * size, msg=name)
        moved = max(moved, float(value.abs().max()) if name.startswith("grad") else 0.0)
    assert moved > 1e-3
    assert_close(theirs[f"{case}.{dtype}.{parts}.losses"], torch.tensor(losses).double(),
                 rtol=bound, atol=0)  # fmt: skip


def test_parameters_outside_the_network_have_the_gradient_of_one_process(found):
    """A learned process: DDP, which wraps the network, leaves its gradient to training."""
    theirs = load_file(found / "found.safetensors")
    for run, steps in (("learned", 3), ("relearned", 4)):
        expected, _ = alone(*CASES["mlp"], torch.float64, steps=steps, process=Learned())
        assert abs(float(expected["grad.process.gain"])) > 1e-3
        for name, value in expected.items():
            assert_close(theirs[f"{run}.{name}"], value, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_are_trained_and_saved_as_whole_ones(found, case):
    theirs = load_file(found / "found.safetensors")
    for run, steps in (("fsdp", 3), ("again", 4)):
        expected, _ = alone(*CASES[case], torch.float64, steps=steps)
        for name, value in expected.items():
            if case == "mlp" or name.startswith("grad"):
                other = theirs[f"{run}.{case}.{name}"]
                assert_close(other, value, rtol=0, atol=1e-12, msg=name)


def test_one_process_goes_on_from_a_checkpoint_of_two(found):
    for folder, case in (("ddp", "unet"), ("fsdp-mlp", "mlp"), ("fsdp-unet", "unet")):
        network, data = CASES[case]
        state = fresh(network, dtype=torch.float64, seed=7)
        training.restore(state, training.newest_checkpoint(found / folder))
        next(training.train(state, data))
        expected, _ = alone(network, data, torch.float64, steps=4)
        for name, value in content(state).items():
            if name.startswith("grad"):
                assert_close(value, expected[name], rtol=0, atol=1e-12, msg=name)


def test_no_two_positions_share_noise_and_together_they_are_the_batch_of_one(found):
    parts = [load_file(found / f"drawn{rank}.safetensors") for rank in range(2)]
    whole = training.draw(POINTS, RECIPE, TIMES, 3)
    for field in ("eps", "x0", "t"):
        assert torch.equal(torch.cat([part[field] for part in parts]), getattr(whole, field))
    assert len(whole.eps.unique(dim=0)) == RECIPE.batch_size


def test_when_one_process_is_killed_the_others_say_so_and_exit(tmp_path):
    script = HERE.parents[1] / "experiments" / "mnist_vp.py"
    mnist = small_mnist(tmp_path / "data")
    run = start(script, "--train", "--network", "mlp", "--data-root", mnist, "--batch-size", 8,
                "--train-steps", 1_000_000, "--out", tmp_path / "out", "--device", "cpu",
                "--tracker", "none")  # fmt: skip
    table, deadline = tmp_path / "out" / "metrics.csv", time.monotonic() + 120
    try:
        while not (table.exists() and table.stat().st_size > 4096):
            assert time.monotonic() < deadline, "no step was made"
            assert all(process.poll() is None for process in run), run[0].communicate()
            time.sleep(0.2)
        run[1].send_signal(signal.SIGKILL)
        _, errors = run[0].communicate(timeout=60)
    finally:
        for process in run:
            process.kill()
            process.communicate()
    assert run[0].returncode == 2, errors
    assert "process 0 of 2 stops at step" in errors
    assert "Traceback" not in errors
