"""Files: safetensors for numbers, JSON for words, SHA-256 to notice damage, rename to be whole.

A file is untrusted input. Nothing read from one is executed: class names are looked up in fixed
tables, arguments are held to the types of the constructor. Nothing large is read or made before
what is small says that it fits: first the record and the head of the weights, each of 4 MiB at
most, then the numbers, as many bytes as the file has. SHA-256 is for damage, not for malice: who
changes a file can change its hash, so everything is checked whatever the hash says.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.files.strict_json import near, parsed, plain, printable, spoken

__all__ = [
    "BadFile",
    "Saved",
    "blaming",
    "blaming_record",
    "check_fit",
    "examine",
    "load",
    "read",
    "regular",
    "replace",
    "write",
]

FORMAT = 2


OURS = ("format", "sha256", "record_sha256")  # what `write` adds to a record


LIMIT = 4 * 2**20  # bytes of a record, and of the head of a .safetensors file


SMALL = 64 * 2**20  # bytes: so much is read to tell damage from what was written to harm


TENSORS = 10_000  # in one file


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


SIGNS = {
    b"PK": "a zip archive; sde_diffusion.importing reads those of torch.save",
    b"\x80\x02": "a pickle, which is never read",
    b"\x80\x03": "a pickle, which is never read",
    b"\x80\x04": "a pickle, which is never read",
    b"\x80\x05": "a pickle, which is never read",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"\x1f\x8b": "gzip",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "HDF5",
    b"{": "JSON",
    b"<": "HTML or XML",
}


class BadFile(ValueError):
    """A file that cannot be used; the message names it and says why, in one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Saved(NamedTuple):
    """A pair of files whose record and head are sound; `load` gives the numbers."""

    path: Path
    record: dict[str, Any]
    outline: dict[str, Tensor]  # names, shapes and dtypes, on the meta device: without numbers
    size: int  # bytes
    data: bytes | None  # the whole file, where it is small


# ---- writing ----------------------------------------------------------------------------------
def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write path (.safetensors) and its JSON: both, or neither where the disk refuses.

    What `read` would refuse is not written. A kill between the two renames leaves a pair that it
    refuses; a checkpoint, which is a folder renamed whole, does not have that instant.

    Raises:
        ValueError: if a number is not finite, by the name of its tensor.
    """
    from safetensors.torch import save

    taken = [name for name in OURS if name in record]
    if taken:
        raise ValueError(f"{', '.join(taken)}: a name that the record keeps for itself")
    form = torch.contiguous_format
    tensors = {  # copies: tied weights share memory, and are written once for each name
        name: value.detach().to("cpu", copy=True, memory_format=form)
        for name, value in tensors.items()
    }
    data = save(tensors)
    outlined(data[8 : head_end(data[:8], len(data))], len(data))
    check_numbers(tensors)
    told = plain({"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **record})
    told["record_sha256"] = record_hash(told)
    words = (json.dumps(told, indent=1) + "\n").encode()
    if len(words) > LIMIT:
        raise ValueError(f"a record of {len(words):,} bytes; it may have {LIMIT:,}")
    parsed(words)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_all({path: data, path.with_suffix(".json"): words})


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record, however it is laid out as text."""
    rest = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def replace(path: Path, data: bytes) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it over `path`."""
    replace_all({path: data})


def replace_all(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places, flush them to the disk, and only then rename them all."""
    temporaries = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, data in contents.items():
            temporaries[path].unlink(missing_ok=True)  # "x": never through a link left there
            with open(temporaries[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    for path, temporary in temporaries.items():
        os.replace(temporary, path)


# ---- reading ----------------------------------------------------------------------------------
def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record that `write` wrote, or BadFile."""
    saved = examine(path)
    return load(saved), saved.record


def examine(path: Path) -> Saved:
    """The record and the names, shapes and dtypes of what `write` wrote, or BadFile.

    Reads 64 MiB at most, however large the files are or say that they are. What follows can be held
    against the outline before the numbers are read.
    """
    if path.suffix != ".safetensors":
        raise BadFile(f"{path}: its name does not end in .safetensors")
    with regular(path) as (file, size):
        start = file.read(8)
        head = file.read(head_end(start, size) - 8)
        outline = outlined(head, size)
    with regular(path.with_suffix(".json"), record_note(path)) as (file, length):
        if length > LIMIT:
            raise ValueError(f"{length:,} bytes; a record has {LIMIT:,} at most")
        record = parsed(file.read(LIMIT + 1))
        check_record(record)
    saved = Saved(path, record, outline, size, None)
    return saved._replace(data=whole(saved)) if size <= SMALL else saved


def load(saved: Saved) -> dict[str, Tensor]:
    """The tensors of a pair that has been examined, or BadFile. Takes twice its size in memory."""
    from safetensors.torch import load as decode

    with blaming(saved.path):
        tensors = decode(whole(saved) if saved.data is None else saved.data)
        check_numbers(tensors)
    return tensors


def whole(saved: Saved) -> bytes:
    """The bytes of the .safetensors file, which must be those that its record was written for."""
    with regular(saved.path) as (file, size):
        if size > (most := memory()):
            raise ValueError(f"{size:,} bytes; this machine has {most:,} of memory")
        data = file.read(saved.size + 1)
        if hashlib.sha256(data).hexdigest() != saved.record["sha256"]:
            raise ValueError(
                f"truncated, damaged, or not the file of {saved.path.stem}.json (its SHA-256 is "
                f"not the recorded one)"
            )
    return data


@contextmanager
def regular(path: Path, note: str = "") -> Iterator[tuple[BinaryIO, int]]:
    """A file opened for reading, and its size; all that goes wrong with it is a BadFile."""
    no_wait = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer would keep us
    with (
        blaming(path, note),
        open(path, "rb", opener=lambda name, how: os.open(name, how | no_wait)) as file,
    ):
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a pipe, a socket or a device, not a file")
        yield file, status.st_size


@contextmanager
def blaming(path: Path, note: str = "") -> Iterator[None]:
    """Whatever is raised inside is a BadFile of `path`.

    Every exception, and not a list of them: what torch or a constructor raises at a number that it
    was never meant for is not written anywhere.
    """
    try:
        yield
    except BadFile:
        raise
    except MemoryError:
        raise BadFile(f"{path}: does not fit in memory{note}") from None
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror or error}{note}") from None
    except Exception as error:
        said = str(error).strip().splitlines() or [f"damaged ({type(error).__name__})"]
        raise BadFile(f"{path}: {said[0]:.500}{note}") from None


def blaming_record(path: Path) -> AbstractContextManager[None]:
    """`blaming` for the record of a .safetensors file, whichever of the two the caller knows."""
    return blaming(path.with_suffix(".json"), record_note(path))


def record_note(path: Path) -> str:
    return f" (the record of {path})"


def memory() -> int:
    """Bytes of memory of this machine, where it says so."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**63 - 1


def check_record(record: Any) -> None:
    """Refuse what `write` has not written as a record."""
    if not isinstance(record, dict):
        raise ValueError(f"not a record but {spoken(record)}")
    for name in OURS:
        if name not in record:
            raise ValueError(f"not a record: it has no {name!r}{near(name, record)}")
    given = record["format"]
    if type(given) is not int or given != FORMAT:
        known = "not one there is" if type(given) is not int or given < 1 else "an older one"
        age = "of a newer version" if type(given) is int and given > FORMAT else known
        raise ValueError(f"format {given!r:.40}, {age}; this version reads format {FORMAT}")
    if record["record_sha256"] != record_hash(record):
        raise ValueError("damaged (its SHA-256 is not the recorded one)")


def head_end(start: bytes, size: int) -> int:
    """Where the head of a .safetensors file of `size` bytes ends, from its first 8 bytes."""
    length = int.from_bytes(start, "little")
    if len(start) == 8 and 2 <= length <= min(size - 8, LIMIT):
        return 8 + length
    what = next((kind for sign, kind in SIGNS.items() if start.startswith(sign)), "")
    if not what and len(start) == 8 and start.isascii() and start.decode().isprintable():
        what = "text"
    if not what and size < 8:
        what = "truncated" if size else "empty"
    told = what or f"truncated, or something else (its head would have {length:,} bytes)"
    raise ValueError(f"not a safetensors file: {told}; it has {size:,} bytes")


def outlined(head: bytes, size: int) -> dict[str, Tensor]:
    """The tensors that the head of a file of `size` bytes announces, without their numbers.

    Their bytes must be all the rest of the file, one after the other.
    """
    try:
        told = parsed(head)
    except ValueError as error:
        raise ValueError(f"damaged, or not a safetensors file; its head: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"not a safetensors file: its head is {spoken(told)}")
    notes = told.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ is not made of strings")
    if len(told) > TENSORS:
        raise ValueError(f"{len(told):,} tensors; a file has {TENSORS:,} at most")
    pieces = sorted((announced(name, entry) for name, entry in told.items()), key=lambda p: p[2:])
    end = 0
    for name, _, begin, stop in pieces:
        if begin != end:
            raise ValueError(f"tensor {name!r:.80} begins at byte {begin}, not at {end}")
        end = stop
    if 8 + len(head) + end != size:
        raise ValueError(
            f"truncated or damaged: {size:,} bytes, of which its head accounts for "
            f"{8 + len(head) + end:,}"
        )
    return {name: tensor for name, tensor, _, _ in pieces}


def announced(name: str, entry: Any) -> tuple[str, Tensor, int, int]:
    """Name, outline, first and last byte of one tensor."""
    if not name.isprintable() or len(name) > 200:
        raise ValueError(f"a tensor's name is not printable, or too long: {name!r:.80}")
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r:.40}")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not whole_numbers(shape) or len(shape) > 64:
        raise ValueError(f"tensor {name!r} has the shape {shape!r:.80}")
    if not whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has the data_offsets {offsets!r:.80}")
    count = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != count:
        raise ValueError(
            f"tensor {name!r} takes {offsets[1] - offsets[0]} bytes; its shape {shape!r:.80} takes "
            f"{count}"
        )
    return name, torch.empty(shape, dtype=dtype, device="meta"), offsets[0], offsets[1]


def whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers that are not finite, and bytes that are no bool: damage, by any hash."""
    for name, value in tensors.items():
        if value.dtype == torch.bool and not bool((value.view(torch.uint8) <= 1).all()):
            raise ValueError(f"tensor {name!r} has bytes that are no bool")
        ends = value.detach().aminmax() if value.is_floating_point() and value.numel() else ()
        if not all(bool(end.isfinite()) for end in ends):
            raise ValueError(f"tensor {name!r} has values that are not finite")


def check_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not, by name, shape and dtype, those that are wanted."""
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing:
        more = f" nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"no tensor {missing[0]!r:.200}{more}{near(missing[0], unknown)}")
    if unknown:
        raise ValueError(f"unknown tensor {unknown[0]!r:.200}{near(unknown[0], wanted)}")
    for name, like in wanted.items():
        value = given[name]
        if value.shape != like.shape:
            raise ValueError(
                f"tensor {name!r} has the shape {tuple(value.shape)}; "
                f"the network's has {tuple(like.shape)}"
            )
        if value.dtype != like.dtype:
            raise ValueError(
                f"tensor {name!r} is of {value.dtype}; the network's is of {like.dtype}"
            )
