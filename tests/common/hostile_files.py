"""Malicious files and how they are made: wrong bytes, and paths that are no regular file.

A case is a function that writes files in a folder and returns the path to be loaded.
"""

import hashlib
import json
import os
import struct
import zipfile
from functools import wraps

import torch
from safetensors.torch import save

from sde_diffusion.files import storage
from sde_diffusion.grids import frames
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.parameterizations import V
from sde_diffusion.networks import MLP, UNet
from sde_diffusion.processes import VP, Discrete

DENOISERS, FRAMES, FOREIGN = {}, {}, {}


# ---- valid files --------------------------------------------------------------------------------


def kept(make):
    """Make the files of `make` once, and copy them afterwards."""
    contents = {}

    @wraps(make)
    def copied(folder):
        if not contents:
            path = make(folder)
            contents.update({file.name: file.read_bytes() for file in folder.iterdir()}, path=path)
        for name, content in contents.items():
            if name != "path":
                (folder / name).write_bytes(content)
        return folder / contents["path"].name

    return copied


def written(folder, name="x", **changed):
    path = folder / f"{name}.safetensors"
    torch.manual_seed(0)
    parts = {"network": MLP(width=8, depth=1), "process": VP(), "parameterization": V(), **changed}
    Denoiser(**parts).save(path, command="as typed")
    return path


@kept
def sound(folder):
    return written(folder)


@kept
def unet(folder):
    network = UNet(channels=(8,), blocks=1, attention=(), embedding=8, heads=1)
    return written(folder, network=network)


@kept
def chain(folder):
    return written(folder, process=Discrete.linear(10))


@kept
def frame(folder):
    path = folder / "x.safetensors"
    mean, root = torch.tensor([0.1, 0.2, 0.3]), torch.diag(torch.tensor([1.0, 0.5, 0.2]))
    frames.GaussianFrame.of(mean, root, rank=2).save(path)
    return path


@kept
def foreign(folder):
    path = folder / "x.pt"
    torch.save(MLP(width=8, depth=1).state_dict(), path)
    return path


# ---- how files are changed ----------------------------------------------------------------------


def rehashed(path, record, data=None):
    """Write both files as an attacker would: with the right hashes."""
    data = path.read_bytes() if data is None else data
    path.write_bytes(data)
    rest = {k: v for k, v in record.items() if k != "record_sha256"}
    rest = {**rest, "sha256": hashlib.sha256(data).hexdigest()}
    if "format" in record:
        rest["record_sha256"] = storage.record_hash(rest)
    path.with_suffix(".json").write_text(json.dumps(rest))
    return path


def record_of(path):
    return json.loads(path.with_suffix(".json").read_text())


def binary(head, data=b"", length=None):
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def case(table, name):
    def keep(make):
        assert name not in table
        table[name] = make
        return make

    return keep


def bytes_case(table, name, data, base=sound):
    """A file of these bytes beside a record with their hash."""

    def make(folder):
        path = base(folder)
        return rehashed(path, record_of(path), data(path) if callable(data) else data)

    case(table, name)(make)


def text_case(name, text, table=DENOISERS, base=sound):
    """A record of this text."""

    def make(folder):
        path = base(folder)
        words = path.with_suffix(".json")
        words.write_bytes(text(words.read_bytes()) if callable(text) else text)
        return path

    case(table, name)(make)


def record_case(name, change, table=DENOISERS, base=sound):
    """A record changed by a function, with new hashes."""

    def make(folder):
        path = base(folder)
        record = record_of(path)
        record = change(record) or record
        return rehashed(path, record)

    case(table, name)(make)


def part_case(name, part, base=sound, **changed):
    """A description with other arguments of one part; ... removes an argument."""

    def change(record):
        described = {**record["denoiser"][part], **changed}
        record["denoiser"][part] = {k: v for k, v in described.items() if v is not ...}

    record_case(f"{part}: {name}", change, base=base)


def tensors_case(table, name, change, base=sound):
    """Changed tensors, written as the library writes them."""

    def make(folder):
        path = base(folder)
        tensors, record = storage.read(path)
        tensors = change(tensors) or tensors
        return rehashed(path, record, save(tensors))

    case(table, name)(make)


def without(name):
    def change(record):
        del record[name]

    return change


def with_(**changed):
    return lambda record: {**record, **changed}


# ---- bytes --------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


class Bomb:
    """Would make a folder if it was unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def bomb(path):
    canary = str(path.parent / "canary").encode()
    return b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(canary)) + canary + b"\x85R."


def zipped_bomb(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", bomb(path))
        archive.writestr("x/version", "3\n")
    return path.read_bytes()


BYTES = {
    "empty": b"",
    "one byte": b"\x08",
    "eight bytes": struct.pack("<Q", 2),
    "zeros": b"\0" * 4096,
    "ones": b"\xff" * 4096,
    "text": b"these are no numbers\n" * 40,
    "png": b"\x89PNG\r\n\x1a\n" + b"\0" * 200,
    "jpeg": b"\xff\xd8\xff\xe0" + b"\0" * 200,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 200,
    "html": b"<!DOCTYPE html><html>Not Found</html>",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
    "pickle": bomb,
    "zip with a pickle": zipped_bomb,
    "its own record": lambda path: path.with_suffix(".json").read_bytes(),
    "head of 2^63 bytes": binary({}, length=2**63),
    "head of 2^64-1 bytes": binary({}, length=2**64 - 1),
    "head of 100 MB": binary({}, length=100_000_000),
    "head longer than the file": binary({"a": ENTRY}, b"\0" * 4, length=1000),
    "head of no bytes": binary(b""),
    "head that is no json": binary(b"{'a': 1}"),
    "head that is no utf-8": binary(b'{"\xff\xfe": 1}'),
    "head that is a list": binary(b"[]      "),
    "head nested deeply": binary(b"[" * 100_000),
    "head with nan": binary(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
    "head with a long integer": binary(b'{"a":' + b"9" * 100_000 + b"}"),
    "tensor that is null": binary({"a": None}),
    "tensor without dtype": binary({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "tensor with more": binary({"a": {**ENTRY, "code": "x"}}, b"\0" * 4),
    "unknown dtype": binary({"a": {**ENTRY, "dtype": "F31"}}, b"\0" * 4),
    "dtype F4": binary({"a": {**ENTRY, "dtype": "F4"}}, b"\0" * 4),
    "dtype that is a list": binary({"a": {**ENTRY, "dtype": ["F32"]}}, b"\0" * 4),
    "shape of floats": binary({"a": {**ENTRY, "shape": [1.0]}}, b"\0" * 4),
    "shape of true": binary({"a": {**ENTRY, "shape": [True]}}, b"\0" * 4),
    "negative shape": binary({"a": {**ENTRY, "shape": [-1]}}, b"\0" * 4),
    "shape that is a number": binary({"a": {**ENTRY, "shape": 1}}, b"\0" * 4),
    "shape past 2^64": binary({"a": {**ENTRY, "shape": [2**32, 2**32]}}, b"\0" * 4),
    "shape that is 1 mod 2^64": binary({"a": {**ENTRY, "shape": [2**62, 4, 2**62]}}, b"\0" * 4),
    "empty and huge": binary({"a": {**ENTRY, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
    "shape of 10,000 sides": binary({"a": {**ENTRY, "shape": [1] * 10_000}}, b"\0" * 4),
    "offsets that overlap": binary(
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [2, 6]}}, b"\0" * 6
    ),
    "offsets that are equal": binary({"a": ENTRY, "b": ENTRY}, b"\0" * 4),
    "offsets with a gap": binary({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 12]}}, b"\0" * 12),
    "offsets that fall": binary({"a": {**ENTRY, "data_offsets": [4, 0]}}, b"\0" * 4),
    "offsets past the end": binary({"a": {**ENTRY, "shape": [9], "data_offsets": [0, 36]}}, b"\0"),
    "offsets below 0": binary({"a": {**ENTRY, "data_offsets": [-4, 0]}}, b"\0" * 4),
    "offsets that are strings": binary({"a": {**ENTRY, "data_offsets": ["0", "4"]}}, b"\0" * 4),
    "three offsets": binary({"a": {**ENTRY, "data_offsets": [0, 2, 4]}}, b"\0" * 4),
    "bytes at the end": lambda path: path.read_bytes() + b"\0",
    "a byte less": lambda path: path.read_bytes()[:-1],
    "half": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "twice one name": binary(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "name with an escape": binary({"\x1b[2J\x1b]0;mine\x07": ENTRY}, b"\0" * 4),
    "name with a newline": binary({"a\nerror: all is well": ENTRY}, b"\0" * 4),
    "name that turns the line": binary({"\u202ea": ENTRY}, b"\0" * 4),
    "name of 100,000 letters": binary({"a" * 100_000: ENTRY}, b"\0" * 4),
    "name that is half a surrogate": binary(b'{"\\ud800":{"dtype":"F32"}}', b"\0" * 4),
    "metadata of numbers": binary({"__metadata__": {"a": 1}}),
    "50,000 tensors": binary(
        {f"{i}": {**ENTRY, "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    ),
}  # fmt: skip
for _name, _data in BYTES.items():
    bytes_case(DENOISERS, _name, _data)
for _name in ("empty", "png", "pickle", "zip with a pickle", "head of 2^63 bytes", "twice one name",
              "offsets that overlap", "name with an escape", "a byte less"):  # fmt: skip
    bytes_case(FRAMES, _name, BYTES[_name], base=frame)


# ---- paths of no file ----------------------------------------------------------------------------


def instead(name, put, suffix=".safetensors", table=DENOISERS, base=sound):
    """Something else instead of one of the two files."""

    def make(folder):
        path = base(folder)
        place = path.with_suffix(suffix)
        place.unlink()
        put(place)
        return path

    case(table, f"{name} as {suffix}")(make)


def sparse(size):
    def put(place):
        with open(place, "wb") as file:
            file.truncate(size)

    return put


def sparse_tensor(place):
    """A valid header of 2^40 numbers, in a sparse file of that length."""
    data = binary({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    place.write_bytes(data)
    os.truncate(place, len(data) + 2**42)


for _suffix in (".safetensors", ".json"):
    instead("nothing", lambda place: None, _suffix)
    instead("a folder", lambda place: place.mkdir(), _suffix)
    instead("a pipe", os.mkfifo, _suffix)
    instead("/dev/zero", lambda place: place.symlink_to("/dev/zero"), _suffix)
    instead("/dev/urandom", lambda place: place.symlink_to("/dev/urandom"), _suffix)
    instead("a link to nothing", lambda place: place.symlink_to("absent"), _suffix)
    instead("a link to itself", lambda place: place.symlink_to(place), _suffix)
    instead("4 TiB of nothing", sparse(2**42), _suffix)
    if os.geteuid():
        instead("a locked file", lambda place: (place.touch(), place.chmod(0)), _suffix)
instead("4 TiB as announced", sparse_tensor)
instead("a pipe", os.mkfifo, table=FRAMES, base=frame)
instead("/dev/zero", lambda place: place.symlink_to("/dev/zero"), ".pt", FOREIGN, foreign)
instead("a pipe", os.mkfifo, ".pt", FOREIGN, foreign)
instead("4 TiB of nothing", sparse(2**42), ".pt", FOREIGN, foreign)


@case(DENOISERS, "the path of the record")
def _(folder):
    return sound(folder).with_suffix(".json")


@case(DENOISERS, "a pickle by its right name")
def _(folder):
    path = folder / "x.pt"
    path.write_bytes(bomb(path))
    return path


@case(DENOISERS, "the record of another file")
def _(folder):
    path, other = sound(folder), written(folder, "y", network=MLP(width=9, depth=1))
    other.with_suffix(".json").replace(path.with_suffix(".json"))
    return path


@case(DENOISERS, "the record of another file, with the hash of these weights")
def _(folder):
    path, other = sound(folder), written(folder, "y", network=MLP(width=9, depth=1))
    record = {**record_of(other), "sha256": record_of(path)["sha256"]}
    path.with_suffix(".json").write_text(json.dumps(record))
    return path
