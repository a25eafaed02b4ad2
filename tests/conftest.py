"""Run-time checks of the annotated shapes, and where real data are looked for."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

# Before the package is imported. beartype cannot read a generic NamedTuple, so the modules that
# annotate with Level are left to pyright.
CHECKED = [f"sde_diffusion.{name}" for name in ("networks", "data", "toy", "noise", "grids")]
install_import_hook(CHECKED, "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the tensors here are small: more threads only wait for each other

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder above MNIST/raw, or a skip that says what to set."""
    for root in (os.environ.get("SDE_DIFFUSION_DATA"), ROOT.parent / "shared" / "data"):
        if root and Path(root, "MNIST", "raw").is_dir():
            return Path(root)
    pytest.skip("MNIST is not here; set SDE_DIFFUSION_DATA to the folder above MNIST/raw")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
