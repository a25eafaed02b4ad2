"""mnist_conditional.py: digits of the class that is asked for, and the training behind them."""

import json
from pathlib import Path

import mnist_conditional
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scripts import run, run_apart
from training_runs import small_mnist

import sde_diffusion as sd
from sde_diffusion import training
from sde_diffusion.metrics import features
from sde_diffusion.models.guidance import ClassifierFree

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = ("--train", "--train-steps", 3, "--batch-size", 8, "--tracker", "none", "--device", "cpu",
        "--steps", 2, "--num-samples", 1, "--scale", 1)  # fmt: skip
PACKAGED = EXPERIMENTS.parent / "sde_diffusion" / "weights" / "mnist_vp.safetensors"


@pytest.fixture(name="root", scope="module")
def root_fixture(tmp_path_factory):
    return small_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(name="trained", scope="module")
def trained_fixture(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("conditional") / "run"
    done = run("mnist_conditional", *TINY, "--data-root", root, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("scale", "least"), [(1.0, 0.93), (2.0, 0.97)])
def test_the_packaged_weights_draw_the_class_that_is_asked_for(scale, least):
    """Judged by another network; 2 is the default scale."""
    model, count = sd.pretrained("mnist_conditional"), 100
    labels = torch.arange(count) % 10
    cond = torch.nn.functional.one_hot(labels, 10)
    x = model.process.prior((count, 1, 28, 28), seeds=range(count))
    guided = ClassifierFree(model, scale)
    assert ClassifierFree(model).scale == 2.0
    made = sd.sample(guided, sd.Adams.auto(10), x, steps=10, cond=cond.float(), seeds=range(count))
    right = features.MnistFeatures().probabilities(made).argmax(1) == labels
    assert float(right.double().mean()) >= least


def test_it_draws_a_labelled_grid_at_several_scales(tmp_path):
    flags = ("--scale", 0, 1, 3, "--classes", 3, 8, "--num-samples", 2, "--steps", 3)
    done = run("mnist_conditional", *flags, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {
        "grid.png", "samples.safetensors", "config.json"
    }  # fmt: skip
    left = load_file(tmp_path / "samples.safetensors")
    assert left["samples"].shape == (3, 4, 1, 28, 28)
    assert left["classes"].tolist() == [3, 8, 3, 8]
    assert left["scale"].tolist() == [0, 1, 3]
    with Image.open(tmp_path / "grid.png") as image:
        image.load()
    model = sd.pretrained("mnist_conditional")
    cond = torch.nn.functional.one_hot(left["classes"], 10).float()
    seeds = [0, 0, 1, 1]
    x = model.process.prior((4, 1, 28, 28), seeds=seeds)
    for w, made in zip((0.0, 1.0, 3.0), left["samples"], strict=True):
        guided = ClassifierFree(model, w)
        expected = sd.sample(guided, sd.Adams.auto(3), x, steps=3, cond=cond, seeds=seeds)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    # At w = 0 a class is not heard of: one digit for each seed.
    torch.testing.assert_close(left["samples"][0, 0], left["samples"][0, 1], rtol=0, atol=1e-4)
    assert (left["samples"][1, 0] - left["samples"][1, 1]).abs().max() > 0.1


def test_training_leaves_weights_that_take_a_class(trained):
    left = {p.name for p in trained.iterdir()}
    assert {"mnist_conditional.safetensors", "mnist_conditional.json", "metrics.csv", "loss.png",
            "grid.png", "samples.safetensors", "config.json",
            "checkpoint-00000003"} <= left  # fmt: skip
    record = json.loads((trained / "mnist_conditional.json").read_text())
    assert record["cond_dropout"] == 0.2
    denoiser = sd.Denoiser.load(trained / "mnist_conditional.safetensors")
    assert denoiser.network.config["cond"] == 10
    assert len(training.history(trained)) == 3


def test_training_goes_on_from_a_checkpoint_bit_for_bit(trained, root, tmp_path):
    flags = [*TINY, "--data-root", root, "--out", tmp_path / "run", "--checkpoint-every", 1]
    assert run("mnist_conditional", *flags).returncode == 0
    last = tmp_path / "run" / "checkpoint-00000003"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    done = run("mnist_conditional", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    both = [load_file(p / "mnist_conditional.safetensors") for p in (trained, tmp_path / "run")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_an_unconditional_network_is_widened_without_changing_what_it_says():
    plain = sd.Denoiser.load(PACKAGED)
    wide = mnist_conditional.widened(plain).eval()
    x = plain.process.prior((2, 1, 28, 28), seeds=range(2))
    level = plain.process.levels(torch.tensor([0.4]))[0]
    cond = torch.nn.functional.one_hot(torch.tensor([3, 7]), 10).float()
    assert torch.equal(wide(x, level, cond).x0, plain(x, level).x0)
    assert mnist_conditional.widened(wide) is wide
    assert all(parameter.requires_grad for parameter in wide.parameters())
    with pytest.raises(ValueError, match="must hold a UNet"):
        mnist_conditional.widened(sd.Denoiser(sd.networks.MLP(), sd.VP()))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--classes", 10), "--classes must be at most 9"),
        (("--classes", -1), "--classes must be at least 0"),
        (("--classes", "cat"), "--classes"),
        (("--classes",), "--classes"),
        (("--scale", "nan"), "--scale must be finite"),
        (("--scale", "inf"), "--scale must be finite"),
        (("--scale", "much"), "--scale"),
        (("--low", 3, "--high", 2), "--low and --high"),
        (("--low", "nan"), "--low and --high"),
        (("--num-samples", 0), "--num-samples must be at least 1"),
        (("--seed", -1), "--seed must be"),
        (("--sampler", "ode", "--steps", 5), "--steps has no effect"),
        (("--train-steps", 5), "--train-steps has no effect without --train"),
        (("--resume",), "--resume has no effect without --train"),
        (("--cond-dropout", 0.1), "--cond-dropout has no effect"),
        (("--train", "--cond-dropout", 1.5), "--cond-dropout must lie in"),
        (("--train", "--learning-rate", 0), "--learning-rate must"),
        (("--train", "--data-root", "nowhere"), "MNIST not found"),
        (("--checkpoint", "absent.safetensors"), "absent"),
        (("--checkpoint", PACKAGED), "no model of digits by class"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2_and_nothing_is_written(tmp_path, arguments, named):
    done = run("mnist_conditional", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr
    assert not any(tmp_path.iterdir())


def test_it_runs_as_a_process_of_its_own(tmp_path):
    done = run_apart("mnist_conditional", "--steps", 2, "--num-samples", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "40 digits" in done.stdout
