"""Malicious files run no code and are refused: in one line, in little time and memory."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import hostile_archives  # noqa: F401  fills the tables
import hostile_records  # noqa: F401
import pytest
import torch
from hostile_files import DENOISERS, FOREIGN, FRAMES, foreign, frame, sound
from hostile_run import LOADERS, SOUND
from torch import nn

import sde_diffusion as sd
from sde_diffusion.files import storage
from sde_diffusion.files.storage import BadFile
from sde_diffusion.grids import frames
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.networks import MLP

TESTS = Path(__file__).parents[1] / "common"
CASES = [(kind, name) for kind, table in (("denoiser", DENOISERS), ("frame", FRAMES),
                                          ("foreign", FOREIGN)) for name in table]  # fmt: skip
SOUNDS = [(kind, make.__name__) for kind, makes in SOUND.items() for make in makes]


HINTS = {
    ("denoiser", "png"): "a PNG picture",
    ("denoiser", "pickle"): "a pickle, which is never read",
    ("denoiser", "zip with a pickle"): "a zip archive",
    ("denoiser", "empty"): "empty",
    ("denoiser", "a byte less"): "truncated",
    ("denoiser", "a pipe as .safetensors"): "a pipe",
    ("denoiser", "the record of another file"): "not the file of x.json",
    ("denoiser", "record: a name twice"): "the name 'format' occurs twice",
    ("denoiser", "record: format 3"): "format 3, of a newer version; this version reads format 2",
    ("denoiser", "record: format 1"): "format 1, an older one",
    ("denoiser", "record: denoisre"): "did you mean 'denoisre'?",
    ("denoiser", "record: a part misspelt"): "no denoiser part 'process' (did you mean 'proces'?)",
    ("denoiser", "network: unet: chanels"): "has no argument 'chanels' (did you mean 'channels'?)",
    ("denoiser", "network: wdith"): "has no argument 'wdith' (did you mean 'width'?)",
    ("denoiser", "network: no width"): "has no 'width'",
    ("denoiser", "network: class 'mlp'"): "unknown network class 'mlp'",
    ("denoiser", "network: width true"): "width of MLP must not be true",
    ("denoiser", "network: width 10^9"): "width must be at most 65536; got 1000000000",
    ("denoiser", "network: depth 10^9"): "depth must be at most 1000; got 1000000000",
    ("denoiser", "tensors: another name"): "did you mean 'layers.0.weigth'?",
    ("denoiser", "tensors: nan"): "tensor 'layers.0.weight' has values that are not finite",
    ("foreign", "a bomb"): "mkdir",
    ("foreign", "dicts of tensors"): "give the key of a dict: model, ema",
    ("foreign", "compressed"): "is compressed",
    ("foreign", "the old format"): "give sha256=",
}


def outcomes():
    """Return the outcome of each file, in a process limited to 256 MiB more than it has."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # 500 folders: disks are slow
    with TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, TESTS / "hostile_run.py", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr
    return {
        (kind, name): outcome for kind, name, outcome in map(json.loads, done.stdout.splitlines())
    }


def faults(found, hint):
    """Return the faults of a refusal."""
    error, message = found["outcome"]
    wanted = {
        "is refused": error == "BadFile",
        "names the file": found["path"] in message,
        "is one printable line": message.isprintable() and len(message) < 1200,
        "needs no memory": not any(word in message for word in ("fit in memory", "allocate")),
        "runs nothing": not found["run"],
        "takes little time": found["seconds"] < 10,  # 0.2 at most, on a free machine
        f"has {hint!r}": hint in message,
    }
    return [what for what, holds in wanted.items() if not holds]


def test_hostile_files_are_refused_in_one_line_in_little_room_and_run_no_code():
    """All in one test, as one process loads all; valid files are loaded within the same limits."""
    found = outcomes()
    assert found.keys() == {*CASES, *SOUNDS}
    assert HINTS.keys() <= found.keys()
    assert all(found[name]["outcome"] == ["accepted", ""] for name in SOUNDS)
    wrong = {name: (faults(found[name], HINTS.get(name, "")), found[name]) for name in CASES}
    assert not {name: outcome for name, outcome in wrong.items() if outcome[0]}


# ---- flipped bits -----------------------------------------------------------------------------

FLIPPED = {
    "weights": ("denoiser", sound, ".safetensors"),
    "record": ("denoiser", sound, ".json"),
    "frame": ("frame", frame, ".safetensors"),
    "archive": ("foreign", foreign, ".pt"),
}


def content(loaded):
    """Return the settings and tensors of a loaded value, for comparison."""
    if isinstance(loaded, Denoiser):
        parts = (loaded.process, loaded.parameterization, loaded.noise_input)
        return [type(loaded.network), loaded.network.config, *parts], loaded.network.state_dict()
    if isinstance(loaded, frames.GaussianFrame):
        return [loaded.rest], {name: getattr(loaded, name) for name in frames.PARTS}
    return [], loaded


def equal(first, second):
    (settings, ours), (others, theirs) = content(first), content(second)
    return settings == others and ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )  # fmt: skip


@pytest.mark.parametrize("what", FLIPPED)
@pytest.mark.parametrize("flips", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_flipped_bit_changes_what_is_read_silently(tmp_path, what, flips):
    """Refused; or without effect: 1e-05 and 1E-05 are one number in a record, and no tensor
    depends on the times and attributes that a zip archive has beside the contents of its members.
    """
    kind, make, suffix = FLIPPED[what]
    path = make(tmp_path)
    place, numbers = path.with_suffix(suffix), random.Random(flips)
    whole, untouched, refusals = place.read_bytes(), LOADERS[kind](path), []
    for bit in numbers.sample(range(8 * len(whole)), min(flips, 8 * len(whole))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        place.write_bytes(damaged)
        try:
            loaded = LOADERS[kind](path)
        except BadFile as error:
            refusals.append(str(error))
        else:
            assert suffix != ".safetensors", f"bit {bit} went unnoticed"
            assert equal(loaded, untouched), f"bit {bit} changed what was read"
    assert all(str(path) in message and message.isprintable() for message in refusals)
    assert len(refusals) > flips / 2


# ---- at the door ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["", ".", "/", "a\0b.safetensors", "x" * 5000 + ".safetensors", "\x1b[2J.safetensors",
     "a\nb.safetensors", "\udcff.safetensors", "~/none.safetensors", "/dev/zero", "/dev/stdin"],
)  # fmt: skip
@pytest.mark.parametrize("kind", LOADERS)
def test_any_path_that_is_no_file_is_refused_in_one_printable_line(kind, path, monkeypatch):
    with pytest.raises(BadFile) as caught:
        LOADERS[kind](path)
    assert str(caught.value).isprintable()


def test_a_network_that_was_given_is_left_as_it_was_by_a_refusal(tmp_path):
    path = DENOISERS["tensors: another shape"](tmp_path)
    mine = MLP(width=8, depth=1)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(BadFile):
        Denoiser.load(path, mine)
    assert all(torch.equal(before[name], value) for name, value in mine.state_dict().items())


OWN = {
    "of another class": lambda: nn.Sequential(nn.Linear(3, 8)),
    "of another width": lambda: MLP(width=9, depth=1),
    "of another shape with the same tensors": lambda: MLP(shape=(2, 1), width=8, depth=1),
    "of another dtype": lambda: MLP(width=8, depth=1).double(),
}


@pytest.mark.parametrize("which", OWN)
def test_a_network_that_was_given_must_be_the_one_saved(tmp_path, which):
    with pytest.raises(BadFile, match=str(tmp_path)):
        Denoiser.load(sound(tmp_path), OWN[which]())


def test_a_saved_name_cannot_reach_what_is_imported(tmp_path):
    """Classes of blocks, which describe no network, are not in the table of networks."""
    for name in ("network: class 'Fourier'", "network: class 'Dropout'", "network: class 'nn'"):
        (tmp_path / name).mkdir()
        with pytest.raises(BadFile):
            Denoiser.load(DENOISERS[name](tmp_path / name))


def test_reading_leaves_the_global_generator_alone(tmp_path):
    path, before = sound(tmp_path), torch.get_rng_state()
    Denoiser.load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_would_not_be_read_is_not_written(tmp_path):
    path = tmp_path / "x.safetensors"
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="'a' has values that are not finite"):
            storage.write(path, {"a": torch.tensor([value])}, {})
    with pytest.raises(ValueError, match="unknown dtype 'C64'"):
        storage.write(path, {"a": torch.zeros(1, dtype=torch.complex64)}, {})
    with pytest.raises(ValueError, match="not printable"):
        storage.write(path, {"\x1b[2J": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="more than 4,194,304 bytes"):
        storage.write(path, {}, {"long": "x" * 5_000_000})
    with pytest.raises(ValueError, match="an integer of 100 digits"):
        storage.write(path, {}, {"seed": 10**99})
    assert not any(tmp_path.iterdir())


def test_the_command_line_refuses_in_one_line_that_does_nothing_to_the_terminal(tmp_path):
    path = DENOISERS["name with an escape"](tmp_path)
    out = tmp_path / "out"
    script = Path(sd.__file__).parents[1] / "experiments" / "mnist_vp.py"
    command = [sys.executable, script, "--checkpoint", path, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.strip().isprintable()
    assert str(path) in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("count", [100_002, 600_000])
def test_a_record_of_very_many_numbers_is_refused_before_it_is_parsed(tmp_path, count):
    """600,000 betas took 9 seconds; by processor time, which other programs do not change."""
    path = tmp_path / "a.safetensors"
    Denoiser(MLP(width=8), sd.Discrete.linear(10)).save(path)
    record = json.loads(path.with_suffix(".json").read_text())
    record["denoiser"]["process"]["betas"] = [0.01] * count
    record["record_sha256"] = storage.record_hash(record)
    path.with_suffix(".json").write_text(json.dumps(record))
    start = time.process_time()
    with pytest.raises(BadFile, match=r"a\.json: more than 100,000 values"):
        Denoiser.load(path)
    assert time.process_time() - start < 0.3


def test_infinity_is_a_value_in_the_buffers_of_a_denoiser_and_nowhere_else(tmp_path):
    """In a mask of attention, for example."""

    def made(value):
        network = torch.nn.Linear(2, 2)
        network.register_buffer("mask", torch.full((2, 2), value))
        return network

    path = tmp_path / "a.safetensors"
    Denoiser(made(-torch.inf), sd.VP()).save(path)
    network = made(0.0)
    Denoiser.load(path, network)
    assert torch.equal(network.mask, torch.full((2, 2), -torch.inf))
    with pytest.raises(ValueError, match="'mask' has values that are not finite"):
        Denoiser(made(torch.nan), sd.VP()).save(path)
    tensors, record = storage.read(path, infinite={"mask"})
    record = {name: value for name, value in record.items() if name not in storage.OURS}
    tensors["weight"][0, 0] = torch.inf
    storage.write(path, tensors, record, infinite={"mask", "weight"})
    with pytest.raises(BadFile, match="'weight' has values that are not finite"):
        Denoiser.load(path, made(0.0))
