"""Scripts whose model diverges: one line and a failing exit, and no files of samples."""

import json

import mnist_calls
import pytest
import torch
import toy2d
from PIL import Image
from scripts import run
from training_runs import small_mnist

import sde_diffusion as sd


def broken(denoiser):
    """Return the denoiser with weights so large that its outputs overflow to inf and nan."""
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.fill_(3e38)
    return denoiser


def digits(process, parameterization=None):
    network = sd.networks.MLP((1, 28, 28), width=8)
    return broken(sd.Denoiser(network, process, parameterization or sd.Eps()))


def assert_failed(done, out):
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "not finite" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("sampler", ["heun", "sde", "adams", "dpm2", "ddim"])
def test_digits_of_a_model_that_overflows_are_not_written(tmp_path, sampler):
    digits(sd.VP()).save(tmp_path / "net.safetensors")
    flags = ("--sampler", sampler, "--steps", 3, "--num-samples", 4, "--gif")
    done = run("mnist_vp", "--checkpoint", tmp_path / "net.safetensors", *flags,
               "--out", tmp_path / "out")  # fmt: skip
    assert_failed(done, tmp_path / "out")
    assert f"4 of 4 samples of {sampler}" in done.stderr


def test_a_chain_that_overflows_is_not_written(tmp_path):
    digits(sd.Discrete.linear(5)).save(tmp_path / "net.safetensors")
    done = run(
        "mnist_ddpm", "--checkpoint", tmp_path / "net.safetensors", "--out", tmp_path / "out"
    )
    assert_failed(done, tmp_path / "out")


def test_strips_of_a_chain_that_overflows_are_not_written(tmp_path):
    network = sd.networks.MLP((3, 8, 8), width=8)
    broken(sd.Denoiser(network, sd.Discrete.cosine(6))).save(tmp_path / "net.safetensors")
    pixels = torch.arange(8 * 192, dtype=torch.uint8).reshape(8, 8, 8, 3).numpy()
    (tmp_path / "data").mkdir()
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "data" / f"{k}.png")
    flags = ("--time_steps", 6, "--image_size", 8, "--visualize", "--data_path", tmp_path / "data")
    for more in ((), ("--sampler", "ddim")):
        done = run("ddpm_images", "--load_path", tmp_path / "net.safetensors", *flags, *more,
                   "--save_folder", tmp_path / "out")  # fmt: skip
        assert_failed(done, tmp_path / "out")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("mnist_calls", ("--calls", 2, "--num-samples", 2)),
        ("inpaint", ("--steps", 2, "--num-images", 2, "--completions", 1)),
        ("mnist_conditional", ("--steps", 2, "--num-samples", 1, "--classes", 3)),
    ],
)
def test_packaged_weights_that_are_damaged_draw_nothing(tmp_path, monkeypatch, script, flags):
    whole = sd.pretrained
    monkeypatch.setattr(sd, "pretrained", lambda name: broken(whole(name)))
    monkeypatch.setattr(mnist_calls, "REFERENCE", 2)
    assert_failed(run(script, *flags, "--out", tmp_path / "out"), tmp_path / "out")


def test_points_of_a_network_that_overflows_are_not_drawn(tmp_path, monkeypatch):
    whole = toy2d.train
    monkeypatch.setattr(toy2d, "train", lambda *a: (broken(whole(*a)[0]), 0.0))
    done = run("toy2d", "--train-steps", 1, "--num-samples", 3, "--out", tmp_path / "out")
    assert_failed(done, tmp_path / "out")


def test_an_evaluation_marks_samplers_that_fail_and_exits_with_2(tmp_path):
    """The other rows took time and are right: they are written."""
    root = small_mnist(tmp_path / "data")
    digits(sd.VP()).save(tmp_path / "net.safetensors")
    flags = ("--samplers", "ddim", "--steps", 1, "--num-samples", 64, "--num-real", 300)
    done = run("evaluate", *flags, "--checkpoint", tmp_path / "net.safetensors",
               "--data-root", root, "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: samples that are not finite: ddim\n"
    (row,) = json.loads((tmp_path / "out" / "evaluate.json").read_text())["rows"]
    assert row["failed"] == 64
    assert "frechet" not in row
