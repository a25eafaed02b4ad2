"""Weights of other programs are imported whole, by an explicit call, and nothing else is."""

import hashlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sde_diffusion.files import storage, torch_archives
from sde_diffusion.files.storage import BadFile
from sde_diffusion.files.torch_archives import import_weights
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.parameterizations import V
from sde_diffusion.networks import MLP
from sde_diffusion.processes import VP

SCRIPT = Path(__file__).parents[2] / "experiments" / "import_weights.py"


def network(seed=0, **changed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(**{"width": 8, "depth": 1, **changed})


def saved(folder, value, **how):
    path = folder / "theirs.pt"
    torch.save(value, path, **how)
    return path


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert_close(value, second[name], rtol=0, atol=0)


# ---- what comes in ----------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
          torch.bool]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_in_bit_for_bit(tmp_path, dtype):
    values = torch.arange(6).reshape(2, 3).to(dtype)
    made = {"a": values, "b": values[1], "none": values[:0], "one": values[0, 0]}
    assert_same(import_weights(saved(tmp_path, made)), made)


def test_a_state_dict_comes_in_with_its_buffers_and_parameters(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert_same(import_weights(saved(tmp_path, module.state_dict())), module.state_dict())
    parameters = dict(module.named_parameters())
    loaded = import_weights(saved(tmp_path, parameters))
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in loaded.values())


def test_views_and_tied_weights_are_copied_apart(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    made = {"whole": whole, "same": whole, "turned": whole.T, "row": whole[1]}
    loaded = import_weights(saved(tmp_path, made))
    assert_same(loaded, made)
    assert all(value.is_contiguous() for value in loaded.values())
    loaded["same"].zero_()
    assert_same({"whole": loaded["whole"]}, {"whole": whole})


@pytest.mark.parametrize("key", ["model", "ema", "state_dict"])
def test_one_dict_of_several_is_taken_by_its_key(tmp_path, key):
    made = {"model": network(1).state_dict(), "ema": network(2).state_dict(), "step": 7,
            "state_dict": OrderedDict(a=torch.ones(2)), "lr": 0.1}  # fmt: skip
    path = saved(tmp_path, made)
    assert_same(import_weights(path, key=key), made[key])
    with pytest.raises(BadFile, match=r"'model' must be a tensor; .* key of a dict: model, ema"):
        import_weights(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("modle", r"no 'modle' \(did you mean 'model'\?\)"),
        ("step", "'step' must hold a dict of tensors; got a int"),
    ],
)
def test_a_key_that_is_not_there_is_refused_with_those_that_are(tmp_path, key, message):
    with pytest.raises(BadFile, match=message):
        import_weights(saved(tmp_path, {"model": {"a": torch.ones(1)}, "step": 3}), key=key)


# ---- the format before 1.6, which has no checksums --------------------------------------------


def test_an_old_file_is_read_only_if_its_sha256_is_given(tmp_path):
    made = network().state_dict()
    path = saved(tmp_path, made, _use_new_zipfile_serialization=False)
    with pytest.raises(BadFile, match="give sha256="):
        import_weights(path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(import_weights(path, sha256=right), made)
    assert_same(import_weights(path, sha256=right.upper()), made)
    with pytest.raises(BadFile, match=f"its SHA-256 is {right}, not the one given"):
        import_weights(path, sha256="0" * 64)


def test_the_hash_of_a_new_file_is_checked_too(tmp_path):
    path = saved(tmp_path, network().state_dict())
    with pytest.raises(BadFile, match="not the one given"):
        import_weights(path, sha256="0" * 64)


class Bomb:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_runs_nothing_even_if_its_sha256_is_given(tmp_path, new):
    canary = tmp_path / "canary"
    path = saved(tmp_path, {"a": Bomb(canary)}, _use_new_zipfile_serialization=new)
    with pytest.raises(BadFile, match="mkdir"):
        import_weights(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert not canary.exists()


# ---- renaming ---------------------------------------------------------------------------------


def test_renaming_moves_what_begins_so_and_nothing_else():
    one, two = torch.ones(1), torch.zeros(1)
    made = {"module.a": one, "b": two}
    assert torch_archives.rename(made, "module.", "") == {"a": one, "b": two}
    assert torch_archives.rename(made, "b", "c.b") == {"module.a": one, "c.b": two}
    assert list(made) == ["module.a", "b"]
    with pytest.raises(ValueError, match=r"no tensor begins with 'modul\.'"):
        torch_archives.rename(made, "modul.", "")
    with pytest.raises(ValueError, match="two tensors one name"):
        torch_archives.rename(made, "module.a", "b")


# ---- the script -------------------------------------------------------------------------------


def run(folder, *flags):
    """Run the script with a checkpoint of ours for --like and the weights of theirs.pt."""
    Denoiser(network(), VP(0.2), V()).save(folder / "like.safetensors")
    files = {"weights": "theirs.pt", "like": "like.safetensors", "out": "ours.safetensors"}
    named = [part for flag, file in files.items() for part in (f"--{flag}", folder / file)]
    command = [sys.executable, SCRIPT, *named, *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script_fills_the_network_of_a_checkpoint(tmp_path):
    theirs = network(5)
    inside = {f"module.{name}": value.half() for name, value in theirs.state_dict().items()}
    path = saved(tmp_path, {"ema": inside, "step": 3})
    done = run(tmp_path, "--key", "ema", "--rename", "module.=")
    assert done.returncode == 0, done.stderr
    assert "converted: torch.float16 -> torch.float32" in done.stdout
    loaded = Denoiser.load(tmp_path / "ours.safetensors")
    assert loaded.process == VP(0.2)
    assert_same(
        loaded.network.state_dict(), {k: v.half().float() for k, v in theirs.state_dict().items()}
    )
    record = json.loads((tmp_path / "ours.json").read_text())
    assert record["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_script_refuses_in_one_line_and_writes_nothing(tmp_path):
    """The library compares the names; the script reports its message."""
    made = network().state_dict()
    saved(tmp_path, {name.replace("bias", "bais"): value for name, value in made.items()})
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    message = "no tensor 'layers.0.bias' nor 1 others (did you mean 'layers.0.bais'?)"
    assert f"theirs.pt: {message}" in done.stderr
    assert not (tmp_path / "ours.safetensors").exists()


FITS = {
    "no tensor 'b'": {"a": torch.zeros(2)},
    "unknown tensor 'c'": {"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)},
    r"'a' must be \(2,\) of torch.float32; got \(3,\) of torch.float32": {
        "a": torch.zeros(3), "b": torch.zeros(1)
    },
    r"'b' must be \(1,\) of torch.float32; got \(1,\) of torch.int64": {
        "a": torch.zeros(2), "b": torch.zeros(1).long()
    },
}  # fmt: skip


@pytest.mark.parametrize("message", FITS)
def test_tensors_that_do_not_fit_are_named(message):
    with pytest.raises(ValueError, match=message):
        storage.check_fit(FITS[message], {"a": torch.zeros(2), "b": torch.zeros(1)})
