"""`import sde_diffusion` loads torch and nothing else heavy, and does nothing but import."""

import importlib
import pkgutil
import subprocess
import sys

import sde_diffusion as sd

# Each of these is imported where it is used.
HEAVY = "torchvision torchdiffeq torchsde scipy matplotlib tyro accelerate diffusers PIL sklearn"


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_neither_the_package_nor_any_of_its_modules_loads_anything_heavy_but_torch():
    loaded = run(
        "import sys, torch; before = set(sys.modules);"
        "import pkgutil, importlib, sde_diffusion as sd\n"
        "for module in pkgutil.walk_packages(sd.__path__, 'sde_diffusion.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    assert not set(HEAVY.split()) & set(loaded.split())


def test_no_name_hides_a_module():
    """`processes.interpolate` was called `continuous`, as the module beside it."""
    for module in pkgutil.walk_packages(sd.__path__, "sde_diffusion."):
        room, _, name = module.name.rpartition(".")
        found = importlib.import_module(module.name)
        assert getattr(importlib.import_module(room), name) is found, module.name


def test_import_leaves_the_global_generators_and_settings_alone():
    state = (
        "import random, sys, numpy, torch;"
        "state = lambda: (random.getstate(), str(numpy.random.get_state()), "
        "torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(), "
        "torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled());"
        "before = state(); import sde_diffusion; print(state() == before)"
    )
    assert run(state).strip() == "True"


def test_all_names_what_is_there():
    assert sorted(set(sd.__all__)) == sorted(sd.__all__)
    assert all(hasattr(sd, name) for name in sd.__all__)
