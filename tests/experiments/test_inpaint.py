"""inpaint.py: halves of digits completed from packaged weights, as the course sheet asks."""

import pytest
import torch
from PIL import Image
from scripts import run
from training_runs import small_mnist

import sde_diffusion as sd
from sde_diffusion import data
from sde_diffusion.inverse import corrections, inpainting
from sde_diffusion.metrics import features

TINY = ("--steps", 2, "--num-images", 2, "--completions", 2)
STEPS = {corrections.BackpropCorrection: 50, corrections.PosteriorMeanCorrection: 100}
SCALES = {corrections.BackpropCorrection: 300.0, corrections.PosteriorMeanCorrection: 2.0}


@pytest.fixture(name="digits", scope="module")
def digits_fixture(request):
    """10 test digits and their labels: some of MNIST's, or the packaged ones where it is absent."""
    try:
        images = data.mnist(request.getfixturevalue("mnist_root"), train=False)
        rows = slice(100, 110)
    except pytest.skip.Exception:
        images, rows = data.sample_digits(), slice(0, 10)
    pixels = images.pixels[rows]
    return data.dequantize(pixels, torch.full(pixels.shape, 0.5)), images.labels[rows]


@pytest.mark.parametrize("route", SCALES)
def test_completions_are_recognized_and_differ(digits, route):
    """Judged by another network than the one that draws, in fewer steps than the figure's: where
    the top is given at least 60 % are what they were, and two differ where nothing is known."""
    y, labels = digits
    mask = torch.zeros(1, 1, 28, 28)
    mask[:, :, :14] = 1
    made = inpainting.complete_image(
        sd.pretrained("mnist_vp"), y.repeat_interleave(2, 0), mask, SCALES[route], route=route,
        steps=STEPS[route], seeds=range(20),
    )  # fmt: skip
    seen = features.MnistFeatures().probabilities(made).argmax(1)
    assert float((seen == labels.repeat_interleave(2)).double().mean()) >= 0.6
    first, second = made[::2], made[1::2]
    known = mask.expand_as(first) == 1
    apart = (first - second).square()
    assert float(apart[~known].mean()) > 4 * float(apart[known].mean())


@pytest.mark.parametrize("rule", ["replacement", "repaint"])
def test_methods_that_replace_keep_the_known_half_of_digits_to_the_bit(rule):
    images = data.sample_digits()
    pixels = images.pixels[:4]
    y = data.dequantize(pixels, torch.full(pixels.shape, 0.5))
    mask = torch.zeros(4, 1, 28, 28)
    mask[:2, :, :14] = 1
    mask[2:, :, 14:] = 1
    made_by = {
        "replacement": sd.inverse.Replacement(sd.Ancestral(), y, mask),
        "repaint": sd.inverse.RePaint(sd.Ancestral(), y, mask, rounds=2),
    }
    model = sd.pretrained("mnist_vp")
    x = model.process.prior(y.shape, seeds=range(4))
    made = sd.sample(model, made_by[rule], x, steps=10, seeds=range(4))
    assert torch.equal(made[mask == 1], y[mask == 1])
    assert not torch.equal(made[mask == 0], y[mask == 0])


def test_it_says_where_the_digits_are_from(tmp_path):
    done = run("inpaint", *TINY, "--out", tmp_path / "packaged")
    assert done.returncode == 0, done.stderr
    assert "that come with the package: there is no MNIST here" in done.stdout
    root = small_mnist(tmp_path / "data")
    done = run("inpaint", *TINY, "--data-root", root, "--out", tmp_path / "mnist")
    assert done.returncode == 0, done.stderr
    assert f"of {root}" in done.stdout


@pytest.mark.parametrize("route", ["network", "mean"])
def test_it_makes_the_figure_and_one_seed_makes_it_again(tmp_path, route):
    figures = []
    for name in ("one", "two"):
        done = run("inpaint", *TINY, "--route", route, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert {p.name for p in (tmp_path / name).iterdir()} == {"inpaint.png", "config.json"}
        with Image.open(tmp_path / name / "inpaint.png") as image:
            image.load()
        figures.append((tmp_path / name / "inpaint.png").read_bytes())
    assert figures[0] == figures[1]
    done = run("inpaint", *TINY, "--route", route, "--seed", 1, "--out", tmp_path / "other")
    assert (tmp_path / "other" / "inpaint.png").read_bytes() != figures[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--num-images", 0), "--num-images must be at least 1"),
        (("--num-images", 21), "--num-images must be at most 20"),
        (("--completions", 0), "--completions must be at least 1"),
        (("--steps", 0), "--steps must be at least 1"),
        (("--scale", "nan"), "--scale must be finite; got nan"),
        (("--route", "sea"), "--route"),
        (("--seed", -1), "--seed must be"),
        (("--data-root", "nowhere"), "MNIST not found"),
        (("--device", "tpu"), "--device"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2_and_nothing_is_written(tmp_path, arguments, named):
    done = run("inpaint", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr
    assert not any(tmp_path.iterdir())
