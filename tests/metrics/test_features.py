"""The networks are the published ones, see images as saved ones, and refuse any other file."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close

from sde_diffusion import data, metrics
from sde_diffusion.files.storage import BadFile
from sde_diffusion.metrics import features

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mnist():
    return features.MnistFeatures()


@pytest.fixture(scope="module")
def efficientnet():
    return features.EfficientNetFeatures()


def scan(count):
    """scikit-learn's 8x8 digits, three times as large, in 28x28 with labels."""
    digits = load_digits()
    pixels = np.pad(digits.images.repeat(3, 1).repeat(3, 2) / 8 - 1, ((0, 0), (2, 2), (2, 2)),
                    constant_values=-1.0)  # fmt: skip
    return torch.tensor(pixels[:count, None]).float(), torch.tensor(digits.target[:count])


# ---- MNIST ------------------------------------------------------------------------------------


def test_the_packaged_classifier_is_small_and_says_what_it_is(mnist):
    folder = features.PACKAGED.parent
    assert sum(path.stat().st_size for path in folder.glob("mnist.*")) < 2**20
    assert "experiments/mnist_features.py" in mnist.record["command"]
    assert mnist.record["test"]["accuracy"] >= 0.99
    assert not mnist.training
    assert not any(p.requires_grad for p in mnist.parameters())


@pytest.mark.slow
def test_the_packaged_figures_are_those_of_mnist(mnist, mnist_root):
    digits = data.mnist(mnist_root, train=False)
    x = data.dequantize(digits.pixels, torch.tensor(0.5))
    hidden = metrics.extract(x, mnist.hidden)
    found = metrics.Statistics.of((hidden - mnist.center) / mnist.scale)
    packaged = mnist.reference("test")
    assert found.count == packaged.count == 10_000
    # float32 features of size 1, whose rounding other machines and batch sizes change: 1e-5.
    assert_close(found.mean, packaged.mean, rtol=0, atol=1e-5)
    assert_close(found.covariance, packaged.covariance, rtol=0, atol=1e-4)
    right = mnist.last(hidden.relu()).argmax(1) == digits.labels
    assert float(right.double().mean()) == pytest.approx(mnist.record["test"]["accuracy"], abs=3e-4)
    assert torch.equal(torch.bincount(digits.labels), mnist.classes("test"))
    assert int(mnist.classes("train").sum()) == 60_000


def test_features_are_standardized_over_the_training_digits(mnist):
    train = mnist.reference("train")
    assert_close(train.mean, torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-4)
    assert_close(
        train.covariance.diagonal(), torch.ones(64, dtype=torch.float64), rtol=1e-4, atol=0
    )
    assert float(torch.linalg.eigvalsh(train.covariance)[0]) > 1e-4  # none follows from others


def test_the_packaged_examples_are_test_digits(mnist):
    """2,000 of the 10,000: their mean is the population's to 4.5 standard errors of 64 of them."""
    examples, test = mnist.examples().double(), mnist.reference("test")
    assert examples.shape == (2000, 64)
    error = (test.covariance.diagonal() / 2000).sqrt()
    assert bool(((examples.mean(0) - test.mean).abs() < 4.5 * error).all())
    distance = metrics.frechet_distance(test, metrics.Statistics.of(examples))
    assert distance < metrics.frechet_distance(test, metrics.Statistics.of(examples[:500]))


def test_the_classifier_reads_digits_that_it_was_not_trained_on(mnist):
    """scikit-learn's digits, drawn by others and scanned at 8x8: at least three of four."""
    x, labels = scan(500)
    probabilities = mnist.probabilities(x)
    assert_close(probabilities.sum(1), torch.ones(500))
    assert (probabilities.argmax(1) == labels).double().mean() > 0.75


def test_digits_are_seen_as_they_would_be_saved(mnist):
    """Anything inside a pixel's interval, or outside [-1, 1], is the same image."""
    pixels = torch.randint(256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    low, high = (data.dequantize(pixels, torch.tensor(u)) for u in (0.0, 0.99))
    assert torch.equal(mnist(low), mnist(high))
    wide = torch.where(low >= data.dequantize(torch.tensor(255), torch.tensor(0.0)), 3.0, low)
    assert torch.equal(mnist(wide), mnist(low))
    assert torch.equal(mnist(low.double()), mnist(low))


# ---- EfficientNet -----------------------------------------------------------------------------


def test_efficientnet_knows_a_cat(efficientnet):
    """ImageNet's classes 281 to 285 are cats, on photographs of cats at 64x64."""
    folder = ROOT.parent / "shared" / "data" / "afhq" / "train"
    paths = sorted(folder.rglob("*.jpg"))[:24] + sorted(folder.rglob("*.png"))[:24]
    if not paths:
        pytest.skip("the cats are not here")
    photographs = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    x = torch.tensor(np.stack(photographs)).permute(0, 3, 1, 2) / 127.5 - 1
    guessed = metrics.extract(x, efficientnet.probabilities).argmax(1)
    # Its published accuracy over all of ImageNet is 0.75; any cat is enough here.
    assert ((guessed >= 281) & (guessed < 286)).double().mean() > 0.75


def test_efficientnet_features_are_what_its_classes_are_read_from(efficientnet):
    x = 2 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    found = efficientnet(x)
    assert found.shape == (2, efficientnet.num_features)
    seen = torch.nn.functional.interpolate(
        ((x + 1) * 128).floor(), (224, 224), mode="bicubic", antialias=True
    )
    logits = efficientnet.network((seen.clamp(0, 255) - 127) / 128)
    assert_close(efficientnet.probabilities(x), logits.softmax(1))
    gray = efficientnet(x[:, :1])
    assert_close(gray, efficientnet(x[:, :1].repeat(1, 3, 1, 1)))


def test_making_a_network_draws_no_random_number(efficientnet):
    before = torch.get_rng_state()
    features.EfficientNetFeatures()
    features.MnistFeatures()
    assert torch.equal(torch.get_rng_state(), before)


# ---- Inception --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_inception():
    """Bytes of a file like the published one with other numbers, in torch's format."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    nothing, contents = io.BytesIO(), io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Untrained("untrained", ["2048"], feature_extractor_weights_path=nothing)
    torch.save(made.state_dict(), contents)
    return contents.getvalue()


def test_inception_is_torch_fidelitys(random_inception, monkeypatch, tmp_path):
    """With a file whose hash is called the published one: its 2,048 features of uint8 images."""
    path = tmp_path / "weights.pth"
    path.write_bytes(random_inception)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(random_inception).hexdigest())
    before = torch.get_rng_state()
    network = features.InceptionFeatures(path)
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    found = network(data.dequantize(pixels, torch.tensor(0.5)))
    assert found.shape == (2, network.num_features)
    assert_close(found, network.network(pixels)[0])


def test_weights_other_than_the_published_are_not_even_parsed(tmp_path, random_inception):
    """Random weights in the right format, a malicious pickle, a folder, a pipe, no file."""
    marked = tmp_path / "marked"
    bomb = f"cposix\nmkdir\n(S'{marked}'\ntR.".encode()
    for contents in (random_inception, bomb, b""):
        path = tmp_path / "weights.pth"
        path.write_bytes(contents)
        with pytest.raises(BadFile, match="not the published weights") as refused:
            features.InceptionFeatures(path)
        assert str(path) in str(refused.value)
    assert not marked.exists()
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / "absent", "No such file"),
    ):
        with pytest.raises(BadFile, match=reason):
            features.InceptionFeatures(path)


def test_nothing_is_fetched_unless_asked_for(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be given; got weights=None, download=False"):
        features.InceptionFeatures()
    with pytest.raises(ValueError, match="one of weights and download=True must be given"):
        features.InceptionFeatures(tmp_path, download=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(BadFile, match="could not be downloaded"):
        features.InceptionFeatures(download=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---- refusals, imports ------------------------------------------------------------------------


def test_images_of_another_kind_are_refused_by_shape(mnist, efficientnet):
    for network, shape in ((mnist, (2, 3, 28, 28)), (mnist, (2, 1, 32, 32)), (mnist, (2, 784)),
                           (efficientnet, (2, 2, 8, 8)), (efficientnet, (3, 8, 8))):  # fmt: skip
        with pytest.raises(ValueError, match="x must be"):
            network(torch.zeros(shape))
    with pytest.raises(ValueError, match="floating"):
        mnist(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="part must be one of train, test"):
        mnist.reference("valid")


def test_pixels_in_0_to_255_warn_and_nan_is_refused(mnist, efficientnet):
    """Clamped to [-1, 1], all but the black pixels would be white."""
    x = torch.arange(2.0 * 784).reshape(2, 1, 28, 28) % 256
    for network in (mnist, efficientnet):
        with pytest.warns(UserWarning, match="x has values from 0 to 255, beside noise"):
            network(x)
        with pytest.raises(ValueError, match="x must be numbers; got nan in row 0"):
            network(x / torch.zeros(1))


def test_the_digits_need_no_library_of_the_extra():
    heavy = "torchmetrics torch_fidelity ot efficientnet_lite_pytorch torchvision accelerate"
    code = (
        "import sys, torch\n"
        "from sde_diffusion import metrics\nfrom sde_diffusion.metrics import features\n"
        "network = features.MnistFeatures()\n"
        "metrics.frechet_distance(network.reference('train'), network.reference('test'))\n"
        f"print(*set('{heavy}'.split()) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()
