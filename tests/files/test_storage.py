"""Files come back bit for bit, or are refused in one line that names them."""

import json
import os
import random
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from sde_diffusion.files import storage
from sde_diffusion.files.storage import BadFile
from sde_diffusion.files.strict_json import plain
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.noise_inputs import CNoise, ContinuousTime, LogSNR, TimestepIndex
from sde_diffusion.models.parameterizations import X0, Eps, Preconditioned, Score, V, Velocity
from sde_diffusion.networks import MLP, UNet
from sde_diffusion.processes import (
    EDM,
    OU,
    VE,
    VP,
    Cosine,
    Discrete,
    Interpolated,
    RectifiedFlow,
    SubVP,
)

NETWORKS = {
    "unet": lambda: UNet(channels=(8, 16), blocks=1, embedding=8, heads=2, cond=0),
    "mlp": lambda: MLP((1, 4, 4), width=8, fourier=4),
}
PROCESSES = [VP(0.2, 15.0), RectifiedFlow(), Discrete.linear(10), Interpolated((0.1, 0.25)),
             SubVP(0.2, 15.0), VE(0.1, 9.0), OU(2.0), Cosine(0.01), EDM(70.0),
             Discrete.cosine(5).zero_terminal_snr()]  # fmt: skip
PARAMETERIZATIONS = [Eps(), X0(), V(), Score(), Velocity(), Preconditioned(0.7)]
NOISE_INPUTS = [ContinuousTime(), LogSNR(), CNoise(), TimestepIndex(10)]


def small(**changed):
    torch.manual_seed(0)  # initial weights are the one thing that torch draws from its global state
    arguments = {"network": MLP(width=8, depth=1), "process": VP(), "parameterization": V()}
    return Denoiser(**{**arguments, **changed})


@pytest.fixture(autouse=True)
def restored_state():
    with torch.random.fork_rng():
        yield


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "small.safetensors"
    small().save(path, command="as typed")
    return path


def weights(denoiser):
    return denoiser.network.state_dict()


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name])


def refusal(path, named=None):
    """Return the message of a refused load: one line that names a file."""
    with pytest.raises(BadFile) as caught:
        Denoiser.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(named or path) in message
    return message


def combinations():
    """Every network with every process; the other two parts alternate."""
    for i, (network, process) in enumerate(product(NETWORKS, PROCESSES)):
        yield network, process, PARAMETERIZATIONS[i % 6], NOISE_INPUTS[(i // 6 + i) % 4]


@pytest.mark.parametrize(
    ("network", "process", "parameterization", "noise_input"), list(combinations())
)
def test_a_denoiser_comes_back_bit_for_bit(
    tmp_path, network, process, parameterization, noise_input
):
    denoiser = small(
        network=NETWORKS[network](),
        process=process,
        parameterization=parameterization,
        noise_input=noise_input,
    )
    for parameter in denoiser.network.parameters():
        torch.nn.init.normal_(parameter)  # the U-Net's zeros would hide a loss
    path = tmp_path / "denoiser.safetensors"
    denoiser.save(path)
    loaded = Denoiser.load(path)
    assert_same_weights(loaded, denoiser)
    assert loaded.process == process
    assert loaded.parameterization == parameterization
    assert loaded.noise_input == noise_input
    assert not loaded.training
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    level = process.level(torch.tensor(0.5), x)
    assert torch.equal(loaded(x, level).eps, denoiser.eval()(x, level).eps)


def test_a_loaded_network_can_be_trained(saved):
    """It is made on the meta device, of which nothing remains."""
    denoiser = Denoiser.load(saved)
    made = small()
    for name, parameter in made.named_parameters():
        loaded = denoiser.get_parameter(name)
        assert type(loaded) is torch.nn.Parameter
        assert loaded.requires_grad
        assert (loaded.device, loaded.dtype) == (parameter.device, parameter.dtype)
        assert loaded.stride() == parameter.stride()
    x = torch.ones(2, 2)
    denoiser.network(x, torch.ones(2)).sum().backward()
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    optimizer.step()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_denoiser_keeps_its_dtype(tmp_path, dtype):
    denoiser = small()
    denoiser.network.to(dtype)
    denoiser.save(tmp_path / "wide.safetensors")
    assert_same_weights(Denoiser.load(tmp_path / "wide.safetensors"), denoiser)


def test_a_network_of_ones_own_is_filled(tmp_path):
    path = tmp_path / "own.safetensors"
    denoiser = small(network=torch.nn.Sequential(torch.nn.Linear(2, 3)))
    denoiser.save(path)
    assert "Sequential" in refusal(path, path.with_suffix(".json"))
    mine = torch.nn.Sequential(torch.nn.Linear(2, 3))
    loaded = Denoiser.load(path, mine)
    assert loaded.network is mine
    assert_same_weights(loaded, denoiser)


def test_facts_are_kept_beside_the_weights(saved):
    _, record = storage.read(saved)
    assert record["command"] == "as typed"
    assert json.loads(saved.with_suffix(".json").read_text())["command"] == "as typed"


@pytest.mark.parametrize("name", ["format", "sha256", "denoiser"])
def test_a_fact_may_not_take_the_name_of_a_field(saved, name):
    """Otherwise the hash, for example, would be the caller's, and the file unreadable."""
    with pytest.raises(ValueError, match=name):
        small().save(saved, **{name: "mine"})
    Denoiser.load(saved)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.safetensors; got .*weights\.pt"):
        small().save(tmp_path / "weights.pt")
    assert not any(tmp_path.iterdir())


def test_every_truncation_of_the_weights_is_noticed(saved):
    whole, numbers = saved.read_bytes(), random.Random(1)
    for length in [0, 7, 8, len(whole) - 1, *numbers.sample(range(len(whole)), 50)]:
        saved.write_bytes(whole[:length])
        refusal(saved)
    saved.write_bytes(whole + b"\0")
    refusal(saved)


def test_a_truncated_record_is_refused(saved):
    path = saved.with_suffix(".json")
    whole = path.read_bytes()
    for length in random.Random(3).sample(range(len(whole) - 1), 50):  # the last byte ends a line
        path.write_bytes(whole[:length])
        refusal(saved, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_missing_file_is_named(saved, suffix):
    saved.with_suffix(suffix).unlink()
    assert "No such file" in refusal(saved, saved.with_suffix(suffix))


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    path = tmp_path / "folder.safetensors"
    path.mkdir()
    assert "directory" in refusal(path)


def facts(record):
    """A record without the entries that `storage.write` adds."""
    return {k: v for k, v in record.items() if k not in ("format", "sha256", "record_sha256")}


def tampered(path, part, **changed):
    """Save the denoiser with another description, with the hashes that the library writes."""
    tensors, record = storage.read(path)
    description = {**record["denoiser"], part: {**record["denoiser"][part], **changed}}
    description[part] = {k: v for k, v in description[part].items() if v is not None}
    storage.write(path, tensors, {**facts(record), "denoiser": description})


PARTS = ["network", "process", "parameterization", "noise_input"]
OUTSIDE = ["os.system", "system", "__import__", "Process", "Level", "Prediction", "Pair", "truth"]
OUTSIDE += ["Denoiser", "Model", "nn", "torch.nn.Linear", "Parameterization", "", 7, ["VP"], {}]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", OUTSIDE, ids=str)
def test_a_class_outside_the_table_is_refused(saved, part, name):
    tampered(saved, part, **{"class": name})
    refusal(saved, saved.with_suffix(".json"))


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (p, o)
        for p in PARTS
        for q, o in zip(PARTS, ["MLP", "VP", "V", "ContinuousTime"], strict=True)
        if p != q
    ],
)
def test_a_class_of_another_table_is_refused(saved, part, other):
    tampered(saved, part, **{"class": other})
    refusal(saved, saved.with_suffix(".json"))


def test_no_part_of_a_description_can_be_a_whole_denoiser(saved):
    """`Denoiser` is a class that can be called, but in no table."""
    tampered(saved, "noise_input", **{"class": "Denoiser"}, network=None, process="x")
    refusal(saved, saved.with_suffix(".json"))
    tampered(saved, "noise_input", **{"class": "Denoiser"}, network="x", process="x")
    refusal(saved, saved.with_suffix(".json"))


@pytest.mark.parametrize("part", PARTS)
def test_an_unknown_argument_is_refused(saved, part):
    tampered(saved, part, beta_middle=3.0)
    assert "beta_middle" in refusal(saved, saved.with_suffix(".json"))


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("network", {"width": 9}),
        ("network", {"depth": 2}),
        ("network", {"shape": [3]}),
        ("network", {"class": "UNet", "shape": None, "width": None, "depth": None}),
        ("network", {"class": "Fourier", "shape": None, "depth": None}),
        ("network", {"width": "8"}),
        ("network", {"width": 8.0}),
        ("network", {"width": -1}),
        ("network", {"width": 10**30}),
        ("network", {"shape": 2}),
        ("network", {"shape": "ab"}),
        ("network", {"shape": [[2]]}),
        ("process", {"beta_min": "0.1"}),
        ("process", {"beta_min": -1.0}),
        ("process", {"beta_max": float("nan")}),
        ("process", {"beta_max": [20.0]}),
        ("process", {"class": "Discrete", "beta_min": None, "beta_max": None}),
        ("process", {"class": "Discrete", "beta_min": None, "beta_max": None, "betas": []}),
        ("process", {"class": "Discrete", "beta_min": None, "beta_max": None, "betas": [2.0]}),
        ("process", {"class": "Discrete", "beta_min": None, "beta_max": None, "betas": ["a"]}),
        ("process", {"class": "Discrete", "beta_min": None, "beta_max": None, "betas": {"a": 1}}),
        ("process", {"class": None}),
    ],
    ids=str,
)
def test_a_wrong_argument_or_shape_is_refused(saved, part, changed):
    tampered(saved, part, **changed)
    refusal(saved, saved.with_suffix(".json"))


def test_a_unet_that_cannot_be_is_refused(saved):
    tensors, record = storage.read(saved)
    for wrong in ({"heads": 0}, {"patch": 0}, {"blocks": -1}, {"channels": "ab"}, {"cond": -1}):
        network = {"class": "UNet", "channels": [8], "attention": [0], **wrong}
        described = {**record["denoiser"], "network": network}
        storage.write(saved, tensors, {**facts(record), "denoiser": described})
        refusal(saved, saved.with_suffix(".json"))


@pytest.mark.parametrize(
    "described", [None, 3, "VP", [], {}, {"network": {"class": "MLP"}}], ids=str
)
def test_a_record_that_describes_no_denoiser_is_refused(saved, described):
    tensors, record = storage.read(saved)
    storage.write(saved, tensors, {**facts(record), "denoiser": described})
    refusal(saved, saved.with_suffix(".json"))


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "shape"])
def test_wrong_tensors_are_refused(saved, change):
    tensors, record = storage.read(saved)
    name = next(iter(tensors))
    value = tensors.pop(name)
    if change == "extra":
        tensors |= {name: value, "more": value.clone()}
    if change == "renamed":
        tensors["more"] = value
    if change == "shape":
        tensors[name] = value[:-1]
    storage.write(saved, tensors, facts(record))
    assert name in refusal(saved, saved.with_suffix("")) or change == "extra"


@contextmanager
def largest_file(size):
    """Limit the size of files, as a full disk would (EFBIG instead of ENOSPC)."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("larger", ["weights", "record"])
def test_a_failed_write_leaves_the_old_file_as_it_was(saved, larger):
    """The disk is full after 2,000 bytes: in the weights (5,000), or only later, in the record."""
    old = Denoiser.load(saved)
    other = small(network=MLP(width=256 if larger == "weights" else 8, depth=1), process=VP(0.3))
    for parameter in other.network.parameters():
        torch.nn.init.ones_(parameter)
    command = "long " * (1000 if larger == "record" else 1)
    with largest_file(2000), pytest.raises(OSError, match="too large"):
        other.save(saved, command=command)
    loaded = Denoiser.load(saved)
    assert_same_weights(loaded, old)
    assert loaded.process == old.process
    assert storage.read(saved)[1]["command"] == "as typed"
    other.save(saved, command=command)  # with room again
    assert_same_weights(Denoiser.load(saved), other)


def test_a_failed_write_leaves_nothing_else_behind(saved):
    with largest_file(2000), pytest.raises(OSError, match="too large"):
        small(network=MLP(width=256)).save(saved)
    assert sorted(os.listdir(saved.parent)) == ["small.json", "small.safetensors"]


def test_a_write_where_no_folder_can_be_is_an_error_and_leaves_the_file(saved):
    with pytest.raises(OSError, match=r"small\.safetensors"):
        small().save(saved / "inside.safetensors")
    Denoiser.load(saved)


def test_a_write_does_not_follow_a_link_left_in_its_way(tmp_path):
    """For example in a folder that others can write to, by the name of the temporary file."""
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    (tmp_path / "small.safetensors.part").symlink_to(theirs)
    small().save(tmp_path / "small.safetensors")
    assert theirs.read_text() == "precious"
    Denoiser.load(tmp_path / "small.safetensors")


def test_numbers_that_json_cannot_say_come_back_as_words(saved):
    """For example a recipe that clips at inf; `plain` returns what the record will hold."""
    facts = {"clip": float("inf"), "worst": float("nan"), "sides": (1, 2), "deep": {"a": (0.5,)}}
    small().save(saved, **facts)
    record = storage.read(saved)[1]
    expected = {"clip": "inf", "worst": "nan", "sides": [1, 2], "deep": {"a": [0.5]}}
    assert {name: record[name] for name in facts} == expected == plain(facts)


def test_a_message_is_one_printable_line_and_bounded():
    error = BadFile("a\x1b[2J\nb\u202e\udcff " + "x" * 100_000)
    assert str(error).startswith(r"a\x1b[2J\nb\u202e\udcff x")
    assert str(error).isprintable()
    assert len(str(error)) < 2100


@pytest.mark.parametrize("part", [p for p in PARTS if p != "network"])
def test_what_is_handed_in_must_be_what_was_saved(saved, part):
    right = {"process": VP(), "parameterization": V(), "noise_input": ContinuousTime()}
    wrong = {"process": VP(0.2), "parameterization": Eps(), "noise_input": LogSNR()}
    Denoiser.load(saved, **right)
    with pytest.raises(BadFile, match=f"the {part} was saved as another: .* -> "):
        Denoiser.load(saved, **{part: wrong[part]})


def test_equal_numbers_are_equal_settings(saved):
    """20 and 20.0 are one number; True and 1 are not."""
    Denoiser.load(saved, process=VP(beta_max=20))
    small(process=VP(beta_max=20)).save(saved)
    assert Denoiser.load(saved, process=VP(beta_max=20.0)).process == VP()


def test_a_file_without_an_argument_that_came_later_is_read_as_it_was_meant(saved):
    """`dropout` was added to the networks when files of this format were there already."""
    tensors, record = storage.read(saved)
    del record["denoiser"]["network"]["dropout"]
    storage.write(saved, tensors, facts(record))
    assert Denoiser.load(saved).network.config["dropout"] == 0.0
    Denoiser.load(saved, MLP(width=8, depth=1))
    with pytest.raises(BadFile, match=r"dropout 0 -> 0\.5"):
        Denoiser.load(saved, MLP(width=8, depth=1, dropout=0.5))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", ["VP", 3, VP])
def test_a_wrong_type_handed_in_is_not_blamed_on_the_file(saved, part, value):
    with pytest.raises(TypeError, match=f"{part} must be"):
        Denoiser.load(saved, **{part: value})
