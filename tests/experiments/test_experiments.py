"""The scripts as a user runs them: what they write, and one line with exit 2 for what is wrong."""

import hashlib
import io
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from common import command, flags, samplers, words
from PIL import Image
from safetensors.torch import load_file
from scripts import run, run_apart
from training_runs import small_mnist

import sde_diffusion as sd

ROOT = Path(__file__).parents[2]
SAMPLERS = (
    "ancestral", "ddim", "sde", "torchsde", "langevin", "heun", "churn", "adams", "dpm2", "dpm3",
    "sde-dpm2", "multistep", "ode", "adaptive-ode", "adaptive-sde",
)  # fmt: skip

OWN_STEPS = ("ode", "adaptive-ode", "adaptive-sde")


def frames(path):
    """Size and number of frames of a picture that can be read to its end."""
    with Image.open(path) as image:
        image.load()
        return image.size, getattr(image, "n_frames", 1)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def idx_root(scratch):
    return small_mnist(scratch / "data")


# ---- sampling ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(scratch):
    calls = []
    for name in SAMPLERS:
        few = ("--rtol", 0.3, "--atol", 0.3) if name in OWN_STEPS else ("--steps", 3)
        calls.append(
            ("mnist_vp", "--sampler", name, *few, "--num-samples", 5, "--out", scratch / name)
        )
    return {name: run(*call) for name, call in zip(SAMPLERS, calls, strict=True)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_writes_its_digits_and_says_what_it_took(sampled, scratch, name):
    done, out = sampled[name], scratch / name
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "config.json").read_text())
    calls = config["network_calls"]
    assert f"{name}: 5 digits, {calls} network calls, " in done.stdout
    assert calls == {"heun": 5, "churn": 5, "langevin": 5}.get(name, 3) or name in OWN_STEPS
    assert config["flags"]["sampler"] == name
    x = load_file(out / "samples.safetensors")["samples"]
    assert x.shape == (5, 1, 28, 28)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert frames(out / "samples.png")[0][0] > 5 * 28
    assert {path.name for path in out.iterdir()} == {
        "config.json", "samples.png", "samples.safetensors"
    }  # fmt: skip


def test_the_defaults_are_the_packaged_weights_and_what_python_gives(scratch, sampled):
    """The script's samples are those of the library with seeds seed * 2^32 + k."""
    denoiser = sd.pretrained("mnist_vp")
    seeds = range(5)
    x = denoiser.process.prior((5, 1, 28, 28), seeds=seeds)
    ours = sd.sample(denoiser, sd.Ancestral(), x, steps=3, seeds=seeds)
    theirs = load_file(scratch / "ancestral" / "samples.safetensors")["samples"]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_the_batch_size_and_a_gif_changes_nothing(scratch, sampled):
    out = scratch / "chunks"
    done = run("mnist_vp", "--sampler", "sde", "--steps", 3, "--num-samples", 5,
               "--batch-size", 2, "--gif", "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "9 network calls in 3 batches" in done.stdout
    parts, whole = (load_file(f / "samples.safetensors")["samples"] for f in (out, scratch / "sde"))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert frames(out / "trajectory.gif")[1] == 4


# ---- training ---------------------------------------------------------------------------------

TRAIN = ("--train", "--batch-size", 4, "--num-samples", 2, "--sampler", "adams", "--steps", 2,
         "--tracker", "none")  # fmt: skip


def test_a_run_is_trained_resumed_and_sampled_from(idx_root, scratch):
    out = scratch / "unet"

    def train(*more, steps=4):
        flags = (*TRAIN, "--train-steps", steps, "--checkpoint-every", 2, "--out", out)
        return run("mnist_vp", *flags, *more, data=idx_root)

    done = train()
    assert done.returncode == 0, done.stderr
    names = {path.name for path in out.iterdir()}
    assert names == {
        "checkpoint-00000002", "checkpoint-00000004", "metrics.csv", "loss.png", "config.json",
        "mnist_vp.safetensors", "mnist_vp.json", "samples.png", "samples.safetensors",
    }  # fmt: skip
    record = json.loads((out / "mnist_vp.json").read_text())
    assert record["steps"] == 4
    assert "--train-steps 4" in record["command"]
    assert {"commit", "seed", "loss_of_last_1_steps", "sha256"} <= record.keys()
    rows = (out / "metrics.csv").read_text().splitlines()
    weights = (out / "mnist_vp.safetensors").read_bytes()

    shutil.rmtree(out / "checkpoint-00000004")  # as if it had been killed at step 3
    (out / "mnist_vp.safetensors").unlink()
    again = train("--resume")
    assert again.returncode == 0, again.stderr
    assert "resuming at step 2" in again.stdout
    assert (out / "metrics.csv").read_text().splitlines() == rows
    assert (out / "mnist_vp.safetensors").read_bytes() == weights

    assert_refused(train(), "holds a run", out, kept=True)
    assert_refused(train("--resume", steps=6), "steps 4 -> 6", out, kept=True)
    average = out / "checkpoint-00000002" / "denoiser.safetensors"
    few = ("--sampler", "heun", "--steps", 2, "--num-samples", 1, "--out", scratch / "average")
    sampled = run("mnist_vp", "--checkpoint", average, *few)
    assert sampled.returncode == 0, sampled.stderr
    more = (
        "--train-steps",
        1,
        "--checkpoint",
        average,
        "--log-snr-std",
        1,
        "--out",
        scratch / "on",
    )
    tuned = run("mnist_vp", *TRAIN, *more, data=idx_root)
    assert tuned.returncode == 0, tuned.stderr
    before, after = (load_file(path) for path in (average, scratch / "on" / "mnist_vp.safetensors"))
    gap = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < gap <= 2e-3 + 1e-7  # Adam's first step, without a warm-up, and rounding

    changed = ("--learning-rate", 1e-3, "--resume")
    for given, named in (
        (("--resume", "--extend-to", 3), "--extend-to must be at least 4"),
        (("--extend-to", 6), "--extend-to has no effect without --resume"),
        (("--overwrite", "--changed", "seed"), "--changed has no effect without --resume"),
        (changed, "changed={'learning_rate'}"),
        ((*changed, "--changed", "rate"), "each entry of changed must be one of"),
    ):
        assert_refused(train(*given), named, out, kept=True)
    more = train(*changed, "--changed", "learning_rate", "--extend-to", 6)
    assert more.returncode == 0, more.stderr
    assert "resuming at step 4" in more.stdout
    record = json.loads((out / "mnist_vp.json").read_text())
    (change,) = record["changes"]
    assert (change["step"], change["steps"]) == (4, [4, 6])
    assert change["learning_rate"] == [2e-3, 1e-3]
    assert record["steps"] == 6
    assert (out / "metrics.csv").read_text().splitlines()[:5] == rows
    assert len(sd.training.history(out)) == 6


@pytest.mark.parametrize("made", [False, True])
def test_resume_without_a_checkpoint_is_one_line_and_exit_2_and_makes_nothing(scratch, made):
    """A mistyped folder is not a new run; it is refused before the data are read."""
    out = scratch / f"mistyped {made}"
    if made:
        out.mkdir()
    done = run("mnist_vp", *TRAIN, "--resume", "--data-root", "nowhere", "--out", out)
    reason = "" if made else "no such folder; "
    named = f"--resume: {out} holds no checkpoint; {reason}without --resume, a new run"
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(out.glob("*"))
    assert out.exists() == made


def test_overwrite_replaces_a_run(idx_root, scratch):
    out = scratch / "mlp"
    pytest.importorskip("tensorboard")
    flags = (*TRAIN[:-2], "--train-steps", 1, "--network", "mlp", "--dtype", "bf16", "--out", out)
    done = run("mnist_vp", *flags, "--data-root", idx_root)
    assert done.returncode == 0, done.stderr
    again = run("mnist_vp", *flags, "--overwrite", "--data-root", idx_root)
    assert again.returncode == 0, again.stderr
    assert len((out / "metrics.csv").read_text().splitlines()) == 2
    assert len(list(out.glob("trackers/mlp/events.*"))) == 2  # tensorboard, where it is installed


@pytest.mark.parametrize(
    "flags",
    ["--process edm --weight likelihood", "--process ve --penalty huber",
     "--process ddpm --weight vlb --penalty l1", "--process cosine --weight min-snr"],
)  # fmt: skip
def test_toy2d_trains_on_any_process_with_any_loss(tmp_path, flags):
    few = ("--data", "two-gaussians", "--train-steps", 20, "--num-samples", 50)
    done = run("toy2d", *few, *flags.split(), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert frames(tmp_path / "toy2d.png")[0][0] > 1000


def test_agreement_prints_and_writes_its_report(tmp_path):
    done = run("agreement", "--sizes", 64, 128, 256, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = sd.verify.agreement(
        sd.VP(), lambda n: sd.processes.discretize(sd.VP(), n), sizes=(64, 128, 256)
    )
    assert done.stdout.startswith(str(report))
    assert (tmp_path / "agreement.txt").read_text() == f"{report}\n"
    written = json.loads((tmp_path / "agreement.json").read_text())
    assert written["rates"] == pytest.approx(report.rates, rel=1e-12)
    assert written["laws"] == pytest.approx(report.laws, rel=1e-12)
    assert frames(tmp_path / "agreement.png")[0][0] > 300
    assert (tmp_path / "config.json").exists()


def test_toy2d_trains_samples_and_draws(scratch):
    out = scratch / "toy"
    done = run("toy2d", "--train-steps", 20, "--num-samples", 50, "--out", out)
    assert done.returncode == 0, done.stderr
    assert frames(out / "toy2d.png")[0][0] > 1000
    assert json.loads((out / "config.json").read_text())["losses"].keys() == {
        "two-gaussians", "chequerboard"
    }  # fmt: skip


# ---- help -------------------------------------------------------------------------------------

PROGRAMS = [
    ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
    for path in sorted((ROOT / "experiments").rglob("*.py"))
    if "command.run(main, Config" in path.read_text()
]


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_shows_the_default_once_and_ends_with_a_command_line(script):
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "None" not in done.stdout
    lines = done.stdout.splitlines()
    example = lines[lines.index("examples:") + 1]
    assert example.startswith(f"  python experiments/{script.replace('.', '/')}.py")
    flags = [line.split()[1] for line in lines if re.match(r"│ --", line)]
    assert not {"--samples", "--draws", "--time-steps", "--num-steps"} & set(flags)
    if "--train" in flags:
        first_of_training = flags.index("--train")
        assert flags.index("--resume") > first_of_training
        assert (
            max(map(flags.index, ("--sampler", "--steps", "--seed", "--out"))) < first_of_training
        )


def test_every_sampler_and_process_of_the_package_has_a_name_on_the_command_lines():
    assert tuple(words.by_word(sd.samplers.CATALOGUE)) == flags.SAMPLERS
    assert tuple(words.by_word(sd.processes.CATALOGUE)) == flags.PROCESSES
    assert tuple(samplers.SAMPLERS) == flags.SAMPLER_NAMES
    assert tuple(command.PROCESSES) == flags.PROCESS_NAMES
    usual = {name: samplers.usual_steps(name) for name in SAMPLERS}
    assert usual == {
        "ancestral": 250, "ddim": 250, "sde": 250, "torchsde": 250, "langevin": 125, "heun": 18,
        "churn": 50, "adams": 20, "dpm2": 20, "dpm3": 20, "sde-dpm2": 50, "multistep": 50,
        "ode": None, "adaptive-ode": None, "adaptive-sde": None,
    }  # fmt: skip


# ---- refusals ---------------------------------------------------------------------------------


def assert_refused(done, message, out, kept=False):
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert kept or not Path(out).exists()


REFUSALS = {
    "--sampler dpm": "--sampler must be a known name; got dpm; near it: dpm2, dpm3",
    "--sampelr ode": "--sampelr",
    "--steps 0 --sampler adams": "--steps",
    "--steps -3": "--steps must be at least 1",
    "--steps x --sampler adams": "--steps must be an integer; got x",
    "--steps 5 --sampler ode": "--steps has no effect with --sampler ode",
    "--rtol 0": "--rtol",
    "--rtol nan": "--rtol",
    "--rtol much": "--rtol must be a number; got much",
    "--atol 1e-3 --sampler heun": "--atol has no effect with --sampler heun",
    "--num-samples 0": "--num-samples",
    "--batch-size -1": "--batch-size",
    "--seed -1": "--seed",
    "--seed 100000000000000000000": "--seed",
    "--steps 100000000000 --sampler sde": "--steps",
    "--atol 0": "--atol",
    "--train --epochs 0": "--epochs",
    "--train --train-steps 0": "--train-steps",
    "--train --checkpoint-every 0": "--checkpoint-every",
    "--overwrite": "--overwrite has no effect without --train",
    "--download": "--download has no effect without --train",
    "--device tpu": "--device must be a known name; got tpu; known: auto, cpu, cuda, mps",
    "--dtype float16": "--dtype must be a known name; got float16; known: float32, bf16",
    "--gif False": "False",
    "--checkpoint nowhere": "--checkpoint must be a path that exists; got nowhere",
    "--checkpoint experiments": "must be a .safetensors file; got the folder experiments",
    "--checkpoint README.md": "must be a .safetensors file; got README.md",
    "--epochs 3": "--epochs has no effect without --train",
    "--train-steps 3": "--train-steps has no effect without --train",
    "--resume": "--resume has no effect without --train",
    "--data-root .": "--data-root has no effect without --train",
    "--network mlp": "--network has no effect without --train",
    "--train --epochs 1 --train-steps 2": "not both",
    "--train --resume --overwrite": "not both",
    "--train --checkpoint README.md --network mlp": "--network has no effect with",
    "--log-snr-std 2": "--log-snr-std has no effect without --train",
    "--log-snr-mean 0": "--log-snr-mean has no effect without --train",
    "--train --log-snr-std 0": "--log-snr-std",
    "--train --log-snr-mean nan": "--log-snr-mean",
    "--train --learning-rate 0": "--learning-rate",
    "--train --checkpoint nowhere.safetensors --overwrite": "nowhere.safetensors",
    "--train --data-root nowhere": "train-images-idx3-ubyte",
}
if not torch.cuda.is_available():
    REFUSALS["--device cuda"] = "--device cuda"


TOY_REFUSALS = {
    "--data moons": "--data must be a known name; got moons",
    "--train-steps 0 --data both": "--train-steps",
    "--num-samples -1": "--num-samples",
    "--seed -1 --data both": "--seed",
    "--process brownian": "--process must be a known name; got brownian; known: vp, sub-vp",
    "--weight vlb": "--weight vlb belongs to a chain",
    "--penalty l3": "--penalty must be a known name; got l3; known: l2, l1, huber",
}
AGREEMENT_REFUSALS = {
    "--sizes 10": "--sizes needs two or more",
    "--sizes 10 10": "--sizes must have different values; got 10 10",
    "--sizes": "--sizes must have one or more values; got none",
    "--sizes 0 10": "--sizes",
    "--sizes 10 x": "--sizes",
    "--sizes 10 20000": "--sizes",
    "--rule midpoint": "--rule must be a known name; got midpoint",
    "--rule table": "--rule table: vp has none",
    "--process edm": "process must be variance-preserving",
    "--process cosine": "rule must be 'exact'",
    "--sizes 4 8": "take more steps",
    "--data-variance 0": "--data-variance",
    "--data-mean nan": "--data-mean",
}
SCRIPTS = {"mnist_vp": REFUSALS, "toy2d": TOY_REFUSALS, "agreement": AGREEMENT_REFUSALS}
ALL_REFUSALS = REFUSALS | TOY_REFUSALS | AGREEMENT_REFUSALS


@pytest.fixture(scope="module")
def refused(scratch):
    """One of each script as a process, the others in this one."""
    done = {}
    for script, refusals in SCRIPTS.items():
        for k, line in enumerate(refusals):
            start = run if k else run_apart
            done[line] = start(script, *line.split(), "--out", scratch / line)
    return done


@pytest.mark.parametrize("flags", ALL_REFUSALS)
def test_a_bad_flag_is_one_line_and_exit_2_and_nothing_is_written(refused, scratch, flags):
    assert_refused(refused[flags], ALL_REFUSALS[flags], scratch / flags)


def test_a_missing_data_set_names_files_places_and_remedies(refused):
    message = refused["--train --data-root nowhere"].stderr
    for word in ("t10k-labels-idx1-ubyte", "nowhere/MNIST/raw", "--data-root",
                 "SDE_DIFFUSION_DATA", "--download"):  # fmt: skip
        assert word in message


def test_a_checkpoint_of_something_else_is_one_line_and_exit_2(tmp_path):
    path, out = tmp_path / "toy.safetensors", tmp_path / "out"
    sd.Denoiser(sd.networks.MLP((2,), width=8), sd.VP()).save(path)
    assert_refused(run("mnist_vp", "--checkpoint", path, "--out", out), "--checkpoint", out)


def test_the_packaged_weights_say_how_they_were_made():
    folder = ROOT / "sde_diffusion" / "weights"
    record = json.loads((folder / "mnist_vp.json").read_text())
    data = (folder / "mnist_vp.safetensors").read_bytes()
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(data) < 5e6
    assert sum(p.numel() for p in sd.pretrained("mnist_vp").parameters()) <= 1.2e6
    assert record["command"].startswith("python experiments/mnist_vp.py --train")
    assert len(record["commit"]) == 40
    assert {"seed", "steps", "loss_of_last_1000_steps", "times"} <= record.keys()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no record", "record of a list"])
def test_a_damaged_checkpoint_is_one_line_and_exit_2(tmp_path, damage):
    path = tmp_path / "net.safetensors"
    sd.Denoiser(sd.networks.MLP((1, 28, 28), width=8), sd.VP()).save(path)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-5] ^= 4
        path.write_bytes(data)
    elif damage == "no record":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("[]")
    out = tmp_path / "out"
    assert_refused(run("mnist_vp", "--checkpoint", path, "--out", out), "net.", out)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("mnist_vp", "--out", tmp_path / "file")
    assert_refused(done, "not a folder", tmp_path / "file", kept=True)


@pytest.mark.parametrize(
    "out", ["x" * 256, f"{'y' * 250}/{'x' * 300}/z", "/".join(["d" * 200] * 21), "nul\0"],
    ids=["a long name", "a long name in a new folder", "a long path", "a zero byte"],
)  # fmt: skip
@pytest.mark.parametrize("script", ["mnist_vp", "toy2d", "import_weights"])
def test_an_out_that_no_folder_can_have_is_refused_before_any_work(script, out):
    there = Path(__file__)  # any files that exist
    needed = ("--weights", there, "--like", there) if script == "import_weights" else ()
    out = f"{out}.safetensors" if needed else out
    done = run(script, *needed, "--out", out)
    assert_refused(done, "--out: ", out, kept=True)
    assert done.stdout == ""
    assert len(done.stderr) < 250


@dataclass
class Drawing:
    """Draw."""

    steps: int = 1


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_messages_have_no_frames_and_any_path_can_be_printed(encoding, monkeypatch, capsys):
    """The parser draws frames of hyphens where stdout has no box characters, as on Windows."""
    for given, code, printed in (
        (["--steps", "x"], 2, "error: --steps must be an integer; got x"),
        (["--stepz", "3"], 2, "error: Unrecognized options: --stepz, 3 Perhaps you meant: --steps"),
        ([], 0, "-> \u03c3" if encoding == "utf-8" else r"-> \u03c3"),
    ):
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding, newline=""))
        monkeypatch.setattr(sys, "argv", ["draw.py", *given])
        ended = 0
        try:
            command.run(lambda config: print("-> \u03c3"), Drawing)
        except SystemExit as end:
            ended = end.code
        sys.stdout.flush()
        assert ended == code
        assert (shown.getvalue().decode(encoding) + capsys.readouterr().err).startswith(printed)
