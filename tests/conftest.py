"""Run-time checks of the annotated shapes, hypothesis' profiles, and where real data are."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

# Before the package is imported. beartype cannot read a generic NamedTuple, so the modules that
# annotate with Level are left to pyright.
CHECKED = [f"sde_diffusion.{name}" for name in ("networks", "data")]
install_import_hook(CHECKED, "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Two profiles of hypothesis. "default" draws the same examples in every run, so that a rerun finds
# what a run found. "slow" draws 2,000 new ones for each test, to look for faults:
#     python -m pytest --hypothesis-profile slow tests/test_properties.py
# What it finds is printed with a @reproduce_failure line; --hypothesis-seed=0 repeats a whole run.
# Times are no part of a theorem: no deadline, and no complaint about a slow machine.
settings.register_profile(
    "default",
    max_examples=100,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "slow",
    parent=settings.get_profile("default"),
    max_examples=2000,
    derandomize=False,
    database=None,
    print_blob=True,
)
settings.load_profile("default")  # hypothesis would take its own where it sees a CI

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
