"""The evaluation of samplers as a user runs it: its figures, two processes, what it refuses."""

import importlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from common import command
from PIL import Image
from torch.testing import assert_close
from training_runs import small_mnist

import sde_diffusion as sd
from sde_diffusion import data, metrics
from sde_diffusion.metrics import features

ROOT = Path(__file__).parents[2]
COUNT = 70
FLAGS = (
    "--samplers", "ddim", "heun", "adaptive-ode", "--steps", "1", "2", "--tolerances", "0.9",
    "--num-samples", COUNT, "--batch-size", 32, "--num-real", 300,
)  # fmt: skip


def start(*flags, root, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "SDE_DIFFUSION_DATA"}
    command = [sys.executable, ROOT / "experiments" / "evaluate.py", *flags, "--data-root", root]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return small_mnist(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, root):
    """What one process prints and writes."""
    out = tmp_path_factory.mktemp("evaluate") / "alone"
    process = start(*FLAGS, "--out", out, root=root)
    printed, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    return printed, out


def test_every_row_is_in_the_table_the_json_and_the_picture(alone):
    printed, out = alone
    record = json.loads((out / "evaluate.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "evaluate.json", "evaluate.png", "config.json"
    }  # fmt: skip
    with Image.open(out / "evaluate.png") as picture:
        picture.load()
        assert picture.size[0] > 600
    rows = {(row["sampler"], row["steps"], row["tolerance"]): row for row in record["rows"]}
    calls = {key[:2]: row["calls"] for key, row in rows.items()}
    assert calls.pop(("adaptive-ode", None)) >= 2
    assert calls == {("ddim", 1): 1, ("ddim", 2): 2, ("heun", 1): 1, ("heun", 2): 3}
    lines = printed.splitlines()
    assert "Frechet distance on 64 features of a digit classifier, against 150" in lines[0]
    assert "real digits" in lines[2]
    assert lines[3].split()[:4] == ["±", "5", "splits", f"{COUNT}"]
    for (word, steps, tolerance), line in zip(rows, lines[4:], strict=False):
        assert line.startswith(word)
        assert (f"{steps} steps" if steps else f"tol {tolerance:g}") in line
        assert f"{COUNT} " in line
    for row in [record["floor"], *rows.values()]:
        assert row["num_samples"] == COUNT
        assert sum(row["classes"]) == COUNT
        assert min(row[name] for name in ("precision", "recall", "total_variation")) >= 0
    # Twice as many steps of either serve better, and nothing comes as near as real digits.
    assert rows["ddim", 2, None]["frechet"] < rows["ddim", 1, None]["frechet"]
    assert record["floor"]["frechet"] < min(row["frechet"] for row in rows.values())


def test_the_figures_are_the_librarys(alone, root):
    """Those of DDIM in two steps, with seeds seed * 2^32 + k, in batches of 32."""
    record = json.loads((alone[1] / "evaluate.json").read_text())
    row = next(r for r in record["rows"] if (r["sampler"], r["steps"]) == ("ddim", 2))
    denoiser, network = sd.pretrained("mnist_vp"), features.MnistFeatures()
    x = denoiser.process.prior((COUNT, 1, 28, 28), seeds=range(COUNT))
    made = sd.sample(denoiser, sd.Ancestral(eta=0.0), x, steps=2)
    digits = data.mnist(root).pixels[:300]
    real = data.dequantize(digits, torch.tensor(0.5))
    reference, held_out = metrics.halves(metrics.extract(real, network))
    found = metrics.extract(made, network)
    distance = metrics.frechet_distance(
        metrics.Statistics.of(reference), metrics.Statistics.of(found)
    )
    # A network's rounding depends on its batch: 1e-5 of features whose variance is about 1.
    assert row["frechet"] == pytest.approx(float(distance), rel=1e-3)
    assert row["kid"] == pytest.approx(float(metrics.kid(reference, found)), rel=1e-3)
    alike = metrics.precision_recall(reference[:COUNT], found)
    assert row["precision"] == pytest.approx(float(alike.precision), abs=1.5 / COUNT)
    assert row["recall"] == pytest.approx(float(alike.recall), abs=1.5 / COUNT)
    largest = network.probabilities(made).max(1)
    assert row["confidence"] == pytest.approx(float(largest.values.mean()), abs=1e-4)
    classes = torch.bincount(largest.indices, minlength=10)
    assert int((classes - torch.tensor(row["classes"])).abs().sum()) <= 2
    shares = torch.bincount(data.mnist(root).labels[:300], minlength=10) / 300
    assert_close(torch.tensor(record["data_class_shares"]), shares)
    variation = (torch.tensor(row["classes"]) / COUNT - shares).abs().sum() / 2
    assert row["total_variation"] == pytest.approx(float(variation), abs=1e-6)
    floor = metrics.frechet_distance(
        metrics.Statistics.of(reference), metrics.Statistics.of(held_out[:COUNT])
    )
    assert record["floor"]["frechet"] == pytest.approx(float(floor), rel=1e-3)
    splits = [metrics.halves(metrics.extract(real, network), seed) for seed in range(5)]
    laws = [tuple(map(metrics.Statistics.of, (a, b[:COUNT]))) for a, b in splits]
    spread = statistics.stdev(float(metrics.frechet_distance(*pair)) for pair in laws)
    errors = record["floor_standard_deviations"]
    assert errors["frechet"] == pytest.approx(spread, rel=1e-2)
    assert errors["splits"] == 5


def start_two(*flags, root):
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(*flags, root=root, RANK=str(rank), LOCAL_RANK=str(rank), **environment)
        for rank in range(2)
    ]


def test_when_one_process_is_killed_the_other_says_so_and_exits(tmp_path, root):
    out = tmp_path / "pair"
    pair = start_two("--samplers", "ddim", "--steps", 1, 60, "--num-samples", 64,
                     "--batch-size", 32, "--num-real", 300, "--out", out, root=root)  # fmt: skip
    try:
        seen = [pair[0].stdout.readline() for _ in range(5)]  # up to the first sampler's row
        pair[1].kill()
        _, complaint = pair[0].communicate(timeout=120)
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert seen[4].startswith("ddim"), (seen, complaint)
    assert pair[0].returncode == 2, complaint
    assert complaint.endswith("error: another process of this run is gone\n")  # gloo may log first
    assert "Traceback" not in complaint
    assert not out.exists()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(alone, tmp_path, root):
    """The same bits, and one table."""
    pair = start_two(*FLAGS, "--out", tmp_path / "pair", root=root)
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    assert (tmp_path / "pair" / "evaluate.json").read_bytes() == (
        alone[1] / "evaluate.json"
    ).read_bytes()
    assert ends[0][0].splitlines()[:-1] == alone[0].splitlines()[:-1]
    assert ends[1][0] == ""


REFUSALS = {
    "--samplers euler": "euler",
    "--samplers": "samplers",
    "--samplers ddim DDIM": "--samplers must have different values; got ddim ddim",
    "--steps 0": "--steps",
    "--steps 5 5": "--steps must have different values; got 5 5",
    "--samplers ode --steps 5": "--steps has no effect on samplers that choose their own steps",
    "--steps 2.5": "2.5",
    "--num-samples 1": "--num-samples",
    "--num-samples 63": "63 samples are fewer than the 64 features",
    "--num-real 100": "50 samples are fewer than the 64 features",
    "--num-real 300 --num-samples 151": "--num-samples must be at most 150, half of the real",
    "--tolerances 0.1": "no effect without a sampler that chooses its own steps",
    "--samplers ode --tolerances 0": "--tolerances",
    "--samplers ddim --frame gaussian": "--frame has no effect",
    "--features inception": "--inception-weights PATH or --download",
    "--features inception --download --inception-weights .": "PATH or --download",
    "--inception-weights .": "--inception-weights PATH",
    "--features inception --inception-weights /nowhere/x": "a path that exists; got /nowhere/x",
    "--features resnet": "resnet",
    "--seed -1": "--seed",
    "--checkpoint /nowhere/x.safetensors": "/nowhere/x",
    "--data-root /nowhere": "MNIST not found",
}


def refused(*flags, without=None):
    """The line of a run in this process, which must end with exit 2 and print nothing else."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        for name in [name for name in sys.modules if without and name.startswith(without)]:
            patch.delitem(sys.modules, name)
        if without:
            patch.setitem(sys.modules, without, None)  # how Python marks what is not there
        script = importlib.import_module("evaluate")
        with pytest.raises(SystemExit) as ended:
            command.run(script.main, script.Config)
    assert ended.value.code == 2
    assert not out.getvalue()
    assert err.getvalue().startswith("error: ")
    assert err.getvalue().count("\n") == 1
    return err.getvalue()


@pytest.mark.parametrize("flags", REFUSALS)
def test_a_bad_flag_is_one_line_and_exit_2_and_nothing_is_written(flags, root, tmp_path):
    given = [] if "--data-root" in flags else ["--data-root", root]
    told = refused(*flags.split(), *given, "--out", tmp_path / "out")
    assert REFUSALS[flags] in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["torchmetrics", "torch_fidelity"])
def test_a_missing_library_is_one_line_that_names_the_extra(library, root, tmp_path):
    told = refused("--data-root", root, "--out", tmp_path / "out", without=library)
    assert "pip install 'sde-diffusion[metrics]'" in told
    assert not (tmp_path / "out").exists()
