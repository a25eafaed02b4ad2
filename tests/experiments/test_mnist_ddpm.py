"""mnist_ddpm.py trains by the discrete face, and samples the same network in four ways."""

import json
import shutil
import sys
from pathlib import Path

import mnist_ddpm
import pytest
import torch
from common import command
from PIL import Image
from safetensors.torch import load_file
from training_runs import small_mnist

import sde_diffusion as sd
from sde_diffusion import training
from sde_diffusion.data.image_files import mnist

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = ("--chain-steps", 12, "--epochs", 1, "--batch-size", 500, "--device", "cpu")


@pytest.fixture(scope="module")
def script():
    """The script as a module: a start of Python takes longer than its work here."""

    def run(*arguments):
        before = sys.argv
        sys.argv = ["mnist_ddpm.py", *map(str, arguments)]
        try:
            command.run(mnist_ddpm.main, mnist_ddpm.Config)
        finally:
            sys.argv = before

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return small_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(script, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("mnist_ddpm") / "run"
    script(*TINY, "--network", "mlp", "--data-root", root, "--out", out)
    return out


def test_it_leaves_weights_a_curve_samples_and_what_explains_them(trained):
    left = {path.name for path in trained.iterdir()}
    assert {"mnist_ddpm.safetensors", "mnist_ddpm.json", "metrics.csv", "loss.png", "samples.png",
            "side_by_side.png", "config.json", "checkpoint-00000003"} <= left  # fmt: skip
    assert len(training.history(trained)) == 3  # one epoch of 1,500 digits
    record = json.loads((trained / "mnist_ddpm.json").read_text())
    assert record["times"] == "DiscreteTimes(num_steps=12)"
    with Image.open(trained / "side_by_side.png") as image:
        image.load()
    denoiser = sd.Denoiser.load(trained / "mnist_ddpm.safetensors")
    assert denoiser.process == sd.Discrete.linear(12)
    assert denoiser.parameterization == sd.models.Preconditioned(0.5)


def test_its_loss_is_the_one_of_the_discrete_face(trained, root):
    """Algorithm 1's summand of the first batch, by DDPM.p_loss at the untrained weights."""
    torch.manual_seed(0)
    networks = [sd.networks.UNet(channels=(32, 64), blocks=1), sd.networks.PlainUNet(),
                sd.networks.MLP(shape=(1, 28, 28), width=1024, depth=4, fourier=64)]  # fmt: skip
    ddpm = sd.DDPM(sd.Denoiser(networks[2], sd.Discrete.linear(12), sd.models.Preconditioned(0.5)))
    recipe = training.Recipe(steps=3, batch_size=500)
    digits = mnist(root)
    batch = training.draw(digits, recipe, sd.losses.DiscreteTimes(12), 0)
    i = (batch.t * 12).round().long()
    with torch.no_grad():
        loss = ddpm.p_loss(batch.x0, i, batch.eps).mean()
    assert abs(training.history(trained)[0].loss - float(loss)) < 1e-5


def test_a_checkpoint_is_drawn_from_without_training(script, trained, tmp_path, capsys):
    out = tmp_path / "drawn"
    script("--checkpoint", trained / "mnist_ddpm.safetensors", "--out", out)
    assert {path.name for path in out.iterdir()} == {"samples.png", "side_by_side.png"}
    for name in ("samples.png", "side_by_side.png"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
    assert "16 digits in 12 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "plain"])
def test_the_other_networks_train_too(script, root, tmp_path, network):
    script(*TINY, "--network", network, "--data-root", root, "--out", tmp_path / "run")
    weights = load_file(tmp_path / "run" / "mnist_ddpm.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--network", "vit"), "--network"),
        (("--epochs", 0), "--epochs must be at least 1"),
        (("--chain-steps", "many"), "--chain-steps"),
        (("--learning-rate", "nan"), "--learning-rate must lie in"),
        (("--checkpoint", "absent.safetensors"), "absent"),
        (("--checkpoint", __file__, "--epochs", 2), "--epochs has no effect"),
        (("--data-root", "nowhere"), "MNIST not found"),
        (("--resume", "--overwrite"), "give --resume or --overwrite"),
        (("--tracker", "paper"), "--tracker"),
        (("--device", "cuda"), "--device cuda"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2_and_nothing_is_written(
    script, tmp_path, capsys, arguments, named
):
    if arguments == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stopped:
        script(*arguments, "--out", tmp_path / "run")
    told = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(told) == 1, told
    assert named in told[0]
    assert not any(tmp_path.iterdir())


def test_what_cannot_start_deletes_nothing_and_only_its_own_files_are_deleted(
    script, trained, root, tmp_path, capsys
):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "holiday.png").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    flags = (*TINY, "--network", "mlp", "--data-root", root, "--out", out, "--tracker", "none")
    for bad in (("--overwrite", "--accumulate", 501), ("--resume", "--seed", 1), ()):
        with pytest.raises(SystemExit) as stopped:
            script(*flags, *bad)
        assert stopped.value.code == 2
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    told = capsys.readouterr().err
    for word in ("--accumulate 501", "seed 0 -> 1", "holds a run"):
        assert word in told
    script(*flags, "--overwrite")
    assert (out / "holiday.png").read_bytes() == b"mine"
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "metrics.csv").unlink()
    script(*flags[:-3], again, "--tracker", "none", "--resume")
    weights = [load_file(folder / "mnist_ddpm.safetensors") for folder in (out, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("place", ["file/x", "dangling", "file"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(script, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as stopped:
        script("--out", tmp_path / place)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --out")
    assert "not a folder" in told


@pytest.mark.parametrize("empty", [("--out", ""), ("--data-root=",)])
def test_an_empty_argument_is_refused(script, capsys, empty):
    with pytest.raises(SystemExit) as stopped:
        script(*empty)
    assert stopped.value.code == 2
    assert "an argument is empty" in capsys.readouterr().err


def test_the_titles_of_a_short_chain_are_its_steps():
    assert list(mnist_ddpm.side_by_side(20)) == [
        "ancestral, 20", "DDIM, 20", "reverse SDE, 20", "probability-flow ODE"
    ]  # fmt: skip
    assert list(mnist_ddpm.side_by_side(1000)) == [
        "ancestral, 1,000", "DDIM, 50", "reverse SDE, 250", "probability-flow ODE"
    ]  # fmt: skip
