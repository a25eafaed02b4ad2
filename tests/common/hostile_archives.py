"""Malicious files of torch.save."""

import math
import struct
import warnings
import zipfile
from pathlib import Path

import torch
from hostile_files import BYTES, FOREIGN, Bomb, bomb, case, foreign, sound

from sde_diffusion.networks import MLP


def saved_case(name, value, **how):
    @case(FOREIGN, name)
    def _(folder):
        path = folder / "x.pt"
        torch.save(value() if callable(value) else value, path, **how)
        return path


def archive_case(name, change, compression=zipfile.ZIP_STORED):
    """An archive with changed members."""

    @case(FOREIGN, name)
    def _(folder):
        path = foreign(folder)
        with zipfile.ZipFile(path) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        members = change(members, path) or members
        with zipfile.ZipFile(path, "w", compression) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return path


def pickle_of(content):
    return lambda members, path: {**members, "x/data.pkl": content}


def program(*operations):
    """A pickle of protocol 2."""
    return b"\x80\x02" + b"".join(operations) + b"."


def number(n):
    return b"\x8a\x08" + struct.pack("<q", n)


for _name in ("empty", "png", "text", "pickle", "its own record"):

    def _foreign(folder, data=BYTES[_name]):
        path = foreign(folder)
        sound(folder)
        path.write_bytes(data(folder / "x.safetensors") if callable(data) else data)
        return path

    case(FOREIGN, _name)(_foreign)
saved_case("a list", [torch.zeros(2)])
saved_case("a tensor", torch.zeros(2))
saved_case("a module", lambda: MLP(width=8, depth=1))
saved_case("a path", {"a": torch.zeros(2), "path": Path("x")})
saved_case("a number among tensors", {"a": torch.zeros(2), "step": 3})
saved_case("dicts of tensors", {"model": {"a": torch.zeros(2)}, "ema": {"a": torch.zeros(2)}})
saved_case("a number for a name", {3: torch.zeros(2)})
saved_case("an escape for a name", {"\x1b[2J": torch.zeros(2)})
saved_case("nan", {"a": torch.tensor([math.nan])})
saved_case("sparse", {"a": torch.zeros(2, 2).to_sparse()})
saved_case("meta", {"a": torch.zeros(2, 2, device="meta")})
saved_case("complex", {"a": torch.zeros(2, dtype=torch.complex64)})
saved_case("2^40 numbers of one", {"a": torch.zeros(1).expand(2**40)})
saved_case(
    "1,000 names of one", lambda: {f"{k}": t for t in [torch.zeros(10_000)] for k in range(1000)}
)
saved_case("the old format", {"a": torch.zeros(2)}, _use_new_zipfile_serialization=False)
saved_case("a bomb", lambda: {"a": Bomb("canary")})
archive_case("compressed", lambda members, path: None, zipfile.ZIP_DEFLATED)
archive_case(
    "a zip bomb", lambda members, path: {**members, "x/data/0": b"\0" * 2**27}, zipfile.ZIP_DEFLATED
)
archive_case("a path out", lambda members, path: {**members, "x/../../y": b"mine"})
archive_case("an absolute path", lambda members, path: {**members, "/etc/mine": b"mine"})
archive_case("two folders", lambda members, path: {**members, "y/data.pkl": b"mine"})
archive_case(
    "no words", lambda members, path: {k: v for k, v in members.items() if ".pkl" not in k}
)
archive_case("one storage less", lambda members, path: members.pop("x/data/0") and None)
archive_case("a shorter storage", lambda members, path: {**members, "x/data/0": b"\0" * 4})
archive_case("a longer storage", lambda members, path: {**members, "x/data/0": b"\0" * 4000})
archive_case("a program", lambda members, path: {**members, "x/constants.pkl": b"mine"})
archive_case("names that differ in case", lambda members, path: {**members, "x/DATA.pkl": b"mine"})
archive_case("a bomb in it", lambda members, path: {**members, "x/data.pkl": bomb(path)})
archive_case("words of no pickle", pickle_of(b"mine"))
archive_case("words that end early", pickle_of(b"\x80\x02}"))
archive_case(
    "a bytearray of 8 GB", pickle_of(program(b"cbuiltins\nbytearray\n", number(2**33), b"\x85R"))
)
archive_case(
    "a storage of 8 GB", pickle_of(program(b"ctorch\nUntypedStorage\n", number(2**33), b"\x85R"))
)
archive_case("a tensor of 8 GB", pickle_of(program(b"ctorch\nTensor\n", number(2**31), b"\x85R")))
archive_case("a class by a string", pickle_of(program(b"X\x02\0\0\0osX\x06\0\0\0system\x93")))
archive_case("tuples in tuples", pickle_of(program(b")" + b"\x85" * 1_000_000)))
archive_case("20 MB of words", pickle_of(program(b"N0" * 10_000_000, b"}")))


@case(FOREIGN, "a truncated archive")
def _(folder):
    path = foreign(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


@case(FOREIGN, "a name twice")
def _(folder):
    path = foreign(folder)
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/data.pkl", b"mine")
    return path


@case(FOREIGN, "an OrderedDict of 8 GB")
def _(folder):
    return archive(folder, program(b"ccollections\nOrderedDict\n", number(2**33), b"\x85R"))


def archive(folder, content):
    path = foreign(folder)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", content)
        made.writestr("x/version", "3\n")
    return path
